"""The picture that explains an answer shows what was sent, and says it in the right places."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image as Pillow

from service.cli.drawing import COLOURS, IMAGE_SIDE, WAYS, explain, png
from service.media.decoder import ImageLimits, decode
from tests.support.documents import BLUE, RED, filled, pdf, tiff
from tests.support.fakes import png as image_file

QUESTION = "which character is on the $red$ square?"


def answer(levels: np.ndarray | None = None) -> dict[str, Any]:
    """What the service says: every map another one, so that none can stand in for another."""
    generator = np.random.default_rng(0)
    maps = generator.random((4, 16, 16)).round(4)
    drawn = generator.integers(0, 2, (8, 8)) if levels is None else levels
    scores = {way: scores.tolist() for way, scores in zip(WAYS, maps[1:], strict=True)}
    tensions = {"particularize": 0.42, "explore": 0.5, "diversify": 0.9}
    looked = {"map": maps[0].tolist(), "scores": scores, "levels": drawn.tolist(), "tensions": tensions}
    return {"answer": "K", "relevance": [looked]}


def panels(figure: Figure) -> Mapping[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def layer(axes: Axes, number: int) -> np.ndarray:
    return np.asarray(axes.images[number].get_array())


def test_the_file_is_a_png_of_the_documented_size() -> None:
    with Pillow.open(BytesIO(png(explain(image_file(), QUESTION, answer())))) as picture:
        assert (picture.format, picture.size, picture.mode[:3]) == ("PNG", (1920, 732), "RGB")


def test_every_panel_shows_what_was_sent() -> None:
    said = answer()
    looked = said["relevance"][0]
    found = panels(explain(image_file((200, 30, 40)), QUESTION, said))
    assert (layer(found["image"], 0) == (200, 30, 40)).all()
    assert np.array_equal(layer(found["relevance to the question"], 1), looked["map"])
    for way in WAYS:
        assert np.array_equal(layer(found[way], 0), looked["scores"][way])
    veil = layer(found["level of detail"], 1)[..., 3]
    assert np.array_equal(veil == 0, np.array(looked["levels"]) > 0)


def test_relevance_and_ways_share_one_scale_and_its_bar() -> None:
    figure = explain(image_file(), QUESTION, answer())
    found = panels(figure)
    for maps in (found["relevance to the question"].images[1], *(found[way].images[0] for way in WAYS)):
        assert (maps.get_clim(), maps.get_cmap().name) == ((0, 1), COLOURS)
    (bar,) = [axes for axes in figure.axes if axes.get_ylim() == (0, 1) and not axes.images]
    assert [label.get_text() for label in bar.get_yticklabels()] == ["0.0", "0.5", "1.0"]


def test_question_and_answer_are_the_title_as_they_stand() -> None:
    said = answer() | {"answer": "a\x13b $x$"}
    figure = explain(image_file(), f"{QUESTION} {'very ' * 50}long", said)
    asked, told, _ = (text.get_text() for text in figure.texts)
    assert asked.startswith(QUESTION)
    assert (asked[-1], told) == ("…", "a b $x$")
    png(figure)  # no character that the font lacks, no $formula$ that fails


def test_tensions_are_told_in_words_below() -> None:
    *_, told = (text.get_text() for text in explain(image_file(), QUESTION, answer()).texts)
    assert told.split("   ·   ") == [
        "compress – particularize 0.42 (compress is stronger)",
        "exploit – explore 0.50 (balanced)",
        "focus – diversify 0.90 (diversify is stronger)",
    ]


def test_cells_are_cut_into_their_tokens() -> None:
    levels = np.zeros((8, 8), int)
    levels[0, 0], levels[7, 7], levels[3, 2] = 1, 2, -1
    axes = panels(explain(image_file(), QUESTION, answer(levels)))["level of detail"]
    assert axes.get_xlabel() == "81 vision tokens: 2 of 64 cells seen closely, 1 closest, 1 left out"
    lines = [lines.get_segments() for lines in axes.collections if isinstance(lines, LineCollection)]
    assert [len(each) for each in lines] == [61 * 4, 6, 10, 4]
    assert np.allclose(layer(axes, 1)[3, 2], (0.5, 0.5, 0.5, 0.9))
    assert np.array(lines[2]).min() == IMAGE_SIDE * 7 / 8


def test_the_picture_is_upright_square_and_without_transparency() -> None:
    sideways = Pillow.new("RGBA", (60, 30), (0, 0, 0, 0))
    sideways.paste((255, 0, 0, 255), (0, 0, 30, 30))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # turn right to stand upright
    out = BytesIO()
    sideways.save(out, "PNG", exif=exif)
    seen = layer(panels(explain(out.getvalue(), QUESTION, answer()))["image"], 0)
    assert seen.shape == (IMAGE_SIDE, IMAGE_SIDE, 3)
    assert seen[5, 264].tolist() == [255, 0, 0]
    assert seen[-5, 264].tolist() == [255, 255, 255]


def test_exif_behind_the_pixels_turns_the_picture_as_it_turns_the_services() -> None:
    image = Pillow.new("RGB", (60, 30), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 30, 30))
    exif = Pillow.Exif()
    exif[0x0112] = 6
    out = BytesIO()
    image.save(out, "PNG", exif=exif)
    early = out.getvalue()
    start = early.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(early[start : start + 4], "big")
    late = early[:start] + early[end:-12] + early[start:end] + early[-12:]
    drawn = layer(panels(explain(late, QUESTION, answer()))["image"], 0)
    served = decode(late, ImageLimits()).pixels.transpose(1, 2, 0)
    assert drawn[5, 264].tolist() == served[2, 112].tolist() == [255, 0, 0]
    assert drawn[-5, 264].tolist() == served[-2, 112].tolist() == [0, 0, 255]


@pytest.mark.parametrize("light", [0, 77, 200, 255])
def test_sixteen_bit_grey_is_drawn_as_grey(light: int) -> None:
    out = BytesIO()
    Pillow.fromarray(np.full((40, 40), light << 8, np.uint16)).save(out, "PNG")
    assert (layer(panels(explain(out.getvalue(), QUESTION, answer()))["image"], 0) == light).all()


def test_what_is_no_image_is_not_drawn() -> None:
    with pytest.raises(OSError, match="not an image that can be read"):
        explain(b"no image", QUESTION, answer())


@pytest.mark.parametrize(
    ("area", "colours"),
    [
        ([-1, 0, 2, 1], [(232, 232, 232), (200, 30, 40), (232, 232, 232)]),
        ([0, 0.3333, 1, 0.6667], [(200, 30, 40)] * 3),
        ([0, 0, 1, 1], [(200, 30, 40)] * 3),
    ],
)
def test_the_square_that_was_seen_is_drawn_with_its_padding(area, colours) -> None:
    said = answer()
    said["relevance"][0]["area"] = area
    panel = layer(panels(explain(image_file((200, 30, 40), (300, 900)), QUESTION, said))["image"], 0)
    assert [tuple(panel[IMAGE_SIDE // 2, IMAGE_SIDE * part // 8]) for part in (1, 4, 7)] == colours


PAGES = {
    "PDF": pdf([filled(RED), filled(BLUE, (0, 0, 100, 200))]),
    "TIFF": tiff([Pillow.new("RGB", (90, 30), RED), Pillow.new("RGB", (30, 60), BLUE)]),
}


@pytest.mark.parametrize("data", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize(("page", "title", "colour"), [(None, "image", RED), (1, "page 1", RED), (2, "page 2", BLUE)])
def test_the_page_that_was_asked_for_is_drawn(data, page, title, colour) -> None:
    panel = layer(panels(explain(data, QUESTION, answer(), page))[title], 0)
    assert tuple(panel[IMAGE_SIDE * 3 // 4, IMAGE_SIDE * 3 // 4]) == colour


@pytest.mark.parametrize("data", PAGES.values(), ids=PAGES)
def test_the_area_is_that_of_the_page_and_not_of_the_first_one(data) -> None:
    said = answer()
    said["relevance"][0]["area"] = [-0.5, 0, 1.5, 1]
    panel = layer(panels(explain(data, QUESTION, said, 2))["page 2"], 0)
    row = panel[IMAGE_SIDE * 3 // 4]
    assert [tuple(row[IMAGE_SIDE * part // 8]) for part in (1, 3, 5, 7)] == [
        (232, 232, 232),
        BLUE,
        BLUE,
        (232, 232, 232),
    ]


def test_a_page_that_is_not_there_is_not_drawn() -> None:
    with pytest.raises(OSError, match="page is 3, and the document has 2 pages"):
        explain(PAGES["PDF"], QUESTION, answer(), 3)


def test_what_the_levels_say_fits_below_them() -> None:
    levels = np.full((8, 8), -1)
    levels[:4, :4], levels[0] = 1, 2
    figure = explain(image_file(), QUESTION, answer(levels))
    axes = panels(figure)["level of detail"]
    assert axes.get_xlabel() == "176 vision tokens: 20 of 64 cells seen closely, 8 closest, 44 left out"
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert axes.xaxis.label.get_window_extent(renderer).x1 <= figure.bbox.x1
