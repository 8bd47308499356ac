import itertools

import pytest

from service.core.viewport import WHOLE, Fitting, Viewport, fitting, viewed

GREY = (128, 127, 126)


@pytest.mark.parametrize(
    ("width", "height", "square", "area"),
    [
        (300, 900, (-300, 0, 900), (-1.0, 0.0, 2.0, 1.0)),
        (900, 300, (0, -300, 900), (0.0, -1.0, 1.0, 2.0)),
        (3, 8, (-2, 0, 8), (-2 / 3, 0.0, 2.0, 1.0)),
    ],
)
def test_a_padded_image_lies_in_the_middle_of_its_square(width, height, square, area):
    (viewport, tiles) = fitting(width, height, "pad", GREY)
    assert viewport == Viewport(*square, width, height, GREY)
    assert viewport.area == pytest.approx(area)
    assert (viewport.fit, tiles) == ("pad", ())


@pytest.mark.parametrize(
    ("width", "height", "fit"),
    [
        (640, 640, "pad"),
        (640, 640, "auto"),
        (300, 900, "squash"),
        (750, 500, "auto"),
        (600, 500, "tiles"),
        (500, 600, "tiles"),
    ],
)
def test_an_image_that_is_square_enough_or_squashed_has_no_frame_and_its_own_cache_keys(width, height, fit):
    fitted = fitting(width, height, fit, GREY)
    assert fitted == Fitting(None, ())
    assert viewed("d", fitted.viewport) == "d"


@pytest.mark.parametrize(
    ("longer", "side", "count", "fit"),
    [
        (361, 300, 2, "tiles"),
        (450, 300, 2, "tiles"),
        (451, 300, 3, "tiles"),
        (451, 300, 3, "auto"),
        (900, 300, 5, "auto"),
        (1950, 300, 12, "auto"),
    ],
)
def test_a_page_is_squashed_first_and_has_tiles_along_its_longer_side(longer, side, count, fit):
    tall, wide = fitting(300, longer, fit, GREY), fitting(longer, 300, fit, GREY)
    assert tall.viewport is None
    assert len(tall.tiles) == count
    assert {tile.side for tile in tall.tiles} == {side}
    starts = [tile.top for tile in tall.tiles]
    assert (starts[0], starts[-1]) == (0, longer - side)
    assert all(0 < later - one <= side / 2 + 1 for one, later in itertools.pairwise(starts))
    assert all((tile.left, tile.fit) == (0, "tiles") for tile in tall.tiles)
    assert [(tile.top, tile.left) for tile in wide.tiles] == [(tile.left, tile.top) for tile in tall.tiles]


@pytest.mark.parametrize("longer", [2000, 50_000])
def test_a_strip_has_twelve_tiles_that_are_padded_and_leave_no_gap(longer):
    tiles = fitting(30, longer, "tiles", GREY).tiles
    assert len(tiles) == 12
    assert all(later.top <= one.top + one.side / 2 + 1 for one, later in itertools.pairwise(tiles))
    assert (tiles[0].top, tiles[-1].top + tiles[-1].side) == (0, longer)
    assert all(tile.area[0] < 0 and tile.area[2] > 1 for tile in tiles)


def test_what_decides_the_pixels_is_in_the_cache_key():
    viewports = [
        Viewport.around(300, 900, GREY),
        Viewport.around(300, 900, (0, 0, 0)),
        Viewport(0, 0, 300, 300, 900, GREY),
        Viewport(0, 1, 300, 300, 900, GREY),
        Viewport(0, 0, 301, 300, 900, GREY),
        Viewport(1, 0, 300, 300, 900, GREY),
    ]
    keys = {viewed("d", viewport) for viewport in (*viewports, None)}
    assert len(keys) == len(viewports) + 1
    assert not any(":" in key for key in keys)  # the colon parts the names in Redis


def test_the_area_of_the_whole_image_is_that_of_no_frame():
    assert Viewport(0, 0, 300, 300, 300, GREY).area == WHOLE
