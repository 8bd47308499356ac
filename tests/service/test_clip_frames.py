"""Which frames of a clip are looked at, and what the caches call them."""

import asyncio
import gc
from dataclasses import replace

import numpy as np
import pytest

from service.core.vision import Int8Rows, VisionFeatures
from service.media.clip import DecodedClip, DecodedFrame, choosable, spaced
from service.media.store import Image, LoadedClip
from service.vision_stage.changes import (
    CHANGED_PATCHES,
    LEAST_CHANGE,
    Change,
    changes_of,
    difference,
    directions,
    largest,
)
from service.vision_stage.clips import MOST_KNOWN, ClipMemory, changed_key, frames_of, given_frames

FILE = Image.of(b"a file")


def decoded(*greys: int, seconds: float = 1.0) -> DecodedClip:
    frames = tuple(
        DecodedFrame(3 * number, number * seconds, np.full((3, 224, 224), grey, np.uint8))
        for number, grey in enumerate(greys)
    )
    count = frames[-1].index + 1
    times_s = tuple(index * seconds / 3 for index in choosable(count))
    return DecodedClip(32, 24, seconds * len(greys), frames, count, times_s)


def features(*turned: int) -> VisionFeatures:
    """Patches of one direction, but those of these numbers, which are at a right angle to it."""
    rows = np.tile(np.array([1, 0], np.float32), (257, 1))
    rows[[1 + patch for patch in turned]] = (0, 1)
    return VisionFeatures(rows, np.zeros(256), np.zeros(256), np.zeros((13, 16, 16)))


def test_frames_with_equal_pixels_have_one_name():
    frames = frames_of(FILE, decoded(9, 9, 7, 9).frames)
    assert [frame.digest for frame in frames] == [f"{FILE.digest}#{index}" for index in (0, 0, 6, 0)]
    assert [frame.index for frame in frames] == [0, 3, 6, 9]
    assert [frame.at for frame in frames] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_places_in_time_follow_the_times_or_else_the_order():
    clip = decoded(1, 2, 3)
    late = [clip.frames[0], replace(clip.frames[1], time_s=1.5), clip.frames[2]]
    assert [frame.at for frame in frames_of(FILE, late)] == [0, 0.75, 1]
    assert [frame.at for frame in frames_of(FILE, decoded(1, 2, 3, seconds=0).frames)] == [0, 0.5, 1]
    assert [frame.at for frame in frames_of(FILE, decoded(1).frames)] == [0]


def test_given_frames_are_spread_evenly_over_all_of_them():
    images = tuple(Image.of(bytes([number])) for number in range(5))
    frames = given_frames(LoadedClip(None, images), 3)
    assert [(frame.index, frame.at, frame.digest) for frame in frames] == [
        (index, index / 4, images[index].digest) for index in (0, 2, 4)
    ]


def test_a_difference_is_that_of_a_few_patches():
    still = directions(features())
    assert difference(still, still) == 0
    assert difference(still, directions(features(*range(CHANGED_PATCHES - 1)))) == 0
    assert difference(still, directions(features(*range(CHANGED_PATCHES)))) == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
@pytest.mark.parametrize("as_int8", [False, True])
def test_a_patch_without_a_direction_does_not_differ(value, as_int8):
    blank = features(*range(9))
    blank.features[1:10] = value
    if as_int8:
        blank = replace(blank, features=Int8Rows.of(blank.features))
    assert difference(directions(blank), directions(features())) == 0


def test_a_frame_is_compared_once_with_the_last_one_kept():
    """Frames with equal pixels have the same features, which are not compared with themselves."""
    still, moved = features(), features(*range(9))
    assert changes_of([still, still, moved, moved, still]) == [
        Change(0, np.inf),
        Change(2, pytest.approx(1)),
        Change(4, pytest.approx(1)),
    ]


def test_features_kept_as_int8_differ_as_the_exact_ones():
    exact = features(*range(9))
    rounded = VisionFeatures(Int8Rows.of(exact.features), exact.saliency, exact.entropy, exact.texture)
    other = directions(features())
    assert difference(directions(rounded), other) == pytest.approx(difference(directions(exact), other), abs=1e-3)


def test_each_frame_is_compared_with_the_last_one_kept():
    """A slow change is seen once it has gone far enough."""
    angles = np.linspace(0, 1.2, 25)
    frames = []
    for angle in angles:
        rows = np.tile(np.array([np.cos(angle), np.sin(angle)], np.float32), (257, 1))
        frames.append(VisionFeatures(rows, np.zeros(256), np.zeros(256), np.zeros((13, 16, 16))))
    found = changes_of(frames)
    assert found[0] == Change(0, np.inf)
    steps = np.diff([angles[change.place] for change in found])
    assert 2 < len(found) < 10
    assert (1 - np.cos(steps) >= LEAST_CHANGE).all()
    assert (1 - np.cos(steps - 0.05) < LEAST_CHANGE).all()


def test_the_largest_changes_win_and_stay_in_order():
    changes = [Change(0, np.inf), Change(2, 0.3), Change(5, 0.9), Change(7, 0.4)]
    assert largest(changes, 4) == [0, 2, 5, 7]
    assert largest(changes, 3) == [0, 5, 7]
    assert largest(changes, 1) == [0]


def test_what_is_remembered_of_clips_is_bounded():
    memory = ClipMemory()
    memory.keep(FILE, 4, decoded(1, 2))
    for number in range(MOST_KNOWN - 1):
        memory.keep(Image(b"", str(number)), 4, decoded(1))
    assert memory.frames(FILE.digest, 4) is not None  # and so used last
    memory.keep(Image(b"", "one more"), 4, decoded(1))
    assert memory.frames(FILE.digest, 4) is not None
    assert memory.frames("0", 4) is None


def test_a_file_that_was_decoded_once_has_names_for_any_number_of_frames():
    memory = ClipMemory()
    memory.keep(FILE, 4, decoded(*[5] * 12))
    assert memory.has_compared(FILE.digest, 4)
    assert [frame.digest[-2:] for frame in memory.frames(FILE.digest, 4)] == ["#0"] * 12
    for most in (1, 2, 3, *range(5, 33)):
        frames = memory.frames(FILE.digest, most)
        assert [frame.index for frame in frames] == spaced(34, most)
        assert all(frame.digest == f"{FILE.digest}#{frame.index}" for frame in frames)
        assert [frame.time_s for frame in frames] == pytest.approx([frame.index / 3 for frame in frames])
    assert not memory.has_compared(FILE.digest, 8)
    assert memory.frames("another", 8) is None


def test_a_choice_is_that_of_an_encoder_and_of_all_frames():
    frames = frames_of(FILE, decoded(1, 2, 3).frames)
    memory = ClipMemory()
    memory.keep_changes(changed_key("a", frames), [Change(0, np.inf)])
    assert memory.changes(changed_key("a", frames)) == (Change(0, np.inf),)
    assert memory.changes(changed_key("b", frames)) is None
    assert memory.changes(changed_key("a", frames[:2])) is None


async def test_what_was_decoded_lasts_as_long_as_somebody_holds_it():
    memory, calls = ClipMemory(), []

    async def decode() -> DecodedClip:
        calls.append(1)
        await asyncio.sleep(0)
        return decoded(1, 2)

    reel = memory.reel("digest", 4)
    (one, begins), (other, again) = reel.decoding(decode), memory.reel("digest", 4).decoding(decode)
    assert (begins, again) == (True, False)
    assert await one is await other
    assert len(calls) == 1
    del reel, one, other
    gc.collect()
    await memory.reel("digest", 4).decoding(decode)[0]
    assert len(calls) == 2


async def test_a_decoding_that_nobody_waits_for_is_found_until_it_ends():
    memory, goes_on = ClipMemory(), asyncio.Event()

    async def decode() -> DecodedClip:
        await goes_on.wait()
        return decoded(1)

    memory.reel("digest", 4).decoding(decode)
    await asyncio.sleep(0)
    gc.collect()
    decoding, begins = memory.reel("digest", 4).decoding(decode)
    assert not begins
    goes_on.set()
    assert len((await decoding).frames) == 1


async def test_a_decoding_that_fails_is_tried_again_by_the_next():
    reel = ClipMemory().reel("digest", 4)

    async def fails() -> DecodedClip:
        raise ValueError

    async def works() -> DecodedClip:
        return decoded(1)

    with pytest.raises(ValueError):
        await reel.decoding(fails)[0]
    decoding, begins = reel.decoding(works)
    assert begins
    assert len((await decoding).frames) == 1
