"""Fields as clients really send them: what is taken, and what a caller is told of the rest."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import numpy as np
import pytest

from service.core.errors import InvalidRequest
from service.core.request import ImageBytes, ImageId, Sampling
from service.edges.asking import Fields
from service.edges.http.body import FormPart
from service.edges.http.faults import no_question, require_text, shown
from service.edges.http.schema import FormFiles, VqaForm, VqaRequest
from tests.support.fakes import png

ASKED = {"image": "img_0", "question": "what colour?"}
OPTIONAL = sorted(VqaRequest.model_fields.keys() - ASKED.keys())
PYTHON = re.compile(
    r"None|True|False|[Tt]uple|dict|NoneType|bytes|<class|Enum|\bint\b|\bstr\b|\bfloat\b|\bnan\b|\binf\b"
)
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF"


def asked(**changes: object) -> Fields:
    return VqaRequest.from_json(json.dumps(ASKED | changes).encode()).fields()


def part(name: str, data: bytes, *, file: bool = False, content_type: bytes = b"") -> FormPart:
    disposition = f'form-data; name="{name}"' + ('; filename="x"' if file else "")
    headers = {b"content-disposition": disposition.encode()}
    made = FormPart(headers | ({b"content-type": content_type} if content_type else {}))
    made.content.add(data)
    return made


def from_parts(parts: list[FormPart]) -> tuple[VqaForm, FormFiles]:
    return asyncio.run(VqaForm.from_parts(parts))


def form(**fields: str) -> Fields:
    parts = [part(name, value.encode()) for name, value in (ASKED | fields).items()]
    read, files = from_parts(parts)
    return read.fields(files)


def refused(*parts: FormPart, **changes: object) -> str:
    """The message for a form of these parts, or for JSON with these changes."""
    return said_of(parts, changes) or pytest.fail("it is taken")


def said_of(parts: tuple[FormPart, ...], changes: dict[str, object]) -> str:
    """Empty if it is taken."""
    try:
        if parts:
            from_parts(parts)
        else:
            asked(**changes)
    except InvalidRequest as error:
        return error.message
    return ""


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "timeout_s"])
@pytest.mark.parametrize("value", [1e-46, 1e-40, 1e-38, 5e-324, -1e-46, -1])
def test_no_number_means_another_in_float32(name, value):
    assert refused(**{name: value}).startswith(name)
    assert refused(part("question", b"?"), part("image", b"img_0"), part(name, repr(value).encode())).startswith(name)


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "timeout_s"])
@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_is_finite(name, word):
    body = json.dumps(ASKED)[:-1] + f', "{name}": {word}}}'
    with pytest.raises(InvalidRequest, match=f"^{name} should be a finite number; it is -?(NaN|Infinity)"):
        VqaRequest.from_json(body.encode())


@pytest.mark.parametrize(
    ("name", "least"), [("temperature", 0.01), ("top_p", 1e-6), ("repetition_penalty", 0.01), ("timeout_s", 1e-6)]
)
def test_the_least_value_is_taken_and_holds_in_float32(name, least):
    assert getattr(asked(**{name: least}), name) == least
    assert getattr(form(**{name: str(least)}), name) == least
    assert refused(**{name: least * 0.99})
    with np.errstate(all="raise"):
        assert np.isfinite(np.float32(1_000) / np.float32(least))


def test_zero_is_greedy_with_either_sign():
    assert str(asked(temperature=-0.0).temperature) == "0.0"
    assert refused(temperature=0.001).startswith(
        "temperature must be 0, which is greedy, or at least 0.01; it is 0.001"
    )


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_leaves_an_optional_field_out(name):
    assert asked(**{name: None}) == asked()
    if name != "images":
        assert form(**{name: "null"}) == form()


def test_null_leaves_all_optional_fields_out():
    assert asked(**dict.fromkeys(OPTIONAL)) == asked()
    assert asked().max_tokens == Sampling().max_tokens


def test_null_is_no_image_and_no_question():
    assert VqaRequest.from_json(b'{"question": "?", "image": null}').fields().image is None
    fields = from_parts([part("question", b"?"), part("image", b"null")])
    assert fields[0].fields(fields[1]).images is None
    assert refused(question=None) == "question should be a valid string; it is null"


WRONG: list[Any] = [None, True, 5, 0.5, -1, "x", [], [None, True], [1, 2, 3], {}, {"a": {"b": None}}, [[[]]]]


@pytest.mark.parametrize("name", sorted(VqaRequest.model_fields))
def test_messages_are_in_the_words_of_json(name):
    for value in [*WRONG, {"vision_tokens": [1]}, {"vision_tokens": None, "x": True}, [{"question": None}], [None]]:
        assert not PYTHON.search(said_of((), {name: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": "x"}, 'turns must be a list of turns, such as [{"question"'),
        ({"images": {}, "image": None}, 'images must be a list of images, such as ["img_...'),
        (
            {"budget": {"vision_tokens": 5}},
            "budget.vision_tokens must be a list of the least and the most, such as [64",
        ),
        (
            {"budget": {"visual_tokens": [32]}},
            "budget.visual_tokens must be a list of the least and the most, such as [",
        ),
        ({"budget": {"vision_tokens": [1, 2, 3]}}, "budget.vision_tokens must be a list of the least and the most"),
        (
            {"turns": [{"question": None, "answer": True}]},
            "turns.0.question should be a valid string; it is null (and 1",
        ),
        ({"images": [], "image": None}, "images must hold at least 1 item; it is []"),
        ({"turns": [{"role": 1}]}, "there is no field 'turns.0.role': the fields of turns are question, answer (and 2"),
        (
            {"turns": [{"question": "a", "anser": "b"}]},
            "there is no field 'turns.0.anser': did you mean answer? (and 1",
        ),
        ({"budget": {"vison_tokens": [1, 2]}}, "there is no field 'budget.vison_tokens': did you mean vision_tokens?"),
        ({"budget": {"max_tokens": 5}}, "there is no field 'budget.max_tokens': "),
        ({"prompt": "?"}, "there is no field 'prompt': did you mean question?"),
        ({"file": "?"}, "there is no field 'file': did you mean image?"),
    ],
)
def test_a_wrong_field_is_told_with_what_belongs_there(changes, message):
    assert refused(**changes).startswith(message)


def test_what_is_shown_of_a_value_is_json():
    assert shown([None, True, float("nan"), (1, False)]) == "[null, true, NaN, [1, false]]"
    assert shown({"a": float("-inf")}) == "{'a': -Infinity}"


@pytest.mark.parametrize("name", ["file", "photo", "picture", "images", "img", "File"])
def test_a_file_in_another_field_is_told_the_fields_name(name):
    message = refused(part(name, png(), file=True), part("question", b"?"))
    assert message == f"there is no field '{name}': did you mean image?"
    assert refused(part(name, png(), file=True), part(name, b"")).startswith(
        f"there is no field '{name}': did you mean"
    )


@pytest.mark.parametrize(
    "image",
    [
        part("image", png()),
        part("image", png(), content_type=b"image/png"),
        part("image", b"text, by its type a file", content_type=b"Application/Octet-Stream"),
        part("image", b"\xff\xd8", content_type=b"text/plain"),
        part("image", b"img_0", file=True),
    ],
)
def test_an_image_without_a_file_name_is_a_file(image):
    _, files = from_parts([image, part("question", b"?")])
    assert files.image == [ImageBytes(bytes(image.data))]


def test_a_form_holds_a_video_or_its_frames_beside_an_image():
    video, image = part("video", b"\0\0\0\x20ftypisom", file=True), part("image", b"img_0")
    read, files = from_parts([video, image, part("question", b"?"), part("video_frames", b"16")])
    asked = read.fields(files)
    assert (asked.video, asked.image) == (ImageBytes(bytes(video.data)), ImageId("img_0"))
    assert (asked.video_frames, asked.frames) == (16, None)
    frames = [part("frames", b"img_1"), part("frames", png(), file=True), part("question", b"?")]
    read, files = from_parts([*frames, part("video_sampling", b"change")])
    asked = read.fields(files)
    assert asked.frames == (ImageId("img_1"), ImageBytes(png()))
    assert (asked.video, asked.images, asked.video_sampling) == (None, None, "change")


@pytest.mark.parametrize("content_type", [b"video/mp4", b"application/octet-stream"])
def test_a_part_of_a_videos_type_is_a_file(content_type):
    _, files = from_parts([part("video", b"text", content_type=content_type), part("question", b"?")])
    assert files.video == [ImageBytes(b"text")]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part("video", b"img_1")] * 2, "video is given twice: send one video, or its frames in order as frames"),
        ([part("video", b"!")], "video is neither base64, nor a data: URL, nor an image id"),
        ([part("video_frames", b"33")], "video_frames should be less than or equal to 32; it is '33'"),
        ([part("video_sampling", b"all")], "video_sampling should be 'uniform' or 'change'; it is 'all'"),
    ],
)
def test_a_wrong_part_of_a_video_is_named(parts, message):
    assert refused(part("question", b"?"), *parts).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_frames": 0}, "video_frames should be greater than or equal to 1; it is 0"),
        ({"video_frames": 33}, "video_frames should be less than or equal to 32; it is 33"),
        ({"video_sampling": "all"}, "video_sampling should be 'uniform' or 'change'; it is 'all'"),
        ({"frames": []}, "frames must hold at least 1 item; it is []"),
        ({"frames": ["img_0"] * 33}, "frames may hold at most 32 items"),
        ({"frames": "img_0"}, "frames must be a list of images, such as ["),
        ({"num_frames": 4}, "there is no field 'num_frames': did you mean video_frames?"),
        ({"video_url": "img_0"}, "there is no field 'video_url': did you mean video?"),
    ],
)
def test_a_wrong_field_of_a_video_is_named(changes, message):
    assert refused(**changes).startswith(message)


@pytest.mark.parametrize(
    ("name", "example"),
    [("turns", '[{"question": "which shape?", "answer": "a circle"}]'), ("budget", '{"vision_tokens"')],
)
def test_text_that_is_not_json_is_told_with_an_example_that_can_be_sent(name, example):
    message = refused(part("question", b"?"), part("image", b"img_0"), part(name, b"which shape?"))
    assert message.startswith(f"{name} must be JSON text, such as {example}")
    sent = message.removeprefix(f"{name} must be JSON text, such as ").partition("; it is ")[0]
    form(**{name: sent})


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": "9", "top_p": "9"}, {"question": "?", "top_k": "-1", "seed": "-1"}, {"turns": '[{"a": 1}]'}],
)
def test_json_and_forms_count_faults_alike(fields):
    values = {name: json.loads(value) if name != "question" else value for name, value in fields.items()}
    with pytest.raises(InvalidRequest) as of_json:
        VqaRequest.from_json(json.dumps(values).encode())
    with pytest.raises(InvalidRequest) as of_form:
        from_parts([part(name, value.encode()) for name, value in fields.items()])
    assert counted(of_form.value.message) == counted(of_json.value.message)
    assert of_form.value.param == of_json.value.param


def counted(message: str) -> str:
    return message.partition(" (and ")[2]


@pytest.mark.parametrize(
    ("body", "kind"),
    [(JPEG, "a JPEG"), (png(), "a PNG"), (b"GIF89a", "a GIF"), (b"RIFF\0\0\0\0WEBP", "a WebP"), (b"%PDF-1.7", "a PDF")],
)
def test_a_file_in_place_of_json_or_a_form_is_named(body, kind):
    with pytest.raises(InvalidRequest) as caught:
        require_text(body)
    for error in (caught.value, no_question(body, "application/x-www-form-urlencoded")):
        assert error.message.startswith(
            f"the body is {kind}, where JSON or a form is expected: send image and question"
        )
        assert "curl -F image=@FILE -F question=..." in error.message


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed"])
def test_a_number_without_a_fraction_is_an_integer_however_it_is_written(name):
    """As JSON Schema says, and as clients write whose numbers are all floating-point numbers."""
    taken = getattr(asked(**{name: 16.0}), name)
    assert (taken, type(taken)) == (16, int)
    assert "integer" in said_of((), {name: 16.5})
    assert said_of((), {name: 1e300})
    assert asked(budget={"vision_tokens": [64.0, 128]}).vision_tokens == (64, 128)


@pytest.mark.parametrize(
    ("word", "flag"),
    [("true", True), ("True", True), ("1", True), ("yes", True), ("false", False), ("FALSE", False), ("0", False)],
)
def test_a_forms_flag_is_true_or_false(word, flag):
    assert form(stream=word).stream is flag


@pytest.mark.parametrize("name", ["stream", "explain"])
@pytest.mark.parametrize("word", ["2", "perhaps", "t", ""])
def test_another_word_is_no_flag(name, word):
    said = refused(*(part(field, value.encode()) for field, value in (ASKED | {name: word}).items()))
    assert said == f"{name} must be true or false; it is {word!r}"
