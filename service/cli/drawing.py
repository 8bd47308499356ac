"""Draw where the model looked for one question, and why, as one picture.

Needs matplotlib, which brings NumPy and Pillow. Its figures are used without pyplot: no window and no global state.
"""

from __future__ import annotations

import errno
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image as Pillow

from service.core.errors import GlimpseError
from service.core.viewport import WHOLE, Viewport
from service.media.decoder import Decoded, ImageLimits
from service.media.document import decode_page

Array = npt.NDArray[Any]

DPI = 120
# Inches, from the left and from below. 16 by 6.1 inches are 1920 by 732 pixels.
WIDTH, HEIGHT = 16.0, 6.1
SIDE, GAP, BASE = 4.4, 0.2, 0.45
BAR, BAR_ROOM = 0.12, 0.5
SMALL = 1.08
LEFT_OF = {
    "image": GAP,
    "relevance": 2 * GAP + SIDE,
    "bar": 2 * GAP + 2 * SIDE + 0.08,
    "ways": 2 * GAP + 2 * SIDE + 0.08 + BAR_ROOM,
    "levels": WIDTH - GAP - SIDE,
}

IMAGE_SIDE = 528  # pixels of a panel
MAX_PIXELS = 1_000_000_000
COLOURS = "viridis"  # rises evenly in lightness, so colour-blind eyes and grey printers read it too
PADDING = (0xE8, 0xE8, 0xE8)
INK, PALE = "#1a1a1a", "#5f5f5f"
LONG = 56  # characters that do not fit below the levels in the usual size
LEFT_OUT = (0.5, 0.5, 0.5, 0.9)  # over a cell without a token
OPPOSITES = {"particularize": "compress", "explore": "exploit", "diversify": "focus"}
WAYS = {
    "propositional": "how much is there",
    "perspectival": "what stands out",
    "participatory": "what is asked about",
}


def explain(image: bytes, question: str, answer: Mapping[str, Any], page: int | None = None) -> Figure:
    """Draw the image, its relevance, the three maps and the levels of detail side by side, with the tensions below.

    `answer` is the answer of `POST /v1/vqa` with `explain`. `page` is the page of a PDF or a TIFF that was asked for,
    counted from 1. Raises OSError if the bytes are not an image, or have no such page.
    """
    looked = answer["relevance"][0]
    picture = _as_seen(image, looked.get("area", WHOLE), page or 1)
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    _title(figure, question, answer["answer"])
    _panel(figure, "image", "image" if page is None else f"page {page}").imshow(picture)
    relevance = _relevance(_panel(figure, "relevance", "relevance to the question"), picture, looked["map"])
    _colour_bar(figure, relevance)
    _ways(figure, looked["scores"])
    _levels(_panel(figure, "levels", "level of detail"), picture, np.asarray(looked["levels"]))
    figure.text(GAP / WIDTH, 0.12 / HEIGHT, tensions_in_words(looked["tensions"]), fontsize=11, color=INK)
    return figure


def png(figure: Figure) -> bytes:
    """Encode the figure as a PNG; of `explain`, 1920 by 732 pixels."""
    out = BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def _as_seen(image: bytes, area: Sequence[float], page: int) -> Array:
    """uint8 RGB: the square that the service saw, by its own decoder, but sharper than its view."""
    limits = ImageLimits(len(image), MAX_PIXELS)  # the service has taken it, whatever its limits are
    try:
        viewport = _viewport(decode_page(image, limits, (), page=page), area)
        seen = decode_page(image, limits, (IMAGE_SIDE,), viewport, page)
    except GlimpseError as exc:
        raise OSError(errno.EINVAL, exc.message) from exc
    return seen.views[IMAGE_SIDE].transpose(1, 2, 0)


def _viewport(page: Decoded, area: Sequence[float]) -> Viewport | None:
    """Return the square of which an answer told the area; None for the whole page, squashed."""
    if tuple(area) == WHOLE:
        return None
    left, top, right, _ = area
    width, height = page.width, page.height
    return Viewport(round(left * width), round(top * height), round((right - left) * width), width, height, PADDING)


def tensions_in_words(tensions: Mapping[str, float]) -> str:
    """Name each tension and its stronger side."""
    sides = []
    for name, value in tensions.items():
        stronger = "balanced" if value == 0.5 else f"{name if value > 0.5 else OPPOSITES[name]} is stronger"
        sides.append(f"{OPPOSITES[name]} – {name} {value:.2f} ({stronger})")
    return "   ·   ".join(sides)


def _axes(figure: Figure, left: float, base: float, width: float, height: float) -> Axes:
    """Add empty axes; all lengths are in inches."""
    axes = figure.add_axes((left / WIDTH, base / HEIGHT, width / WIDTH, height / HEIGHT))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def _panel(figure: Figure, place: str, title: str) -> Axes:
    axes = _axes(figure, LEFT_OF[place], BASE, SIDE, SIDE)
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=6)
    return axes


def _title(figure: Figure, question: str, answer: str) -> None:
    """Write the question and, below it, the answer, each on one line."""
    for text, top, weight in ((question, 0.972, "bold"), (answer, 0.915, "normal")):
        printable = "".join(letter if letter.isprintable() else " " for letter in text)
        line = textwrap.shorten(printable, 120, placeholder=" …")
        figure.text(GAP / WIDTH, top, line, fontsize=16, weight=weight, color=INK, va="top", parse_math=False)


def _relevance(axes: Axes, picture: Array, relevance: Any) -> AxesImage:
    """Draw relevance over the grey picture, so that colours mean relevance only."""
    grey = np.asarray(Pillow.fromarray(picture).convert("L"))
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
    return axes.imshow(
        np.asarray(relevance), cmap=COLOURS, vmin=0, vmax=1, alpha=0.65, extent=(0, IMAGE_SIDE, IMAGE_SIDE, 0)
    )


def _colour_bar(figure: Figure, relevance: AxesImage) -> None:
    axes = _axes(figure, LEFT_OF["bar"], BASE, BAR, SIDE)
    bar = figure.colorbar(relevance, cax=axes, ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=10, colors=INK, length=0)


def _ways(figure: Figure, scores: Mapping[str, Any]) -> None:
    """Draw the three maps one below the other, in the colours of the bar."""
    step = (SIDE - SMALL) / (len(WAYS) - 1)
    for row, (way, meaning) in enumerate(WAYS.items()):
        axes = _axes(figure, LEFT_OF["ways"], BASE + SIDE - SMALL - row * step, SMALL, SMALL)
        axes.imshow(np.asarray(scores[way]), cmap=COLOURS, vmin=0, vmax=1)
        axes.set_title(way, loc="left", fontsize=10, color=INK, pad=4)
        axes.set_xlabel(meaning, loc="left", fontsize=8, color=PALE)


def _levels(axes: Axes, picture: Array, levels: Array) -> None:
    """Draw the level of each cell.

    Cells with one token are pale. Cells seen closely are clear, with lines around their tokens. Cells of the closer
    view have a thick border. Cells that are left out are grey.
    """
    side = IMAGE_SIDE / len(levels)
    axes.imshow(picture)
    veil = np.ones((*levels.shape, 4))
    veil[..., 3] = np.where(levels == 0, 0.72, 0.0)
    veil[levels < 0] = LEFT_OUT
    axes.imshow(veil, extent=(0, IMAGE_SIDE, IMAGE_SIDE, 0), interpolation="nearest")
    for level, colour in enumerate((PALE, INK, INK)):
        lines = [line for row, column in np.argwhere(levels == level) for line in _cuts(row, column, level, side)]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=0.5))
    around = [line for row, column in np.argwhere(levels == 2) for line in _cuts(row, column, 0, side)]
    axes.add_collection(LineCollection(around, colors=INK, linewidths=2.0))
    tokens, closely = (4 ** levels[levels >= 0]).sum(), (levels > 0).sum()
    text = f"{tokens} vision tokens: {closely} of {levels.size} cells seen closely"
    for number, said in (((levels == 2).sum(), "closest"), ((levels < 0).sum(), "left out")):
        text += f", {number} {said}" if number else ""
    axes.set_xlabel(text, loc="left", fontsize=11 if len(text) < LONG else 9, color=INK)


def _cuts(row: int, column: int, level: int, side: float) -> list[list[tuple[float, float]]]:
    """Return the lines around a cell's tokens: one token at level 0, 2x2 at level 1, 4x4 at level 2."""
    top, left = row * side, column * side
    steps = np.linspace(0, side, 2**level + 1)
    across = [[(left, top + step), (left + side, top + step)] for step in steps]
    down = [[(left + step, top), (left + step, top + side)] for step in steps]
    return across + down
