"""POST /v1/vqa/estimate: what a question would cost, from fields and headers."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from service.admission.quota import Cost
from service.edges.http.application import http_api
from service.text.prompt import PromptBuilder
from tests.support.fakes import CLOSER, TOKENIZER, House, Strain, png
from tests.support.paths import SCENES
from tests.support.servers import Gateway

PHOTO = png(size=(640, 480))
SCENE = (SCENES / "new_020.webp").read_bytes()


class Caller:
    """An HTTP client of a service without Triton."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(http_api(house.edge)), base_url="http://localhost")

    async def estimate(self, image: bytes | str, **fields: object) -> httpx.Response:
        encoded = image if isinstance(image, str) else base64.b64encode(image).decode()
        return await self.http.post("/v1/vqa/estimate", json={"image": encoded, "question": "what colour?"} | fields)


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    caller = Caller(House(CLOSER, max_image_bytes=100_000, max_image_pixels=1_000_000))
    yield caller
    await caller.http.aclose()
    caller.house.reader.close()


async def test_it_costs_what_the_answer_then_takes(caller):
    said = (await caller.estimate(PHOTO, max_tokens=20)).json()
    assert (said["model"], said["admitted"], said["refusal"], said["reduced"]) == ("tiny", True, None, False)
    (image,) = said["images"]
    assert (image["bytes"], image["width"], image["height"], image["known"]) == (len(PHOTO), 640, 480, False)
    assert (said["image_tokens"], said["vision_tokens"], said["max_tokens"]) == ([32, 32], [64, 256], 20)
    assert said["cost"]["pixels"] == 640 * 480
    assert said["cost"]["tokens"] == max(32 + said["prompt_tokens"] + 20, caller.house.admission.row_tokens)
    assert said["cost"]["bytes"] > len(PHOTO)
    assert said["limits"]["tokens"] == caller.house.admission.quota.limits.tokens
    asked = {"image": base64.b64encode(PHOTO).decode(), "question": "what colour?"}
    answer = (await caller.http.post("/v1/vqa", json=asked)).json()
    assert answer["usage"]["prompt_tokens"] == said["prompt_tokens"]
    assert answer["image_ids"] == [said["images"][0]["id"]]


async def test_nothing_is_decoded_encoded_kept_or_held(caller):
    await caller.estimate(png())
    assert not caller.house.vision.calls
    assert len(caller.house.pipeline.images.store) == 0
    assert caller.house.admission.quota.held == Cost()
    assert not caller.house.outcomes()


async def test_a_known_image_has_no_pixels_to_decode(caller):
    asked = {"image": base64.b64encode(png()).decode(), "question": "what colour?"}
    image_id = (await caller.http.post("/v1/vqa", json=asked)).json()["image_ids"][0]
    said = (await caller.estimate(image_id)).json()
    assert (said["images"][0]["known"], said["cost"]["pixels"]) == (True, 0)


async def test_an_image_is_known_whatever_the_precision_that_the_models_compute_in(caller):
    house = caller.house
    int8, prompts = CLOSER.computed_in("int8"), PromptBuilder(CLOSER, TOKENIZER)
    house.pipeline.models.models = [house.pipeline.model(house.vision, house.language, int8, prompts)]
    asked = {"image": base64.b64encode(png()).decode(), "question": "what colour?"}
    image_id = (await caller.http.post("/v1/vqa", json=asked)).json()["image_ids"][0]
    said = (await caller.estimate(image_id)).json()
    assert (said["images"][0]["known"], said["cost"]["pixels"]) == (True, 0)


async def test_the_beginning_of_a_file_is_enough(caller):
    said = (await caller.estimate(SCENE[:64])).json()
    assert [(image["width"], image["height"], image["bytes"]) for image in said["images"]] == [(224, 224, 64)]


async def test_several_images_and_load_are_counted(caller):
    encoded = [base64.b64encode(png(colour)).decode() for colour in ((1, 2, 3), (4, 5, 6), (1, 2, 3))]
    caller.house.admission.fidelity = Strain(3)
    body = {"images": encoded, "question": "?", "max_tokens": 1, "budget": {"visual_tokens": [32, 32]}}
    said = (await caller.http.post("/v1/vqa/estimate", json=body)).json()
    assert (said["image_tokens"], said["vision_tokens"], said["reduced"]) == ([96, 96], [192, 288], True)
    assert said["cost"]["pixels"] == 2 * 224 * 224  # the same image twice is decoded once


async def test_a_full_service_says_that_it_would_refuse_and_counts_no_refusal(caller):
    with caller.house.admission.reservation("") as full:
        full.reserve(Cost(tokens=caller.house.admission.quota.limits.tokens))
        said = (await caller.estimate(png())).json()
    assert (said["admitted"], said["refusal"]["code"]) == (False, "saturated")
    assert said["refusal"]["retry_after_s"] >= 0
    assert caller.house.counted("glimpse_refusals_total", reason="saturated") == 0


@pytest.mark.parametrize(
    ("image", "fields", "status", "code"),
    [
        (b"hello", {}, 400, "invalid_image"),
        (png(size=(2_000, 1_000)), {}, 413, "too_large"),
        ("img_" + 32 * "0", {}, 404, "image_not_found"),
        (png(), {"max_tokens": 5_000}, 400, "context_length_exceeded"),
        (png(), {"colour": 1}, 400, "unknown_field"),
        (png(), {"question": " "}, 400, "invalid_request"),
    ],
)
async def test_what_could_never_be_answered_is_an_error(caller, image, fields, status, code):
    response = await caller.estimate(image, **fields)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_a_real_service_estimates_what_it_then_uses(gateway: Gateway):
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60, trust_env=False) as http:
        asked: dict[str, Any] = {"data": {"question": "how many objects are there?"}, "files": {"image": SCENE + b"e"}}
        said = (await http.post("/v1/vqa/estimate", **asked)).json()
        answer = (await http.post("/v1/vqa", **asked)).json()
        again = (await http.post("/v1/vqa/estimate", **asked)).json()
    least, most = said["vision_tokens"]
    assert said["admitted"]
    assert least <= answer["vision"]["vision_tokens"] <= most
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["image_tokens"]) == (
        said["prompt_tokens"],
        said["image_tokens"][0],
    )
    assert [each["images"][0]["known"] for each in (said, again)] == [False, True]
