"""The rules that every transport's questions go through."""

from __future__ import annotations

import re
import time
from base64 import b64encode, encodebytes, urlsafe_b64encode
from dataclasses import replace

import pytest

from service.core.errors import InvalidImage, InvalidRequest
from service.core.request import Budget, Clip, Exchange, ImageBytes, ImageId, ImageUrl, Sampling, Text
from service.edges.asking import Fields, QuestionLimits, to_request
from service.edges.caller import Caller
from service.edges.image_text import source_of
from tests.support.fakes import CARD, CLOSER

LIMITS = QuestionLimits(max_question_chars=100, default_timeout_s=30, max_timeout_s=120)
IMAGE = ImageBytes(b"an image")
QUESTION = Fields(parts=(Text(" what colour? "),), images=(IMAGE,))
BYTES = bytes(range(255, 0, -1))  # the last two letters of the alphabets are in them
TURN = Exchange((Text(" which shape? "),), " a circle ")


def test_a_question_takes_the_defaults_of_the_model_and_the_service():
    request = to_request(QUESTION, CARD, LIMITS, Caller("acme", "trace"))
    assert request.parts == (IMAGE, Text("what colour?"))
    assert request.budget == Budget(CARD.vision_tokens, CARD.default_visual_tokens)
    assert (request.timeout_s, request.tenant, request.trace_id) == (30, "acme", "trace")
    assert request.sampling == Sampling(seed=request.sampling.seed, streaming=False)
    assert request.id.startswith("vqa_")
    assert to_request(QUESTION, CARD, LIMITS).id != request.id
    assert to_request(QUESTION, CARD, LIMITS).sampling.seed != request.sampling.seed


def test_the_default_budget_depends_on_the_detail():
    assert to_request(replace(QUESTION, detail="high"), CLOSER, LIMITS).budget.vision_tokens == (64, 400)
    adapted = replace(CARD, default_vision_tokens=(96, 256))
    assert to_request(QUESTION, adapted, LIMITS).budget.vision_tokens == (96, 256)
    narrow = replace(QUESTION, detail="high", vision_tokens=(64, 100), visual_tokens=(32, 96))
    assert to_request(narrow, CLOSER, LIMITS).budget == Budget((64, 100), (32, 96))


def test_the_default_budget_of_a_video_is_that_of_frames_whatever_its_detail():
    video = replace(QUESTION, images=None, video=IMAGE, detail="auto")
    assert to_request(video, CLOSER, LIMITS).budget.vision_tokens == (64, 256)
    assert to_request(replace(video, images=(IMAGE,)), CLOSER, LIMITS).budget.vision_tokens == (64, 400)
    earlier = replace(video, turns=(Exchange((IMAGE, Text("a")), "b"),))
    assert to_request(earlier, CLOSER, LIMITS).budget.vision_tokens == (64, 400)


@pytest.mark.parametrize(("stream", "stop", "streaming"), [(True, (), True), (False, (".",), True), (False, (), False)])
def test_tokens_are_streamed_for_a_stream_and_for_stop_strings(stream, stop, streaming):
    assert to_request(replace(QUESTION, stream=stream, stop=stop), CARD, LIMITS).sampling.streaming is streaming


def test_images_in_front_stand_in_the_earliest_turn():
    request = to_request(replace(QUESTION, turns=(TURN, TURN)), CARD, LIMITS)
    assert request.exchanges == (
        Exchange((IMAGE, Text("which shape?")), "a circle"),
        Exchange((Text("which shape?"),), "a circle"),
    )
    assert request.parts == (Text("what colour?"),)


def test_images_that_have_a_place_keep_it():
    turn = Exchange((Text("is"), IMAGE, Text(" red?")), "yes")
    parts = (Text("  "), Text("and "), ImageId("img_1"), Text("?"))
    request = to_request(Fields(parts=parts, turns=(turn,)), CARD, LIMITS)
    assert request.exchanges == (Exchange((Text("is"), IMAGE, Text("red?")), "yes"),)
    assert request.parts == (Text("and"), ImageId("img_1"), Text("?"))
    assert request.images == (IMAGE, ImageId("img_1"))
    assert request.question == "and ?"


def test_a_system_message_has_no_spaces_around_it():
    assert to_request(replace(QUESTION, system=" be brief "), CARD, LIMITS).system == "be brief"
    assert to_request(replace(QUESTION, system=" "), CARD, LIMITS).system == ""


@pytest.mark.parametrize(
    ("text", "source"),
    [
        (b64encode(b"file").decode(), ImageBytes(b"file")),
        (f" {b64encode(b'file').decode()}\n", ImageBytes(b"file")),
        (f"data:image/png;base64,{b64encode(b'file').decode()}", ImageBytes(b"file")),
        (b64encode(b"\xfb\xff\xfe").decode().rstrip("="), ImageBytes(b"\xfb\xff\xfe")),
        *((urlsafe_b64encode(BYTES[:size]).decode(), ImageBytes(BYTES[:size])) for size in range(4)),
        *((urlsafe_b64encode(BYTES[:size]).decode().rstrip("="), ImageBytes(BYTES[:size])) for size in range(4)),
        *((encodebytes(BYTES[:size]).decode(), ImageBytes(BYTES[:size])) for size in (76, 77, 78)),
        (f"data:image/png;base64,{urlsafe_b64encode(BYTES[:1]).decode().rstrip('=')}", ImageBytes(BYTES[:1])),
        ("+_-/", ImageBytes(b"\xfb\xff\xbf")),
        (" img_0123", ImageId("img_0123")),
        ("HTTPS://example.com/x.png", ImageUrl("HTTPS://example.com/x.png")),
    ],
)
def test_the_text_of_an_image_is_its_bytes_its_id_or_its_url(text, source):
    assert source_of(text) == source
    assert to_request(Fields(parts=(Text("?"),), image=text), CARD, LIMITS).images == (source,)


def test_a_clip_stands_behind_the_images_and_before_the_text():
    clip = Clip(ImageBytes(b"a film"))
    request = to_request(replace(QUESTION, video=ImageBytes(b"a film")), CARD, LIMITS)
    assert request.parts == (IMAGE, clip, Text("what colour?"))
    assert request.images == (IMAGE,)
    told = to_request(replace(QUESTION, video=ImageBytes(b"a film"), turns=(TURN,)), CARD, LIMITS)
    assert told.exchanges == (Exchange((IMAGE, clip, Text("which shape?")), "a circle"),)
    assert told.parts == (Text("what colour?"),)


def test_a_clip_needs_no_image_beside_it():
    asked = Fields(parts=(Text("?"),), video=f" {b64encode(b'file').decode()}")
    request = to_request(asked, CARD, LIMITS)
    assert request.parts == (Clip(ImageBytes(b"file"), frames=None, sampling="uniform"), Text("?"))
    assert request.images == ()


def test_all_frames_that_are_sent_are_looked_at_unless_the_caller_says_fewer():
    asked = Fields(parts=(Text("?"),), frames=(IMAGE, "img_1", *[IMAGE] * 10))
    (clip, _) = to_request(asked, CARD, LIMITS).parts
    assert clip == Clip((IMAGE, ImageId("img_1"), *[IMAGE] * 10), frames=12)
    (clip, _) = to_request(replace(asked, video_frames=5, video_sampling="change"), CARD, LIMITS).parts
    assert (clip.frames, clip.sampling) == (5, "change")


def test_how_a_clip_is_looked_at_holds_wherever_it_stands():
    clip = Clip(ImageId("img_1"))
    looked_at = Clip(ImageId("img_1"), frames=16, sampling="change")
    here = Fields(parts=(Text("what"), clip, Text("?")), video_frames=16, video_sampling="change")
    assert to_request(here, CARD, LIMITS).parts == (Text("what"), looked_at, Text("?"))
    before = replace(here, parts=(Text("?"),), turns=(Exchange((clip, Text("which?")), "a ring"),))
    assert to_request(before, CARD, LIMITS).exchanges[0].parts == (looked_at, Text("which?"))


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"video": "img_1", "frames": ("img_1",)}, "frames", "video and frames are both given: leave one out"),
        ({"video": "!"}, "video", "video is neither base64, nor a data: URL, nor an image id"),
        ({"video": "data:video/mp4,a"}, "video", "video is a data: URL without base64"),
        ({"frames": ("img_1", "!")}, "frames.1", "frame 2 of 2: image is neither base64"),
        ({"frames": ()}, "frames", "frames has 0 images: send 1 to 32"),
        ({"frames": (IMAGE,) * 33}, "frames", "frames has 33 images: send 1 to 32"),
        ({"video_frames": 4}, "video_frames", "video_frames needs a video: add one, or leave video_frames out"),
        ({"video_sampling": "uniform"}, "video_sampling", "video_sampling needs a video: add one, or leave"),
        ({"video": "img_1", "parts": (Clip(IMAGE), Text("?"))}, "video", "video is given 2 times: ask about one video"),
        (
            {"parts": (Clip(IMAGE), Text("?")), "turns": (Exchange((Clip(IMAGE), Text("?")), "a"),)},
            "video",
            "video is given 2 times: ask about one video at a time",
        ),
    ],
)
def test_a_clip_that_breaks_a_rule_is_named(changes, param, message):
    with pytest.raises(InvalidRequest) as caught:
        to_request(replace(QUESTION, **changes), CARD, LIMITS)
    assert caught.value.param == param
    assert caught.value.message.startswith(message)
    assert caught.value.args == (caught.value.message,)


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"images": None}, "image", "the field image is missing"),
        ({"image": "img_1"}, "images", "image and images are both given: leave one out"),
        ({"images": (IMAGE, "!")}, "images.1", "image 2 of 2: image is neither base64"),
        ({"images": ("!",)}, "image", "image is neither base64"),
        ({"parts": (Text(" "), Text("\n"))}, "question", "question is empty: say what you want to know"),
        ({"parts": (Text("w" * 101),)}, "question", "question has 101 characters, the limit is 100: shorten it"),
        (
            {"turns": (Exchange((Text("w" * 90),), "yes"),)},
            "turns",
            "question and turns have 105 characters, the limit is 100: leave",
        ),
        ({"turns": (TURN, Exchange((IMAGE, Text(" ")), "yes"))}, "turns.1.question", "turns.1.question is empty"),
        ({"turns": (Exchange((Text("a?"),), " "),)}, "turns.0.answer", "turns.0.answer is empty"),
        ({"system": "s" * 90}, "system", "system, question and turns have 102 characters, the limit is 100: shorten"),
        ({"timeout_s": 121.0}, "timeout_s", "timeout_s is 121, the limit is 120: lower it"),
        ({"page": 1}, "page", "page is about one image: send the document alone as image"),
        ({"images": None, "image": IMAGE, "video": IMAGE, "page": 2}, "page", "one image, and video is given"),
        ({"images": None, "image": IMAGE, "frames": (IMAGE,), "page": 2}, "page", "one image, and frames is given"),
        ({"images": None, "parts": (IMAGE, IMAGE, Text("which?")), "page": 2}, "page", "without other images"),
        ({"images": None, "parts": (IMAGE, Clip(IMAGE), Text("which?")), "page": 2}, "page", "or a video, or leave"),
        ({"images": None, "parts": (Clip(IMAGE), Text("which?")), "page": 2}, "page", "page is about one image"),
        ({"images": None, "image": IMAGE, "turns": (TURN,), "parts": (IMAGE, Text("?")), "page": 1}, "page", "alone"),
    ],
)
def test_a_field_that_breaks_a_rule_is_named(changes, param, message):
    with pytest.raises(InvalidRequest) as caught:
        to_request(replace(QUESTION, **changes), CARD, LIMITS)
    assert caught.value.param == param
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("aGVsbG8!", "its character 8 is '!'"),
        ("  aG.VsbG8=", "its character 5 is '.'"),
        ("data:image/png;base64,aGVs*G8=", "its character 27 is '*'"),
        ("aGV=sbG8=", "its character 4 is '='"),
        ("aG\nVs\nbé8=", "its character 8 is 'é'"),
        ("/home/me/x.jpg", "its character 11 is '.'"),
        ("aGVsb", "5 characters are one too many or end too early"),
    ],
)
def test_the_character_that_is_not_base64_is_named(text, told):
    with pytest.raises(InvalidImage, match=re.escape(told)):
        source_of(text)


@pytest.mark.parametrize("junk", ["=", "= ", " ", "aaa=", "é"])
def test_what_is_no_base64_is_refused_at_once(junk):
    begun = time.process_time()
    with pytest.raises(InvalidImage):
        source_of("a" + junk * (2_000_000 // len(junk)) + "!")
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("filler", [";", "a", ";a", ";base64"])
def test_a_data_url_without_an_end_is_refused_at_once(filler):
    text = "data:" + filler * (2_000_000 // len(filler))
    begun = time.process_time()
    with pytest.raises(InvalidRequest, match="without base64"):
        source_of(text)
    assert time.process_time() - begun < 1
