"""A clip is looked at frame by frame, or as a whole, and what is known of it is not worked out again."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from io import BytesIO
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageDraw
from structlog.testing import capture_logs

from service.admission.admission import Reservation
from service.admission.quota import Cost
from service.admission.scheduler import Claim, Kind, Resource
from service.cache.features import FeatureCache
from service.core.access import Use
from service.core.answer import Finished
from service.core.card import ClipResampler, Engines
from service.core.errors import (
    DeadlineExceeded,
    InvalidImage,
    InvalidRequest,
    Overloaded,
    QuotaExceeded,
    ShuttingDown,
    TooLarge,
)
from service.core.estimate import Estimate
from service.core.payer import current
from service.core.request import Budget, Clip, Exchange, ImageBytes, ImageId, ImageUrl, Request, Text
from service.core.vision import VisionFeatures
from service.media.clip import DecodedClip
from service.media.clip_header import clip_cost
from service.media.decoder import Decoded
from service.media.reader import ImageReader
from service.media.store import Image
from service.triton.codec import require_consistent
from tests.service.test_pipeline import answer, nothing_is_held, request, shades
from tests.support import clips
from tests.support.calibrations import calibrated
from tests.support.fakes import CARD, CLIPS, CLOSER, House, Strain, cancelled, png, turns, until

ROOMY = replace(CARD, max_positions=4000)
GREYS = (250, 40, 90, 140, 10, 200, 60, 120)


@pytest.fixture
def house() -> Iterator[House]:
    """With room for any clip, and no visual cache."""
    house = House(ROOMY)
    yield house
    house.reader.close()


@pytest.fixture
def whole() -> Iterator[House]:
    """With a clip resampler."""
    house = House(CLIPS)
    yield house
    house.reader.close()


def film(greys: tuple[int, ...] = GREYS, ms: int = 100) -> bytes:
    """An animated GIF with one grey a picture."""
    return animated([Pillow.new("P", (32, 24), grey) for grey in greys], ms)


def animated(pictures: list[Pillow.Image], ms: int = 100) -> bytes:
    out = BytesIO()
    grey = [value for value in range(256) for _ in range(3)]
    for picture in pictures:
        picture.putpalette(grey)
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], duration=ms, optimize=False, disposal=0)
    return out.getvalue()


def square_at(*lefts: int) -> bytes:
    """A white square on black that stands at these places, one a picture. One pixel flickers."""
    pictures = []
    for number, left in enumerate(lefts):
        picture = Pillow.new("P", (224, 224), 0)
        picture.putpixel((0, 0), 200 + number)
        ImageDraw.Draw(picture).rectangle((left, 90, left + 41, 131), 255)
        pictures.append(picture)
    return animated(pictures)


def about(source: object, question: str = "what moves?", **changes: object) -> Request:
    """A question about a clip: a file's bytes, an id, or images. `frames` and `sampling` are those of the clip."""
    clip = {name: changes.pop(name) for name in ("frames", "sampling") if name in changes}
    changes.setdefault("gave_budget", (True, False))
    if isinstance(source, bytes):
        source = ImageBytes(source)
    return request(parts=(Clip(source, **clip), Text(question)), **changes)


def given(*greys: int) -> tuple[ImageBytes, ...]:
    return tuple(ImageBytes(png((grey,) * 3)) for grey in greys)


def indices(end: Finished) -> list[int]:
    return [frame.index for frame in end.frames]


def encodes(house: House) -> int:
    return sum(call.startswith(("see", "encode")) for call in house.vision.calls)


class Counting(ImageReader):
    """Counts the clips that it decodes, and how many frames of each are wanted."""

    clips = 0
    wanted = 0

    async def decode_clip(self, data: bytes, most: int) -> DecodedClip:
        self.clips += 1
        self.wanted += most
        return await super().decode_clip(data, most)


def counting(house: House) -> Counting:
    reader = Counting(house.reader.limits, threads=1)
    house.reader.close()
    house.reader = house.pipeline.reader = house.pipeline.pixels.reader = reader
    return reader


async def test_each_frame_is_looked_at_and_read_in_order(house):
    text, end = await answer(house, about(film()))
    assert text == "red"
    assert house.vision.calls == ["see"] * 8
    assert shades(house) == list(GREYS)
    assert indices(end) == list(range(8))
    assert [frame.time_s for frame in end.frames] == pytest.approx([number / 10 for number in range(8)])
    assert (end.visual_tokens, end.vision_tokens, end.cache) == (8 * 32, 8 * 64, "miss")
    assert end.prompt_tokens == len(house.language.prompts[-1].input_ids) - 8 * 32
    assert all(frame.relevance.map.shape == (16, 16) and not frame.image_id for frame in end.frames)
    assert end.relevance == end.image_ids == ()
    assert end.clip_id.startswith("img_")
    assert not end.reduced
    assert nothing_is_held(house)


async def test_asked_again_nothing_is_decoded_or_encoded(house):
    reader = counting(house)
    _, first = await answer(house, about(film()))
    _, other = await answer(house, about(film(), "how many came?"))
    _, by_id = await answer(house, about(ImageId(first.clip_id)))
    assert reader.clips == 1
    assert house.vision.calls == ["see"] * 8 + ["attend"] * 16
    assert [first.cache, other.cache, by_id.cache] == ["miss", "hit", "hit"]
    assert by_id.clip_id == first.clip_id
    assert [frame.time_s for frame in by_id.frames] == [frame.time_s for frame in first.frames]


async def test_a_repeat_needs_only_the_llm():
    house = House(ROOMY, visual_cache_bytes=10_000_000)
    await answer(house, about(film()))
    await answer(house, about(film()))
    assert house.vision.calls == ["see"] * 8
    one, other = house.language.prompts
    assert np.array_equal(one.visual_tokens, other.visual_tokens)
    assert np.array_equal(one.extra_ids, other.extra_ids)
    assert len(set(one.extra_ids.tolist())) == 8 * 32 + 1  # each frame's own, and the text's 0


async def test_frames_that_were_evicted_are_decoded_once_for_all_of_them():
    house = House(ROOMY, feature_cache_bytes=0)
    reader = counting(house)
    await answer(house, about(film()))
    await answer(house, about(film()))
    assert reader.clips == 2
    assert encodes(house) == 16
    assert shades(house) == list(GREYS)


async def test_fewer_frames_are_spread_evenly_and_share_what_is_known(house):
    await answer(house, about(film()))
    _, end = await answer(house, about(film(), frames=3))
    assert indices(end) == [0, 4, 7]
    assert shades(house) == [GREYS[index] for index in (0, 4, 7)]
    assert encodes(house) == 8


async def test_a_scene_that_comes_back_is_encoded_once(house):
    _, end = await answer(house, about(film((90, 200, 90, 200, 90))))
    assert encodes(house) == 2
    assert indices(end) == [0, 1, 2, 3, 4]
    assert shades(house) == [90, 200, 90, 200, 90]


async def test_images_in_order_are_frames_and_share_the_cache_with_images(house):
    frames = given(240, 30, 90)
    _, known = await answer(house, request(image=png((30, 30, 30))))
    _, end = await answer(house, about((frames[0], ImageId(known.image_ids[0]), frames[2])))
    assert sorted(house.vision.calls) == ["attend", "see", "see", "see"]
    assert shades(house) == [240, 30, 90]
    assert [frame.time_s for frame in end.frames] == [None] * 3
    assert end.frames[1].image_id == known.image_ids[0]
    assert end.clip_id == ""
    _, again = await answer(house, request(image=end.frames[2].image_id))
    assert again.cache == "hit"


async def test_of_many_images_as_many_are_looked_at_as_are_asked_for(house):
    _, end = await answer(house, about(given(*range(10, 110, 10)), frames=4))
    assert indices(end) == [0, 3, 6, 9]
    assert shades(house) == [10, 40, 70, 100]


async def test_a_clip_stands_behind_images_or_inside_the_text(house):
    image, clip = ImageBytes(png((77, 77, 77))), Clip(ImageBytes(film((250, 40))))
    _, end = await answer(house, request(parts=(image, clip, Text("which?"))))
    assert shades(house) == [77, 250, 40]
    assert (len(end.image_ids), len(end.relevance), indices(end)) == (1, 1, [0, 1])
    _, end = await answer(house, request(parts=(Text("in"), clip, Text("as in"), image, Text("which?"))))
    assert shades(house) == [250, 40, 77]
    ids = house.language.prompts[-1].input_ids
    visual = [place for place, token in enumerate(ids) if token >= CARD.vocab_size]
    assert visual[0] > 0
    assert visual[63] - visual[0] == 63  # no text between the frames
    assert visual[64] - visual[63] > 1


async def test_a_question_goes_on_about_the_clip_of_an_earlier_one(house):
    earlier = Exchange((Clip(ImageBytes(film((250, 40)))), Text("what?")), "a square")
    _, end = await answer(house, request(parts=(Text("and then?"),), exchanges=(earlier,)))
    assert shades(house) == [250, 40]
    assert indices(end) == [0, 1]


async def test_a_clip_without_a_number_of_frames_has_the_card_s_or_what_fits():
    house = House(replace(CARD, frames=4, max_positions=4000))
    _, end = await answer(house, about(film()))
    assert len(end.frames) == 4
    house = House(replace(CARD, max_positions=150))
    _, end = await answer(house, about(film()))
    assert len(end.frames) == 3


async def test_more_frames_than_fit_are_refused_with_how_many_fit():
    house = House(replace(CARD, max_positions=150))
    with pytest.raises(InvalidRequest, match="3 frames fit, so set video_frames to 3") as refused:
        await answer(house, about(film(), frames=8))
    assert (refused.value.param, refused.value.code) == ("video_frames", "context_length_exceeded")
    assert house.vision.calls == []
    _, end = await answer(house, about(film(), frames=3))
    assert len(end.frames) == 3


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"min_confidence": 0.5}, "min_confidence"),
        ({"detail": "high"}, "detail"),
        ({"fit": "pad"}, "fit"),
        ({"frames": 33}, "video_frames"),
        ({"frames": 0}, "video_frames"),
        ({"budget": Budget((64, 400))}, "budget.vision_tokens"),
    ],
)
async def test_what_a_clip_has_not_is_refused(changes, param):
    house = House(replace(CLOSER, max_positions=4000, confidence=calibrated(4)))
    with pytest.raises(InvalidRequest) as refused:
        await answer(house, about(film(), **changes))
    assert refused.value.param == param


@pytest.mark.parametrize("with_image", [False, True])
async def test_a_video_with_detail_auto_is_answered_by_a_model_with_a_closer_view(with_image):
    house = House(replace(CLOSER, max_positions=4000, default_vision_tokens=(96, 192)))
    asked = about(film(), detail="auto", gave_budget=(False, False))
    if with_image:
        asked = replace(asked, parts=(ImageBytes(png()), *asked.parts))
    (model,) = house.pipeline.models.models
    adapted = model.adapted(asked)
    assert adapted.budget.vision_tokens == ((96, 400) if with_image else (96, 192))
    _, end = await answer(house, adapted)
    assert len(end.frames) == 8


async def test_an_answer_about_a_clip_has_no_confidence():
    house = House(replace(ROOMY, confidence=calibrated(4)))
    _, image = await answer(house, request())
    _, clip = await answer(house, about(film()))
    assert image.confidence is not None
    assert clip.confidence is None
    assert [sampling.log_probs for sampling in house.language.sampling] == [True, False]


async def test_faults_say_which_file_or_frame_they_are_about(house):
    with pytest.raises(InvalidImage) as broken:
        await answer(house, about(film()[:200]))
    assert broken.value.param == "video"
    with pytest.raises(InvalidImage, match="frame 2 of 3") as broken:
        await answer(house, about((*given(1), ImageBytes(b"GIF89a"), *given(2))))
    assert broken.value.param == "frames.1"
    with pytest.raises(InvalidRequest) as refused:
        await answer(house, about(ImageUrl("https://example.org/a.mp4")))
    assert refused.value.param == "video"
    await until(lambda: nothing_is_held(house))  # the other frames' decodes have ended


async def test_under_strain_fewer_frames_are_looked_at_and_that_is_told(house):
    await answer(house, about(film()))
    house.admission.fidelity = Strain(3)
    _, end = await answer(house, about(film()))
    assert len(end.frames) == 4
    assert end.reduced
    _, asked = await answer(house, about(film(), frames=2, budget=Budget((64, 64))))
    assert (len(asked.frames), asked.reduced) == (2, False)
    _, short = await answer(house, about(film((1, 200)), budget=Budget((64, 64))))
    assert (len(short.frames), short.reduced) == (2, False)


async def test_a_caller_that_leaves_leaves_nothing_behind(house):
    house.vision.close("see")
    asked = asyncio.create_task(answer(house, about(film())))
    await until(lambda: "see" in house.vision.calls)
    await cancelled(asked)
    house.vision.gate.set()
    await until(lambda: nothing_is_held(house))
    assert house.outcomes() == {"cancelled": 1}
    sent = encodes(house)
    assert sent <= house.admission.vision_slots
    await answer(house, about(film()))
    assert shades(house) == list(GREYS)
    assert encodes(house) == 8  # those that were sent before are kept


async def test_frames_wait_for_vision_slots_as_images_do():
    house = House(ROOMY, vision_slots=2)
    house.vision.close("see")
    asked = asyncio.create_task(answer(house, about(film())))
    await until(lambda: encodes(house) == 2)
    for _ in range(50):
        await asyncio.sleep(0)
    assert encodes(house) == 2
    house.vision.gate.set()
    await asked
    assert encodes(house) == 8
    assert nothing_is_held(house)


async def test_concurrent_questions_decode_and_encode_a_clip_once():
    house = House(ROOMY, vision_slots=2)
    reader = counting(house)
    ends = await asyncio.gather(*(answer(house, about(film(), f"question {number}?")) for number in range(6)))
    assert reader.clips == 1
    assert encodes(house) == 8
    assert all(len(end.frames) == 8 for _, end in ends)
    assert nothing_is_held(house)


async def test_two_clips_of_the_same_frames_in_another_order_do_not_wait_for_each_other():
    house = House(ROOMY, vision_slots=1)
    frames = given(*GREYS)
    asked = (about(frames), about(frames[::-1]))
    async with asyncio.timeout(10):
        await asyncio.gather(*(answer(house, each) for each in asked))
    assert encodes(house) == 8


async def test_a_clip_costs_the_pixels_that_its_decoder_holds_at_once():
    one = 32 * 24 + 8 * 224 * 224
    house = House(ROOMY, max_pixels_in_flight=2 * one - 1, max_image_pixels=one)
    house.vision.close("see")
    first = asyncio.create_task(answer(house, about(film())))
    await until(lambda: encodes(house) > 0)
    assert house.admission.quota.held.pixels == one
    with pytest.raises(Overloaded, match="limit of pixels to decode"):
        await answer(house, about(film(GREYS[::-1])))
    house.vision.gate.set()
    await first
    await answer(house, about(film(GREYS[::-1])))
    assert house.admission.quota.held == Cost()


async def test_where_an_image_has_room_a_clip_has(house):
    house = House(ROOMY, max_pixels_in_flight=32 * 24, max_image_pixels=32 * 24)
    assert (await estimated(house, about(film()))).refusal is None
    _, end = await answer(house, about(film()))
    assert len(end.frames) == 8
    assert nothing_is_held(house)


async def test_the_log_and_the_metrics_tell_the_frames(house):
    with capture_logs() as logs:
        await answer(house, about(film()))
    (line,) = [each for each in logs if each["event"] == "answered"]
    assert line["frames"] == 8
    assert house.counted("glimpse_clip_frames_sum") == 8


async def test_of_a_scene_that_changes_the_frames_that_differ_are_looked_at(house):
    house.vision.sees_patches = True
    clip = square_at(0, 0, 0, 0, 90, 90, 90, 180, 180, 180)
    _, end = await answer(house, about(clip, sampling="change"))
    assert indices(end) == [0, 4, 7]
    assert encodes(house) == 10
    _, again = await answer(house, about(clip, "what else?", sampling="change"))
    assert indices(again) == [0, 4, 7]
    assert (again.cache, encodes(house)) == ("hit", 10)


async def test_a_still_clip_costs_one_frame(house):
    house.vision.sees_patches = True
    grain = np.random.default_rng(1)
    pictures = [
        Pillow.fromarray(np.full((32, 32), 100, np.uint8) + grain.integers(0, 2, (32, 32), np.uint8), "L")
        for _ in range(6)
    ]
    _, end = await answer(house, about(animated([each.convert("P") for each in pictures]), sampling="change"))
    assert indices(end) == [0]
    assert end.visual_tokens == 32


async def test_of_more_changes_than_frames_the_largest_are_looked_at(house):
    house.vision.sees_patches = True
    pictures = []
    for height in (0, 20, 220, 180):
        picture = Pillow.new("P", (224, 224), 30)
        ImageDraw.Draw(picture).rectangle((0, 0, 223, height), 255)
        pictures.append(picture)
    _, every = await answer(house, about(animated(pictures), sampling="change"))
    _, some = await answer(house, about(animated(pictures), sampling="change", frames=2))
    assert indices(every) == [0, 1, 2, 3]
    assert len(some.frames) == 2
    assert indices(some)[0] == 0


async def test_a_clip_resampler_reads_all_frames_at_once(whole):
    _, end = await answer(whole, about(film()))
    assert whole.vision.calls == ["encode 1"] * 8 + ["attend_clip 8"]
    assert whole.vision.times == [pytest.approx([number / 7 for number in range(8)])]
    assert end.visual_tokens == 64
    assert shades(whole) == [pytest.approx(np.mean(GREYS))]
    assert (indices(end), end.cache, end.vision_tokens) == (list(range(8)), "miss", 8 * 64)
    assert not end.reduced
    _, again = await answer(whole, about(film(), "how many?"))
    assert whole.vision.calls[9:] == ["attend_clip 8"]
    assert again.cache == "hit"
    assert nothing_is_held(whole)


async def test_a_repeat_of_a_whole_clip_needs_only_the_llm():
    house = House(CLIPS, visual_cache_bytes=10_000_000)
    await answer(house, about(film()))
    _, end = await answer(house, about(film()))
    assert house.vision.calls == ["encode 1"] * 8 + ["attend_clip 8"]
    assert (end.cache, end.visual_tokens, len(end.frames)) == ("hit", 64, 8)
    await answer(house, about(film(), budget=Budget((64, 100))))
    assert house.vision.calls[9:] == ["attend_clip 8"]  # with another budget there are other visual tokens
    assert Budget((64, 100), (64, 64)) in house.vision.budgets


async def test_a_whole_clip_under_strain_has_fewer_frames_and_a_smaller_budget(whole):
    whole.admission.fidelity = Strain(3)
    _, end = await answer(whole, about(film()))
    assert len(end.frames) == 4
    assert end.reduced


async def test_a_whole_clip_stands_beside_images(whole):
    image, clip = ImageBytes(png((77, 77, 77))), Clip(ImageBytes(film((250, 40))))
    _, end = await answer(whole, request(parts=(image, clip, Text("which?"))))
    assert shades(whole) == [77, 145]
    assert (end.visual_tokens, len(end.relevance), len(end.frames)) == (96, 1, 2)


@pytest.mark.parametrize("visual_tokens", [(32, 32), (96, 128)])
async def test_visual_tokens_that_a_resampler_never_makes_are_refused(visual_tokens):
    house = House(replace(CLIPS, visual_tokens=(32, 128), max_positions=600))
    budget = Budget((64, 256), visual_tokens)
    with pytest.raises(InvalidRequest, match=r"is without 64, which is what tiny makes of a video") as refused:
        await answer(house, about(film(), budget=budget, gave_budget=(True, True)))
    assert refused.value.param == "budget.visual_tokens"
    image, clip = ImageBytes(png((77, 77, 77))), Clip(ImageBytes(film((250, 40))))
    _, end = await answer(house, request(parts=(image, clip, Text("which?")), budget=budget))  # it is the image's
    assert visual_tokens[0] <= end.visual_tokens - 64 <= visual_tokens[1]
    _, end = await answer(house, about(film(), budget=Budget((64, 256), (32, 64)), gave_budget=(True, True)))
    assert end.visual_tokens == 64
    _, end = await answer(house, about(film(), budget=budget, gave_budget=(True, False)))  # the model's default
    assert end.visual_tokens == 64
    house.reader.close()


async def test_more_frames_than_the_resampler_reads_are_refused_by_the_field_that_was_sent(whole):
    small = House(replace(CLIPS, clip=replace(CLIPS.clip, frames=8)))
    nine = tuple(ImageBytes(png((number, 0, 0))) for number in range(9))
    for source, changes, param in [(nine, {"frames": 9}, "frames"), (film(), {"frames": 9}, "video_frames")]:
        with pytest.raises(InvalidRequest, match="9") as refused:
            await answer(small, about(source, **changes))
        assert refused.value.param == param
    small.reader.close()


async def test_a_long_clip_costs_a_resampler_no_more_visual_tokens(whole):
    _, end = await answer(whole, about(film(GREYS * 4), frames=32))
    assert len(end.frames) == 32
    assert end.visual_tokens == 64
    assert whole.vision.calls.count("encode 1") == 8  # of 32 frames, 8 are different


async def test_frames_beyond_one_message_are_refused_before_anything_is_decoded():
    house = House(replace(CLIPS, vision_width=8192))
    reader = counting(house)
    with pytest.raises(InvalidRequest, match="video_frames is 32: tiny looks at 1 to 7 frames") as refused:
        await answer(house, about(film(), frames=32))
    assert refused.value.param == "video_frames"
    assert reader.clips == 0
    _, end = await answer(house, about(film()))
    assert len(end.frames) == 7


async def estimated(house: House, asked: Request) -> Estimate:
    with house.admission.reservation("") as reservation:
        return await house.pipeline.estimate(asked, reservation)


async def test_an_estimate_counts_the_frames_and_decodes_nothing(house):
    reader = counting(house)
    new = await estimated(house, about(film(), frames=4))
    assert (new.visual_tokens, new.vision_tokens) == ((128, 128), (4 * 64, 4 * 256))
    assert new.cost.pixels == 32 * 24 + 4 * 224 * 224
    assert (new.clip.frames, new.clip.known, new.clip.nbytes) == (4, False, len(film()))
    assert reader.clips == 0
    _, end = await answer(house, about(film(), frames=4))
    known = await estimated(house, about(ImageId(end.clip_id), frames=4))
    assert (known.clip.known, known.cost.pixels, known.clip.id) == (True, 0, end.clip_id)
    assert known.prompt_tokens == end.prompt_tokens
    house.admission.fidelity = Strain(4)
    strained = await estimated(house, about(film()))
    assert (strained.clip.frames, strained.reduced) == (4, True)


async def test_an_estimate_of_frames_counts_those_that_are_new(house):
    await answer(house, request(image=png((30, 30, 30))))
    told = await estimated(house, about(given(240, 30, 90)))
    assert (told.clip.frames, told.clip.known, told.clip.id) == (3, False, "")
    assert told.images == ()
    with pytest.raises(InvalidImage) as wrong:
        await estimated(house, about(png()))
    assert wrong.value.param == "video"


@pytest.mark.parametrize("by_id", [False, True])
async def test_what_is_no_video_is_refused_before_it_costs_anything(house, by_id):
    junk: ImageBytes | ImageId = ImageBytes(png())
    if by_id:
        junk = ImageId((await house.keep_image(png())).id)
    house.admission.quota.limits = Cost(10**9, 0, 10**9)  # whatever needs pixels is refused
    with pytest.raises(InvalidImage, match=r"not a video .* an image \(PNG\); send MP4") as wrong:
        await answer(house, about(junk))
    assert wrong.value.param == "video"
    assert nothing_is_held(house)


async def test_an_estimate_refuses_what_the_answer_would_by_the_header(house):
    large = replace(house.reader.limits, max_pixels=32 * 24 - 1)
    house.pipeline.models.models[0].estimator.limits = house.reader.limits = large
    with pytest.raises(TooLarge, match="the video has 32x24 pixels") as estimate:
        await estimated(house, about(film()))
    house.reader.close()
    house.reader = house.pipeline.reader = house.pipeline.pixels.reader = ImageReader(large, threads=1)
    with pytest.raises(TooLarge) as told:
        await answer(house, about(film()))
    assert (estimate.value.message, estimate.value.param) == (told.value.message, "video")


async def test_an_estimate_for_a_resampler_has_its_budget(whole):
    told = await estimated(whole, about(film()))
    assert (told.visual_tokens, told.vision_tokens) == ((64, 64), (64, 256))


async def test_a_video_is_checked_and_kept_once(house):
    reader = counting(house)
    kept = await house.keep_image(clips.film(count=12))
    assert (kept.width, kept.height) == (320, 240)
    assert (reader.clips, reader.wanted) == (1, 8)
    _, end = await answer(house, about(ImageId(kept.id)))
    assert (len(end.frames), end.clip_id) == (8, kept.id)
    with pytest.raises(InvalidImage) as broken:
        await house.keep_image(clips.film(count=12)[:400])
    assert broken.value.param == "video"
    assert nothing_is_held(house)


async def test_an_upload_of_a_broken_video_is_charged_its_image():
    house, data = House(ROOMY, quota_images_per_minute=1), clips.film(count=2)[:400]
    for error in (InvalidImage, QuotaExceeded):
        with house.pipeline.reservation("a") as reservation, pytest.raises(error):
            await house.pipeline.keep_image(data, reservation)
        await house.quotas.settle()


@pytest.mark.parametrize(("data", "what"), [(clips.film(count=2), "video"), (png(), "image")])
async def test_an_upload_that_is_not_decoded_in_time_says_what_it_is(data, what):
    house = House(ROOMY, default_timeout_s=0.05)
    house.pipeline.reader = house.pipeline.pixels.reader = stalled = Stalled(house.reader.limits, threads=1)
    stalled.goes_on = asyncio.Event()
    with pytest.raises(DeadlineExceeded, match=rf"^the {what} was not decoded within 0\.05 s"):
        await house.keep_image(data)
    stalled.goes_on.set()
    await until(lambda: nothing_is_held(house))


class Stalled(ImageReader):
    """Refuses everything when `goes_on` is set."""

    goes_on: asyncio.Event

    async def decode_clip(self, *_):
        await self.goes_on.wait()
        raise InvalidImage("refused")

    async def begin_decode(self, *_):
        return asyncio.create_task(self.decode_clip())


async def test_a_clip_counts_as_its_frames_in_the_tenant_s_quota():
    house = House(ROOMY, quota_images_per_minute=12)
    asked = about(film(), frames=8, tenant="a")
    with house.pipeline.reservation("a") as reservation:
        assert [event async for event in house.pipeline.answer(asked, reservation)]
    with (
        house.pipeline.reservation("a") as reservation,
        pytest.raises(QuotaExceeded, match="send fewer images, or lower video_frames"),
    ):
        [event async for event in house.pipeline.answer(asked, reservation)]


async def test_frames_that_load_leaves_out_are_not_charged():
    house = House(ROOMY, quota_images_per_minute=40)
    house.admission.fidelity = Strain(3)
    asked = about(given(*range(0, 96, 3)), frames=32, tenant="a")
    with house.pipeline.reservation("a") as reservation:
        *_, end = [event async for event in house.pipeline.answer(asked, reservation)]
    assert (len(end.frames), end.reduced) == (4, True)
    await house.quotas.settle()
    with house.pipeline.reservation("a") as reservation, pytest.raises(QuotaExceeded, match="has 36 left"):
        async with reservation.account.charged(Use(images=37)):
            pass


async def test_two_requests_that_wait_for_one_clip_have_errors_of_their_own(house):
    stalled = Stalled(house.reader.limits, threads=1)
    stalled.goes_on = asyncio.Event()
    house.pipeline.reader = house.pipeline.pixels.reader = stalled
    asking = [asyncio.create_task(answer(house, about(film()))) for _ in range(2)]
    await turns()
    stalled.goes_on.set()
    errors = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(error) for error in errors] == [InvalidImage] * 2
    assert errors[0] is not errors[1]
    assert [(error.message, error.param) for error in errors] == [("refused", None)] * 2


async def test_a_question_whose_comparison_encoded_frames_is_no_follow_up_to_the_llm(house):
    house.vision.sees_patches = True
    clip = square_at(0, 0, 0, 90, 90)
    await answer(house, about(clip, sampling="change"))
    assert house.counted("glimpse_request_queue_time_seconds_count", kind="multi_image") == 1
    await answer(house, about(clip, "and then?", sampling="change"))
    assert house.counted("glimpse_request_queue_time_seconds_count", kind="follow_up") == 1


async def test_a_clip_s_pixels_are_not_held_while_its_question_waits_for_the_llm(house):
    scheduler = house.admission.scheduler
    claim = Claim(Resource.LLM, house.admission.row_tokens * Engines().llm_rows, Kind.FOLLOW_UP, 0.0, 1e9)
    scheduler.submit(claim, time.monotonic())
    scheduler.schedule(time.monotonic())
    house.vision.close("see")
    asked = asyncio.create_task(answer(house, about(film())))
    await until(lambda: encodes(house))
    reel = weakref.ref(house.pipeline.clips.reel(Image.of(film()).digest, 8))
    gc.collect()
    assert reel() is not None
    house.vision.gate.set()
    await until(lambda: house.admission.scheduler.waiting(Kind.MULTI_IMAGE) and encodes(house) == 8)
    gc.collect()
    assert reel() is None
    scheduler.release(claim, time.monotonic())
    await cancelled(asked)


async def test_a_picture_that_is_an_image_and_a_frame_has_the_same_visual_tokens(house):
    """Two calls of a GPU for one picture can differ in their last bits."""
    house.vision.jitter = 1e-3
    parts = (ImageBytes(png((77, 77, 77))), Clip(given(250, 77, 77)), Text("which?"))
    await answer(house, request(parts=parts))
    prompt = house.language.prompts[-1]
    require_consistent(prompt)
    assert shades(house) == pytest.approx([77, 250, 77], abs=0.1)
    image, _, frame, _ = np.split(prompt.visual_tokens, 4)
    assert np.array_equal(image, frame)


async def test_the_frames_that_were_rounded_decide_which_visual_tokens_of_a_clip_are_the_same():
    """A frame whose features this request encoded is exact, and one that was kept is rounded."""
    house = House(CLIPS, feature_cache_dtype="int8")
    for known in (40, 250):
        house.pipeline.features = house.pipeline.models.models[0].vision_stage.features = FeatureCache(
            10_000_000, house.metrics, as_int8=True
        )
        await answer(house, request(image=png((known,) * 3)))
        await answer(house, about(given(250, 40)))
    one, other = (set(prompt.extra_ids.tolist()) - {0} for prompt in house.language.prompts[1::2])
    assert len(one) == len(other) == 64
    assert not one & other


class Watched(np.ndarray):
    """Features that tell which threads convert them."""

    threads: ClassVar[set[threading.Thread]] = set()

    def astype(self, *args, **kwargs):
        self.threads.add(threading.current_thread())
        return super().astype(*args, **kwargs)


async def test_frames_are_compared_in_a_thread(house):
    """On the loop, 32 frames would keep all other requests waiting."""
    plain = house.vision._features

    def watched(image: np.ndarray) -> VisionFeatures:
        features = plain(image)
        return replace(features, features=features.features.view(Watched))

    house.vision._features = watched
    await answer(house, about(film(), sampling="change"))
    assert Watched.threads
    assert threading.main_thread() not in Watched.threads


class Held(Counting):
    """Decodes clips when `goes_on` is set."""

    goes_on: asyncio.Event

    async def decode_clip(self, data: bytes, most: int) -> DecodedClip:
        clip = await super().decode_clip(data, most)
        await self.goes_on.wait()
        return clip


def held(house: House) -> Held:
    reader = Held(house.reader.limits, threads=1)
    reader.goes_on = asyncio.Event()
    house.reader.close()
    house.reader = house.pipeline.reader = house.pipeline.pixels.reader = reader
    return reader


async def test_a_decoding_goes_on_when_the_request_that_began_it_leaves(house):
    reader = held(house)
    leads = asyncio.create_task(answer(house, about(film())))
    await until(lambda: reader.clips)
    follows = asyncio.create_task(answer(house, about(film(), "how many?")))
    await until(lambda: house.admission.scheduler.used(Resource.VISION) == 2)
    await cancelled(leads)
    assert house.admission.scheduler.used(Resource.VISION) == 2
    assert house.admission.quota.held.pixels == 2 * (32 * 24 + 8 * 224**2)  # those of the decoding too
    reader.goes_on.set()
    _, end = await follows
    assert (reader.clips, len(end.frames)) == (1, 8)
    assert nothing_is_held(house)


async def test_what_was_decoded_for_a_request_that_has_left_is_known_later(house):
    reader = held(house)
    leaves = asyncio.create_task(answer(house, about(film())))
    await until(lambda: reader.clips)
    await cancelled(leaves)
    assert house.admission.scheduler.used(Resource.VISION) == 1
    reader.goes_on.set()
    await until(lambda: nothing_is_held(house))
    assert len(house.pipeline.clips.frames(Image.of(film()).digest, 8)) == 8


async def test_a_decoding_ends_with_the_service(house):
    reader = held(house)
    asked = asyncio.create_task(answer(house, about(film())))
    await until(lambda: reader.clips)
    decoding, _ = house.pipeline.clips.reel(Image.of(film()).digest, 8).decoding(lambda: None)
    house.admission.end()
    with pytest.raises(ShuttingDown):
        await asked
    with pytest.raises(asyncio.CancelledError):
        await decoding
    assert nothing_is_held(house)


async def test_a_file_that_cannot_be_decoded_is_tried_once_for_all_that_wait(house):
    reader = counting(house)
    broken = (about(film()[:200], f"question {number}?") for number in range(house.admission.vision_slots))
    ends = await asyncio.gather(*(answer(house, each) for each in broken), return_exceptions=True)
    assert all(isinstance(each, InvalidImage) and each.param == "video" for each in ends)
    assert reader.clips == 1
    assert nothing_is_held(house)


LONG = tuple(range(0, 240, 6))  # 40 frames: among 4 of them that are evenly spaced are others than among 8


async def test_under_strain_the_frames_are_some_of_those_that_are_known(house):
    reader = counting(house)
    _, before = await answer(house, about(film(LONG)))
    house.admission.fidelity = Strain(3)
    _, end = await answer(house, about(film(LONG), "how many?"))
    assert (reader.clips, encodes(house)) == (1, 8)
    assert indices(end) == [indices(before)[place] for place in (0, 2, 5, 7)]
    assert end.reduced
    frames = given(*LONG)
    house.admission.fidelity = Strain(0)
    _, before = await answer(house, about(frames, frames=8))
    house.admission.fidelity = Strain(3)
    _, end = await answer(house, about(frames, "how many?", frames=8))
    assert encodes(house) == 16
    assert set(indices(end)) < set(indices(before))


async def test_under_strain_frames_whose_features_are_known_are_not_decoded_again(house):
    """The 4 frames of an earlier question are among the 8 that this one asks for."""
    reader = counting(house)
    _, before = await answer(house, about(film(), frames=4))
    house.admission.fidelity = Strain(3)
    _, end = await answer(house, about(film(), "how many?"))
    assert (reader.clips, encodes(house)) == (1, 4)
    assert indices(end) == indices(before) == [0, 2, 5, 7]
    assert end.reduced


async def test_under_strain_a_new_file_is_decoded_for_fewer_frames(house):
    reader = counting(house)
    house.admission.fidelity = Strain(3)
    _, end = await answer(house, about(film(LONG)))
    assert (reader.clips, reader.wanted, len(end.frames), end.reduced) == (1, 4, 4, True)
    _, short = await answer(house, about(film((1, 200, 9))))
    assert len(short.frames) == 3


async def test_under_strain_a_resampler_reads_all_frames_whose_features_are_known(whole):
    reader = counting(whole)
    await answer(whole, about(film(LONG)))
    whole.admission.fidelity = Strain(3)
    _, end = await answer(whole, about(film(LONG), "how many?"))
    assert (reader.clips, encodes(whole), len(end.frames)) == (1, 8, 8)
    assert whole.vision.calls[-1] == "attend_clip 8"


async def test_under_strain_a_repeat_of_a_whole_clip_needs_only_the_llm():
    house = House(CLIPS, visual_cache_bytes=10_000_000, feature_cache_bytes=0)
    await answer(house, about(film(LONG)))
    calls = list(house.vision.calls)
    house.admission.fidelity = Strain(3)
    _, end = await answer(house, about(film(LONG)))
    assert house.vision.calls == calls
    assert (len(end.frames), end.reduced) == (8, False)


async def test_under_strain_changes_that_are_known_to_a_resampler_are_all_read(whole):
    whole.vision.sees_patches = True
    clip = square_at(0, 90, 0, 90, 180, 0)
    _, before = await answer(whole, about(clip, sampling="change"))
    whole.admission.fidelity = Strain(3)
    _, end = await answer(whole, about(clip, "how many?", sampling="change"))
    assert len(before.frames) == 6
    assert indices(end) == indices(before)


async def test_other_numbers_of_known_frames_need_no_decoding(house):
    reader = counting(house)
    await answer(house, about(film()))
    _, end = await answer(house, about(film(), frames=3))
    assert (reader.clips, encodes(house)) == (1, 8)
    assert [frame.time_s for frame in end.frames] == pytest.approx([0, 0.4, 0.7])


async def test_a_scene_that_comes_back_is_encoded_once_of_any_number_of_frames(house):
    await answer(house, about(film((90, 200) * 6), frames=1))
    _, end = await answer(house, about(film((90, 200) * 6), frames=12))
    assert len(end.frames) == 12
    assert encodes(house) == 2


async def test_an_upload_and_a_question_decode_a_video_once(house):
    reader, data = held(house), clips.film(count=12)
    kept = asyncio.create_task(house.keep_image(data))
    await until(lambda: reader.clips)
    asked = asyncio.create_task(answer(house, about(data)))
    await until(lambda: house.admission.scheduler.used(Resource.VISION) == 2)
    reader.goes_on.set()
    _, end = await asked
    assert (await kept).id == end.clip_id
    assert reader.clips == 1
    assert nothing_is_held(house)


async def test_an_upload_of_a_video_waits_for_a_slot_and_reserves_the_pixels_of_its_frames_while_they_are_decoded():
    house, data = House(ROOMY, vision_slots=1), clips.film(count=12)
    reader = held(house)
    cost = clip_cost(data, 8, house.reader.limits.max_pixels)
    kept = asyncio.create_task(house.keep_image(data))
    await until(lambda: reader.clips)
    assert (house.admission.scheduler.used(Resource.VISION), house.admission.quota.held.pixels) == (1, cost)
    second = asyncio.create_task(house.keep_image(clips.film(count=5)))
    await until(lambda: house.admission.scheduler.waiting(Kind.SINGLE_IMAGE))
    assert reader.clips == 1
    reader.goes_on.set()
    await asyncio.gather(kept, second)
    assert nothing_is_held(house)
    reader.close()


class Paid(ImageReader):
    """Notes who pays for what it decodes."""

    def __init__(self, reader: ImageReader) -> None:
        super().__init__(reader.limits, threads=1)
        self.payers: list[str] = []

    async def begin_decode(self, *given: object) -> asyncio.Future[Decoded]:
        self.payers.append(current.get().tenant)
        return await super().begin_decode(*given)

    async def decode_clip(self, data: bytes, most: int) -> DecodedClip:
        self.payers.append(current.get().tenant)
        return await super().decode_clip(data, most)


@pytest.mark.parametrize(("data", "other"), [(film(), film((1, 2))), (png(), png((1, 2, 3)))], ids=["video", "image"])
async def test_the_tenant_that_sends_an_image_or_a_video_pays_for_its_decoding(data, other):
    house = House(ROOMY)
    house.reader.close()
    house.reader = house.pipeline.reader = house.pipeline.pixels.reader = reader = Paid(house.reader)
    house.metrics.costs.payer("before")  # another request, in this context
    for tenant, sent in (("acme", data), ("other", other)):
        with house.pipeline.reservation(tenant) as reservation:
            await house.pipeline.keep_image(sent, reservation)
    assert reader.payers == ["acme", "other"]
    reader.close()


async def test_an_upload_decodes_no_more_frames_than_a_resampler_reads():
    house = House(replace(CLIPS, clip=ClipResampler(64, 4, (64, 256))))
    reader = counting(house)
    await house.keep_image(clips.film(count=12))
    assert reader.wanted == 4
    house.reader.close()


@pytest.mark.parametrize("leaves", [True, False], ids=["the caller leaves", "the deadline passes"])
async def test_frames_that_were_encoded_are_charged_although_the_look_fails(leaves):
    house = House(ROOMY, quota_images_per_minute=8, vision_slots=3)
    await answer(house, request())  # starts the decoder
    house.vision.calls.clear()
    house.vision.close("see")
    with house.pipeline.reservation("a") as reservation:
        asked = about(film(), frames=8, tenant="a", timeout_s=30.0 if leaves else 1.0)
        answering = asyncio.create_task(drained(house, asked, reservation))
        await until(lambda: encodes(house) == 3)
        if leaves:
            await cancelled(answering)
        else:
            with pytest.raises(DeadlineExceeded):
                await answering
    house.vision.gate.set()
    await house.quotas.settle()
    with house.pipeline.reservation("a") as reservation, pytest.raises(QuotaExceeded, match="has 5 left"):
        await drained(house, about(film(), frames=6, tenant="a"), reservation)
    with house.pipeline.reservation("a") as reservation:
        await drained(house, about(film(), frames=5, tenant="a"), reservation)


async def drained(house: House, asked: Request, reservation: Reservation) -> None:
    async with aclosing(house.pipeline.answer(asked, reservation)) as events:
        async for _ in events:
            pass


@pytest.mark.parametrize(
    ("clip_weights", "calibrated_for"), [(False, False), (False, True), (True, False), (True, True)]
)
async def test_clips_and_several_images_are_answered_by_the_weights_for_them(clip_weights, calibrated_for):
    """One image is not, also beside earlier questions about it. Each has a confidence if it was calibrated for it."""
    house = House(replace(ROOMY, clip_weights=clip_weights, confidence=calibrated(4, several=calibrated_for)))
    image, other, blue = ImageBytes(png()), ImageBytes(png((1, 2, 3))), Text("blue?")
    earlier = (Exchange((image, Text("red?")), "yes"),)
    for parts, exchanges, several in (
        ((image, blue), (), False),
        ((blue,), earlier, False),
        ((image, other, blue), (), True),
        ((image, image, blue), (), True),
        ((other, blue), earlier, True),
        ((Clip(ImageBytes(film())), blue), (), True),
        ((image, Clip(ImageBytes(film())), blue), (), True),
    ):
        _, end = await answer(house, request(parts=parts, exchanges=exchanges))
        assert house.language.prompts[-1].clip_weights == (clip_weights and several)
        of_clip = any(isinstance(part, Clip) for part in parts)
        is_sure = calibrated_for if clip_weights and several else not of_clip
        assert (end.confidence is not None) == is_sure
        assert house.language.sampling[-1].log_probs == is_sure


async def test_a_clips_confidence_comes_from_the_answer_and_how_familiar_its_frames_are():
    house = House(replace(CLIPS, clip_weights=True, confidence=calibrated(4, several=True)))
    house.language.say("")  # the end's token alone, whose log probability is 0
    _, clip = await answer(house, about(film()))
    assert clip.confidence is not None
    calibration = house.pipeline.models.models[0].card.confidence
    mean = np.mean([calibration.strangeness(frame) for frame in house.vision.shown])
    expected = calibration.confidence_of_several(0.0, float(mean), is_clip=True)
    assert clip.confidence.value == pytest.approx(expected.value)
    assert clip.confidence.familiar == pytest.approx(expected.familiar)
    _, again = await answer(house, about(film()))
    assert again.confidence == clip.confidence


async def test_a_least_confidence_of_several_images_is_refused_where_other_weights_answer():
    asked = request(parts=(ImageBytes(png()), ImageBytes(png()), Text("same?")), min_confidence=0.5)
    _, end = await answer(House(replace(ROOMY, confidence=calibrated(4))), asked)
    assert end.abstained is not None
    with pytest.raises(InvalidRequest, match="of several images: confidence is calibrated for one image") as refused:
        await answer(House(replace(ROOMY, clip_weights=True, confidence=calibrated(4))), asked)
    assert (refused.value.param, refused.value.code) == ("min_confidence", "confidence_not_supported")
    _, end = await answer(House(replace(ROOMY, clip_weights=True, confidence=calibrated(4, several=True))), asked)
    assert end.abstained is not None
