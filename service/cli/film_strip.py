"""Draw where the model looked in each frame of a video for one question, as one picture.

Needs matplotlib, as drawing.py does.
"""

from __future__ import annotations

import errno
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image as Pillow

from service.cli.drawing import COLOURS, DPI, GAP, INK, MAX_PIXELS, PALE, WIDTH, Array
from service.core.errors import GlimpseError
from service.core.frames import MAX_FRAMES
from service.core.viewport import WHOLE
from service.core.vision import IMAGE_SIZE
from service.media.clip import decode_clip
from service.media.decoder import ImageLimits, decode

COLUMNS = 8
LEAST_COLUMNS = 5  # so that few frames do not grow over the page
TOP, WORDS, FOOT = 0.9, 0.3, 0.42  # inches: the title, the words over a frame, what stands below
BETWEEN = 0.08  # a frame and its map
BAR_ROOM = 0.6


def explain_clip(
    clip: bytes | Sequence[bytes], question: str, answer: Mapping[str, Any], most: int | None = None
) -> Figure:
    """Draw each frame that was looked at, and below it its relevance over the grey frame.

    `clip` is a video file, or images in order; `most` is the `video_frames` that was asked for. `answer` is the answer
    of `POST /v1/vqa` with `explain`. Raises OSError if the frames cannot be decoded.
    """
    seen = answer["vision"]["frames"]
    pictures = pictures_of(clip, [frame["index"] for frame in seen], most or len(seen))
    columns = min(COLUMNS, max(len(seen), LEAST_COLUMNS))
    side = (WIDTH - BAR_ROOM - GAP * (columns + 1)) / columns
    block = WORDS + 2 * side + BETWEEN + GAP  # a row of frames, and the row of their maps
    height = TOP + block * -(-len(seen) // columns) + FOOT
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _title(figure, question, answer["answer"])
    drawn: AxesImage | None = None
    for number, (frame, picture) in enumerate(zip(seen, pictures, strict=True)):
        row, column = divmod(number, columns)
        left, top = GAP + column * (side + GAP), TOP + row * block + WORDS
        above = _axes(figure, left, top, side)
        above.imshow(picture)
        above.set_title(name_of(frame), loc="left", fontsize=10, color=INK, pad=4)
        if (relevance := frame.get("relevance")) is not None:
            drawn = _relevance(_axes(figure, left, top + side + BETWEEN, side), picture, relevance)
    if drawn is not None:
        _colour_bar(figure, drawn, GAP + min(len(seen), columns) * (side + GAP), side)
    text = (
        f"{answer['vision']['vision_tokens']} vision tokens and {answer['vision']['visual_tokens']} visual tokens for "
    )
    text += f"{len(seen)} frames"
    figure.text(GAP / WIDTH, 0.15 / height, text, fontsize=11, color=PALE)
    return figure


def name_of(frame: Mapping[str, Any]) -> str:
    time = f", {frame['time_s']:.2f} s" if "time_s" in frame else ""
    return f"frame {frame['index']}{time}"


def pictures_of(clip: bytes | Sequence[bytes], indices: Sequence[int], most: int) -> list[Array]:
    """Decode the frames of these indices to uint8 RGB [224, 224, 3]. Raises OSError."""
    try:
        if not isinstance(clip, bytes):
            return [
                _upright(decode(clip[index], ImageLimits(len(clip[index]), MAX_PIXELS)).pixels) for index in indices
            ]
        limits = ImageLimits(len(clip), MAX_PIXELS)  # the service has taken it, whatever its limits are
        # Sampling by change chooses among more frames, and under load the service looks at fewer.
        for count in (most, MAX_FRAMES, len(indices)):
            found = {frame.index: frame.pixels for frame in decode_clip(clip, limits, count).frames}
            if all(index in found for index in indices):
                return [_upright(found[index]) for index in indices]
    except GlimpseError as exc:
        raise OSError(errno.EINVAL, exc.message) from exc
    raise OSError(errno.EINVAL, "the service looked at other frames than this version of glimpse finds in the file")


def _upright(pixels: Array) -> Array:
    return pixels.transpose(1, 2, 0)


def _axes(figure: Figure, left: float, top: float, side: float) -> Axes:
    """Add an empty square; lengths are in inches, from the left and from above."""
    height = figure.get_figheight()
    axes = figure.add_axes((left / WIDTH, (height - top - side) / height, side / WIDTH, side / height))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=PALE, linewidth=0.5)  # frames are often white
    return axes


def _title(figure: Figure, question: str, answer: str) -> None:
    """Write the question and, below it, the answer, each on one line."""
    height = figure.get_figheight()
    for text, below, weight in ((question, 0.16, "bold"), (answer, 0.5, "normal")):
        printable = "".join(letter if letter.isprintable() else " " for letter in text)
        line = textwrap.shorten(printable, 120, placeholder=" …")
        place = (GAP / WIDTH, (height - below) / height)
        figure.text(*place, line, fontsize=16, weight=weight, color=INK, va="top", parse_math=False)


def _relevance(axes: Axes, picture: Array, relevance: Mapping[str, Any]) -> AxesImage:
    """Draw relevance over the grey frame, so that colours mean relevance only."""
    grey = np.asarray(Pillow.fromarray(np.ascontiguousarray(picture)).convert("L"))
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    left, top, right, bottom = (IMAGE_SIZE * place for place in relevance.get("area", WHOLE))
    drawn = axes.imshow(
        np.asarray(relevance["map"]), cmap=COLOURS, vmin=0, vmax=1, alpha=0.65, extent=(left, right, bottom, top)
    )
    axes.set_xlim(0, IMAGE_SIZE)
    axes.set_ylim(IMAGE_SIZE, 0)
    return drawn


def _colour_bar(figure: Figure, relevance: AxesImage, left: float, side: float) -> None:
    """Draw it beside the first row of maps."""
    height = figure.get_figheight()
    base = height - TOP - WORDS - 2 * side - BETWEEN
    axes = figure.add_axes((left / WIDTH, base / height, 0.12 / WIDTH, side / height))
    bar = figure.colorbar(relevance, cax=axes, ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=10, colors=INK, length=0)
