"""Define how the frames of a clip are chosen. It imports nothing, so that the command line starts at once."""

from typing import Literal

FrameSampling = Literal["uniform", "change"]  # evenly spaced; or those of them that differ from the one before
MAX_FRAMES = 32  # of one clip
