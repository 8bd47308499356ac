"""What is known of an image is not worked out again, and a hit is what the models would give."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import bombs
from service.admission.fidelity import LEVELS
from service.admission.quota import Cost
from service.admission.scheduler import Claim, Kind, Resource
from service.cache.visual_tokens import VisualCache, visual_key
from service.core.errors import Overloaded, TooLarge, Unavailable
from service.core.request import Budget, Sampling
from service.core.viewport import Viewport
from service.core.vision import Seen, UInt8Array, VisionFeatures
from service.media.decoder import Decoded
from service.media.store import Image
from service.vision_stage import decoding_cost
from tests.service.test_pipeline import answer, request, shades
from tests.support.fakes import CARD, CLOSER, House, Strain, cancelled, png, until

LARGE = png(size=(300, 200))
PIXELS = 300 * 200


@pytest.fixture
def house() -> Iterator[House]:
    """With a closer view and a visual cache."""
    house = House(CLOSER, visual_cache_bytes=1_000_000)
    yield house
    house.reader.close()


def lookups(house: House) -> dict[str, float]:
    name = "glimpse_visual_cache_lookups_total"
    return {result: house.counted(name, result=result) for result in ("hit", "miss")}


async def test_an_exact_repeat_needs_no_vision_model_and_changes_nothing(house):
    text, first = await answer(house, request())
    again, second = await answer(house, request(image=first.image_ids[0], sampling=Sampling(max_tokens=8)))
    assert house.vision.calls == ["see"]
    assert (again, second.cache, second.relevance) == (text, "hit", first.relevance)
    one, other = house.language.prompts
    assert np.array_equal(one.visual_tokens, other.visual_tokens)
    assert np.array_equal(one.extra_ids, other.extra_ids)
    assert lookups(house) == {"hit": 1, "miss": 1}
    assert house.counted("glimpse_visual_cache_bytes") > one.visual_tokens.nbytes
    assert house.counted("glimpse_request_queue_time_seconds_count", kind="follow_up") == 1


async def test_under_strain_what_was_seen_closely_before_is_free_and_not_reduced(house):
    await answer(house, request())
    house.admission.fidelity = Strain(4)
    _, known = await answer(house, request())
    _, other = await answer(house, request(question="which?"))
    _, again = await answer(house, request(question="which?"))
    assert [known.reduced, other.reduced, again.reduced] == [False, True, True]
    assert house.vision.calls == ["see", "attend"]
    assert lookups(house) == {"hit": 2, "miss": 2}


async def test_under_strain_more_visual_tokens_than_are_allowed_are_not_free():
    house = House(replace(CARD, visual_tokens=(32, 64)), visual_cache_bytes=1_000_000)
    wide = Budget(visual_tokens=(32, 64))
    await answer(house, request(budget=wide))
    house.admission.fidelity = Strain(3)
    _, end = await answer(house, request(budget=wide))
    assert (end.reduced, end.visual_tokens) == (True, 32)
    assert house.vision.calls == ["see", "attend"]
    house.reader.close()


@pytest.mark.parametrize(
    "change",
    [
        {"question": "which shape?"},
        {"budget": Budget(vision_tokens=(64, 128))},
        {"budget": Budget(visual_tokens=(32, 64))},
        {"detail": "high"},
        {"image": png((1, 2, 3))},
    ],
)
async def test_another_question_budget_detail_or_image_is_looked_at_anew(house, change):
    await answer(house, request())
    calls = len(house.vision.calls)
    await answer(house, request(**change))
    assert len(house.vision.calls) > calls
    assert lookups(house)["hit"] == 0


async def test_auto_goes_on_from_what_is_known(house):
    house.vision.particularize = 0.7
    await answer(house, request(image=LARGE))
    house.vision.calls.clear()
    _, end = await answer(house, request(image=LARGE, detail="auto"))
    assert house.vision.calls == ["encode 4", "attend_448"]  # it knew from the first request that it asks for more
    assert end.detail == "high"
    assert house.counted("glimpse_request_queue_time_seconds_count", kind="multi_image") == 1  # of four crops
    house.vision.calls.clear()
    for detail in ("auto", "low"):
        await answer(house, request(image=LARGE, detail=detail))
    assert house.vision.calls == []


async def test_only_what_is_new_of_several_images_is_looked_at(house):
    red, grey = png((240, 0, 0)), png((90, 90, 90))
    await answer(house, request(image=grey))
    _, end = await answer(house, request(images=(red, grey)))
    assert house.vision.calls == ["see", "see"]
    assert shades(house) == [80, 90]
    assert end.cache == "miss"
    _, again = await answer(house, request(images=(grey, red)))
    assert house.vision.calls == ["see", "see"]
    assert shades(house) == [90, 80]
    assert again.cache == "hit"


async def test_what_was_seen_under_strain_is_not_taken_for_what_was_asked(house):
    house.admission.fidelity = Strain(4)
    _, reduced = await answer(house, request())
    assert reduced.reduced
    house.admission.fidelity = Strain(0)
    _, whole = await answer(house, request())
    assert not whole.reduced
    assert house.vision.calls == ["see", "attend"]
    house.admission.fidelity = Strain(4)
    _, again = await answer(house, request())
    assert (again.reduced, house.vision.calls) == (False, ["see", "attend"])  # the better one is there, and free


async def test_who_is_denied_a_closer_view_is_told_so_even_if_it_was_known(house):
    house.vision.particularize = 0.7
    await answer(house, request(image=LARGE))
    house.admission.fidelity = Strain(LEVELS.index(next(level for level in LEVELS if not level.closer_view)))
    for detail in ("auto", "high"):
        _, end = await answer(house, request(image=LARGE, detail=detail, budget=Budget((64, 64))))
        assert (end.detail, end.reduced) == ("low", True)


@pytest.mark.parametrize("asked", ["high", "auto"])
async def test_under_strain_a_closer_view_that_was_seen_before_is_free_and_not_reduced(house, asked):
    house.vision.particularize = 0.7
    budget = Budget((64, 64))
    await answer(house, request(image=LARGE, detail="high", budget=budget))
    house.vision.calls.clear()
    house.admission.fidelity = Strain(2)
    _, end = await answer(house, request(image=LARGE, detail=asked, budget=budget))
    assert (end.detail, end.reduced) == ("high", False)
    assert house.vision.calls == {"high": [], "auto": ["attend"]}[asked]  # only the low view tells auto what it wants


async def test_auto_gets_what_it_has_where_there_is_no_room_for_a_closer_view():
    house = House(CLOSER, visual_cache_bytes=1_000_000, max_image_pixels=100_000, max_pixels_in_flight=100_000)
    house.vision.particularize = 0.7
    await answer(house, request(image=LARGE))
    house.vision.gate.clear()
    other = asyncio.create_task(answer(house, request(id="vqa_2", image=png((1, 2, 3)))))
    await until(lambda: house.vision.calls == ["see", "see"])
    _, end = await answer(house, request(image=LARGE, detail="auto"))
    assert (end.detail, end.reduced) == ("low", True)
    with pytest.raises(Overloaded):
        await answer(house, request(image=LARGE, detail="high"))
    house.vision.gate.set()
    await other
    house.reader.close()


async def test_auto_gets_what_it_has_if_there_is_no_room_for_the_first_view_of_a_closer_look_either():
    house = House(
        CLOSER,
        visual_cache_bytes=1_000_000,
        feature_cache_bytes=0,
        max_image_pixels=100_000,
        max_pixels_in_flight=100_000,
    )
    house.vision.particularize = 0.7
    await answer(house, request(image=LARGE))
    house.vision.gate.clear()
    other = asyncio.create_task(answer(house, request(id="vqa_2", image=png((1, 2, 3)))))
    await until(lambda: house.vision.calls == ["see", "see"])
    _, end = await answer(house, request(image=LARGE, detail="auto"))
    assert (end.detail, end.reduced, end.cache) == ("low", True, "hit")
    house.vision.gate.set()
    await other
    house.reader.close()


async def test_a_closer_view_that_triton_refuses_holds_no_vision_slots_while_the_llm_answers(house):
    house.vision.particularize = 0.7
    await answer(house, request(image=LARGE))
    teach(house, Resource.VISION, 1e6)  # of which the scheduler takes 2 %: 20,000 s
    house.vision.fault = Overloaded("triton's queue is full")
    house.language.gate.clear()
    asked = asyncio.create_task(answer(house, request(image=LARGE, detail="auto", timeout_s=1e6)))
    await until(lambda: house.language.open)
    assert house.vision.calls == ["see", "encode 4"]
    assert house.counted("glimpse_resource_used", resource="vision") == 0
    house.language.gate.set()
    _, end = await asked
    assert (end.detail, end.reduced) == ("low", True)
    with pytest.raises(Overloaded, match="waited in the queue"):  # a refusal does not tell how long an encode takes
        await answer(house, request(timeout_s=10))


async def test_visual_tokens_of_rounded_features_have_other_extra_ids():
    house = House(visual_cache_bytes=0, feature_cache_dtype="int8")
    for _ in range(3):
        await answer(house, request())
    assert house.vision.calls == ["see", "attend", "attend"]
    found, rounded, again = (prompt.extra_ids[0] for prompt in house.language.prompts)
    assert found != rounded == again
    house.reader.close()


async def test_of_several_images_the_one_that_failed_keeps_the_cause_of_its_error(house):
    cause = OSError("a socket was closed")
    house.vision.fault = Unavailable("triton is gone")
    house.vision.fault.__cause__ = cause
    with pytest.raises(Unavailable) as caught:
        await answer(house, request(images=(png((1, 1, 1)), png((2, 2, 2)))))
    assert caught.value.__cause__ is cause


async def test_who_was_denied_a_closer_view_and_gets_it_after_all_is_not_reduced():
    house = House(CLOSER, llm_tokens=CLOSER.max_positions)
    house.vision.particularize = 0.7
    house.admission.fidelity = Strain(2)
    house.language.gate.clear()
    long = Sampling(max_tokens=100)  # one at a time
    first = asyncio.create_task(answer(house, request(sampling=long, budget=Budget((64, 64)))))
    await until(lambda: house.language.open)
    asked = request(id="vqa_2", image=LARGE, detail="auto", sampling=long)
    second = asyncio.create_task(answer(house, asked))
    await until(lambda: house.vision.calls == ["see", "see"] and house.admission.scheduler.waiting(Kind.SINGLE_IMAGE))
    house.admission.fidelity = Strain(0)
    house.language.gate.set()
    await first
    _, end = await second
    assert (end.detail, end.reduced) == ("high", False)
    house.reader.close()


async def test_an_image_that_comes_along_can_be_asked_about_by_its_id_after_a_hit_too():
    house = House(visual_cache_bytes=1_000_000, max_image_bytes=2000, image_store_bytes=3024)  # room for one
    await answer(house, request())
    await house.keep_image(png((1, 2, 3)))
    _, end = await answer(house, request())
    assert house.vision.calls == ["see"]
    assert (await answer(house, request(image=end.image_ids[0])))[0] == "red"
    house.reader.close()


# What the stage reserves, and what the scheduler learns from it.


@pytest.mark.parametrize(("detail", "calls"), [("auto", ["see", "encode 4"]), ("high", ["encode 1", "encode 4"])])
async def test_the_pixels_of_an_image_are_reserved_once_for_both_views(house, detail, calls):
    house.vision.particularize = 0.7
    gated = asyncio.Event()
    encode = house.vision.encode

    async def encode_crops_later(images: UInt8Array, timeout_s: float) -> list[VisionFeatures]:
        if len(images) == 4:
            await gated.wait()
        return await encode(images, timeout_s)

    house.vision.encode = encode_crops_later
    asked = asyncio.create_task(answer(house, request(image=LARGE, detail=detail)))
    await until(lambda: house.counted("glimpse_resource_used", resource="vision") > 1)
    assert house.counted("glimpse_admitted_cost", unit="pixels") == PIXELS
    gated.set()
    await asked
    assert house.vision.calls[:2] == calls
    assert house.counted("glimpse_admitted_cost", unit="pixels") == 0


async def test_features_that_are_found_reserve_no_pixels(house):
    house.vision.particularize = 0.7
    await answer(house, request(image=LARGE, detail="high"))
    house.vision.close("attend_448")
    asked = asyncio.create_task(answer(house, request(image=LARGE, question="which?", detail="high")))
    await until(lambda: house.vision.calls.count("attend_448") == 2)
    assert house.counted("glimpse_admitted_cost", unit="pixels") == 0
    house.vision.gate.set()
    await asked


@pytest.mark.parametrize(
    ("data", "most", "pixels"),
    [
        (LARGE, PIXELS + 1, PIXELS),
        (LARGE, PIXELS, PIXELS),
        (LARGE, PIXELS - 1, PIXELS - 1),  # the decoder refuses it: it must not cost more than any image may
        (b"\xff\xd8 a JPEG that does not tell its size", 1000, 1000),
        (b"no image", 1000, 0),
        (bombs.png(5000, 1), 100_000, 8 * 5000),  # resizing takes memory by the longer side
        (bombs.png(2, 5000), 100_000, 8 * 5000),
        (bombs.png(5000, 9), 100_000, 9 * 5000),
        (bombs.png(50_000, 1), 100_000, 100_000),
    ],
)
def test_an_image_costs_its_pixels_and_no_more_than_the_most_that_are_decoded(data, most, pixels):
    assert decoding_cost(data, most) == Cost(pixels=pixels)


async def test_an_image_over_the_limit_of_pixels_is_refused_as_too_large_and_not_as_overload():
    house = House(max_image_pixels=PIXELS - 1, max_pixels_in_flight=PIXELS - 1)
    with pytest.raises(TooLarge):
        await answer(house, request(image=LARGE))
    house.reader.close()


def teach(house: House, resource: Resource, held_s: float) -> None:
    """Shows the scheduler a claim that was held for so long."""
    scheduler, claim = house.admission.scheduler, Claim(resource, 1, Kind.FOLLOW_UP, 0.0, 1e9)
    scheduler.submit(claim, 0.0)
    scheduler.schedule(0.0)
    scheduler.release(claim, held_s)


async def test_llm_capacity_given_back_for_a_closer_view_does_not_tell_how_long_answers_take():
    house = House(CLOSER)
    house.vision.particularize = 0.7
    await answer(house, request(image=LARGE))
    teach(house, Resource.LLM, 1e6)  # of which the scheduler takes 2 %: 20,000 s
    house.vision.close("encode")
    closer = asyncio.create_task(answer(house, request(image=LARGE, detail="auto", timeout_s=1e6)))
    await until(lambda: "encode 4" in house.vision.calls)
    assert house.vision.calls == ["see", "attend", "encode 4"]
    with pytest.raises(Overloaded, match="waited in the queue"):
        await answer(house, request(image=LARGE, id="vqa_2", timeout_s=10))
    await cancelled(closer)
    house.reader.close()


async def test_an_encode_tells_how_long_vision_slots_are_held(house):
    teach(house, Resource.VISION, 1000.0)
    with pytest.raises(Overloaded, match="waited in the queue"):
        await answer(house, request())
    await answer(house, request(timeout_s=10_000))
    await answer(house, request(image=LARGE))  # 1000 s was far too much


@pytest.mark.parametrize("detail", ["high", "auto"])
async def test_both_views_are_decoded_together_if_both_are_needed(house, detail):
    house.vision.particularize = 0.7
    decoded = []
    begin_decode = house.reader.begin_decode

    async def noted(
        data: bytes, views: tuple[int, ...], viewport: Viewport | None, page: int
    ) -> asyncio.Future[Decoded]:
        decoded.append(views)
        return await begin_decode(data, views, viewport, page)

    house.reader.begin_decode = noted
    await answer(house, request(image=LARGE, detail=detail))
    assert decoded == {"high": [(224, 448)], "auto": [(224,), (448,)]}[detail]


def test_keys_differ_in_all_that_they_name():
    image, other = Image.of(b"a"), Image.of(b"b")
    keys = [
        visual_key(CARD, image.digest, "a?", Budget(), "low"),
        visual_key(CARD, other.digest, "a?", Budget(), "low"),
        visual_key(CARD, image.digest, "b?", Budget(), "low"),
        visual_key(CARD, image.digest, "a?", Budget(), "high"),
        visual_key(CARD, image.digest, "a?", Budget((64, 128)), "low"),
        visual_key(CARD, image.digest, "a?", Budget(visual_tokens=(32, 64)), "low"),
        visual_key(replace(CARD, visual_fingerprint="w"), image.digest, "a?", Budget(), "low"),
    ]
    assert len(set(keys)) == len(keys)


async def test_the_cache_holds_no_more_than_its_bytes(house):
    _, end = await answer(house, request())
    seen = Seen(house.language.prompts[0].visual_tokens, end.relevance[0], Budget())
    cache = VisualCache(3 * (seen.nbytes + 3000), house.metrics)
    for number in range(10):
        cache.keep(f"{number}".encode(), seen)
    assert len(cache) == 3
    assert [number for number in range(10) if cache.get(f"{number}".encode())] == [7, 8, 9]
