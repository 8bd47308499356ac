"""Test that the `vqa` ensemble, the whole chain inside Triton, answers like the gateway."""

from __future__ import annotations

import base64
import json

import httpx
import pytest

from service.core.errors import InternalError
from service.text.prompt import Detokeniser
from service.triton import TritonClient
from tests.support.paths import SCENES
from tests.support.servers import Gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

SAMPLES = [json.loads(line) for line in (SCENES / "questions.jsonl").read_text().splitlines()[::97]]


@pytest.mark.parametrize("sample", SAMPLES[:6], ids=lambda sample: sample["image"])
async def test_its_streamed_answer_is_the_gateways(
    sample: dict[str, str], client: TritonClient, gateway: Gateway
) -> None:
    image = (SCENES / sample["image"]).read_bytes()
    spoken = Detokeniser(())
    answer = ""
    async for piece in client.answer(image, sample["question"], max_tokens=12, timeout_s=10):
        answer += spoken.push_bytes(piece)
    answer += spoken.finish()
    async with httpx.AsyncClient(base_url=gateway.url) as http:
        response = await http.post(
            "/v1/vqa",
            json={
                "image": base64.b64encode(image).decode(),
                "question": sample["question"],
                "max_tokens": 12,
                "temperature": 0,
            },
        )
    assert answer.strip() == response.raise_for_status().json()["answer"]


@pytest.mark.parametrize(("image", "question"), [(b"not an image", "what is this?"), (b"", "what is this?")])
async def test_what_it_cannot_read_ends_with_an_error(client: TritonClient, image: bytes, question: str) -> None:
    """A plain client gets Triton's INVALID_ARGUMENT.

    Glimpse's own client never sends such bytes, so it treats this as a fault.
    """
    with pytest.raises(InternalError):
        async for _ in client.answer(image, question, max_tokens=2, timeout_s=10):
            pass
