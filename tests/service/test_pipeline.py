import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.admission.admission import Reservation
from service.admission.quota import Cost
from service.admission.scheduler import Claim, Kind, Resource
from service.core.answer import Delta, Finished
from service.core.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidImage,
    InvalidRequest,
    NotFound,
    Overloaded,
    QuotaExceeded,
    ShuttingDown,
    Unavailable,
)
from service.core.request import Budget, Exchange, ImageBytes, ImageId, ImageUrl, Priority, Request, Sampling, Text
from service.core.viewport import Viewport
from service.media.decoder import Decoded, ImageLimits
from service.media.reader import ImageReader
from service.settings import IMAGE_ENTRY_BYTES
from tests.support.calibrations import calibrated
from tests.support.fakes import CARD, CLOSER, House, Strain, cancelled, ids_of, image_source, png, turns, until


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.reader.close()


def request(**changes: object) -> Request:
    """`image`, or `images`, and `question` stand for `parts`: images first, each as its bytes or its id."""
    if "parts" not in changes:
        images = (changes.pop("image"),) if "image" in changes else changes.pop("images", (png(),))
        changes["parts"] = (*map(image_source, images), Text(changes.pop("question", "what colour?")))
    plain = Request(
        id="vqa_1",
        parts=(),
        budget=Budget(),
        sampling=Sampling(max_tokens=16),
        timeout_s=10,
        trace_id="trace",
    )
    return replace(plain, **changes)


async def answer(house: House, asked: Request) -> tuple[str, Finished]:
    *deltas, last = [event async for event in house.answer(asked)]
    assert isinstance(last, Finished)
    return "".join(delta.text for delta in deltas if isinstance(delta, Delta)), last


async def test_the_first_question_sees_and_the_second_attends(house):
    text, first = await answer(house, request())
    _, second = await answer(house, request(question="which shape?"))
    _, by_id = await answer(house, request(image=first.image_ids[0]))
    assert text == "red"
    assert house.vision.calls == ["see", "attend", "attend"]
    assert [first.cache, second.cache, by_id.cache] == ["miss", "hit", "hit"]
    assert (first.finish_reason, first.completion_tokens, first.visual_tokens) == ("stop", 1, 32)
    assert first.prompt_tokens == len(house.language.prompts[0].input_ids) - 32
    assert first.vision_tokens == 64
    assert list(first.timing_ms) == ["queue", "load", "vision", "first_token", "total"]
    assert first.timing_ms["load"] > 0
    assert first.timing_ms["total"] >= first.timing_ms["first_token"] >= first.timing_ms["vision"]


async def test_equal_prompts_have_equal_extra_ids_and_others_have_not(house):
    for asked in (request(), request(), request(question="which shape?"), request(image=png((1, 2, 3)))):
        await answer(house, asked)
    same, again, question, image = (prompt.extra_ids[:32] for prompt in house.language.prompts)
    assert np.array_equal(same, again)
    assert len({ids[0] for ids in (same, question, image)}) == 3


def shades(house: House, number: int = -1) -> list[float]:
    """Of a prompt's visual tokens, in order, the features of the images that they come from."""
    tokens = house.language.prompts[number].visual_tokens[:, 0].tolist()
    return [shade for place, shade in enumerate(tokens) if place == 0 or tokens[place - 1] != shade]


async def test_several_images_are_looked_at_each_by_itself_and_read_in_order(house):
    red, dark, grey = png((240, 0, 0)), png((30, 0, 0)), png((90, 90, 90))
    _, known = await answer(house, request(image=dark))
    _, end = await answer(house, request(images=(red, known.image_ids[0], grey)))
    assert sorted(house.vision.calls[1:]) == ["attend", "see", "see"]
    assert shades(house) == [80, 10, 90]
    assert end.image_ids[1] == known.image_ids[0]
    assert len(set(end.image_ids)) == len(end.relevance) == 3
    assert (end.cache, end.visual_tokens, end.vision_tokens) == ("miss", 96, 192)
    assert end.prompt_tokens == len(house.language.prompts[-1].input_ids) - 96
    _, again = await answer(house, request(images=end.image_ids))
    assert again.cache == "hit"
    assert shades(house) == [80, 10, 90]
    assert nothing_is_held(house)


async def test_an_image_that_comes_twice_is_looked_at_once_and_read_twice(house):
    red, grey = png((240, 0, 0)), png((90, 90, 90))
    _, end = await answer(house, request(images=(red, grey, red)))
    assert house.vision.calls == ["see", "see"]
    assert shades(house) == [80, 90, 80]
    assert end.image_ids[0] == end.image_ids[2] != end.image_ids[1]
    assert (len(end.relevance), end.visual_tokens) == (3, 96)


async def test_several_images_cost_their_sum():
    house = House(max_pixels_in_flight=200_000, max_image_pixels=200_000, vision_slots=2)
    house.vision.close("see")
    asked = asyncio.create_task(answer(house, request(images=(png((1, 0, 0)), png((2, 0, 0)), png((3, 0, 0))))))
    await until(lambda: house.vision.calls.count("see") == 2)
    assert house.counted("glimpse_resource_used", resource="vision") == 2
    assert house.counted("glimpse_requests_waiting", kind="multi_image") == 1
    assert house.counted("glimpse_admitted_cost", unit="pixels") == 3 * 224 * 224
    house.vision.gate.set()
    await asked
    assert house.counted("glimpse_request_queue_time_seconds_count", kind="multi_image") == 1
    assert nothing_is_held(house)


async def test_two_requests_for_the_same_images_in_another_order_do_not_lock(house):
    images = [png((shade, 0, 0)) for shade in (1, 2, 3, 4)]
    house.vision.close("see")
    tasks = [asyncio.create_task(answer(house, request(images=tuple(each)))) for each in (images, images[::-1])]
    await until(lambda: house.vision.calls)
    await turns()
    house.vision.gate.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*tasks)
    assert house.vision.calls.count("see") == 4
    assert shades(house, 0) == shades(house, 1)[::-1]


@pytest.mark.parametrize("broken", [b"no image", "img_gone"])
async def test_one_bad_image_of_several_fails_the_request_and_is_named(house, broken):
    with pytest.raises((InvalidImage, NotFound), match="image 2 of 3: ") as caught:
        await answer(house, request(images=(png((1, 0, 0)), broken, png((3, 0, 0)))))
    assert caught.value.param == "images.1"
    await until(lambda: nothing_is_held(house))  # the other images' decodes have ended
    assert house.outcomes() == {caught.value.code: 1}


async def test_cancelling_a_request_of_several_images_frees_all_it_held_once_its_encodes_have_ended():
    house = House(vision_slots=2)
    house.vision.close("see")
    task = asyncio.create_task(answer(house, request(images=(png((1, 0, 0)), png((2, 0, 0)), png((3, 0, 0))))))
    await until(lambda: house.vision.calls.count("see") == 2)
    await cancelled(task)
    assert house.outcomes() == {"cancelled": 1}
    assert house.counted("glimpse_requests_waiting", kind="multi_image") == 0
    assert house.admission.scheduler.used(Resource.VISION) == 2
    house.vision.gate.set()
    await until(lambda: len(house.pipeline.features) == 2)
    assert nothing_is_held(house)
    assert house.vision.calls == ["see", "see"]


async def test_more_images_than_the_model_has_room_for_are_refused_at_once(house):
    images = tuple(png((shade, 0, 0)) for shade in range(6))
    with pytest.raises(InvalidRequest, match=r"192 visual of 6 images .* ask about fewer images"):
        await answer(house, request(images=images))
    assert not house.vision.calls


async def test_a_budget_of_more_visual_tokens_reaches_the_prompt_and_the_usage(keen):
    sampling = Sampling(max_tokens=8)
    _, end = await answer(keen, request(budget=Budget(visual_tokens=(32, 128)), sampling=sampling))
    assert keen.vision.budgets[0].visual_tokens == (32, 128)
    assert end.visual_tokens == len(keen.language.prompts[0].visual_tokens) == 128
    assert keen.counted("glimpse_visual_tokens_sum") == 128
    with pytest.raises(InvalidRequest, match="128 visual"):
        await answer(keen, request(budget=Budget(visual_tokens=(32, 128)), sampling=Sampling(max_tokens=64)))
    with pytest.raises(InvalidRequest, match="multiples of 32"):
        await answer(keen, request(budget=Budget(visual_tokens=(32, 100)), sampling=sampling))


async def test_earlier_turns_reach_the_prompt_and_not_the_allocator(house):
    earlier = Exchange((ImageBytes(png()), Text("which shape?")), "a circle")
    asked = request(exchanges=(earlier,), parts=(Text("what colour?"),))
    await answer(house, request())
    await answer(house, asked)
    first, second = house.language.prompts
    assert len(second.input_ids) > len(first.input_ids)
    assert (first.extra_ids[:32] == second.extra_ids[:32]).all()  # the same visual tokens
    with pytest.raises(InvalidRequest, match="leave the earliest turns out"):
        await answer(house, request(exchanges=(Exchange((Text("w" * 150),), "yes"),)))


async def test_images_of_an_earlier_question_and_between_texts_are_looked_at_and_read_in_place(house):
    red, dark, grey = png((240, 0, 0)), png((30, 0, 0)), png((90, 90, 90))
    earlier = Exchange((Text("which shape?"), ImageBytes(red)), "a circle")
    kept = await house.keep_image(dark)
    parts = (Text("is"), ImageId(kept.id), Text("like"), ImageBytes(grey))
    _, end = await answer(house, request(exchanges=(earlier,), parts=parts))
    assert end.image_ids[1] == kept.id
    assert shades(house) == [80, 10, 90]
    is_visual = house.language.prompts[0].input_ids >= CARD.vocab_size
    runs = [(visual, len(list(run))) for visual, run in groupby(is_visual.tolist())]
    assert [run for run in runs if run[0]] == [(True, 32)] * 3
    assert [visual for visual, _ in runs] == [False, True] * 3 + [False]
    assert end.visual_tokens == 96
    assert nothing_is_held(house)


async def test_a_url_is_refused_where_images_are_loaded(house):
    with pytest.raises(InvalidRequest, match="image 2 of 2: image is a URL, and URLs are not fetched") as caught:
        await answer(house, request(parts=(ImageBytes(png()), ImageUrl("https://example.com/x.png"), Text("what?"))))
    assert (caught.value.param, caught.value.code) == ("images.1", "url_not_supported")
    assert nothing_is_held(house)


@pytest.fixture
def keen() -> Iterator[House]:
    """A service whose model has a closer view."""
    house = House(CLOSER)
    yield house
    house.reader.close()


async def test_high_detail_encodes_both_views_once_and_attends_to_both(keen):
    _, first = await answer(keen, request(detail="high"))
    _, second = await answer(keen, request(detail="high", question="which shape?"))
    assert keen.vision.calls == ["encode 1", "encode 4", "attend_448", "attend_448"]
    assert [first.detail, second.detail] == ["high", "high"]
    assert [first.cache, second.cache] == ["miss", "hit"]
    assert first.vision_tokens == 8 * 16 + 56
    assert keen.counted("glimpse_images_seen_total", detail="high") == 2
    assert nothing_is_held(keen)


async def test_the_views_of_an_image_are_found_apart(keen):
    _, low = await answer(keen, request())
    _, high = await answer(keen, request(detail="high"))
    _, again = await answer(keen, request())
    assert keen.vision.calls == ["see", "encode 4", "attend_448", "attend"]
    assert [low.detail, high.detail, again.detail] == ["low", "high", "low"]
    assert [low.cache, high.cache, again.cache] == ["miss", "miss", "hit"]
    assert keen.counted("glimpse_images_seen_total", detail="low") == 2


@pytest.mark.parametrize(
    ("particularize", "size", "calls"),
    [
        (0.7, (300, 200), ["see", "encode 4", "attend_448"]),
        (0.7, (224, 225), ["see", "encode 4", "attend_448"]),
        (0.7, (224, 224), ["see"]),
        (0.5, (300, 200), ["see"]),
    ],
)
async def test_auto_looks_closer_where_the_question_asks_for_it_and_the_image_has_it(keen, particularize, size, calls):
    keen.vision.particularize = particularize
    _, end = await answer(keen, request(image=png(size=size), detail="auto"))
    assert keen.vision.calls == calls
    assert end.detail == ("high" if len(calls) > 1 else "low")


async def test_auto_attends_to_a_known_image_first_and_holds_no_room_in_the_llm_while_it_encodes(keen):
    keen.vision.particularize = 0.7
    image = png(size=(300, 200))
    await answer(keen, request(image=image))
    keen.vision.close("encode")
    task = asyncio.create_task(answer(keen, request(image=image, detail="auto")))
    await until(lambda: "encode 4" in keen.vision.calls)
    assert keen.admission.scheduler.used(Resource.LLM) == 0
    keen.vision.gate.set()
    _, end = await task
    assert keen.vision.calls == ["see", "attend", "encode 4", "attend_448"]
    assert (end.detail, end.cache) == ("high", "miss")
    _, again = await answer(keen, request(image=image, detail="auto"))
    assert keen.vision.calls[4:] == ["attend", "attend_448"]
    assert (again.detail, again.cache) == ("high", "hit")
    assert nothing_is_held(keen)


async def test_concurrent_questions_share_one_closer_view(keen):
    keen.vision.close("encode")
    asked = [request(id=f"vqa_{i}", question=f"{i}?", detail="high") for i in range(8)]
    tasks = [asyncio.create_task(answer(keen, each)) for each in asked]
    await until(lambda: keen.vision.calls)
    await turns()
    keen.vision.gate.set()
    ends = [end for _, end in await asyncio.gather(*tasks)]
    assert sorted(keen.vision.calls) == ["attend_448"] * 8 + ["encode 1", "encode 4"]
    assert all(end.detail == "high" for end in ends)


async def test_a_closer_view_takes_the_vision_slots_of_its_four_crops():
    house = House(CLOSER, vision_slots=5)
    house.vision.close("encode")
    await answer(house, request())
    closer = asked_of(house, 0, detail="high", image=png())
    await until(lambda: "encode 4" in house.vision.calls)
    assert house.counted("glimpse_resource_used", resource="vision") == 4
    assert house.counted("glimpse_requests_running", kind="multi_image") == 1
    house.vision.gate.set()
    await closer
    assert nothing_is_held(house)


async def test_a_closer_view_fits_where_there_are_fewer_slots_than_crops():
    house = House(CLOSER, vision_slots=1)
    assert (await answer(house, request(detail="high")))[1].detail == "high"
    assert nothing_is_held(house)


async def test_a_model_without_a_closer_view_refuses_high_and_takes_auto_as_low(house):
    with pytest.raises(InvalidRequest, match="tiny has no closer view") as caught:
        await answer(house, request(detail="high"))
    assert (caught.value.param, caught.value.code) == ("detail", "detail_not_supported")
    house.vision.particularize = 1.0
    _, end = await answer(house, request(image=png(size=(900, 900)), detail="auto"))
    assert (house.vision.calls, end.detail) == (["see"], "low")


async def test_only_a_closer_view_gets_more_vision_tokens_than_the_first(keen):
    keen.vision.particularize = 0.7
    most = Budget(vision_tokens=(64, 400))
    with pytest.raises(InvalidRequest, match=r"outside \[64, 256\], which is what tiny with detail low offers"):
        await answer(keen, request(budget=most))
    await answer(keen, request(image=png(size=(300, 200)), budget=most, detail="auto"))
    assert [budget.vision_tokens for budget in keen.vision.budgets] == [(64, 256), (64, 400)]


async def test_a_least_that_one_view_cannot_reach_is_kept_with_auto_too(keen):
    _, end = await answer(keen, request(budget=Budget(vision_tokens=(300, 400)), detail="auto"))
    assert end.detail == "high"
    assert [budget.vision_tokens for budget in keen.vision.budgets] == [(300, 400)]


async def test_prompts_of_other_detail_or_budget_have_other_extra_ids(keen):
    low, high = Budget(vision_tokens=(64, 128)), Budget(vision_tokens=(64, 256))
    for asked in (request(budget=high), request(budget=low), request(budget=high, detail="high")):
        await answer(keen, asked)
    assert len({prompt.extra_ids[0] for prompt in keen.language.prompts}) == 3


@pytest.mark.parametrize(("level", "most"), [(0, 256), (1, 192), (2, 128), (3, 96), (4, 64)])
async def test_under_strain_all_look_less_closely_but_who_will_not(house, level, most):
    house.admission.fidelity = Strain(level)
    exact = Budget(vision_tokens=(256, 256))
    ends = [(await answer(house, request(budget=budget)))[1] for budget in (Budget(), Budget(), exact)]
    assert [budget.vision_tokens for budget in house.vision.budgets] == [(64, most)] * 2 + [(256, 256)]
    assert [end.reduced for end in ends] == [level > 0, level > 0, False]
    assert house.counted("glimpse_reduced_answers_total") == (2 if level else 0)


async def test_what_was_seen_under_strain_has_other_extra_ids(house):
    for level in (0, 4, 0):
        house.admission.fidelity = Strain(level)
        await answer(house, request())
    first, strained, again = (prompt.extra_ids[0] for prompt in house.language.prompts)
    assert first == again != strained


@pytest.mark.parametrize(("level", "detail", "reduced"), [(0, "high", False), (1, "high", True), (2, "low", True)])
@pytest.mark.parametrize("asked", ["high", "auto"])
async def test_under_strain_nobody_looks_closer_but_who_must(keen, level, detail, reduced, asked):
    keen.vision.particularize = 0.7
    keen.admission.fidelity = Strain(level)
    image = png(size=(300, 200))
    _, end = await answer(keen, request(image=image, detail=asked, budget=Budget(vision_tokens=(64, 400))))
    assert (end.detail, end.reduced) == (detail, reduced)
    must = Budget(vision_tokens=(300, 400))
    _, end = await answer(keen, request(image=image, detail="high", budget=must))
    assert (end.detail, end.reduced) == ("high", level > 0)
    assert keen.vision.budgets[-1].vision_tokens == (300, [400, 300, 300][level])


async def test_of_a_whole_answer_nobody_knows_when_the_prefill_ended(house):
    await answer(house, request())
    await answer(house, request(sampling=Sampling(streaming=False)))
    stages = ("prefill", "decode", "generate", "see", "attend")
    assert [house.counted("glimpse_stage_seconds_count", stage=stage) for stage in stages] == [1] * 5


async def test_the_answers_length_is_a_reason_to_finish(house):
    house.language.say(" red red red")
    text, end = await answer(house, request(sampling=Sampling(max_tokens=2)))
    assert (text, end.finish_reason, end.completion_tokens) == ("red red", "length", 2)


async def test_a_stop_string_ends_the_stream(house):
    house.language.say(" red. And more of it")
    text, end = await answer(house, request(sampling=Sampling(max_tokens=64, stop=(". A",))))
    assert (text, end.finish_reason) == ("red", "stop")
    assert house.language.open == 0


@pytest.mark.parametrize("at_once", [2, 3, 64])
@pytest.mark.parametrize("stop", [(), (". A",), ("And", "more")])
@pytest.mark.parametrize("max_tokens", [64, 20, 3])
async def test_an_answer_is_the_same_however_many_tokens_come_at_once(house, at_once, stop, max_tokens):
    house.language.say(" red. And é more of it")
    said = []
    for house.language.at_once in (1, at_once):
        sampling = Sampling(max_tokens=max_tokens, log_probs=True, stop=stop)
        *deltas, end = [event async for event in house.answer(request(sampling=sampling))]
        told = [each for delta in deltas for each in delta.log_probs]
        said.append(("".join(delta.text for delta in deltas), end.finish_reason, end.completion_tokens, told))
    assert said[0] == said[1]
    text, _, _, told = said[1]
    if not stop:  # else the text may end within a token
        assert b"".join(each.spelled for each in told).decode().lstrip() == text


@pytest.mark.parametrize("at_once", [2, 64])
async def test_the_confidence_is_that_of_the_tokens_before_the_end(at_once):
    house = House(replace(CARD, confidence=calibrated(4)))
    house.language.say(" red. And more of it")
    asked = request(sampling=Sampling(max_tokens=64, stop=(". A",)))
    ends = [(await answer(house, asked))[1] for house.language.at_once in (1, at_once)]
    assert ends[0].confidence is not None
    assert ends[0].confidence == ends[1].confidence
    house.reader.close()


async def test_the_time_between_tokens_is_shared_by_those_that_come_at_once(house):
    house.language.say(" red red red red red")
    house.language.at_once = 3
    house.language.wait_at = 3
    house.language.gate.clear()
    began = time.monotonic()
    answering = asyncio.create_task(answer(house, request(sampling=Sampling(max_tokens=64))))
    await until(lambda: house.language.open)
    await asyncio.sleep(0.06)
    house.language.gate.set()
    _, end = await answering
    took_s = time.monotonic() - began
    tokens = end.completion_tokens + 1 - 3  # with the end's, without the first response's
    assert house.counted("glimpse_inter_token_latency_seconds_count") == tokens > 1
    assert 0.06 <= house.counted("glimpse_inter_token_latency_seconds_sum") <= took_s


async def test_half_characters_wait_for_their_other_half(house):
    house.language.say(" é")
    assert len(ids_of(" é")) == 3
    events = [event async for event in house.answer(request())]
    assert events[0] == Delta("é")


async def test_one_outcome_is_counted_and_one_line_logged_for_an_answer(house):
    with capture_logs() as lines:
        await answer(house, request())
    assert house.outcomes() == {"ok": 1}
    assert [(line["event"], line["outcome"], line["request_id"]) for line in lines] == [("answered", "ok", "trace")]
    assert house.counted("glimpse_time_to_first_token_seconds_count", variant="default") == 1
    for stage in ("queue", "load", "decode_image", "vision", "lookup", "see", "prefill", "decode"):
        assert house.counted("glimpse_stage_seconds_count", stage=stage) == 1
    assert house.counted("glimpse_relevance_entropy_ratio_sum") == pytest.approx(1.0)  # FakeVision's map is even
    assert house.counted("glimpse_tension_ratio_count", tension="explore") == 1
    assert house.counted("glimpse_requests_in_flight") == 0
    assert house.counted("glimpse_generated_tokens_total", variant="default") == 1


@pytest.mark.parametrize(
    ("changes", "error", "outcome"),
    [
        ({"image": b"no image"}, InvalidImage, "invalid_image"),
        ({"image": "img_unknown"}, NotFound, "image_not_found"),
        ({"budget": Budget(visual_tokens=(32, 64))}, InvalidRequest, "invalid_request"),
        ({"budget": Budget(vision_tokens=(100, 64))}, InvalidRequest, "invalid_request"),
        ({"sampling": Sampling(max_tokens=1000)}, InvalidRequest, "context_length_exceeded"),
    ],
)
async def test_what_cannot_be_answered_ends_in_one_typed_outcome(house, changes, error, outcome):
    with capture_logs() as lines, pytest.raises(error):
        await answer(house, request(**changes))
    assert house.outcomes() == {outcome: 1}
    assert [line["event"] for line in lines] == ["not_answered"]
    assert house.counted("glimpse_requests_in_flight") == 0
    assert (await answer(house, request()))[0] == "red"


async def test_budgets_outside_the_models_ranges_say_what_is_offered(house):
    with pytest.raises(InvalidRequest, match=r"budget.visual_tokens \[32, 128\] is outside \[32, 32\], .* tiny offers"):
        await answer(house, request(budget=Budget(visual_tokens=(32, 128))))
    with pytest.raises(InvalidRequest, match="80 is more than 70: swap"):
        await answer(house, request(budget=Budget(vision_tokens=(80, 70))))
    house.pipeline.models.models[0].card = replace(CARD, visual_tokens=(32, 128))
    with pytest.raises(InvalidRequest, match="must be multiples of 32"):
        await answer(house, request(budget=Budget(visual_tokens=(32, 60))))
    assert house.vision.calls == []


async def test_no_more_requests_than_there_is_room_for():
    house = House(max_requests_in_flight=2)
    house.vision.gate.clear()
    tasks = [asyncio.create_task(answer(house, request(id=f"vqa_{i}"))) for i in range(2)]
    await turns()
    assert house.counted("glimpse_requests_in_flight") == 2
    with pytest.raises(Overloaded) as caught:
        await answer(house, request())
    assert caught.value.retry_after_s >= 1
    house.vision.gate.set()
    assert [text for text, _ in await asyncio.gather(*tasks)] == ["red", "red"]
    assert house.outcomes() == {"saturated": 1, "ok": 2}
    await answer(house, request())
    house.reader.close()


@pytest.mark.parametrize("stage", ["vision", "language"])
async def test_the_deadline_covers_the_whole_path(house, stage):
    (house.vision if stage == "vision" else house.language).gate.clear()
    with pytest.raises(DeadlineExceeded, match="timeout_s"):
        await answer(house, request(timeout_s=0.05))
    assert house.outcomes() == {"deadline_exceeded": 1}
    assert house.language.open == 0


@pytest.mark.parametrize("stage", ["vision", "language"])
async def test_a_caller_who_goes_away_frees_its_slot_and_its_stream(house, stage):
    (house.vision if stage == "vision" else house.language).gate.clear()
    task = asyncio.create_task(answer(house, request()))
    await until(lambda: house.vision.calls and (stage == "vision" or house.language.open))
    await cancelled(task)
    assert house.outcomes() == {"cancelled": 1}
    assert house.language.open == 0
    assert house.counted("glimpse_requests_in_flight") == 0


async def test_closing_the_events_half_way_is_a_cancellation(house):
    house.language.say(" red red red")
    async with aclosing(house.answer(request())) as events:
        assert await anext(events) == Delta("red")
    assert house.language.open == 0
    assert house.outcomes() == {"cancelled": 1}


async def test_who_stops_reading_after_the_last_event_was_answered(house):
    async with aclosing(house.answer(request())) as events:
        async for event in events:
            if isinstance(event, Finished):
                break
    assert house.outcomes() == {"ok": 1}


@pytest.mark.parametrize("error", [Unavailable("triton is gone", cause="UNAVAILABLE: GOAWAY"), Overloaded("full")])
async def test_errors_of_the_models_pass_as_they_are_and_the_log_says_what_was_wrong(house, error):
    house.language.fault = error
    house.language.wait_at = 0
    with capture_logs() as lines, pytest.raises(type(error)):
        await answer(house, request())
    assert house.outcomes() == {error.code: 1}
    assert lines[-1]["error"] == error.message
    assert lines[-1].get("cause", "") == error.cause


async def test_an_answer_without_a_token_is_a_fault_of_the_model(house):
    house.language.tokens = []
    with pytest.raises(Unavailable, match="without a token"):
        await answer(house, request())


async def test_an_unknown_error_is_logged_once_and_says_nothing_of_the_inside(house):
    house.vision.fault = RuntimeError("secret path /etc")
    with capture_logs() as lines, pytest.raises(InternalError) as caught:
        await answer(house, request())
    assert "secret" not in caught.value.message
    assert "trace" in caught.value.message
    assert [(line["log_level"], line["outcome"]) for line in lines] == [("error", "internal_error")]
    assert isinstance(lines[0]["exc_info"], RuntimeError)
    assert house.outcomes() == {"internal_error": 1}


async def test_concurrent_questions_about_one_new_image_encode_it_once(house):
    house.vision.gate.clear()
    tasks = [asyncio.create_task(answer(house, request(id=f"vqa_{i}", question=f"{i}?"))) for i in range(8)]
    await until(lambda: house.vision.calls)
    await turns()
    house.vision.gate.set()
    ends = [end for _, end in await asyncio.gather(*tasks)]
    assert sorted(house.vision.calls) == ["attend"] * 7 + ["see"]
    assert sorted(end.cache for end in ends) == ["hit"] * 7 + ["miss"]


async def test_the_wait_for_anothers_encode_is_a_part_of_vision(house):
    house.vision.close("see")
    first = asyncio.create_task(answer(house, request()))
    await until(lambda: house.vision.calls)
    second = asyncio.create_task(answer(house, request(question="which shape?")))
    await turns()
    begun = time.monotonic()
    await asyncio.sleep(0.02)
    waited_ms = (time.monotonic() - begun) * 1e3
    house.vision.gate.set()
    for _, end in await asyncio.gather(first, second):
        assert end.timing_ms["vision"] >= waited_ms - 0.01  # told to a hundredth


async def test_an_image_that_was_kept_needs_no_bytes_again(house):
    kept = await house.keep_image(png(size=(300, 200)))
    assert (kept.width, kept.height) == (300, 200)
    text, end = await answer(house, request(image=kept.id))
    assert (text, end.cache, end.image_ids) == ("red", "miss", (kept.id,))


async def test_the_life_of_an_image_goes_by_a_clock_that_nobody_sets(house):
    begun = time.time()
    kept = await house.keep_image(png())
    _, asked = await answer(house, request(image=png((9, 9, 9))))
    assert begun + house.settings.image_ttl_s <= kept.expires_at <= time.time() + house.settings.image_ttl_s
    store = house.pipeline.images.store
    for image_id in (kept.id, asked.image_ids[0]):
        assert store.get(image_id, time.monotonic()).image.id == image_id
        assert store.get(image_id, time.monotonic() + house.settings.image_ttl_s + 1) is None


async def test_uploads_of_one_tenant_do_not_push_out_the_images_of_another():
    house = House(image_store_bytes=30_000, max_image_bytes=10_000)
    with house.pipeline.reservation("a") as reservation:
        kept = await house.pipeline.keep_image(png(), reservation)
    for shade in range(40):
        with house.pipeline.reservation("b") as reservation:
            await house.pipeline.keep_image(png((shade, 0, 0)), reservation)
    assert len(house.pipeline.images.store) < 40
    assert (await answer(house, request(image=kept.id, tenant="a")))[0] == "red"


PADDED = 2000  # bytes


def padded(colour: tuple[int, int, int]) -> bytes:
    """An image whose file has PADDED bytes."""
    return png(colour).ljust(PADDED, b"-")


async def test_images_that_questions_look_at_are_within_the_limit_of_the_store():
    size = PADDED + IMAGE_ENTRY_BYTES
    house = House(image_store_bytes=4 * size, max_image_bytes=PADDED)
    store = house.pipeline.images.store
    kept = [await house.keep_image(padded((shade, 0, 0))) for shade in range(4)]
    house.language.wait_at = 1
    house.language.gate.clear()
    asking = [asyncio.create_task(answer(house, request(image=each.id))) for each in (*kept, kept[0])]
    await until(lambda: len(house.language.prompts) == 5)
    assert store.held_bytes == store.nbytes == 4 * size
    with pytest.raises(
        Overloaded, match=r"limit of images that requests look at \(.* of .* bytes are in use\)"
    ) as full:
        await house.keep_image(padded((9, 9, 9)))
    assert (full.value.code, full.value.retry_after_s) == ("saturated", 1.0)
    assert house.counted("glimpse_refusals_total", reason="saturated") == 1
    own_bytes = asyncio.create_task(answer(house, request(image=padded((8, 8, 8)))))
    await until(lambda: len(house.language.prompts) == 6)  # it needs no place there
    await house.pipeline.images.delete(kept[0].id, "")
    assert store.nbytes == 4 * size
    house.language.gate.set()
    assert [text for text, _ in await asyncio.gather(*asking, own_bytes)] == ["red"] * 6
    assert (store.held_bytes, store.nbytes) == (0, 3 * size)
    await house.keep_image(padded((9, 9, 9)))


async def full_of_one_tenants_images() -> tuple[House, list[str]]:
    """A service whose memory holds four images of the tenant a -> it, and their ids."""
    house, kept = House(image_store_bytes=4 * (PADDED + IMAGE_ENTRY_BYTES), max_image_bytes=PADDED), list[str]()
    for shade in range(4):
        with house.pipeline.reservation("a") as reservation:
            kept.append((await house.pipeline.keep_image(padded((shade, 0, 0)), reservation)).id)
    return house, kept


async def test_one_tenants_questions_hold_their_share_of_the_images_in_memory():
    house, kept = await full_of_one_tenants_images()
    house.language.wait_at = 1
    house.language.gate.clear()
    asking = [asyncio.create_task(answer(house, request(image=kept[each], tenant="a"))) for each in (0, 0, 1, 2)]
    await until(lambda: len(house.language.prompts) == 4)
    with pytest.raises(Overloaded, match="tenant a is at its share of images that requests look at") as over:
        await answer(house, request(image=kept[3], tenant="a"))
    assert over.value.code == "tenant_share"
    house.language.gate.set()
    await asyncio.gather(*asking)
    assert house.pipeline.images.store.held_bytes == 0
    assert (await answer(house, request(image=kept[3], tenant="a")))[0] == "red"


async def test_one_request_alone_may_look_at_all_images_of_its_tenant():
    house, kept = await full_of_one_tenants_images()
    text, end = await answer(house, request(images=tuple(kept), tenant="a"))
    assert (text, end.image_ids) == ("red", tuple(kept))
    assert (await answer(house, request(images=(kept[0], kept[0]), tenant="a")))[1].image_ids == (kept[0], kept[0])
    assert house.pipeline.images.store.held_bytes == 0


async def test_what_goes_on_without_its_request_keeps_the_images_and_the_body(house):
    kept = await house.keep_image(png())
    house.vision.close("attend")
    await answer(house, request(image=png((1, 1, 1))))
    with house.pipeline.reservation("") as reservation:
        reservation.reserve_bytes(1000)
        asked = request(images=(kept.id, png((1, 1, 1))), question="which shape?")
        calls = len(house.vision.calls)
        asking = asyncio.create_task(drained(house, asked, reservation))
        await until(lambda: len(house.vision.calls) == calls + 2)
        await cancelled(asking)
    store, quota = house.pipeline.images.store, house.admission.quota
    assert (store.held_bytes > 0, quota.held.nbytes) == (True, 1000)
    house.vision.gate.set()
    await until(lambda: quota.held == Cost())
    assert store.held_bytes == 0


async def drained(house: House, asked: Request, reservation: Reservation) -> None:
    async with aclosing(house.pipeline.answer(asked, reservation)) as events:
        async for _ in events:
            pass


class GatedReader(ImageReader):
    """Decodes one image each time the gate is opened, and tells what it was asked to decode."""

    def __init__(self, limits: ImageLimits) -> None:
        super().__init__(limits, 1)
        self.gate = asyncio.Semaphore(0)
        self.asked: list[bytes] = []

    async def begin_decode(
        self, data: bytes, views: Sequence[int] = (224,), viewport: Viewport | None = None, page: int = 1
    ) -> asyncio.Future[Decoded]:
        self.asked.append(data)
        work = await super().begin_decode(data, views, viewport, page)
        return asyncio.create_task(self._let_through(work))

    async def _let_through(self, work: asyncio.Future[Decoded]) -> Decoded:
        await self.gate.acquire()
        return await work


async def test_uploads_wait_for_the_vision_slots_as_questions_do_and_tenants_share_them():
    house = House(vision_slots=2)
    house.reader.close()
    reader = GatedReader(house.reader.limits)
    house.reader = house.pipeline.reader = house.pipeline.pixels.reader = reader

    async def keep(shade: int) -> None:
        with house.pipeline.reservation("flood") as reservation:
            await house.pipeline.keep_image(png((shade, 0, 0)), reservation)

    flood = [asyncio.create_task(keep(shade)) for shade in range(20)]
    await turns()
    assert len(reader.asked) == house.counted("glimpse_resource_used", resource="vision") == 2
    other = asyncio.create_task(answer(house, request(image=png((0, 99, 0)), tenant="other")))
    await turns()
    reader.gate.release()
    await until(lambda: len(reader.asked) == 3)
    assert reader.asked[2] == png((0, 99, 0))
    for _ in range(20):
        reader.gate.release()
    await asyncio.gather(*flood, other)
    assert nothing_is_held(house)
    reader.close()


async def test_an_upload_whose_caller_leaves_holds_its_slot_its_pixels_and_its_body_until_it_is_decoded():
    house = House(vision_slots=1)
    house.reader.close()
    house.reader = house.pipeline.reader = house.pipeline.pixels.reader = reader = GatedReader(house.reader.limits)
    with house.pipeline.reservation("flood") as reservation:
        reservation.reserve_bytes(1000)
        keeping = asyncio.create_task(house.pipeline.keep_image(png(), reservation))
        await until(lambda: reader.asked)
        held = house.admission.quota.held
        await cancelled(keeping)
    assert held == house.admission.quota.held == Cost(nbytes=1000, pixels=held.pixels)
    assert held.pixels > 0
    assert house.admission.scheduler.used(Resource.VISION) == 1
    reader.gate.release()
    await until(lambda: nothing_is_held(house))
    assert len(house.pipeline.images.store) == 0
    reader.close()


@pytest.mark.parametrize("fails", ["is no image", "its caller leaves"])
async def test_an_upload_that_fails_once_it_is_decoded_is_charged_its_image(fails):
    house = House(vision_slots=1, quota_images_per_minute=2)
    house.reader.close()
    house.reader = house.pipeline.reader = house.pipeline.pixels.reader = reader = GatedReader(house.reader.limits)

    async def keep(data: bytes) -> None:
        with house.pipeline.reservation("a") as reservation:
            await house.pipeline.keep_image(data, reservation)

    for number in range(1, 3):
        keeping = asyncio.create_task(keep(png()[:-30] if fails == "is no image" else png()))
        await until(lambda: len(reader.asked) == number)  # noqa: B023 (it is awaited here)
        if fails == "its caller leaves":
            await cancelled(keeping)
        reader.gate.release()
        if fails == "is no image":
            with pytest.raises(InvalidImage):
                await keeping
        await house.quotas.settle()
    with pytest.raises(QuotaExceeded):
        await keep(png())
    reader.close()


async def test_an_upload_that_fails_while_it_waits_is_charged_no_image():
    house = House(vision_slots=1, default_timeout_s=0.05, quota_images_per_minute=2)
    house.vision.close("see")
    first = asked_of(house, 0)
    await until(lambda: house.vision.calls)
    for _ in range(3):
        with house.pipeline.reservation("a") as reservation, pytest.raises((Overloaded, DeadlineExceeded)):
            await house.pipeline.keep_image(png((1, 1, 1)), reservation)
        await house.quotas.settle()
    house.vision.gate.set()
    await first


async def test_an_upload_that_would_wait_too_long_is_refused_or_expires_and_holds_nothing():
    house = House(vision_slots=1, default_timeout_s=0.05)
    house.vision.close("see")
    first = asked_of(house, 0)
    await until(lambda: house.vision.calls)
    with pytest.raises((Overloaded, DeadlineExceeded)):
        await house.keep_image(png((1, 1, 1)))
    assert house.counted("glimpse_requests_waiting", kind="single_image") == 0
    house.vision.gate.set()
    await first
    assert nothing_is_held(house)


async def test_a_bad_image_is_not_kept(house):
    with pytest.raises(InvalidImage):
        await house.keep_image(b"no")
    assert len(house.pipeline.images.store) == 0


def asked_of(
    house: House, number: int, colour: int | None = None, **changes: object
) -> "asyncio.Task[tuple[str, Finished]]":
    """A question under way; of an image of its own unless the colour, or the image, says otherwise."""
    image = {"image": png((number if colour is None else colour, 0, 0))}
    return asyncio.create_task(answer(house, request(id=f"vqa_{number}", **image | changes)))


def refused(house: House, reason: str) -> float:
    return house.counted("glimpse_refusals_total", reason=reason)


def nothing_is_held(house: House) -> bool:
    return house.admission.quota.held == Cost() and not any(map(house.admission.scheduler.used, Resource))


async def test_a_follow_up_overtakes_new_images_that_wait_for_their_encode():
    house = House(vision_slots=2)
    _, known = await answer(house, request())
    house.vision.close("see")
    images = [asked_of(house, i) for i in range(5)]
    await until(lambda: house.vision.calls.count("see") == 3)
    assert house.counted("glimpse_requests_waiting", kind="single_image") == 3
    assert house.counted("glimpse_resource_used", resource="vision") == 2
    text, _ = await answer(house, request(image=known.image_ids[0]))
    assert text == "red"
    assert house.vision.calls.count("see") == 3  # nobody else came in
    house.vision.gate.set()
    assert [end.cache for _, end in await asyncio.gather(*images)] == ["miss"] * 5
    assert house.counted("glimpse_request_queue_time_seconds_count", kind="single_image") == 6
    assert house.counted("glimpse_request_queue_time_seconds_count", kind="follow_up") == 1
    assert nothing_is_held(house)


async def test_who_shares_an_encode_holds_no_vision_slot():
    house = House(vision_slots=2)
    house.vision.close("see")
    same = [asked_of(house, i, colour=7) for i in range(4)]
    other = asked_of(house, 9)
    await until(lambda: house.vision.calls.count("see") == 2)
    assert house.counted("glimpse_requests_waiting", kind="single_image") == 0
    house.vision.gate.set()
    await asyncio.gather(*same, other)
    assert house.vision.calls.count("see") == 2


async def test_low_priority_lets_the_others_go_first():
    house = House(vision_slots=1)
    house.vision.close("see")
    first = asked_of(house, 0)
    await until(lambda: house.vision.calls)
    order: list[str] = []
    low = asked_of(house, 1, priority=Priority.LOW)
    await until(lambda: house.counted("glimpse_requests_waiting", kind="single_image") == 1)
    normal = asked_of(house, 2)
    await until(lambda: house.counted("glimpse_requests_waiting", kind="single_image") == 2)
    for name, task in (("low", low), ("normal", normal)):
        task.add_done_callback(lambda _, name=name: order.append(name))
    house.vision.gate.set()
    await asyncio.gather(first, low, normal)
    assert order == ["normal", "low"]


async def test_nobody_waits_for_an_image_that_a_request_of_low_priority_is_to_encode():
    house = House(vision_slots=1)
    house.vision.close("see")
    first = asked_of(house, 0)
    await until(lambda: house.vision.calls)
    order: list[str] = []
    low = asked_of(house, 1, colour=7, priority=Priority.LOW)
    await until(lambda: house.counted("glimpse_requests_waiting", kind="single_image") == 1)
    other = asked_of(house, 2)
    await until(lambda: house.counted("glimpse_requests_waiting", kind="single_image") == 2)
    same = asked_of(house, 3, colour=7)
    await until(lambda: house.counted("glimpse_requests_waiting", kind="single_image") == 3)
    for name, task in (("low", low), ("other", other), ("same", same)):
        task.add_done_callback(lambda _, name=name: order.append(name))
    house.vision.gate.set()
    await asyncio.gather(first, low, other, same)
    assert order == ["other", "same", "low"]
    assert nothing_is_held(house)


async def test_the_llm_holds_no_more_than_its_tokens_and_follow_ups_go_first():
    house = House(llm_tokens=200, vision_slots=9)  # a request takes 79
    _, known = await answer(house, request())
    house.language.gate.clear()
    asked = [asked_of(house, i) for i in range(2)]
    await until(lambda: house.language.open == 2)
    new = asked_of(house, 3)
    await until(lambda: house.counted("glimpse_requests_waiting", kind="single_image") == 1)
    order: list[str] = []
    new.add_done_callback(lambda _: order.append("new image"))
    follow_up = asyncio.create_task(answer(house, request(image=known.image_ids[0])))
    follow_up.add_done_callback(lambda _: order.append("follow-up"))
    await until(lambda: house.counted("glimpse_requests_waiting", kind="follow_up") == 1)
    assert house.language.open == 2
    await cancelled(asked[0])
    await until(lambda: house.counted("glimpse_requests_waiting", kind="follow_up") == 0)
    assert house.counted("glimpse_requests_waiting", kind="single_image") == 1
    await until(lambda: house.language.open == 2)
    house.language.gate.set()
    await asyncio.gather(*asked[1:], new, follow_up)
    assert order == ["follow-up", "new image"]
    assert nothing_is_held(house)


async def test_who_waits_for_a_slot_and_goes_away_leaves_the_queue_at_once():
    house = House(vision_slots=1)
    house.vision.close("see")
    first, second, third = (asked_of(house, i) for i in range(3))
    await until(lambda: house.vision.calls and house.counted("glimpse_requests_waiting", kind="single_image") == 2)
    await cancelled(second)
    assert house.counted("glimpse_requests_waiting", kind="single_image") == 1
    assert house.outcomes() == {"cancelled": 1}
    assert house.counted("glimpse_tokens_saved_total", reason="cancelled") == 16
    await cancelled(first)  # its encode holds the slot
    assert len(house.vision.calls) == 1
    house.vision.gate.set()
    assert (await third)[0] == "red"
    assert nothing_is_held(house)


@pytest.mark.parametrize("detail", ["low", "high"])
@pytest.mark.parametrize("leaves", ["hangs up", "has no time left"])
async def test_an_encode_that_was_sent_is_kept_although_its_caller_leaves(detail, leaves):
    house = House(CLOSER, vision_slots=4, visual_cache_bytes=1_000_000)
    house.vision.close("see", "encode")
    late = leaves == "has no time left"
    asked = request(image=png(size=(448, 448)), detail=detail, timeout_s=0.2 if late else 30)
    task = asyncio.create_task(answer(house, asked))
    await until(lambda: house.vision.calls)
    if late:
        with pytest.raises(DeadlineExceeded):
            await task
    else:
        await cancelled(task)
    house.vision.gate.set()
    await until(lambda: len(house.pipeline.features) == 1)
    assert nothing_is_held(house)
    _, end = await answer(house, request(image=png(size=(448, 448)), id="vqa_2"))
    assert end.cache == "hit"
    # What the first caller would have seen is kept too.
    assert house.vision.calls == (["see"] if detail == "low" else ["encode 1", "attend"])
    house.reader.close()


async def test_those_who_wait_for_an_encode_get_it_although_its_leader_leaves(house):
    house.vision.close("see")
    leader = asyncio.create_task(answer(house, request()))
    await until(lambda: house.vision.calls)
    others = [asyncio.create_task(answer(house, request(id=f"vqa_{number}"))) for number in range(2, 5)]
    await turns()
    await cancelled(leader)
    await turns()
    house.vision.gate.set()
    assert [end.cache for _, end in await asyncio.gather(*others)] == ["hit"] * 3
    assert house.vision.calls.count("see") == 1
    assert nothing_is_held(house)


async def test_an_encode_that_fails_after_its_caller_left_is_led_again(house):
    house.vision.close("see")
    leader = asyncio.create_task(answer(house, request()))
    await until(lambda: house.vision.calls)
    other = asyncio.create_task(answer(house, request(id="vqa_2")))
    await turns()
    await cancelled(leader)
    house.vision.fault = Unavailable("it is gone")
    house.vision.gate.set()
    with pytest.raises(Unavailable):
        await other
    assert house.vision.calls.count("see") == 2
    assert nothing_is_held(house)


async def test_no_encode_outlives_the_service(house):
    house.vision.close("see")
    asked = asyncio.create_task(answer(house, request()))
    await until(lambda: house.vision.calls)
    house.admission.end()
    with pytest.raises(ShuttingDown):
        await asked
    await turns()
    assert nothing_is_held(house)
    house.vision.gate.set()
    await turns()
    assert len(house.pipeline.features) == 0


async def test_half_an_answer_saves_the_other_half(house):
    house.language.say(" red red red")
    async with aclosing(house.answer(request())) as events:
        await anext(events)
    assert house.counted("glimpse_tokens_saved_total", reason="cancelled") == 15
    assert house.counted("glimpse_generated_tokens_total", variant="default") == 1
    assert (
        house.counted("glimpse_prompt_tokens_total", variant="default") == len(house.language.prompts[0].input_ids) - 32
    )


async def test_who_expires_in_the_queue_costs_nothing():
    house = House(vision_slots=1)
    house.vision.close("see")
    first, second = asked_of(house, 0), asked_of(house, 1, timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        await second
    house.vision.gate.set()
    await first
    assert house.vision.calls == ["see"]
    assert house.counted("glimpse_tokens_saved_total", reason="deadline_exceeded") == 16
    assert nothing_is_held(house)


async def test_who_could_not_end_in_time_is_dropped_when_its_turn_comes():
    house = House(vision_slots=1)
    house.vision.close("see")
    first, second = asked_of(house, 0), asked_of(house, 1, timeout_s=0.5)
    await until(lambda: house.counted("glimpse_requests_waiting", kind="single_image") == 1)
    teach(house, llm_s=1.0)
    house.vision.gate.set()
    await first
    with pytest.raises(Overloaded, match="waited in the queue until too little") as caught:
        await second
    assert caught.value.code == "deadline"
    assert house.vision.calls == ["see"]
    assert refused(house, "deadline") == 1


def teach(house: House, llm_s: float) -> None:
    """The scheduler sees a claim of the LLM that took so long."""
    scheduler, claim = house.admission.scheduler, Claim(Resource.LLM, 1, Kind.FOLLOW_UP, 0.0, 1e9)
    scheduler.submit(claim, 0.0)
    scheduler.schedule(0.0)
    scheduler.release(claim, llm_s)


async def test_large_images_are_refused_by_their_headers_before_they_are_decoded():
    house = House(max_image_pixels=100_000, max_pixels_in_flight=100_000, vision_slots=1)
    house.vision.close("see")
    first = asked_of(house, 0)  # 50,176 pixels
    await until(lambda: house.vision.calls)
    with pytest.raises(Overloaded, match="50,176 of 100,000 are in use") as caught:
        await answer(house, request(image=png(size=(300, 300))))
    with pytest.raises(Overloaded):
        await house.keep_image(png(size=(300, 300)))
    assert caught.value.code == "saturated"
    house.vision.gate.set()
    await first
    assert (await answer(house, request(image=png(size=(300, 300)))))[0] == "red"
    assert nothing_is_held(house)


async def test_one_tenant_cannot_fill_the_house():
    house = House(max_requests_in_flight=8)
    house.language.gate.clear()
    flood = [asked_of(house, i, tenant="flood") for i in range(6)]
    await until(lambda: house.language.open == 6)
    with pytest.raises(Overloaded, match="flood is at its share") as caught:
        await answer(house, request(tenant="flood"))
    assert caught.value.code == "tenant_share"
    other = asked_of(house, 9, tenant="other")
    await until(lambda: house.language.open == 7)
    house.language.gate.set()
    await asyncio.gather(*flood, other)
    assert nothing_is_held(house)


async def test_a_service_that_stops_ends_what_it_began_and_begins_nothing(house):
    house.language.gate.clear()
    asked = asked_of(house, 0)
    await until(lambda: house.language.open)
    house.admission.stop()
    with pytest.raises(Overloaded, match="stopping") as caught:
        await answer(house, request())
    assert caught.value.code == "shutting_down"
    house.language.gate.set()
    assert (await asked)[0] == "red"


async def test_a_service_that_stops_still_looks_closer_for_who_is_in(keen):
    keen.vision.particularize = 0.7
    large = png(size=(300, 200))
    await answer(keen, request(image=large))
    keen.vision.close("attend")
    asked = asked_of(keen, 0, image=large, detail="auto")
    await until(lambda: "attend" in keen.vision.calls)
    keen.admission.stop()
    keen.vision.gate.set()
    assert (await asked)[1].detail == "high"
    assert nothing_is_held(keen)


async def test_retry_after_comes_from_how_fast_the_house_drains():
    house = House(max_requests_in_flight=4)
    tokens = 4 * house.admission.row_tokens
    house.admission.quota.reserve(Cost(tokens=tokens), "", 0.0)
    for second in range(1, 20):  # a request takes 5 s to drain
        house.admission.quota.give_back(Cost(tokens=tokens // 20), "", second)
        house.admission.quota.reserve(Cost(tokens=tokens // 20), "", second)
    with pytest.raises(Overloaded) as caught:
        await answer(house, request())
    assert caught.value.retry_after_s == pytest.approx(5, rel=0.1)


async def test_in_a_narrow_window_nobody_waits_for_an_encode_that_it_keeps_outside():
    house = House(CLOSER, vision_slots=4)
    house.vision.particularize = 0.7
    image = png(size=(300, 200))
    await answer(house, request(image=image))
    house.vision.close("attend")
    house.admission.limit.width = 1.0
    inside = asyncio.create_task(answer(house, request(image=image, question="which shape?", detail="auto")))
    await until(lambda: "attend" in house.vision.calls)
    outside = asyncio.create_task(answer(house, request(image=image, detail="high")))
    await until(lambda: house.counted("glimpse_requests_waiting", kind="multi_image") == 1)
    house.vision.gate.set()  # the admitted request now needs the closer view; the waiting request will encode it
    async with asyncio.timeout(5):
        ends = await asyncio.gather(inside, outside)
    assert [end.detail for _, end in ends] == ["high", "high"]
    assert house.vision.calls.count("encode 4") == 1
    assert nothing_is_held(house)


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=3),  # images
            st.sampled_from(["low", "high", "auto"]),
            st.sampled_from(["ok", "ok", "error", "cancel", "timeout"]),
            st.sampled_from(["", "a", "b"]),
            st.integers(1, 4),  # turns of the loop until the next one
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([1.0, 2.0, 18.0]),
)
@settings(max_examples=40, deadline=None)
def test_whatever_happens_to_requests_everything_they_held_comes_back(requests, width):
    async def day() -> None:
        house = House(CLOSER, vision_slots=2, llm_tokens=2 * CARD.max_positions, max_requests_in_flight=200)
        house.admission.limit.width = width
        house.vision.close("see", "encode", "attend_448")
        house.vision.particularize = 0.7
        tasks = []
        for number, (shades, detail, fate, tenant, gap) in enumerate(requests):
            images = [png((shade, 0, 0), (230, 8)) for shade in shades]
            images[-1:] = [b"no image"] if fate == "error" else images[-1:]
            timeout_s = 0.01 if fate == "timeout" else 30
            asked = request(id=f"vqa_{number}", images=tuple(images), detail=detail, tenant=tenant, timeout_s=timeout_s)
            tasks.append(asyncio.create_task(answer(house, asked)))
            for _ in range(gap):
                await asyncio.sleep(0)
            if fate == "cancel":
                tasks[-1].cancel()
        await asyncio.sleep(0.02 if any(fate == "timeout" for _, _, fate, _, _ in requests) else 0)
        house.vision.gate.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for (_, _, fate, _, _), end in zip(requests, ends, strict=True):
            assert {"ok": isinstance(end, tuple), "error": isinstance(end, InvalidImage)}.get(fate, True), end
        await until(lambda: nothing_is_held(house))  # an encode whose caller has just left ends after it
        assert len(house.admission.contention) == 0
        assert not house.admission.quota._tenants
        assert sum(house.outcomes().values()) == len(requests)
        house.reader.close()

    asyncio.run(day())
