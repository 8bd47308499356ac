import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
import pytest_asyncio
from fastapi.routing import APIRoute
from starlette.responses import Response
from structlog.testing import capture_logs

from service.admission.quota import Cost
from service.core.errors import Overloaded, Unavailable
from service.edges.http.application import http_api
from service.edges.http.respond import run
from tests.support import films
from tests.support.fakes import CARD, CLIPS, CLOSER, SPELLED, FakeProber, House, cancelled, png, turns, until

IMAGE = base64.b64encode(png()).decode()
ASKED = {"image": IMAGE, "question": "what colour?"}


class Caller:
    """An HTTP client of a service without Triton."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.app = http_api(house.edge)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost")

    async def ask(self, **changes: object) -> httpx.Response:
        return await self.http.post("/v1/vqa", json=ASKED | changes)

    async def post(self, body: bytes, content_type: str = "application/json") -> httpx.Response:
        return await self.http.post("/v1/vqa", content=body, headers={"content-type": content_type})

    async def close(self) -> None:
        await self.http.aclose()
        self.house.reader.close()


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    caller = Caller(House(max_image_bytes=100_000, max_image_pixels=1_000_000))
    yield caller
    await caller.close()


def fault(response: httpx.Response, status: int) -> dict[str, str]:
    """The error of a response, which has OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def events(response: httpx.Response) -> list[str]:
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [block.removeprefix("data: ") for block in blocks]


async def test_an_answer_has_everything_that_is_known_of_it(caller):
    response = await caller.ask()
    answer = response.json()
    assert response.status_code == 200
    assert answer.pop("id").startswith("vqa_")
    assert answer.pop("image_ids")[0].startswith("img_")
    assert answer.pop("timing_ms").keys() == {"queue", "load", "vision", "first_token", "total"}
    assert answer == {
        "model": "tiny",
        "answer": "red",
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": len(caller.house.language.prompts[0].input_ids) - 32,
            "completion_tokens": 1,
            "image_tokens": 32,
        },
        "vision": {
            "cache": "miss",
            "vision_tokens": 64,
            "visual_tokens": 32,
            "detail": "low",
            "reduced": False,
            "fit": "squash",
        },
    }


async def test_the_second_question_about_an_image_hits(caller):
    first = (await caller.ask()).json()
    second = (await caller.ask(question="which shape?")).json()
    by_id = (await caller.ask(image=first["image_ids"][0])).json()
    assert [answer["vision"]["cache"] for answer in (first, second, by_id)] == ["miss", "hit", "hit"]


async def test_every_field_reaches_the_models(caller):
    knobs = {"max_tokens": 3, "temperature": 0.5, "top_k": 4, "top_p": 0.5, "seed": 9, "repetition_penalty": 1.5}
    response = await caller.ask(
        **knobs,
        stop=[".", "!"],
        budget={"vision_tokens": [64, 100]},
        timeout_s=3,
        priority="low",
        stream=False,
        explain=False,
    )
    assert response.status_code == 200
    sampling = caller.house.language.sampling[0]
    assert {name: getattr(sampling, name) for name in knobs} == knobs
    assert sampling.stop == (".", "!")
    assert caller.house.vision.budgets[0].vision_tokens == (64, 100)
    assert caller.house.vision.budgets[0].visual_tokens == CARD.visual_tokens


async def test_without_a_seed_each_request_draws_its_own(caller):
    await caller.ask(temperature=1)
    await caller.ask(temperature=1)
    one, other = caller.house.language.sampling
    assert one.seed != other.seed


async def test_without_max_tokens_a_description_is_not_cut(caller):
    await caller.ask()
    assert caller.house.language.sampling[0].max_tokens == 64
    properties = (await caller.http.get("/openapi.json")).json()["components"]["schemas"]["VqaRequest"]["properties"]
    assert properties["max_tokens"]["default"] == 64


async def test_one_stop_string_needs_no_list(caller):
    await caller.ask(stop="\n")
    assert caller.house.language.sampling[0].stop == ("\n",)


async def test_explain_tells_where_it_looked(caller):
    (relevance,) = (await caller.ask(explain=True)).json()["relevance"]
    assert [len(relevance["map"]), len(relevance["map"][0])] == [16, 16]
    assert relevance["scores"].keys() == {"propositional", "perspectival", "participatory"}
    assert [len(relevance["levels"]), len(relevance["levels"][0])] == [8, 8]
    assert relevance["tensions"] == {"particularize": 0.5, "explore": 0.5, "diversify": 0.5}


async def test_high_detail_is_told_and_explained(caller):
    keen = Caller(House(CLOSER))
    answer = (await keen.ask(detail="high", explain=True)).json()
    assert answer["vision"]["detail"] == "high"
    (relevance,) = answer["relevance"]
    assert max(map(max, relevance["levels"])) == 2
    assert keen.house.vision.budgets[0].vision_tokens == (64, 400)
    form = {"image": png(), "question": (None, "?"), "detail": (None, "high")}
    assert (await keen.http.post("/v1/vqa", files=form)).json()["vision"]["detail"] == "high"
    assert 'glimpse_images_seen_total{detail="high"} 2.0' in (await keen.http.get("/metrics")).text
    await keen.close()


async def test_a_stream_is_deltas_then_the_rest_then_done(caller):
    caller.house.language.say(" red or é")
    *deltas, end, done = events(await caller.ask(stream=True))
    assert done == "[DONE]"
    assert "".join(json.loads(delta)["delta"] for delta in deltas) == "red or é"
    rest = json.loads(end)
    assert {json.loads(delta)["id"] for delta in deltas} == {rest["id"]}
    assert "answer" not in rest
    assert rest["usage"]["completion_tokens"] > 1
    assert rest["finish_reason"] == "stop"
    assert rest.keys() >= {"model", "vision", "timing_ms", "image_ids"}


async def test_an_empty_answer_streams_too(caller):
    caller.house.language.say("")
    end, done = events(await caller.ask(stream=True))
    assert json.loads(end)["usage"]["completion_tokens"] == 0
    assert done == "[DONE]"


async def test_an_early_error_of_a_stream_has_its_own_status(caller):
    assert fault(await caller.ask(stream=True, image="img_gone"), 404)["code"] == "image_not_found"


async def test_a_late_error_of_a_stream_is_an_event(caller):
    caller.house.language.say(" red red")
    caller.house.language.wait_at = 1
    caller.house.language.fault = Unavailable("triton is gone")
    delta, error, done = events(await caller.ask(stream=True))
    assert json.loads(delta)["delta"] == "red"
    assert json.loads(error)["error"]["code"] == "unavailable"
    assert done == "[DONE]"
    assert caller.house.outcomes() == {"unavailable": 1}


async def test_a_form_asks_the_same(caller):
    fields = {"question": "what colour?", "max_tokens": "3", "temperature": "0.5", "explain": "true", "seed": "4"}
    fields["budget"] = '{"vision_tokens": [64, 100]}'
    response = await caller.http.post("/v1/vqa", data=fields | {"stop": [".", "!"]}, files={"image": ("x.png", png())})
    assert response.status_code == 200, response.text
    assert response.json()["relevance"]
    sampling = caller.house.language.sampling[0]
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.stop) == (3, 0.5, 4, (".", "!"))
    assert caller.house.vision.budgets[0].vision_tokens == (64, 100)


async def test_several_images_have_an_answer_together(caller):
    other = base64.b64encode(png((1, 2, 3))).decode()
    answer = (await caller.ask(image=None, images=[IMAGE, other], explain=True)).json()
    assert len(answer["image_ids"]) == len(answer["relevance"]) == 2
    assert answer["usage"]["image_tokens"] == answer["vision"]["visual_tokens"] == 64
    assert answer["vision"]["vision_tokens"] == 128
    by_id = (await caller.ask(image=None, images=answer["image_ids"])).json()
    assert by_id["vision"]["cache"] == "hit"
    files = [("image", ("x.png", png())), ("image", (None, answer["image_ids"][1])), ("question", (None, "?"))]
    form = (await caller.http.post("/v1/vqa", files=files)).json()
    assert form["image_ids"] == answer["image_ids"]


async def test_earlier_turns_are_a_part_of_the_prompt(caller):
    asked = [{"question": "which shape?", "answer": "a circle"}]
    one = (await caller.ask()).json()
    two = (await caller.ask(turns=asked)).json()
    assert two["usage"]["prompt_tokens"] > one["usage"]["prompt_tokens"]
    form = {"image": png(), "question": (None, "what colour?"), "turns": (None, json.dumps(asked))}
    three = (await caller.http.post("/v1/vqa", files=form)).json()
    assert three["usage"]["prompt_tokens"] == two["usage"]["prompt_tokens"]


async def test_a_form_may_name_an_image_by_its_id_or_stream(caller):
    image_id = (await caller.ask()).json()["image_ids"][0]
    form = {name: (None, value) for name, value in {"image": image_id, "question": "?", "stream": "true"}.items()}
    assert events(await caller.http.post("/v1/vqa", files=form))[-1] == "[DONE]"


@pytest.mark.parametrize("kind", ["png", "PNG;charset=x", "png;CHARSET=x"])
async def test_a_data_url_is_an_image(caller, kind):
    assert (await caller.ask(image=f"data:image/{kind};base64,{IMAGE}")).status_code == 200


async def test_base64_may_be_wrapped_as_its_command_does(caller):
    wrapped = "\n".join(IMAGE[i : i + 76] for i in range(0, len(IMAGE), 76))
    assert (await caller.ask(image=wrapped)).status_code == 200


async def test_an_image_is_sent_once_and_asked_about_by_its_id(caller):
    raw = await caller.http.post("/v1/images", content=png(size=(40, 30)))
    form = await caller.http.post("/v1/images", files={"image": png(size=(40, 30))})
    kept = raw.json()
    assert kept["id"] == form.json()["id"]
    assert (kept["bytes"], kept["width"], kept["height"]) == (len(png(size=(40, 30))), 40, 30)
    assert kept["expires_at"] > 1_700_000_000
    assert (await caller.ask(image=kept["id"])).json()["vision"]["cache"] == "miss"


@pytest.mark.parametrize(
    ("changes", "status", "param", "code", "message"),
    [
        ({"image": "!"}, 400, "image", "invalid_image", "neither base64, nor a data: URL, nor an image id"),
        ({"image": ""}, 400, "image", "invalid_image", "empty (0 bytes)"),
        ({"image": "aGVsbG8="}, 400, "image", "invalid_image", "send PNG, JPEG, WebP, GIF, AVIF, TIFF or BMP"),
        ({"image": IMAGE[: len(IMAGE) // 2 // 4 * 4]}, 400, "image", "invalid_image", "damaged or cut short"),
        ({"image": "https://example.com/x.png"}, 400, "image", "url_not_supported", "URLs are not fetched"),
        ({"image": "data:image/png,raw"}, 400, "image", "invalid_request", "data:image/png;base64"),
        ({"image": "img_0123"}, 404, "image", "image_not_found", "send it again with POST /v1/images"),
        ({"image": 5}, 400, "image", "invalid_request", "should be a valid string; it is 5"),
        ({"question": "  "}, 400, "question", "invalid_request", "say what you want to know"),
        ({"question": "w" * 200}, 400, "question", "context_length_exceeded", "shorten the question"),
        ({"question": "w" * 2001}, 400, "question", "invalid_request", "2,001 characters, the limit is 2,000"),
        ({"question": None}, 400, "question", "invalid_request", "valid string"),
        ({"max_tokens": "16"}, 400, "max_tokens", "invalid_request", "valid integer; it is '16'"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_request", "greater than or equal to 1"),
        ({"max_tokens": 160}, 400, "max_tokens", "context_length_exceeded", "lower max_tokens to"),
        ({"max_tokens": True}, 400, "max_tokens", "invalid_request", "valid integer"),
        ({"temperature": -1}, 400, "temperature", "invalid_request", "greater than or equal to 0"),
        ({"top_p": 0}, 400, "top_p", "invalid_request", "greater than or equal to 0.000001"),
        ({"seed": -1}, 400, "seed", "invalid_request", "greater than or equal to 0"),
        ({"stop": [""]}, 400, "stop", "invalid_request", "1 to 64 characters"),
        ({"stop": 7}, 400, "stop", "invalid_request", "a string or a list of strings"),
        ({"timeout_s": 1000}, 400, "timeout_s", "invalid_request", "the limit is 120"),
        ({"images": [IMAGE]}, 400, "images", "invalid_request", "image and images are both given"),
        ({"image": None, "images": []}, 400, "images", "invalid_request", "at least 1 item"),
        ({"image": None, "images": [IMAGE, "!"]}, 400, "images.1", "invalid_image", "image 2 of 2: image is neither"),
        (
            {"image": None, "images": [IMAGE, "img_0"]},
            404,
            "images.1",
            "image_not_found",
            "image 2 of 2: image 'img_0' is not in memory",
        ),
        (
            {"image": None, "images": [IMAGE, "aGVsbG8="]},
            400,
            "images.1",
            "invalid_image",
            "image 2 of 2: not an image",
        ),
        ({"turns": [{"question": "a?"}]}, 400, "turns.0.answer", "missing_field", "turns.0.answer is missing"),
        ({"turns": [{"question": " ", "answer": "b"}]}, 400, "turns.0.question", "invalid_request", "is empty"),
        (
            {"turns": [{"question": "a?", "answer": "w" * 200}]},
            400,
            "turns",
            "context_length_exceeded",
            "earliest turns",
        ),
        (
            {"turns": [{"question": "a?", "answer": "w" * 2000}]},
            400,
            "turns",
            "invalid_request",
            "question and turns have",
        ),
        ({"turns": [{"question": "a?", "answer": "b"}] * 65}, 400, "turns", "invalid_request", "at most 64 items"),
        ({"detail": "high"}, 400, "detail", "detail_not_supported", "tiny has no closer view"),
        ({"detail": "medium"}, 400, "detail", "invalid_request", "'low', 'high' or 'auto'; it is 'medium'"),
        ({"priority": "high"}, 400, "priority", "invalid_request", "'normal' or 'low'; it is 'high'"),
        ({"stream": "yes"}, 400, "stream", "invalid_request", "valid boolean"),
        ({"budget": {"visual_tokens": [32, 128]}}, 400, "budget.visual_tokens", "invalid_request", "[32, 32]"),
        ({"budget": {"vision_tokens": [10, 20]}}, 400, "budget.vision_tokens", "invalid_request", "[64, 256]"),
        ({"budget": {"vision": 1}}, 400, "budget.vision", "unknown_field", "there is no field 'budget.vision'"),
        ({"budget": {"vision_tokens": [64, 10**300]}}, 400, "budget.vision_tokens.1", "invalid_request", "equal to 10"),
        ({"budget": 5}, 400, "budget", "invalid_request", "must be a JSON object"),
        ({"top": 5}, 400, "top", "unknown_field", "did you mean stop?"),
        ({"zzz": 5}, 400, "zzz", "unknown_field", "the fields are"),
    ],
)
async def test_a_wrong_field_is_named_with_its_mend(caller, changes, status, param, code, message):
    error = fault(await caller.ask(**changes), status)
    assert error["param"] == param
    assert error["code"] == code
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert (await caller.ask()).status_code == 200


@pytest.mark.parametrize(
    ("body", "content_type", "code", "message"),
    [
        (b"{", "application/json", "invalid_json", "the body is not valid JSON"),
        (b"", "application/json", "invalid_json", "the body is not valid JSON"),
        (b"\xff\xfe", "application/json", "invalid_json", "the body is not valid JSON"),
        (b'{"question": "\\ud800", "image": ""}', "application/json", "invalid_json", "hex escape"),
        (b"[1]", "application/json", "invalid_request", "must be a JSON object"),
        (b"{}", "application/json", "missing_field", "the field question is missing"),
        (b'{"question": "?"}', "application/json", "missing_field", "the field image is missing"),
        (b"image=x", "application/x-www-form-urlencoded", "unsupported_content_type", "curl -F image=@FILE"),
        (b"x", "multipart/form-data", "invalid_form", "names no boundary"),
        (b"x", "multipart/form-data; boundary=b", "invalid_form", "multipart/form-data"),
        (b'--b\r\ncontent-disposition: form-data; name="question"\r\n\r\nwhat', "multipart/form-data; boundary=b",
         "invalid_form", "ends before its last boundary"),
    ],
)  # fmt: skip
async def test_a_body_that_cannot_be_read_says_why(caller, body, content_type, code, message):
    error = fault(await caller.post(body, content_type), 400)
    assert error["code"] == code
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "x"}, "the field image is missing"),
        ({"image": png(), "question": "x", "quesion": "y"}, "did you mean question?"),
        ({"image": png(), "question": b"\xff"}, "question is not UTF-8 text"),
        ({"image": png(), "question": "x", "budget": "{"}, "must be JSON text"),
        ({"image": png(), "question": "x", "temperature": "warm"}, "temperature should be a valid number"),
        ({"image": png(), "question": "x", "temperature": "nan"}, "temperature should be a finite number"),
        ({"image": b"", "question": "x"}, "empty (0 bytes)"),
    ],
)
async def test_a_wrong_form_is_told_as_json_is(caller, fields, message):
    form = {name: ("x.png" if name == "image" else None, value) for name, value in fields.items()}
    assert message in fault(await caller.http.post("/v1/vqa", files=form), 400)["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"q" * 90_000: 1}, "the fields are"),
        ({"budget": {"b" * 80_000: 1}}, "the fields of budget are"),
        ({"stop": "", "turns": [{"no": number} for number in range(64)]}, "the body has 193 faults; the fields are"),
        ({f"field{number}": 1 for number in range(9_000)}, "there is no field 'field"),
        ({"question": ["x" * 80_000]}, "valid string"),
    ],
)
async def test_what_a_body_is_refused_with_is_short(caller, body, message):
    begun = time.process_time()
    response = await caller.ask(**body)
    assert time.process_time() - begun < 1
    assert message in fault(response, 400)["message"]
    assert len(response.content) < 700


async def test_the_name_of_a_forms_field_is_told_in_short(caller):
    long = [("q" * 3_000, (None, "x"))]
    for form in ([("image", png()), ("question", (None, "x")), *long], long * 2):
        for path in ("/v1/vqa", "/v1/images"):
            response = await caller.http.post(path, files=form)
            fault(response, 400)
            assert len(response.content) < 700


@pytest.mark.parametrize("depth", [180, 1_022, 100_000])
@pytest.mark.parametrize("field", ["{}", '{"vision_tokens": {}}', '{"zzz": {}}'])
async def test_json_nested_deeply_is_a_mistake_like_others(caller, depth, field):
    nested = field.replace("{}", "[" * depth + "]" * depth)
    form = {"image": png(), "question": (None, "x"), "budget": (None, nested)}
    status = 413 if depth == 100_000 else 400  # too large to be looked into
    fault(await caller.http.post("/v1/vqa", files=form), status)
    for name in ("budget", "question", "stop", "zzz"):
        fault(
            await caller.post(f'{{"question": "x", "image": "", "{name}": {nested}}}'.encode()),
            400 if name == "zzz" else status,
        )


async def test_a_field_given_twice_is_refused(caller):
    form = [("image", png()), ("question", (None, "a")), ("question", (None, "b"))]
    assert "question is given twice" in fault(await caller.http.post("/v1/vqa", files=form), 400)["message"]


async def test_an_upload_needs_one_image(caller):
    assert "empty" in fault(await caller.http.post("/v1/images", content=b""), 400)["message"]
    form = {"file": png()}
    assert (
        "one field, image or video, and it has file"
        in fault(await caller.http.post("/v1/images", files=form), 400)["message"]
    )


async def test_too_many_bytes_are_413(caller):
    large = bytes(200_000)
    by_length = fault(await caller.http.post("/v1/images", content=large), 413)
    assert "the body has 200,000 bytes, the limit is 100,000 bytes" in by_length["message"]
    in_json = fault(await caller.ask(image=base64.b64encode(large).decode()), 413)
    assert "200,000 bytes, the limit is 100,000" in in_json["message"]
    form = {"image": large, "question": (None, "x")}
    assert fault(await caller.http.post("/v1/vqa", files=form), 413)["code"] == "too_large"


async def test_a_body_without_a_length_is_read_up_to_the_limit_and_no_further(caller):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)

    fault(await caller.http.post("/v1/images", content=endless()), 413)
    assert sent <= 120_000


async def test_a_body_that_does_not_arrive_in_time_is_408():
    caller = Caller(House(body_timeout_s=0.05))
    never = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await never.wait()

    assert "only 1 bytes of the body came" in fault(await caller.http.post("/v1/vqa", content=slow()), 408)["message"]
    await caller.close()


async def test_too_many_pixels_are_413(caller):
    error = fault(await caller.ask(image=base64.b64encode(png(size=(2000, 600))).decode()), 413)
    assert "2000x600 pixels" in error["message"]


async def test_a_full_house_says_when_to_come_back(caller):
    caller.house.vision.fault = Overloaded("no room", retry_after_s=3)
    response = await caller.ask()
    assert fault(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "3"


async def test_a_deadline_is_504(caller):
    caller.house.vision.gate.clear()
    assert fault(await caller.ask(timeout_s=0.05), 504)["code"] == "deadline_exceeded"


async def test_an_unknown_fault_is_logged_once_with_the_request_id(caller):
    caller.house.edge.pipeline.models.models[0].card = None  # no path works like this
    with capture_logs() as lines:
        response = await caller.http.get("/v1/models", headers={"x-request-id": "abc"})
    error = fault(response, 500)
    assert "request id abc" in error["message"]
    assert "NoneType" not in response.text
    assert [(line["event"], line["request_id"]) for line in lines] == [("fault", "abc")]


async def test_an_unknown_fault_in_the_path_is_logged_once(caller):
    caller.house.vision.fault = RuntimeError("secret")
    with capture_logs() as lines:
        response = await caller.ask()
    assert fault(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text
    assert len(lines) == 1


async def test_the_request_id_is_echoed_or_made(caller):
    given = await caller.http.get("/health/live", headers={"x-request-id": "my-id.1"})
    made = await caller.http.get("/health/live")
    refused = await caller.http.get("/health/live", headers={"x-request-id": "no spaces\tplease"})
    assert given.headers["x-request-id"] == "my-id.1"
    assert len(made.headers["x-request-id"]) == 32
    assert len(refused.headers["x-request-id"]) == 32


async def test_no_route_and_wrong_method_have_the_same_shape(caller):
    assert fault(await caller.http.get("/v2/vqa"), 404)["code"] == "not_found"
    wrong = await caller.http.get("/v1/vqa")
    assert fault(wrong, 405)["code"] == "method_not_allowed"
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/completions"])
async def test_a_client_that_asks_at_another_api_of_openais_is_told_the_one_to_use(caller, path):
    said = fault(await caller.http.post(path, json={"model": "tiny", "input": "?"}), 404)
    assert said["message"].startswith(f"there is no POST {path}: ask POST /v1/chat/completions (openai.chat")


async def test_live_is_always_and_ready_when_every_model_has_inferred(caller):
    readiness, prober = caller.house.readiness, FakeProber()
    assert (await caller.http.get("/health/live")).json() == {"status": "ok", "faults": {}}
    starting = await caller.http.get("/health/ready")
    assert starting.status_code == 503
    assert starting.json()["faults"] == dict.fromkeys(("see", "attend", "llm"), "not answered yet")
    await readiness.probe(prober, CARD, 1)
    assert (await caller.http.get("/health/ready")).status_code == 200
    prober.faults["llm"] = Unavailable("it is gone")
    await readiness.probe(prober, CARD, 1)
    broken = await caller.http.get("/health/ready")
    assert broken.status_code == 503
    assert broken.json() == {"status": "not ready", "faults": {"llm": "it is gone"}}
    assert caller.house.counted("glimpse_ready") == 0


async def test_watching_probes_until_cancelled(caller):
    readiness, prober = caller.house.readiness, FakeProber()
    watching = asyncio.create_task(readiness.watch(prober, CARD, interval_s=0.01, timeout_s=1))
    await until(lambda: readiness.ready)
    prober.faults["see"] = Unavailable("gone")
    await until(lambda: not readiness.ready)
    prober.faults.clear()
    await until(lambda: readiness.ready)
    watching.cancel()


async def test_the_model_tells_what_it_offers(caller):
    answer = (await caller.http.get("/v1/models")).json()
    (model,) = answer["data"]
    assert answer["object"] == "list"
    assert model["id"] == "tiny"
    assert model["budget"] == {"vision_tokens": [64, 256], "visual_tokens": [32, 32]}
    assert model["default_visual_tokens"] == [32, 32]
    assert "closer_view" not in model
    assert "clip" not in model


async def test_a_model_with_a_clip_resampler_tells_what_it_makes_of_a_video():
    whole = Caller(House(CLIPS))
    (model,) = (await whole.http.get("/v1/models")).json()["data"]
    assert model["clip"] == {"visual_tokens": 64, "vision_tokens": [64, 256], "frames": 32}
    await whole.close()


@pytest.mark.parametrize("field", ["image", "video"])
async def test_a_form_s_damaged_video_is_told_by_the_field_that_was_sent(caller, field):
    cut = films.video()[:60]
    answer = await caller.http.post("/v1/images", files={field: ("clip.webm", cut)})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    kept = await caller.http.post("/v1/files", files={"file": ("clip.webm", cut)}, data={"purpose": "vision"})
    assert kept.json()["error"]["param"] == "file"


async def test_a_form_of_an_image_s_bytes_has_one_field(caller):
    answer = await caller.http.post("/v1/images", files={"photo": ("x.png", png())})
    assert "one field, image or video, and it has photo" in answer.json()["error"]["message"]


async def test_a_model_with_a_closer_view_tells_when_auto_takes_it():
    keen = Caller(House(CLOSER))
    (model,) = (await keen.http.get("/v1/models")).json()["data"]
    assert model["closer_view"] == {"vision_tokens": [64, 400], "auto_at": 0.6}
    await keen.close()


async def test_metrics_count_questions_and_http_requests(caller):
    await caller.ask()
    await caller.ask(question="")
    await caller.http.get("/nowhere")
    text = (await caller.http.get("/metrics")).text
    assert 'glimpse_requests_total{outcome="ok",variant="default"} 1.0' in text
    assert 'glimpse_http_requests_total{method="POST",route="/v1/vqa",status="400"} 1.0' in text
    assert 'glimpse_http_requests_total{method="GET",route="none",status="404"} 1.0' in text


async def test_openapi_describes_every_route_with_examples_that_are_valid(caller):
    spec = (await caller.http.get("/openapi.json")).json()
    questions = {"/v1/vqa", "/v1/vqa/batch", "/v1/vqa/estimate", "/v1/chat/completions"}
    images = {"/v1/images", "/v1/images/{image_id}", "/v1/files", "/v1/files/{file_id}"}
    service = {"/v1/models", "/v1/models/{model}", "/v1/variants", "/health/live", "/health/ready"}
    assert set(spec["paths"]) == questions | images | service
    for reference in references(spec):
        assert reference.removeprefix("#/components/schemas/") in spec["components"]["schemas"]
    body = spec["paths"]["/v1/vqa"]["post"]["requestBody"]["content"]
    examples = {name: example["value"] for name, example in body["application/json"]["examples"].items()}
    for example in examples.values():
        assert (await caller.http.post("/v1/vqa", json=example)).status_code == 200


def references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [each for value in node.values() for each in references(value)]
    return [each for value in node for each in references(value)] if isinstance(node, list) else []


async def one_request(
    caller: Caller, body: dict[str, object], blocks: object = None
) -> tuple[asyncio.Task[None], asyncio.Event]:
    """A question as a server hands it over, and the event that says that its caller went away."""
    return one_body(caller, "/v1/vqa", json.dumps(ASKED | body).encode(), blocks)


def one_body(caller: Caller, path: str, body: bytes, blocks: object = None) -> tuple[asyncio.Task[None], asyncio.Event]:
    """`blocks` tells of which bytes sent to the caller are not taken."""
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, object]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        if callable(blocks) and blocks(message.get("body", b"")):
            await asyncio.Event().wait()

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    return asyncio.create_task(caller.app(scope, receive, send)), gone


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_who_hangs_up_cancels_the_stream_and_frees_the_slot(caller, stream):
    caller.house.language.say(" red red red")
    caller.house.language.wait_at = 1
    caller.house.language.gate.clear()
    task, gone = await one_request(caller, {"stream": stream})
    await until(lambda: caller.house.language.open == 1)
    gone.set()
    await until(task.done)
    assert caller.house.language.open == 0
    assert caller.house.outcomes() == {"cancelled": 1}
    assert caller.house.counted("glimpse_requests_in_flight") == 0
    assert task.exception() is None


@pytest.mark.parametrize("last", [b"delta", b"finish_reason", b"[DONE]"])
async def test_a_caller_who_does_not_read_its_stream_holds_nothing_for_ever(caller, last):
    """It takes nothing from these bytes on: whatever is sent after them would wait too."""
    sent: list[bytes] = []

    def blocks(body: bytes) -> bool:
        sent.append(body)
        return any(last in each for each in sent)

    task, gone = await one_request(caller, {"stream": True}, blocks)
    await until(lambda: sent and last in sent[-1])
    gone.set()
    await until(task.done)
    assert task.exception() is None
    assert last in sent[-1]
    assert caller.house.admission.quota.held == Cost()


async def test_a_caller_who_hangs_up_while_its_image_is_decoded_frees_its_place(caller):
    caller.house.pipeline.pixels.reader = SlowReader()
    task, gone = one_body(caller, "/v1/images", png())
    await until(lambda: caller.house.counted("glimpse_admitted_cost", unit="pixels") > 0)
    gone.set()
    await until(task.done)
    assert task.exception() is None
    assert caller.house.admission.quota.held == Cost()
    assert len(caller.house.pipeline.images.store) == 0


async def test_an_image_that_is_not_decoded_in_time_is_504():
    caller = Caller(House(default_timeout_s=0.05))
    caller.house.pipeline.pixels.reader = SlowReader()
    error = fault(await caller.http.post("/v1/images", content=png()), 504)
    assert "not decoded within 0.05 s" in error["message"]
    assert caller.house.admission.quota.held == Cost()
    await caller.close()


class SlowReader:
    """Never has a process that is free to decode."""

    async def begin_decode(self, *_: object) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("stream", [True, False])
async def test_a_caller_who_hangs_up_in_the_queue_leaves_it(stream):
    caller = Caller(House(vision_slots=1))
    caller.house.vision.close("see")
    first, first_gone = await one_request(caller, {"stream": stream})
    await until(lambda: caller.house.vision.calls)
    other = base64.b64encode(png((1, 2, 3))).decode()
    second, gone = await one_request(caller, {"stream": stream, "image": other})
    await until(lambda: caller.house.counted("glimpse_requests_waiting", kind="single_image") == 1)
    gone.set()
    await until(second.done)
    assert caller.house.counted("glimpse_requests_waiting", kind="single_image") == 0
    first_gone.set()
    await until(first.done)
    held = caller.house.admission.quota.held
    assert held == Cost(nbytes=held.nbytes) != Cost()  # the encode that goes on has the first one's body
    caller.house.vision.gate.set()
    await until(lambda: caller.house.admission.quota.held == Cost())
    await caller.close()


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_is_reserved_as_it_comes(house_of_two_bodies, declared):
    caller = house_of_two_bodies
    more = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(9):
            yield bytes(10_000)
        await more.wait()
        yield bytes(10_000)

    headers = {"content-length": "100000"} if declared else {}
    send = [caller.http.post("/v1/images", content=slowly(), headers=headers) for _ in range(2)]
    tasks = [asyncio.create_task(each) for each in send]
    await until(lambda: caller.house.counted("glimpse_admitted_cost", unit="nbytes") == 1_480_000)
    refused = await caller.http.post("/v1/images", content=bytes(70_000))
    assert fault(refused, 429)["code"] == "saturated"
    assert "1,480,000 of 1,500,000 are in use" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert caller.house.counted("glimpse_refusals_total", reason="saturated") == 1
    more.set()
    assert [response.status_code for response in await asyncio.gather(*tasks)] == [400, 400]
    assert caller.house.counted("glimpse_admitted_cost", unit="nbytes") == 1_300_000


async def test_what_is_announced_and_does_not_come_takes_no_room(house_of_two_bodies):
    caller, never = house_of_two_bodies, asyncio.Event()

    async def nothing() -> AsyncIterator[bytes]:
        yield b""
        await never.wait()

    announced = {"content-length": "100000"}
    send = [caller.http.post("/v1/images", content=nothing(), headers=announced) for _ in range(50)]
    tasks = [asyncio.create_task(each) for each in send]
    await turns()
    response = await caller.http.post("/v1/images", content=png() + bytes(90_000))
    assert response.status_code == 200
    for task in tasks:
        await cancelled(task)


async def test_large_bodies_leave_room_for_small_ones(house_of_two_bodies):
    caller = house_of_two_bodies
    caller.house.admission.quota.reserve(Cost(nbytes=250_000), "", 0.0)
    for size in (64 * 1024 + 1, 100_000):
        assert fault(await caller.http.post("/v1/images", content=bytes(size)), 429)["code"] == "saturated"
    assert (await caller.ask()).status_code == 200
    assert (await caller.http.post("/v1/images", content=png() + bytes(60_000))).status_code == 200


async def test_a_large_body_that_does_not_fit_is_refused_before_it_is_read(house_of_two_bodies):
    house_of_two_bodies.house.admission.quota.reserve(Cost(nbytes=150_000), "", 0.0)

    async def nothing() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    announced = {"content-length": "100000"}
    response = await house_of_two_bodies.http.post("/v1/images", content=nothing(), headers=announced)
    assert fault(response, 429)["code"] == "saturated"


@pytest_asyncio.fixture
async def house_of_two_bodies() -> AsyncIterator[Caller]:
    """A large body may come until 1,500,000 bytes are held."""
    caller = Caller(House(max_image_bytes=100_000, max_bytes_in_flight=2_000_000))
    caller.house.admission.quota.reserve(Cost(nbytes=1_300_000), "", 0.0)
    yield caller
    await caller.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_body_stays_reserved_until_its_answer_has_ended(caller, stream):
    caller.house.language.gate.clear()
    task, _ = await one_request(caller, {"stream": stream})
    await until(lambda: caller.house.language.open == 1)
    assert caller.house.counted("glimpse_admitted_cost", unit="nbytes") > len(IMAGE)
    assert caller.house.counted("glimpse_admitted_cost", unit="tokens") == caller.house.admission.row_tokens
    caller.house.language.gate.set()
    await until(task.done)
    assert caller.house.admission.quota.held == Cost()


async def test_a_full_house_reads_no_body(caller):
    caller.house.admission.quota.reserve(Cost(tokens=caller.house.admission.quota.limits.tokens), "", 0.0)

    async def nothing() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    for path in ("/v1/vqa", "/v1/images"):
        assert fault(await caller.http.post(path, content=nothing()), 429)["code"] == "saturated"


async def test_tenants_are_told_apart_by_a_header_that_must_be_a_plain_word(caller):
    good = await caller.http.post("/v1/vqa", json=ASKED, headers={"x-tenant-id": "acme-1"})
    assert good.status_code == 200
    for bad in ("two words", "x" * 65):
        response = await caller.http.post("/v1/vqa", json=ASKED, headers={"x-tenant-id": bad})
        assert fault(response, 400)["code"] == "invalid_tenant"
    limit = caller.house.admission.quota.limits.tokens
    caller.house.admission.quota.reserve(Cost(tokens=limit * 3 // 4), "acme-1", 0.0)
    full = await caller.http.post("/v1/vqa", json=ASKED, headers={"x-tenant-id": "acme-1"})
    assert fault(full, 429)["code"] == "tenant_share"
    other = await caller.http.post("/v1/vqa", json=ASKED, headers={"x-tenant-id": "other"})
    assert other.status_code == 200
    lines = (await caller.http.get("/metrics")).text.splitlines()
    assert all(line.startswith("glimpse_tenant_") for line in lines if "acme" in line)  # what an operator bills


@pytest.mark.parametrize("form", [False, True])
async def test_each_token_has_its_log_probability_on_request(caller, form):
    caller.house.language.say(" red é")
    wishes = {"logprobs": True, "top_logprobs": 1}
    if form:
        data = {"question": "?"} | {name: str(value) for name, value in wishes.items()}
        said = (await caller.http.post("/v1/vqa", data=data, files={"image": png()})).json()
    else:
        said = (await caller.ask(**wishes)).json()
    assert bytes(one for each in said["logprobs"] for one in each["bytes"]).decode() == " red é"
    assert [each["token"] for each in said["logprobs"]][-2:] == ["\\xc3", "\\xa9"]
    assert [each["logprob"] for each in said["logprobs"]] == [-place / 2 for place in range(len(said["logprobs"]))]
    assert {top["bytes"][0] for each in said["logprobs"] for top in each["top_logprobs"]} == {*SPELLED[3]}
    *deltas, end = map(json.loads, events(await caller.ask(**wishes, stream=True))[:-1])
    assert [one for each in deltas for one in each["logprobs"]] == said["logprobs"]
    assert "logprobs" not in end
    assert "logprobs" not in (await caller.ask()).json()


async def test_a_server_without_likeliest_tokens_refuses_them_by_name():
    caller = Caller(House(replace(CARD, top_log_probs=False)))
    error = fault(await caller.ask(logprobs=True, top_logprobs=1), 400)
    assert (error["param"], error["code"]) == ("top_logprobs", "top_logprobs_not_supported")
    assert (await caller.ask(logprobs=True)).json()["logprobs"][0]["top_logprobs"] == []
    await caller.close()


async def test_an_error_after_the_start_of_a_response_begins_no_second_one():
    class Broken(Response):
        async def __call__(self, _, __, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise Unavailable("it broke")

    async def endpoint(_):
        return Broken()

    sent = []

    async def send(message):
        sent.append(message["type"])

    with pytest.raises(Unavailable):
        await run(APIRoute("/x", endpoint, methods=["POST"]), {"type": "http", "headers": []}, None, send)
    assert sent == ["http.response.start"]
