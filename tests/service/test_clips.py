"""A clip is looked at frame by frame, or as a whole, and what is known of it is not worked out again."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageDraw
from structlog.testing import capture_logs

from service.admission.quota import Cost
from service.core.answer import Finished
from service.core.errors import InvalidImage, InvalidRequest, Overloaded, QuotaExceeded
from service.core.estimate import Estimate
from service.core.request import Budget, Clip, Exchange, ImageBytes, ImageId, ImageUrl, Request, Text
from service.media.clip import DecodedClip
from service.media.reader import ImageReader
from tests.service.test_pipeline import answer, nothing_is_held, request, shades
from tests.support import clips
from tests.support.calibrations import calibrated
from tests.support.fakes import CARD, CLIPS, CLOSER, House, Strain, cancelled, png, until

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
    """Counts the clips that it decodes."""

    clips = 0

    async def decode_clip(self, data: bytes, most: int) -> DecodedClip:
        self.clips += 1
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


async def test_two_clips_are_refused(house):
    clip = Clip(ImageBytes(film()))
    with pytest.raises(InvalidRequest, match="one video at a time") as refused:
        await answer(house, request(parts=(clip, clip, Text("which?"))))
    assert refused.value.param == "video"


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
    assert nothing_is_held(house)


async def test_under_strain_fewer_frames_are_looked_at_and_that_is_told(house):
    await answer(house, about(film()))
    house.admission.controller = Strain(3)
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


async def test_a_clip_costs_the_pixels_of_its_frames_and_counts_as_its_frames():
    house = House(ROOMY, max_pixels_in_flight=32 * 24 * 7, max_image_pixels=32 * 24)
    with pytest.raises(Overloaded, match="pixels"):
        await answer(house, about(film()))
    await answer(house, about(film(), frames=7))
    assert house.admission.quota.held == Cost()


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
    whole.admission.controller = Strain(3)
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


async def estimated(house: House, asked: Request) -> Estimate:
    with house.admission.reservation("") as reservation:
        return await house.pipeline.estimate(asked, reservation)


async def test_an_estimate_counts_the_frames_and_decodes_nothing(house):
    reader = counting(house)
    new = await estimated(house, about(film(), frames=4))
    assert (new.visual_tokens, new.vision_tokens) == ((128, 128), (4 * 64, 4 * 256))
    assert new.cost.pixels == 4 * 32 * 24
    assert (new.clip.frames, new.clip.known, new.clip.nbytes) == (4, False, len(film()))
    assert reader.clips == 0
    _, end = await answer(house, about(film(), frames=4))
    known = await estimated(house, about(ImageId(end.clip_id), frames=4))
    assert (known.clip.known, known.cost.pixels, known.clip.id) == (True, 0, end.clip_id)
    assert known.prompt_tokens == end.prompt_tokens
    house.admission.controller = Strain(4)
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


async def test_an_estimate_for_a_resampler_has_its_budget(whole):
    told = await estimated(whole, about(film()))
    assert (told.visual_tokens, told.vision_tokens) == ((64, 64), (64, 256))


async def test_a_video_is_checked_and_kept_once(house):
    reader = counting(house)
    kept = await house.keep_image(clips.film(count=12))
    assert (kept.width, kept.height) == (320, 240)
    assert reader.clips == 1
    _, end = await answer(house, about(ImageId(kept.id)))
    assert (len(end.frames), end.clip_id) == (8, kept.id)
    with pytest.raises(InvalidImage) as broken:
        await house.keep_image(clips.film(count=12)[:400])
    assert broken.value.param == "video"
    assert nothing_is_held(house)


async def test_a_clip_counts_as_its_frames_in_the_tenant_s_quota():
    house = House(ROOMY, quota_images_per_minute=12)
    asked = about(film(), frames=8, tenant="a")
    with house.pipeline.reservation("a") as reservation:
        assert [event async for event in house.pipeline.answer(asked, reservation)]
    with house.pipeline.reservation("a") as reservation, pytest.raises(QuotaExceeded, match="images"):
        [event async for event in house.pipeline.answer(asked, reservation)]
