"""Videos over HTTP: read from large bodies, named in errors, and told in answers."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from service.core.answer import Finished, FrameSeen
from service.core.errors import InvalidRequest
from service.core.request import ImageBytes
from service.core.vision import Relevance
from service.edges.asking import QuestionLimits, to_request
from service.edges.http.application import http_api
from service.edges.http.batch_schema import BatchQuestion
from service.edges.http.body import FormPart
from service.edges.http.faults import require_text
from service.edges.http.images import image_of
from service.edges.http.schema import VqaAnswer, VqaEnd, VqaForm, VqaRequest, seen_fields
from service.edges.http.vqa import parse_json
from service.edges.openai.schema import SeenFields
from tests.support import films
from tests.support.fakes import CARD, House

CHARS = 2000
LIMITS = QuestionLimits(max_question_chars=CHARS, default_timeout_s=30, max_timeout_s=120)
LARGE = bytes(range(256)) * 8000
TEXT = base64.b64encode(LARGE).decode()
RELEVANCE = Relevance(
    np.full((16, 16), 1 / 3, np.float32),
    np.zeros((3, 16, 16), np.float32),
    np.full((8, 8), -1, np.int32),
    np.array([0.1, 0.2, 0.3], np.float32),
    (0.0, 1 / 3, 1.0, 2 / 3),
)


def body(**fields: object) -> bytes:
    return json.dumps({"question": "which way does it move?"} | fields).encode()


@pytest.mark.parametrize("kind", [VqaRequest, BatchQuestion])
async def test_large_videos_and_frames_are_read(kind):
    _, fields = await parse_json(body(image=TEXT, video=TEXT, video_frames=4), CHARS, kind)
    assert (fields.image, fields.video, fields.video_frames) == (ImageBytes(LARGE), ImageBytes(LARGE), 4)
    _, fields = await parse_json(body(images=["img_1", TEXT], frames=[TEXT, "img_2", TEXT]), CHARS, kind)
    assert fields.images == ("img_1", ImageBytes(LARGE))
    assert fields.frames == (ImageBytes(LARGE), "img_2", ImageBytes(LARGE))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"video": TEXT + "!"}, "video", "video is neither base64"),
        ({"frames": ["img_1", TEXT + "!"]}, "frames.1", "frame 2 of 2: image is neither base64"),
        ({"image": TEXT, "images": None, "video": "data:video/mp4," + TEXT}, "video", "video is a data: URL without"),
    ],
)
async def test_a_large_video_that_is_wrong_is_named(fields, param, message):
    with pytest.raises(InvalidRequest) as caught:
        await parse_json(body(**fields), CHARS)
    assert caught.value.param == param
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(("container", "kind"), [("mp4", "an MP4"), ("webm", "a WebM")])
def test_a_video_in_place_of_json_is_named(container, kind):
    with pytest.raises(InvalidRequest, match=rf"^the body is {kind}, .*send video and question .*-F video=@FILE"):
        require_text(films.video(container=container))
    require_text(b'{"ftyp": 1}')


@pytest.mark.parametrize("name", ["image", "video"])
async def test_a_form_keeps_a_video_by_either_name(name):
    head = f'--b\r\ncontent-disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode()
    field, kept = await image_of([head + b"a film\r\n--b--\r\n"], "multipart/form-data; boundary=b")
    assert (field, b"".join(kept)) == (name, b"a film")


def finished(*frames: FrameSeen) -> Finished:
    timing = {"queue": 0.1, "load": 0.2, "vision": 0.3, "first_token": 0.4, "total": 0.5}
    return Finished("stop", ("img_1",), "hit", "low", False, 12, 3, 64, (), timing, frames=frames)


def told(*frames: FrameSeen, explain: bool) -> dict[str, Any]:
    return VqaEnd.fields_of("vqa_1", "tiny", finished(*frames), explain)


def test_the_frames_that_were_looked_at_are_told():
    frames = (FrameSeen(0, 0.0, RELEVANCE), FrameSeen(7, 1.23456, RELEVANCE), FrameSeen(9, None, RELEVANCE, "img_9"))
    plain = [{"index": 0, "time_s": 0.0}, {"index": 7, "time_s": 1.235}, {"index": 9, "image_id": "img_9"}]
    answer = VqaAnswer(answer="right", **told(*frames, explain=False))
    assert json.loads(answer.model_dump_json(exclude_none=True))["vision"]["frames"] == plain
    chat = SeenFields(**seen_fields(finished(*frames), explain=False))
    assert chat.model_dump()["vision"]["frames"] == plain


def test_each_frame_is_explained_if_asked():
    answer = VqaAnswer(answer="right", **told(FrameSeen(0, 0.5, RELEVANCE), explain=True))
    (first,) = json.loads(answer.model_dump_json(exclude_none=True))["vision"]["frames"]
    assert first["relevance"] == {
        "map": [[0.3333] * 16] * 16,
        "levels": [[-1] * 8] * 8,
        "tensions": {"particularize": 0.1, "explore": 0.2, "diversify": 0.3},
        "area": [0, 0.3333, 1, 0.6667],
    }


def test_an_answer_without_a_video_has_no_frames():
    answer = VqaAnswer(answer="a ring", **told(explain=True))
    assert "frames" not in json.loads(answer.model_dump_json(exclude_none=True))["vision"]
    assert "frames" not in answer.model_dump()["vision"]
    assert "video_id" not in answer.model_dump()


def test_the_id_of_a_video_file_is_told():
    end = replace(finished(FrameSeen(0, 0.0, RELEVANCE)), clip_id="img_2")
    assert VqaEnd(**VqaEnd.fields_of("vqa_1", "tiny", end, explain=False)).video_id == "img_2"
    assert SeenFields(**seen_fields(end, explain=False)).model_dump()["video_id"] == "img_2"


VALID = Draft202012Validator(VqaRequest.model_json_schema())


@pytest.mark.parametrize(
    ("fields", "is_valid"),
    [
        ({"video": "img_1"}, True),
        ({"frames": ["img_1"]}, True),
        ({"image": "img_1", "video": "img_2", "video_frames": 32, "video_sampling": "change"}, True),
        ({"images": ["img_1"], "frames": ["img_2"] * 32}, True),
        ({"image": None, "video": "img_2", "frames": None, "video_frames": None}, True),
        ({}, False),
        ({"video": None}, False),
        ({"video": "img_1", "frames": ["img_1"]}, False),
        ({"image": "img_1", "images": ["img_1"], "video": "img_1"}, False),
        ({"frames": []}, False),
        ({"frames": ["img_1"] * 33}, False),
        ({"image": "img_1", "video_frames": 8}, False),
        ({"image": "img_1", "video": None, "video_sampling": "uniform"}, False),
        ({"video": "img_1", "video_frames": 0}, False),
        ({"video": "img_1", "video_frames": 33}, False),
        ({"video": "img_1", "video_sampling": "all"}, False),
    ],
)
def test_the_schema_says_what_is_taken(fields, is_valid):
    asked = {"question": "?"} | fields
    assert VALID.is_valid(asked) is is_valid
    assert is_taken(asked) is is_valid


@pytest.mark.parametrize(
    ("fields", "is_valid"),
    [
        ({"video": "img_1", "video_frames": 4}, True),
        ({"frames": ["img_1", "img_2"], "video_sampling": "change"}, True),
        ({"image": ["img_1"], "video": "img_2", "video_frames": 32}, True),
        ({"image": ["img_1"], "page": 2}, True),
        ({"video": "img_1", "page": None}, True),
        ({"image": ["img_1", "img_2"], "page": None}, True),
        ({"image": ["img_1"], "video_frames": None}, True),
        ({}, False),
        ({"video": "img_1", "frames": ["img_1"]}, False),
        ({"image": ["img_1"], "video_frames": 8}, False),
        ({"image": ["img_1"], "video_sampling": "uniform"}, False),
        ({"video": "img_1", "page": 1}, False),
        ({"image": ["img_1"], "video": "img_2", "page": 1}, False),
        ({"image": ["img_1", "img_2"], "page": 1}, False),
        ({"frames": ["img_1"] * 33}, False),
    ],
)
async def test_the_schema_of_a_form_says_what_is_taken(fields, is_valid):
    spec = http_api(House().edge).openapi()
    form_schema = {**spec, "$ref": "#/components/schemas/VqaForm"}
    assert Draft202012Validator(form_schema).is_valid({"question": "?"} | fields) is is_valid
    values = [
        (name, each) for name, value in fields.items() for each in (value if isinstance(value, list) else [value])
    ]
    parts = [form_part(name, "null" if value is None else str(value)) for name, value in [("question", "?"), *values]]
    try:
        form, files = await VqaForm.from_parts(parts)
        to_request(form.fields(files), CARD, LIMITS)
        was_taken = True
    except InvalidRequest:
        was_taken = False
    assert was_taken is is_valid


def form_part(name: str, value: str) -> FormPart:
    part = FormPart({b"content-disposition": f'form-data; name="{name}"'.encode()})
    part.content.add(value.encode())
    return part


async def test_a_form_s_frame_that_cannot_be_read_is_named():
    parts = [form_part("question", "?"), form_part("frames", "img_1"), form_part("frames", "no base64!")]
    with pytest.raises(InvalidRequest, match=r"^frame 2 of 2: image is neither base64") as refused:
        await VqaForm.from_parts(parts)
    assert refused.value.param == "frames.1"


async def test_a_form_with_two_images_and_a_page_is_told_of_what_it_sent():
    form, files = await VqaForm.from_parts([form_part(*each) for each in TWO_IMAGES_AND_A_PAGE])
    with pytest.raises(InvalidRequest, match=r"^page is about one image: send the document alone") as refused:
        to_request(form.fields(files), CARD, LIMITS)
    assert "images is given" not in refused.value.message


TWO_IMAGES_AND_A_PAGE = [("question", "?"), ("image", "img_1"), ("image", "img_2"), ("page", "2")]


def is_taken(asked: dict[str, Any]) -> bool:
    try:
        to_request(VqaRequest.from_json(json.dumps(asked).encode()).fields(), CARD, LIMITS)
    except InvalidRequest:
        return False
    return True
