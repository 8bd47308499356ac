"""A clip's frames come out right, at their times, the same whichever others are asked for, and within the limits."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from io import BytesIO

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from benchmarks import bombs
from service.core.errors import InvalidImage, TooLarge
from service.core.vision import IMAGE_SIZE
from service.media import clip_header
from service.media.clip import DecodedClip, choosable, clip_cost, decode_clip, is_clip, spaced
from service.media.clip_header import FRAME_PIXELS, MAX_FRAME_PIXELS, video_header
from service.media.decoder import ImageLimits, decode
from service.media.film import Film, _refused
from tests.support import films
from tests.support.clips import (
    animation,
    changed,
    expected_at,
    film,
    gif,
    header_first,
    many_gif_frames,
    repeated,
    scene,
    sound,
    square_at,
    webp_in_part,
)
from tests.support.paths import PROJECT
from tests.support.pictures import LIMITS, encoded, picture

pytestmark = pytest.mark.slow  # together: video is encoded

SCENES = [scene(index, 10) for index in range(10)]
MP4 = film()
WEBM = film("libvpx", "webm", count=12, size=(160, 120))
GIF = animation("GIF", SCENES)
WEBP = animation("WEBP", SCENES)
FILMS = {  # codec, container, and what makes frames hard to find
    "H.264": ("libx264", "mp4", {}),
    "H.264 of many keyframes": ("libx264", "mp4", {"g": "7"}),
    "H.264 of open groups": ("libx264", "mp4", {"x264-params": "open-gop=1:keyint=8:bframes=3:scenecut=0"}),
    "H.264 of fields": ("libx264", "mp4", {"flags": "+ilme+ildct"}),
    "H.264 in Matroska": ("libx264", "matroska", {}),
    "H.264 in MOV": ("libx264", "mov", {}),
    "H.265 of open groups": ("libx265", "mp4", {"x265-params": "open-gop=1:keyint=9:bframes=4:log-level=none"}),
    "MPEG-4": ("mpeg4", "mp4", {"bf": "2"}),
    "VP8 with pictures that are not shown": (
        "libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "10", "g": "12", "cpu-used": "4"},
    ),
    "VP9": ("libvpx-vp9", "webm", {"auto-alt-ref": "1", "lag-in-frames": "10", "g": "12", "cpu-used": "8"}),
    "AV1": ("libsvtav1", "webm", {"preset": "12"}),
}  # fmt: skip


def frames_of(data: bytes, most: int) -> dict[int, np.ndarray]:
    return {frame.index: frame.pixels for frame in decode_clip(data, LIMITS, most).frames}


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [
        (10, 4, [0, 3, 6, 9]),
        (60, 7, [0, 10, 20, 30, 39, 49, 59]),
        (3, 8, [0, 1, 2]),
        (1, 8, [0]),
        (9, 1, [0]),
        (9, 2, [0, 8]),
        (32, 32, list(range(32))),
    ],
)
def test_frames_are_spaced_evenly_from_the_first_to_the_last(count, most, expected):
    assert spaced(count, most) == expected


@pytest.mark.parametrize("kind", FILMS)
def test_a_film_gives_the_right_frames_at_the_right_times_whichever_are_asked_for(kind):
    codec, container, options = FILMS[kind]
    data = film(codec, container, options=options)
    assert is_clip(data)
    clip = decode_clip(data, LIMITS, 30)
    assert (clip.width, clip.height) == (320, 240)
    assert clip.duration_s == pytest.approx(1.0, abs=0.04)
    assert [frame.index for frame in clip.frames] == list(range(30))
    for frame in clip.frames:
        assert frame.time_s == pytest.approx(frame.index / 30, abs=0.001)
        assert frame.pixels.shape == (3, 224, 224)
        assert frame.pixels.dtype == np.uint8
        assert square_at(frame.pixels) == pytest.approx((expected_at(frame.index, 30), 0.44), abs=0.02)
    whole = {frame.index: frame.pixels for frame in clip.frames}
    for most in (1, 2, 3, 5, 8, 13, 16, 32):
        for index, pixels in frames_of(data, most).items():
            assert np.array_equal(pixels, whole[index])


def test_keyframes_let_most_of_a_long_film_alone():
    data = film(count=90, options={"g": "10", "x264-params": "scenecut=0"}, size=(64, 48))
    opened = Film(data, "mov", MAX_FRAME_PIXELS)
    runs = opened.runs(spaced(opened.count, 4))
    opened.close()
    assert [run.wanted for run in runs] == [(0,), (30,), (59,), (89,)]
    assert sum(run.end - run.start for run in runs) < 30


def test_colours_are_those_of_the_scene():
    """Of a film that does not name its colours, BT.601 for small ones. Encoders here write that."""
    pixels = decode_clip(film(options={"crf": "5"}), LIMITS, 1).frames[0].pixels
    assert np.abs(pixels[:, 200, 100].astype(int) - (40, 80, 120)).max() <= 4
    assert np.abs(pixels[:, 95, 15].astype(int) - (250, 220, 10)).max() <= 8


def test_a_frame_is_squashed_as_an_image_is():
    data = film("libx264rgb", count=2, options={"qp": "0"}, size=(300, 200), pix_fmt="rgb24")
    expected = decode(encoded(scene(0, 2, 300, 200)), LIMITS).pixels
    assert np.array_equal(decode_clip(data, LIMITS, 1).frames[0].pixels, expected)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize(
    ("turned", "size", "place"),
    [(90, (240, 320), (0.44, 0.92)), (180, (320, 240), (0.92, 0.56)), (270, (240, 320), (0.56, 0.08))],
)
def test_a_phones_film_is_turned_upright(container, turned, size, place):
    clip = decode_clip(film(turned=turned, container=container, count=4), LIMITS, 2)
    assert (clip.width, clip.height) == size
    assert square_at(clip.frames[0].pixels) == pytest.approx(place, abs=0.02)


def test_a_mirrored_film_is_turned():
    clip = decode_clip(film(flipped=True, count=4), LIMITS, 2)
    assert square_at(clip.frames[0].pixels)[0] == pytest.approx(1 - expected_at(0, 4), abs=0.02)


def test_only_what_an_edit_list_shows_is_numbered():
    def later(elst: bytes) -> bytes:
        entries, duration, start, rate = struct.unpack(">IIiI", elst[4:])
        return elst[:4] + struct.pack(">IIiI", entries, duration, start + 5 * 512, rate)

    data = film("mpeg4", count=20)
    assert b"edts" in data
    clip = decode_clip(changed(data, {b"edts": lambda edts: edts[:8] + later(edts[8:])}), LIMITS, 32)
    assert len(clip.frames) == 15
    assert (clip.frames[0].index, clip.frames[0].time_s) == (0, 0.0)
    assert square_at(clip.frames[0].pixels)[0] == pytest.approx(expected_at(5, 20), abs=0.02)


@pytest.mark.parametrize("data", [GIF, WEBP], ids=["GIF", "WebP"])
def test_an_animation_gives_its_frames_exactly(data):
    whole = frames_of(data, 32)
    assert list(whole) == list(range(10))
    for index, pixels in whole.items():
        squashed = SCENES[index].resize((224, 224), Pillow.Resampling.BICUBIC)
        assert np.array_equal(pixels.transpose(1, 2, 0), np.asarray(squashed))
    for most in range(1, 10):
        for index, pixels in frames_of(data, most).items():
            assert np.array_equal(pixels, whole[index])


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animations_times_are_those_of_its_frames(kind):
    clip = decode_clip(animation(kind, SCENES[:4], [50, 0, 300, 1000]), LIMITS, 8)
    assert [frame.time_s for frame in clip.frames] == pytest.approx([0, 0.05, 0.15, 0.45])  # 0 is shown for 100 ms
    assert clip.duration_s == pytest.approx(1.45)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_what_is_transparent_in_an_animation_lies_on_white(kind):
    clear = [Pillow.new("RGBA", (64, 64), (0, 0, 0, 0)) for _ in range(3)]
    for index, each in enumerate(clear):
        each.paste((255, 0, 0, 255), (20 * index, 20, 20 * index + 20, 40))
    for index, pixels in frames_of(
        animation(kind, clear, disposal=2) if kind == "GIF" else animation(kind, clear), 8
    ).items():
        assert pixels[:, 5, 5].tolist() == [255, 255, 255]
        assert pixels[:, 105, 35 + 70 * index].tolist() == [255, 0, 0]


RED, GREEN, BLUE, WHITE = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
PLACES = ((30, 30), (112, 112), (194, 194))  # in the pixels of a canvas of 60x60: the top left, middle, bottom right


def colours_of(pixels: np.ndarray) -> list[list[int]]:
    return [pixels[:, down, across].tolist() for down, across in PLACES]


@pytest.mark.parametrize("data", [gif(60, 60, (1, 20, 20, 20, 20, 0)), webp_in_part(60, 60, 20, 20, (255, 0, 0))])
def test_what_the_first_frame_leaves_free_is_white_in_an_image_and_in_a_video(data):
    assert colours_of(decode(data, LIMITS).pixels) == [WHITE, RED, WHITE]
    assert colours_of(frames_of(data, 1)[0]) == [WHITE, RED, WHITE]


def test_a_gifs_frames_are_drawn_and_removed_as_in_browsers():
    data = gif(
        60, 60, (1, 0, 0, 60, 60, 0), (2, 0, 0, 20, 20, 2), (3, 40, 40, 20, 20, 3), (2, 20, 20, 20, 20, 0),
        (3, 50, 50, 20, 20, 0),
    )  # fmt: skip
    clip = decode_clip(data, LIMITS, 8)
    assert (clip.width, clip.height) == (60, 60)  # the last frame is cut off at the sides
    assert [colours_of(frame.pixels) for frame in clip.frames] == [
        [RED, RED, RED],
        [GREEN, RED, RED],
        [WHITE, RED, BLUE],
        [WHITE, GREEN, RED],
        [WHITE, GREEN, BLUE],
    ]


def test_a_gif_whose_later_frames_are_larger_than_its_header_says_is_damaged():
    data = gif(60, 60, (1, 0, 0, 60, 60, 0), (2, 0, 0, 61, 60, 0))
    with pytest.raises(InvalidImage, match="the GIF is damaged"):
        decode_clip(data, LIMITS, 8)


def test_a_gifs_comments_never_reach_the_decoder():
    at = GIF.index(b"!\xf9")
    data = GIF[:at] + (b"!\xfe" + (b"\xff" + bytes(255)) * 1000 + b"\0") * 5 + GIF[at:]
    assert all(np.array_equal(pixels, frames_of(GIF, 4)[index]) for index, pixels in frames_of(data, 4).items())


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_a_still_picture_is_a_clip_of_one_frame(kind):
    data = encoded(SCENES[0], kind)
    assert not is_clip(data)
    clip = decode_clip(data, LIMITS, 8)
    assert [(frame.index, frame.time_s) for frame in clip.frames] == [(0, 0.0)]
    assert np.array_equal(clip.frames[0].pixels, decode(data, LIMITS).pixels)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (MP4, True), (WEBM, True), (GIF, True), (WEBP, True), (film(container="mov", count=2), True),
        (encoded(picture()), False), (encoded(picture(), "JPEG"), False), (encoded(picture(), "AVIF"), False),
        (b"", False), (b"GIF89a", False), (b"RIFF\0\0\0\0WEBPVP8X", False), (b"RIFF\0\0\1\0AVI LIST", False),
        (b"#EXTM3U\n", False), (b"ffconcat version 1.0\nfile x", False),
        (GIF.replace(b"NETSCAPE2.0", b"netscape2.0"), True),
    ],
    ids=map(str, range(15)),  # the encoders write other bytes in each process
)  # fmt: skip
def test_clips_are_recognised_by_their_beginning(data, expected):
    assert is_clip(data) is expected


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (MP4, 320 * 240),
        (WEBM, 160 * 120),
        (GIF, 320 * 240),
        (WEBP, 320 * 240),
        (MP4[:100], MAX_FRAME_PIXELS),
        (WEBM[:60], MAX_FRAME_PIXELS),
        (film(container="mp4", container_options={"movflags": "frag_keyframe+empty_moov"}), 320 * 240),
    ],
    ids=map(str, range(7)),
)
def test_a_clip_costs_the_pixels_that_its_decoder_holds_at_once_by_its_header(data, pixels):
    assert clip_cost(data, 8, 50_000_000) == pixels + 8 * 224 * 224
    assert clip_cost(data, 8, 410_000) == 410_000  # no more than an image may cost, for which there is room


@settings(max_examples=300)
@given(
    st.sampled_from(
        [b"", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8X", b"\0\0\0\x08ftyp", b"\x1a\x45\xdf\xa3\x80", MP4[-900:], WEBM[:300]]
    ),
    st.binary(max_size=300),
    st.integers(0, 900),
)
def test_whatever_the_bytes_are_their_header_is_read(start, noise, place):
    for data in (start + noise, start[:place] + noise + start[place + len(noise) :], MP4[:32] + start[:place] + noise):
        assert is_clip(data) in (True, False)
        assert 8 * 224 * 224 < clip_cost(data, 8, 50_000_000) <= MAX_FRAME_PIXELS + 8 * 224 * 224


@pytest.mark.parametrize(
    "data",
    [
        MP4[:32] + bombs.box(b"free") * 1_000_000,
        MP4[:32] + bombs.box(b"moov", bombs.box(b"trak") * 1_000_000),
        MP4[:32] + bombs.box(b"moov", bombs.box(b"trak", bombs.box(b"mdia", bombs.box(b"free") * 1_000_000))),
        WEBM[:40] + b"\x18\x53\x80\x67\x01" + b"\xff" * 7 + b"\xec\x80" * 4_000_000,
        b"GIF89a" + bytes(7) + b"!\xfe\0" * 3_000_000,
    ],
    ids=["boxes", "tracks", "boxes of a track", "elements", "extensions"],
)
def test_a_header_of_millions_of_parts_is_left_after_some(data):
    begun = time.thread_time()
    clip_cost(data, 8, 50_000_000), is_clip(data)
    assert time.thread_time() - begun < 0.1  # a walk of all takes seconds
    with pytest.raises((InvalidImage, TooLarge)):
        decode_clip(data, ImageLimits(), 8)


class Counted(bytes):
    """Bytes that count how often a part of them is read."""

    reads = 0

    def __getitem__(self, at):
        self.reads += 1
        return super().__getitem__(at)


@pytest.mark.parametrize(
    "data",
    [
        b"\x1a\x45\xdf\xa3\x80" + b"\xec\x80" * 200_000,
        b"\x1a\x45\xdf\xa3\x80" + b"\x18\x53\x80\x67\x01" + b"\xff" * 7 + b"\xae\x80" * 200_000,
        MP4[:32] + bombs.box(b"free") * 200_000,
        MP4[:32] + bombs.box(b"moov", bombs.box(b"mdia", bombs.box(b"free") * 16) * 200_000),
        MP4[:32] + bombs.box(b"moov", bombs.box(b"stsd", bytes(8) + bombs.box(b"free") * 16) * 200_000),
    ],
    ids=["before the segment", "tracks", "boxes", "media", "entries"],
)
def test_the_steps_of_a_header_are_bounded_together(data):
    counted = Counted(data)
    video_header(counted)
    assert 4096 <= counted.reads < 20_000  # an element is read with four reads, a box with one or two


def test_the_size_of_a_film_in_thousands_of_fragments_is_read():
    fragmented = film(container_options={"movflags": "frag_keyframe+empty_moov"})
    fragment = fragmented[fragmented.index(b"moof") - 4 : fragmented.index(b"mfra") - 4]
    assert len(fragment) > 100
    many = fragmented + (bombs.box(b"moof") + bombs.box(b"mdat")) * 3000
    assert video_header(many).width == 320
    assert video_header(many).tracks == 1
    assert not video_header(many).is_short
    assert video_header(fragmented + b"\0\0\1\0mdat").is_short  # few enough to be walked to the end


@pytest.mark.parametrize(("width", "height"), [(65_535, 2), (2, 65_535)])
def test_a_side_beyond_the_limit_is_named(width, height):
    film = bytearray(GIF)
    film[6:10] = struct.pack("<HH", width, height)
    with pytest.raises(
        TooLarge, match=r"^the video has \d+x\d+ pixels, the limit of a side is 65,534: cut it"
    ) as wrong:
        decode_clip(bytes(film), ImageLimits(max_side=65_534), 1)
    assert "megapixels" not in wrong.value.message


def absurd(stsd: bytes) -> bytes:
    return stsd[:40] + struct.pack(">HH", 65_500, 65_500) + stsd[44:]


def at_once(stts: bytes) -> bytes:
    return struct.pack(">IIII", 0, 1, struct.unpack_from(">I", stts, 8)[0], 0)


def sharing(data: bytes) -> bytes:
    """An MP4 whose 200 pictures are all the same bytes: nearly the whole file."""
    (offset,) = struct.unpack(">I", data[data.index(b"stco") + 12 :][:4])
    return changed(
        data,
        {
            b"stts": lambda _: struct.pack(">IIII", 0, 1, 200, 512),
            b"stsc": lambda _: struct.pack(">IIIII", 0, 1, 1, 1, 1),
            b"stsz": lambda _: struct.pack(">III", 0, data.index(b"moov") - 4 - offset, 200),
            b"stco": lambda _: struct.pack(">II", 0, 200) + struct.pack(">I", offset) * 200,
        },
    )


def alias(path: bytes) -> bytes:
    """A MOV's reference to a file, as FFmpeg reads it."""
    names = bytes(10) + bytes(28) + bytes(12) + bytes(64) + bytes(16) + bytes(4) + bytes(16)
    told = names + struct.pack(">HH", 2, len(path)) + path + bytes(len(path) % 2) + struct.pack(">HH", 0xFFFF, 0)
    return struct.pack(">I4sI", 12 + len(told), b"alis", 0) + told


LOCKED = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "ab" * 16, "encryption_kid": "cd" * 16}
REFUSED = {
    "nothing": (lambda: b"", InvalidImage, "the video is empty"),
    "too many bytes": (lambda: bytes(2_000_001), TooLarge, "the video has 2,000,001 bytes"),
    "a PNG": (lambda: encoded(picture()), InvalidImage, "looks like an image (PNG); send MP4, MOV, WebM"),
    "an AVI": (lambda: b"RIFF\0\0\1\0AVI LIST", InvalidImage, "looks like an AVI video; send MP4"),
    "a playlist": (lambda: b"#EXTM3U\nfile:///etc/passwd\n", InvalidImage, "looks like plain text"),
    "half an MP4": (lambda: MP4[: len(MP4) // 2], InvalidImage, "damaged or cut short"),
    "half an MP4 whose header is first": (
        lambda: header_first(MP4)[:-500], InvalidImage, "damaged or cut short",
    ),
    "half a WebM": (lambda: WEBM[: len(WEBM) // 2], InvalidImage, "damaged or cut short"),
    "half a GIF": (lambda: GIF[: len(GIF) // 2], InvalidImage, "damaged or cut short"),
    "half a WebP": (lambda: WEBP[: len(WEBP) // 2], InvalidImage, "damaged or cut short"),
    "a beginning": (lambda: MP4[:32], InvalidImage, "damaged or cut short"),
    "sound": (sound, InvalidImage, "no video in it"),
    "sound in WebM": (lambda: sound("webm"), InvalidImage, "no video in it"),
    "an encrypted video": (lambda: film(container_options=LOCKED), InvalidImage, "is encrypted"),
    "another codec": (lambda: film("mjpeg", "mov", 3, pix_fmt="yuvj420p"), InvalidImage, "codec (mjpeg) is not read"),
    "an absurd size": (lambda: changed(MP4, {b"stsd": absurd}), TooLarge, "has 65500x65500 pixels"),
    "large frames": (lambda: film(count=2, size=(2048, 2000)), TooLarge, "has 2048x2000 pixels (4.1 megapixels)"),
    "frames at one time": (lambda: changed(film("mpeg4", count=9), {b"stts": at_once, b"ctts": lambda _: bytes(8)}),
                           InvalidImage, "have no times"),
    "thousands of frames without keyframes": (lambda: repeated(3100, keyframes=False), TooLarge, "3,101 pictures"),
    "tens of thousands of frames": (lambda: repeated(36_001, keyframes=True), TooLarge, "more than 36,000 pictures"),
    "many streams": (lambda: repeated(1, keyframes=True, streams=40), InvalidImage, "has 40 tracks"),
    "frames that share their bytes": (lambda: sharing(film("mpeg4", count=9)), InvalidImage, "share their bytes"),
    "a GIF of thousands of frames": (lambda: many_gif_frames(3001, 8, 8), TooLarge, "3,001 pictures"),
    "a GIF of large frames": (lambda: many_gif_frames(2, 3000, 3000), TooLarge, "has 3000x3000 pixels"),
    "a GIF of many large frames": (lambda: many_gif_frames(1200, 2000, 2000), TooLarge, "4,800 megapixels"),
    "a GIF of many blocks": (
        lambda: many_gif_frames(1, 8, 8)[:-1] + b"!\xfe" + b"\1x" * 270_000 + b"\0;", InvalidImage, "262,144 blocks",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_clip_or_over_a_limit_is_refused_with_a_reason(kind):
    made, error, message = REFUSED[kind]
    data = made()
    with pytest.raises(error) as caught:
        decode_clip(data, LIMITS, 8)
    assert message in caught.value.message
    assert caught.value.param == "video"


def test_a_frame_of_4k_is_read_and_a_larger_one_is_not():
    def of(width: int, height: int) -> DecodedClip:
        return decode_clip(film("mpeg4", count=1, size=(width, height)), ImageLimits(), 1)

    assert (of(3840, 2160).width, of(2160, 3840).width) == (3840, 2160)
    with pytest.raises(TooLarge, match=r"7680x4320 pixels \(33\.2 megapixels\), the limit is 9\.4"):
        of(7680, 4320)


def test_a_header_that_tells_small_frames_does_not_let_large_ones_in():
    data = film(count=2, size=(2048, 2000))

    def small(stsd: bytes) -> bytes:
        return stsd[:40] + struct.pack(">HH", 64, 64) + stsd[44:]

    with pytest.raises((TooLarge, InvalidImage)):
        decode_clip(changed(data, {b"stsd": small}), LIMITS, 2)


def of_16_by_16(stsd: bytes) -> bytes:
    return stsd[:40] + struct.pack(">HH", 16, 16) + stsd[44:]


@pytest.mark.parametrize(
    "data",
    [
        changed(film(count=2, size=(1920, 1080)), {b"stsd": of_16_by_16}),
        film("libvpx", "webm", count=2, size=(1920, 1080))
        .replace(b"\xb0\x82\x07\x80", b"\xb0\x82\0\x10")
        .replace(b"\xba\x82\x04\x38", b"\xba\x82\0\x10"),
    ],
    ids=["MP4", "WebM"],
)
def test_frames_larger_than_the_header_says_are_not_decoded(data):
    """Their pixels are not reserved."""
    assert clip_cost(data, 2, 50_000_000) == 16 * 16 + 2 * FRAME_PIXELS
    with pytest.raises(InvalidImage, match="is damaged"):
        decode_clip(data, LIMITS, 2)


def test_a_recording_whose_pictures_grow_is_read():
    """As of a call: it began with 320x240."""
    data = film("libvpx", "webm", count=2, size=(640, 480))
    told = data.replace(b"\xb0\x82\x02\x80", b"\xb0\x82\x01\x40").replace(b"\xba\x82\x01\xe0", b"\xba\x82\0\xf0")
    assert told != data
    assert len(decode_clip(told, LIMITS, 2).frames) == 2


@pytest.mark.parametrize("kind", FILMS)
@pytest.mark.parametrize("size", [(328, 248), (72, 136), (968, 72)])
def test_sizes_that_are_no_whole_blocks_are_read(kind, size):
    codec, container, options = FILMS[kind]
    clip = decode_clip(film(codec, container, 2, size, options=options), LIMITS, 2)
    assert (clip.width, clip.height) == size


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_a_film_is_decoded_on_the_callers_thread_only(codec):
    data = film(codec, "matroska", size=(640, 480))
    before = set(os.listdir("/proc/self/task"))
    opened = Film(data, "matroska", MAX_FRAME_PIXELS)
    frames = opened.frames(opened.runs([0, 5])[0])
    next(frames)
    assert set(os.listdir("/proc/self/task")) == before
    opened.close()


def test_a_video_opens_no_other_file():
    """A MOV may keep its pictures in another file, which FFmpeg opens if it is told to."""
    data, asked = film("mpeg4", "mov", count=3), []
    led_away = changed(data, {b"dref": lambda _: struct.pack(">II", 0, 1) + alias(b"/etc/hostname")})

    def opened(url: str, _flags: int, _options: object) -> BytesIO:
        asked.append(url)
        return BytesIO(data)

    told = {"enable_drefs": "1", "use_absolute_path": "1"}
    av.open(BytesIO(led_away), format="mov", container_options=told, io_open=opened).close()
    assert asked == ["/etc/hostname"]
    with pytest.raises(InvalidImage):
        decode_clip(led_away, LIMITS, 3)
    with pytest.raises(PermissionError):
        _refused("/etc/hostname", 1, {})


def test_the_gateways_process_does_not_load_ffmpeg():
    code = "import sys, service.app, service.media.workers; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=PROJECT).returncode == 0


@pytest.mark.parametrize("kind", ["MP4", "a fragmented MP4", "WebM", "VP9", "AV1", "GIF", "WebP"])
def test_damaged_clips_decode_or_are_refused_and_nothing_else(kind):
    small = {"count": 8, "size": (64, 48)}
    data = {
        "MP4": lambda: film(**small, options={"g": "4"}),
        "a fragmented MP4": lambda: film(**small, container_options={"movflags": "frag_keyframe+empty_moov"}),
        "WebM": lambda: film("libvpx", "webm", **small),
        "VP9": lambda: film("libvpx-vp9", "webm", **small, options={"cpu-used": "8"}),
        "AV1": lambda: film("libsvtav1", "mp4", **small, options={"preset": "12"}),
        "GIF": lambda: animation("GIF", [scene(index, 8, 64, 48) for index in range(8)]),
        "WebP": lambda: animation("WEBP", [scene(index, 8, 64, 48) for index in range(8)]),
    }[kind]()
    rng = np.random.default_rng(7)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            damaged[place] = rng.integers(0, 256)
        if rng.random() < 0.3:
            del damaged[int(rng.integers(0, len(data))) :]
        if rng.random() < 0.2:
            place = int(rng.integers(0, max(len(damaged), 1)))
            damaged[place:place] = damaged[place : place + int(rng.integers(1, 200))]
        try:
            assert len(decode_clip(bytes(damaged), LIMITS, 4).frames) <= 4
        except (InvalidImage, TooLarge):
            refused += 1
    assert 0 < refused < 150
    assert len(decode_clip(data, LIMITS, 4).frames) == 4


def test_a_missing_pyav_is_no_damage_of_the_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "service.media.film", None)  # as Python has a module that cannot be imported
    with pytest.raises(ImportError):
        decode_clip(WEBM, LIMITS, 4)
    assert len(decode_clip(films.gif(), LIMITS, 4).frames) == 4


@pytest.mark.parametrize(
    ("data", "advice"),
    [(MP4, "an MP4 video (send it as a video); send PNG"), (WEBM, "a WebM or Matroska video (send it as a video)"),
     (b"RIFF\0\0\1\0AVI LIST", "an AVI video (save it as MP4 and send it as a video)")],
    ids=["MP4", "WebM", "AVI"],
)  # fmt: skip
def test_a_video_that_is_sent_as_an_image_is_refused_with_the_field_to_send_it_in(data, advice):
    with pytest.raises(InvalidImage) as caught:
        decode(data, LIMITS)
    assert advice in caught.value.message


@pytest.mark.parametrize("most", [1, 3, 8, 32])
def test_the_times_of_all_frames_that_can_be_chosen_are_told(most):
    data = film(count=45)
    told = decode_clip(data, LIMITS, 2)
    assert told.count == 45
    times_s = dict(zip(choosable(told.count), told.times_s, strict=True))
    for frame in decode_clip(data, LIMITS, most).frames:
        assert times_s[frame.index] == frame.time_s


def test_few_frames_of_a_long_clip_can_be_chosen():
    assert len(choosable(1_000_000)) <= 528
    assert choosable(3) == [0, 1, 2]
    assert choosable(1) == [0]


def test_without_the_extra_a_film_is_refused_with_what_the_operator_installs(monkeypatch):
    monkeypatch.setattr(clip_header, "HAS_PYAV", False)
    for film_file in (MP4, WEBM):
        with pytest.raises(InvalidImage, match=r"-e '\.\[video\]' in Glimpse's folder; send an animated GIF") as caught:
            decode_clip(film_file, LIMITS, 4)
        assert caught.value.param == "video"
    assert len(decode_clip(GIF, LIMITS, 4).frames) == 4


def test_a_decoded_frame_has_the_pixels_that_the_encoder_sees():
    assert FRAME_PIXELS == IMAGE_SIZE**2
