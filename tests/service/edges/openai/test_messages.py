"""Messages become one question with earlier turns, and errors about it name the chat's fields."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import GlimpseError, InvalidRequest, NotFound
from service.core.request import Clip, Exchange, ImageBytes, ImageId, ImageSource, ImageUrl, Priority, Request, Text
from service.edges.asking import QuestionLimits, naming, to_request
from service.edges.openai.messages import fields_of
from service.edges.openai.schema import MAX_MESSAGES, SUPPORTED, ChatRequest
from tests.support.fakes import CARD

LIMITS = QuestionLimits(max_question_chars=2_000, default_timeout_s=30, max_timeout_s=120)
DATA = f"data:image/png;base64,{b64encode(b'a file').decode()}"


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def image(url: str = "img_1", **fields: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | fields}


def video(url: str = "img_2", **fields: object) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url} | fields}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


ASKED = user(image(), text("which shape?"))


def read(*messages: dict[str, Any], **fields: object) -> ChatRequest:
    return ChatRequest.from_json(json.dumps({"model": "tiny", "messages": messages} | fields).encode())


def request(*messages: dict[str, Any], **fields: object) -> Request:
    asked, names = fields_of(read(*messages, **fields))
    with naming(names):
        return to_request(asked, CARD, LIMITS)


def refused(*messages: dict[str, Any], **fields: object) -> GlimpseError:
    with pytest.raises(InvalidRequest) as caught:
        request(*messages, **fields)
    assert caught.value.args == (caught.value.message,)
    return caught.value


def test_images_keep_their_places_among_the_text():
    asked = request(user(text(" what is "), image("img_1"), text("beside"), image(DATA), text("?")))
    parts = (Text("what is"), ImageId("img_1"), Text("beside"), ImageBytes(b"a file"), Text("?"))
    assert asked.parts == parts
    assert asked.question == "what is beside ?"
    assert asked.exchanges == ()


def test_earlier_turns_keep_their_images():
    asked = request(
        user(image("img_1"), text("which shape?")),
        assistant("a circle"),
        user(text("and here?"), image("img_2")),
        assistant([text("a"), text("square")]),
        {"role": "user", "content": "which is larger?"},
    )
    assert asked.exchanges == (
        Exchange((ImageId("img_1"), Text("which shape?")), "a circle"),
        Exchange((Text("and here?"), ImageId("img_2")), "a square"),
    )
    assert asked.parts == (Text("which is larger?"),)
    assert asked.images == (ImageId("img_1"), ImageId("img_2"))


def test_messages_of_the_user_in_succession_are_one_question():
    asked = request(user(image()), {"role": "user", "content": "which shape?"})
    assert asked.parts == (ImageId("img_1"), Text("which shape?"))


def test_a_video_keeps_its_place_among_images_and_text():
    film = f"data:video/mp4;base64,{b64encode(b'a film').decode()}"
    asked = request(user(text("what is "), image(), text("in"), video(film), text("?")))
    clip = Clip(ImageBytes(b"a film"))
    assert asked.parts == (Text("what is"), ImageId("img_1"), Text("in"), clip, Text("?"))
    looked_at = request(user(video(), text("what?")), assistant("a"), user(text("?")), video_frames=16)
    assert looked_at.exchanges[0].parts == (Clip(ImageId("img_2"), frames=16), Text("what?"))
    change = request(user(video("https://x/y.webm"), text("?")), video_sampling="change")
    assert change.parts == (Clip(ImageUrl("https://x/y.webm"), sampling="change"), Text("?"))


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_messages_come_before_everything(role):
    asked = request(system("be short", role), system([text("say"), text("please")]), ASKED)
    assert asked.system == "be short say please"
    assert asked.parts == (ImageId("img_1"), Text("which shape?"))


def test_fields_reach_the_question():
    asked = request(
        user(image(detail="auto"), text("?")),
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        seed=9,
        repetition_penalty=1.5,
        stop=["a", "b", "c", "d"],
        stream=True,
        timeout_s=3,
        priority="low",
        vision_tokens=[64, 96],
        visual_tokens=[32, 64],
        user="someone@example.com",
        safety_identifier="x",
    )
    sampling = asked.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (5, 0.5, 0.25, 3)
    assert (sampling.seed, sampling.repetition_penalty, sampling.stop) == (9, 1.5, ("a", "b", "c", "d"))
    assert (asked.timeout_s, asked.priority, asked.detail) == (3, Priority.LOW, "auto")
    assert (asked.budget.vision_tokens, asked.budget.visual_tokens) == ((64, 96), (32, 64))
    assert asked.tenant == ""


def test_what_has_no_effect_is_taken_within_bounds():
    named = ASKED | {"name": "critic"}, assistant("a circle") | {"name": "painter"}, ASKED
    fields = {
        "user": "someone",
        "safety_identifier": "x",
        "metadata": {"k" * 64: "v" * 512},
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
    }
    asked = request(*named, **fields, seed=1)
    assert replace(asked, id="") == replace(request(ASKED, assistant("a circle"), ASKED, seed=1), id="")
    for field, value in (
        ("prompt_cache_key", "k" * 513),
        ("prompt_cache_retention", "k" * 513),
        ("metadata", {str(number): "" for number in range(17)}),
        ("metadata", {"a": 1}),
        ("metadata", {"a": "v" * 513}),
        ("metadata", {"k" * 65: "v"}),
    ):
        assert refused(ASKED, **{field: value}).param.partition(".")[0] == field
    assert refused(ASKED | {"name": "n" * 513}).param == "messages.0.name"


@pytest.mark.parametrize(
    ("fields", "taken"),
    [
        ({"temperature": 0.009}, {"temperature": 0.0}),
        ({"temperature": 0.01}, {"temperature": 0.01}),
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"top_p": 1e-6}, {"top_p": 1e-6}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"seed": -(2**63) + 5}, {"seed": 5}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
    ],
)
def test_values_that_openai_takes_are_brought_into_our_bounds(fields, taken):
    sampling = request(ASKED, **fields).sampling
    assert {name: getattr(sampling, name) for name in taken} == taken


def test_what_is_left_out_or_null_has_the_same_default_as_everywhere():
    plain = request(ASKED)
    nulls = request(ASKED, **{name: None for name in SUPPORTED if name not in ("model", "messages")})
    for asked in (plain, nulls):
        assert (asked.sampling.max_tokens, asked.sampling.temperature, asked.detail) == (64, 0, "low")
        assert (asked.timeout_s, asked.budget.visual_tokens) == (30, CARD.default_visual_tokens)


@pytest.mark.parametrize(("fields", "most"), [({"max_tokens": 7}, 7), ({"max_completion_tokens": 7}, 7)])
def test_both_names_of_max_tokens_are_known(fields, most):
    assert request(ASKED, **fields).sampling.max_tokens == most


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "messages is empty: add the user's question"),
        ([user(text("which?"))], "messages", 'messages have no image or video: add {"type": "image_url"'),
        ([user(image(), text(" "))], "messages.0.content", "messages.0.content is empty: say what you want to know"),
        ([user(image()), assistant("a")], "messages.1.role", "messages.1 must be the user's question: add one"),
        ([assistant("a"), ASKED], "messages.0.role", "messages.0 is the assistant's, and no message of the user's"),
        ([ASKED, assistant("a"), assistant("b"), ASKED], "messages.2.role", "messages.2 is the assistant's, and no"),
        ([ASKED, system("be short")], "messages.1.role", "messages.1 is a system message behind others: put it first"),
        ([ASKED, assistant("a"), system("s", "developer"), ASKED], "messages.2.role", "is a developer message behind"),
        ([ASKED, assistant(" "), ASKED], "messages.1.content", "messages.1.content is empty: fill it in"),
        ([ASKED, assistant(None), ASKED], "messages.1.content", "messages.1.content is empty: fill it in"),
        ([user(image()), assistant("a"), ASKED], "messages.0.content", "messages.0.content is empty: fill it in"),
        ([system([image()]), ASKED], "messages.0.content.0.image_url", "messages.0.content.0 is an image: images go"),
        ([ASKED, assistant([image()]), ASKED], "messages.1.content.0.image_url", "images go into messages of the user"),
        (
            [user({"type": "text"}), ASKED],
            "messages.0.content.0.text",
            "the field messages.0.content.0.text is missing",
        ),
        (
            [user({"type": "image_url"}), ASKED],
            "messages.0.content.0.image_url",
            "the field messages.0.content.0.image_url is missing",
        ),
        (
            [user(text("?") | {"image_url": {"url": "img_1"}})],
            "messages.0.content.0.image_url",
            "messages.0.content.0 has the type text: send image_url as a part of its own",
        ),
        (
            [user(text("?"), image("!"))],
            "messages.0.content.1.image_url",
            "messages.0.content.1.image_url is neither base64, nor a data: URL, nor an image id",
        ),
        (
            [user(text("?"), image(), image("data:image/png,a"))],
            "messages.0.content.2.image_url",
            "messages.0.content.2.image_url is a data: URL without base64",
        ),
        (
            [user(image(detail="high"), image(), image(detail="low"), text("?"))],
            "messages.0.content.2.image_url.detail",
            "messages.0.content.2.image_url.detail is 'low', and messages.0.content.0.image_url.detail is 'high'",
        ),
        (
            [user(image(detail="original"), text("?"))],
            "messages.0.content.0.image_url.detail",
            "messages.0.content.0.image_url.detail should be 'low', 'high' or 'auto'; it is 'original'",
        ),
        ([user(video(fps=3))], "messages.0.content.0.video_url.fps", "the fields of video_url are url"),
        (
            [user(video(), text("?")), assistant("a"), user(video(), text("?"))],
            "messages.2.content.0.video_url",
            "messages.2.content.0.video_url is a second video beside messages.0.content.0.video_url: ask about one",
        ),
        (
            [user(text("?"), video("!"))],
            "messages.0.content.1.video_url",
            "messages.0.content.1.video_url is neither base64, nor a data: URL, nor an image id",
        ),
        (
            [user(video() | {"image_url": {"url": "img_1"}})],
            "messages.0.content.0.image_url",
            "messages.0.content.0 has the type video_url: send image_url as a part of its own",
        ),
        ([system([video()]), ASKED], "messages.0.content.0.video_url", "messages.0.content.0 is a video: videos go"),
        (
            [user({"type": "video", "video": "img_1"})],
            "messages.0.content.0.video",
            "there is no field 'messages.0.content.0.video': did you mean video_url?",
        ),
        (
            [user({"type": "video"})],
            "messages.0.content.0.type",
            'is not supported: send parts of type "text", "image_url", "video_url" and "file"',
        ),
        ([user(image(size=3))], "messages.0.content.0.image_url.size", "the fields of image_url are url, detail"),
        ([user(image() | {"texts": "a"})], "messages.0.content.0.texts", "did you mean text?"),
        ([ASKED | {"rôle": "user"}], "messages.0.rôle", "did you mean role?"),
        (
            [system("s" * 1_995), ASKED],
            "messages.0.content",
            "messages.0.content, question and turns have 2,007 characters, the limit is 2,000",
        ),
        ([user(image(), text("w" * 2_001))], "messages.0.content", "messages.0.content has 2,001 characters"),
        ([ASKED, assistant("w" * 1_990), ASKED], "messages", "have 2,014 characters, the limit is 2,000: leave"),
        ([{"role": "user", "content": 7}], "messages.0.content", "must be a string or a list of parts, such as {"),
        ([{"role": "user", "content": [7]}], "messages.0.content.0", "messages.0.content.0 must be a JSON object"),
        ([7], "messages.0", "messages.0 must be a JSON object"),
        ([{"content": "which?"}], "messages.0.role", "the field messages.0.role is missing"),
    ],
)
def test_a_message_that_breaks_a_rule_is_named(messages, param, message):
    error = refused(*messages)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"video_frames": 33}, "video_frames", "video_frames should be less than or equal to 32; it is 33"),
        ({"video_frames": 3}, "video_frames", "video_frames needs a video: add one, or leave video_frames out"),
        ({"video_sampling": "all"}, "video_sampling", "video_sampling should be 'uniform' or 'change'; it is 'all'"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "are both given: leave max_tokens out"),
        (
            {"max_completion_tokens": 0},
            "max_completion_tokens",
            "max_completion_tokens should be greater than or equal",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream"),
        ({"temperature": 2.1}, "temperature", "temperature should be less than or equal to 2; it is 2.1"),
        ({"temperature": -0.1}, "temperature", "temperature should be greater than or equal to 0; it is -0.1"),
        ({"temperature": "1"}, "temperature", "temperature should be a valid number; it is '1'"),
        ({"top_p": -0.1}, "top_p", "top_p should be greater than or equal to 0; it is -0.1"),
        ({"stop": list("abcde")}, "stop", "stop may hold at most 4 strings of 1 to 64 characters"),
        ({"stop": ""}, "stop", "stop may hold at most 4 strings"),
        ({"seed": -(2**63) - 1}, "seed", "seed should be"),
        ({"seed": 2**63}, "seed", "seed should be"),
        ({"timeout_s": 121}, "timeout_s", "timeout_s is 121, the limit is 120: lower it"),
        ({"vision_tokens": [64]}, "vision_tokens", "vision_tokens must be a list of the least and the most"),
        ({"user": "u" * 513}, "user", "user should have at most 512 characters"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "the fields of stream_options are include_usage"),
        ({"max_token": 3}, "max_token", "did you mean max_tokens?"),
        ({"files": ["img_1"]}, "files", "there is no field 'files': the fields are model, messages"),
    ],
)
def test_a_field_that_breaks_a_rule_is_named(fields, param, message):
    error = refused(ASKED, **fields)
    assert error.param == param
    assert message in error.message


def test_a_long_conversation_is_refused_by_its_count():
    error = refused(*[ASKED] * (MAX_MESSAGES + 1))
    assert error.message.startswith(f"messages may hold at most {MAX_MESSAGES} items")


@pytest.mark.parametrize(
    ("ours", "theirs", "message", "named"),
    [
        ("image", "messages.0.content.1.image_url", "image is no image", "messages.0.content.1.image_url is no image"),
        (
            "images.1",
            "messages.2.content.0.image_url",
            "image 2 of 2: image is broken",
            "image 2 of 2: image is broken",
        ),
        ("budget.vision_tokens", "vision_tokens", "budget.vision_tokens [1, 2] is", "vision_tokens [1, 2] is"),
        (
            "max_tokens",
            "max_completion_tokens",
            "900 max_tokens: lower max_tokens",
            "900 max_completion_tokens: lower max_completion_tokens",
        ),
        ("timeout_s", "timeout_s", "raise timeout_s", "raise timeout_s"),
        ("other", "other", "other", "other"),
    ],
)
def test_an_error_of_the_core_gets_the_chats_name(ours, theirs, message, named):
    asked = fields_of(
        read(
            user(text("?"), image()),
            assistant("a"),
            user(image(), text("?")),
            max_completion_tokens=3,
        )
    )
    names = dict(asked[1]) | {"image": "messages.0.content.1.image_url"}
    with pytest.raises(NotFound) as caught, naming(names):
        raise NotFound(message, param=ours)
    assert (caught.value.param, caught.value.message, str(caught.value)) == (theirs, named, named)


def test_only_errors_of_the_service_are_renamed():
    with pytest.raises(ValueError, match="image"), naming({"image": "messages"}):
        raise ValueError("image")


# Every conversation that is in order, and what it must become.
words = st.text(st.characters(categories=("L", "N", "P", "Zs")), min_size=1, max_size=12).filter(str.strip)
sources = st.one_of(
    st.from_regex(r"img_[0-9a-f]{4}", fullmatch=True).map(lambda name: (name, ImageId(name))),
    st.binary(max_size=9).map(
        lambda data: (f"data:image/png;base64,{b64encode(data).decode()}", ImageBytes(data)),
    ),
    st.just(("https://example.com/x.png", ImageUrl("https://example.com/x.png"))),
)
pieces = st.lists(words | sources, max_size=5)


@given(st.lists(st.tuples(pieces, words, words), max_size=4), pieces, words, st.booleans())
def test_any_conversation_in_order_becomes_its_question(turns, last, question, as_text):
    messages: list[dict[str, Any]] = []
    places: dict[str, ImageSource] = {}

    def ask(content: list[Any]) -> tuple[Text | ImageSource, ...]:
        place = f"messages.{len(messages)}.content"
        messages.append(user(*(text(each) if isinstance(each, str) else image(each[0]) for each in content)))
        places.update(
            {f"{place}.{i}.image_url": each[1] for i, each in enumerate(content) if not isinstance(each, str)}
        )
        return tuple(Text(each.strip()) if isinstance(each, str) else each[1] for each in content)

    first = [("img_0", ImageId("img_0"))]
    exchanges = []
    for before, asked_for, answer in turns:
        parts = ask([*first, *before, asked_for])
        exchanges.append(Exchange(parts, answer.strip()))
        messages.append(assistant(answer if as_text else [text(answer)]))
    parts = ask([*first, *last, question])
    fields, names = fields_of(read(*messages))
    asked = to_request(fields, CARD, LIMITS)
    assert asked.exchanges == tuple(exchanges)
    assert asked.parts == parts
    assert asked.images == tuple(places.values())
    for index, place in enumerate(places):
        assert names[f"images.{index}"] == place
    assert names["question"] == f"messages.{len(messages) - 1}.content"


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=5) | st.sampled_from(["user", "text", "img_1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url", "detail", "x"]), inner, max_size=4
        )
    ),
    max_leaves=15,
)


@given(st.dictionaries(st.sampled_from(sorted(ChatRequest.model_fields)), values), st.lists(values, max_size=3))
def test_any_json_is_a_question_or_a_named_fault(fields, messages):
    body = json.dumps({"model": "tiny", "messages": messages} | fields).encode()
    try:
        asked, names = fields_of(ChatRequest.from_json(body))
        with naming(names):
            to_request(asked, CARD, LIMITS)
    except GlimpseError as error:
        named = (error.param or "").split(".")[0]
    else:
        named = "messages"
    assert named in ChatRequest.model_fields
