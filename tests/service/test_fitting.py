"""How an image that is not square is seen, through the pipeline: squashed, padded, or by the tile that matters."""

from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image as Pillow

from service.admission.scheduler import Resource
from service.core.errors import InvalidImage, Overloaded, TooLarge
from service.core.request import Budget
from service.core.viewport import WHOLE, fitting
from service.core.vision import Relevance
from service.edges.http.schema import WireRelevance
from service.vision_stage.plan import TILE_SHARE, tile_of
from tests.service.test_pipeline import answer, request, shades
from tests.support.fakes import CLOSER, House, Strain, png
from tests.support.pictures import encoded

GREY = (120, 120, 120)


def page(turned: int = 0) -> bytes:
    """A page of 300x900 pixels that is red, green and blue from top to bottom; `turned`: as EXIF stores it so."""
    rows = np.repeat(np.array([[90, 0, 0], [0, 150, 0], [0, 0, 210]], np.uint8), 300, axis=0)
    picture = Pillow.fromarray(np.repeat(rows[:, None], 300, axis=1))
    exif = Pillow.Exif()
    if turned:
        picture, exif[0x0112] = picture.transpose(Pillow.Transpose.ROTATE_90), 6  # upright again by a turn to the right
    out = BytesIO()
    picture.save(out, "PNG", exif=exif)
    return out.getvalue()


@pytest.fixture
def house() -> Iterator[House]:
    """With a closer view and a visual cache."""
    house = House(replace(CLOSER, pad_colour=GREY), visual_cache_bytes=1_000_000)
    yield house
    house.reader.close()


def look_at(house: House, *rows: int) -> None:
    """Let these rows of the relevance map, and no others, be what every question is about."""
    house.vision.map = np.zeros((16, 16), np.float32)
    house.vision.map[list(rows)] = 0.9


async def test_a_padded_page_is_another_image_to_the_caches_and_a_repeat_is_a_hit(house):
    _, squashed = await answer(house, request(image=page()))
    _, padded = await answer(house, request(image=page(), fit="pad"))
    _, again = await answer(house, request(image=page(), fit="pad"))
    _, other = await answer(house, request(image=page(), fit="pad", question="which shape?"))
    assert house.vision.calls == ["see", "see", "attend"]
    assert [end.cache for end in (squashed, padded, again, other)] == ["miss", "miss", "hit", "hit"]
    assert [end.fit for end in (squashed, padded, again, other)] == ["squash", "pad", "pad", "pad"]
    assert [end.relevance[0].area for end in (squashed, padded)] == [WHOLE, (-1.0, 0.0, 2.0, 1.0)]
    assert again.relevance == padded.relevance
    ids = [prompt.extra_ids.tolist() for prompt in house.language.prompts]
    assert ids[0] != ids[1] == ids[2]
    # Two thirds of the square are padding, the rest is the page, whose mean is 50.
    assert shades(house, 0) == pytest.approx([50], abs=0.5)
    assert shades(house, 1) == pytest.approx([(2 * 120 + 50) / 3], abs=0.5)


@pytest.mark.parametrize("fit", ["pad", "tiles", "auto"])
async def test_a_square_image_is_the_same_whatever_the_fit_is(house, fit):
    _, first = await answer(house, request())
    _, end = await answer(house, request(fit=fit))
    assert (end.cache, end.fit, house.vision.calls) == ("hit", "squash", ["see"])
    assert end.relevance == first.relevance


async def test_the_card_says_how_pages_are_fitted_and_a_question_may_say_otherwise():
    house = House(replace(CLOSER, fit="pad"))
    _, end = await answer(house, request(image=page()))
    _, other = await answer(house, request(image=page(), fit="squash"))
    assert [end.fit, other.fit] == ["pad", "squash"]
    house.reader.close()


@pytest.mark.parametrize("turned", [0, 6])
async def test_the_tile_that_the_question_is_about_is_looked_at(house, turned):
    look_at(house, 13, 14)  # near the lower end, which is blue
    _, end = await answer(house, request(image=page(turned), fit="tiles"))
    assert house.vision.calls == ["see", "see"]
    assert (end.fit, end.cache, end.visual_tokens) == ("tiles", "miss", 32)
    assert house.counted("glimpse_request_queue_time_seconds_count", kind="single_image") == 1
    assert end.relevance[0].area == pytest.approx((0, 2 / 3, 1, 1))
    assert shades(house) == pytest.approx([70], abs=0.1)
    _, again = await answer(house, request(image=page(turned), fit="tiles"))
    assert (again.relevance, again.cache) == (end.relevance, "hit")
    _, other = await answer(house, request(image=page(turned), fit="tiles", question="which shape?"))
    assert (other.cache, house.vision.calls[2:]) == ("hit", ["attend", "attend"])
    look_at(house, 1)
    _, above = await answer(house, request(image=page(turned), fit="tiles", question="what is above?"))
    assert (above.cache, house.vision.calls[4:]) == ("miss", ["attend", "see"])
    assert shades(house) == pytest.approx([30], abs=0.1)


async def test_the_overview_is_the_squashed_page_of_the_caches(house):
    await answer(house, request(image=page(), fit="squash"))
    look_at(house, 1)
    await answer(house, request(image=page(), fit="tiles", question="which shape?"))
    assert house.vision.calls == ["see", "attend", "see"]


async def test_a_question_about_places_far_apart_is_asked_of_the_whole_page(house):
    look_at(house, 1, 14)
    _, end = await answer(house, request(image=page(), fit="tiles"))
    assert (house.vision.calls, end.fit, end.relevance[0].area) == (["see"], "squash", WHOLE)
    assert not end.reduced


@pytest.mark.parametrize(("particularize", "fit"), [(0.59, "squash"), (0.6, "tiles")])
async def test_a_question_that_asks_for_a_closer_look_gets_the_best_tile(house, particularize, fit):
    look_at(house, 1, 2, 14)
    house.vision.particularize = particularize
    _, end = await answer(house, request(image=page(), fit="tiles"))
    assert end.fit == fit
    if fit == "tiles":
        assert end.relevance[0].area == pytest.approx((0, 0, 1, 1 / 3))


async def test_a_tile_has_its_own_closer_view_and_the_overview_has_none(house):
    look_at(house, 1)
    _, end = await answer(house, request(image=page(), fit="tiles", detail="high"))
    assert house.vision.calls == ["see", "encode 1", "encode 4", "attend_448"]
    assert (end.fit, end.detail) == ("tiles", "high")
    look_at(house, 1, 14)
    _, end = await answer(house, request(image=page(), fit="tiles", detail="high", question="how many?"))
    assert house.vision.calls[4:] == ["attend", "encode 4", "attend_448"]
    assert (end.fit, end.detail) == ("squash", "high")


async def test_a_tile_smaller_than_the_first_view_has_no_closer_view_with_auto(house):
    look_at(house, 1)
    house.vision.particularize = 0.9
    small = png(size=(200, 900))
    _, end = await answer(house, request(image=small, fit="tiles", detail="auto"))
    assert (end.fit, end.detail) == ("tiles", "low")


async def test_under_strain_a_tile_is_left_out_unless_it_was_seen_before(house):
    look_at(house, 1)
    budget = Budget((64, 64))
    await answer(house, request(image=page(), fit="tiles", budget=budget))
    house.admission.fidelity = Strain(2)
    _, known = await answer(house, request(image=page(), fit="tiles", budget=budget))
    assert (known.fit, known.reduced) == ("tiles", False)
    _, new = await answer(house, request(image=page(), fit="tiles", budget=budget, question="which shape?"))
    assert (new.fit, new.reduced) == ("squash", True)


@pytest.mark.parametrize("detail", ["low", "high"])
async def test_a_tile_without_room_is_answered_from_the_whole_page(house, detail):
    look_at(house, 1)
    await answer(house, request(image=page(), fit="squash", detail="low"))
    house.vision.fault_of = {"see": Overloaded("full"), "encode": Overloaded("full")}
    _, end = await answer(house, request(image=page(), fit="tiles", detail=detail))
    assert (end.fit, end.detail, end.reduced, end.cache) == ("squash", "low", True, "miss")


async def test_a_tile_that_takes_too_long_to_draw_is_answered_from_the_whole_page(house):
    look_at(house, 1)
    begin_decode = house.reader.begin_decode

    async def too_long_for_tiles(data, views=(224,), viewport=None, page=1):
        if viewport is not None:
            raise TooLarge("the page took more than 2 CPU seconds", param="image")
        return await begin_decode(data, views, viewport, page)

    house.reader.begin_decode = too_long_for_tiles
    _, end = await answer(house, request(image=page(), fit="tiles"))
    assert (end.fit, end.reduced, house.vision.calls) == ("squash", True, ["see"])
    assert house.admission.scheduler.used(Resource.VISION) == 0
    with pytest.raises(TooLarge, match="CPU seconds"):
        await answer(house, request(image=page(), fit="pad"))


@pytest.mark.parametrize("fit", ["squash", "tiles"])
async def test_a_closer_view_without_room_in_triton_is_answered_from_the_first_view(house, fit):
    look_at(house, 1)
    house.vision.fault_of = {"attend_448": Overloaded("its queue is full")}
    house.vision.particularize = 0.9
    _, end = await answer(house, request(image=page(), fit=fit, detail="auto"))
    assert (end.fit, end.detail, end.reduced) == (fit, "low", True)
    assert "attend_448" in house.vision.calls
    with pytest.raises(Overloaded):
        await answer(house, request(image=page(), detail="high"))


async def test_images_of_one_question_are_each_fitted(house):
    look_at(house, 13)
    _, end = await answer(house, request(images=(png(), page()), fit="auto"))
    assert sorted(house.vision.calls) == ["see", "see", "see"]
    assert [each.area for each in end.relevance] == [WHOLE, pytest.approx((0, 2 / 3, 1, 1))]
    assert end.fit == "tiles"


@pytest.mark.parametrize("fit", ["pad", "tiles", "auto"])
@pytest.mark.parametrize("data", [b"no picture", page()[:20], page()[:-200]], ids=["text", "no header", "cut"])
async def test_what_is_no_whole_picture_is_refused_whatever_the_fit_is(house, fit, data):
    told = []
    for asked in (fit, "squash"):
        with pytest.raises(InvalidImage) as caught:
            await answer(house, request(image=data, fit=asked))
        told.append((caught.value.message, caught.value.param))
    assert told[0] == told[1]
    assert told[0][1] == "image"


async def test_a_page_whose_jpeg_has_a_stray_byte_is_fitted_as_asked(house):
    data = encoded(Pillow.open(BytesIO(page())), "JPEG")
    at = data.index(b"\xff\xdb")
    stray = data[:at] + b"\0" + data[at:]
    _, end = await answer(house, request(image=stray, fit="pad"))
    assert end.fit == "pad"
    with house.admission.reservation("") as reservation:
        told = await house.pipeline.estimate(request(image=stray, fit="pad"), reservation)
    assert (told.images[0].width, told.images[0].height, told.images[0].known) == (300, 900, True)


def relevance(of: np.ndarray) -> Relevance:
    return Relevance(of, np.zeros((3, 16, 16), np.float32), np.zeros((8, 8), np.int32), np.zeros(3, np.float32))


def test_the_tile_holds_a_share_of_the_squared_relevance():
    tiles = fitting(300, 900, "tiles", GREY).tiles
    for peak, other, chosen in [(0.9, 0.2, tiles[0]), (0.9, 0.6, None), (0.3, 0.06, tiles[0])]:
        at = np.full((16, 16), 0.001, np.float32)
        at[1, 3], at[14, 3] = peak, other
        assert tile_of(relevance(at), tiles, None) == chosen
        share = peak**2 / (peak**2 + other**2)
        assert (share >= TILE_SHARE) is (chosen is not None)
    assert tile_of(relevance(np.zeros((16, 16), np.float32)), tiles, 0.0) is None


@pytest.mark.parametrize("place", range(16))
@pytest.mark.parametrize("sideways", [False, True])
def test_each_place_of_a_page_has_a_tile_that_shows_it(place, sideways):
    at = np.zeros((16, 16), np.float32)
    at[place, 5] = 1
    size = (900, 300) if sideways else (300, 900)
    tile = tile_of(relevance(at.T if sideways else at), fitting(*size, "tiles", GREY).tiles, None)
    centre = (place + 0.5) / 16 * 900
    start = tile.left if sideways else tile.top
    assert start <= centre < start + tile.side


def test_an_area_is_told_in_four_decimals():
    told = WireRelevance.of(replace(relevance(np.zeros((16, 16), np.float32)), area=(-2 / 3, 0.0, 2.0, 1.0)))
    assert told.area == (-0.6667, 0.0, 2.0, 1.0)


async def test_an_estimate_knows_what_was_padded_even_by_the_beginning_of_a_file(house):
    out = BytesIO()
    Pillow.open(BytesIO(page())).save(out, "TIFF")
    await answer(house, request(image=page(), fit="pad"))
    for fit, data, known in [("pad", page(), True), ("squash", page(), False), ("pad", out.getvalue()[:500], False)]:
        with house.admission.reservation("") as reservation:
            told = await house.pipeline.estimate(request(image=data, fit=fit), reservation)
        assert told.images[0].known is known
