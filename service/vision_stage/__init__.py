"""Turn images and a question into visual tokens for the LLM, with as few model calls as possible.

stage      does the steps for every image and every frame of a request, and waits for vision slots and LLM tokens
pixels     reserves, decodes and remembers what is looked at
clips      knows the frames of clips
plan       decides which step comes next for one image or frame; pure
changes    decides which frames show something new; pure
"""

from service.vision_stage.pixels import Pixels, decoding_cost
from service.vision_stage.stage import VisionStage

__all__ = ["Pixels", "VisionStage", "decoding_cost"]
