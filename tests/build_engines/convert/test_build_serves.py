"""A repository from `glimpse build` serves in a real Triton.

Its answers equal those of transformers, token for token.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from build_engines.verify import __main__ as verify
from service.core.models import Generation
from service.core.request import Sampling
from service.media.decoder import ImageLimits, decode
from service.text.prompt import Detokeniser, PromptBuilder, token_bytes
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton
from tests.build_engines.test_checkpoints import (
    LONGEST,
    QUESTIONS,
    SAVED,
    Family,
    batched,
    built,
    of_transformers,
    pictures,
)
from tests.support.servers import StartGateway, free_ports
from tests.support.shared_exports import SharedExports

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0
Asked = list[tuple[list[bytes], str]]  # pictures and a question: one picture, or the frames of a clip


@pytest.fixture(scope="module", params=SAVED)
def family(request: pytest.FixtureRequest, exports: SharedExports) -> Family:
    """A tiny random checkpoint, and its built repository."""
    return built(request.param, exports)


@pytest.fixture(scope="module")
def questions(family: Family) -> Asked:
    """What of_transformers asks."""
    return list(zip(batched(pictures(family.frames), family.frames), QUESTIONS, strict=True))


@pytest.fixture(scope="module")
def expected(family: Family) -> list[list[int]]:
    """The tokens of transformers' answer to each question."""
    return of_transformers(family)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def address(family: Family, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """gRPC address of a Triton that serves the built repository."""
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    log_path = tmp_path_factory.mktemp("triton") / "triton.log"
    async with (
        TritonClient(access.url, access.url) as client,
        EmbeddedTriton(family.repository, client=client, card=family.card, log_path=log_path, access=access),
    ):
        yield access.url


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(address: str) -> AsyncIterator[TritonClient]:
    async with TritonClient(address, address) as client:
        yield client


@pytest.fixture(scope="module")
def service(family: Family, address: str, start_gateway: StartGateway) -> Iterator[str]:
    """Address of a gateway in front of that Triton."""
    settings = {
        "GLIMPSE_MODEL_REPOSITORY": str(family.repository),
        "GLIMPSE_VISION_URL": address,
        "GLIMPSE_LLM_URL": address,
    }
    with start_gateway(settings) as gateway:
        yield gateway.url


def about(shown: list[bytes], question: str) -> dict[str, Any]:
    """A question about one picture, or about the frames of a clip."""
    encoded = [base64.b64encode(picture).decode() for picture in shown]
    pictures = {"frames": encoded} if len(shown) > 1 else {"image": encoded[0]}
    return {**pictures, "question": question, "max_tokens": LONGEST, "temperature": 0}


async def asked(service: str, shown: list[bytes], question: str, **more: object) -> dict[str, Any]:
    body = about(shown, question)
    async with httpx.AsyncClient(base_url=service, timeout=TIMEOUT_S) as http:
        return (await http.post("/v1/vqa", json=body | more)).raise_for_status().json()


async def test_its_tokens_are_those_of_transformers(
    family: Family, questions: Asked, expected: list[list[int]], server: TritonClient
) -> None:
    prompts = PromptBuilder.load(family.card, family.repository)
    said = []
    for shown, question in questions:
        looked_at = []
        for picture in shown:
            pixels = decode(picture, ImageLimits()).pixels
            _, seen = await server.see(pixels, prompts.question(question), family.full, TIMEOUT_S)
            looked_at.append((seen.visual_tokens, picture))
        prompt = prompts.compose(question, looked_at)
        generation = Generation(
            prompt, Sampling(max_tokens=LONGEST), end_id=family.card.end_id, pad_id=family.card.pad_id,
            request_id=question, stall_timeout_s=TIMEOUT_S,
        )  # fmt: skip
        pieces = server.generate(generation, TIMEOUT_S)
        said.append([token async for piece in pieces for token in piece])
    assert said == expected


async def test_the_gateways_answers_are_those_of_transformers(
    family: Family, questions: Asked, expected: list[list[int]], service: str
) -> None:
    card = family.card
    spelled = token_bytes(PromptBuilder.load(card, family.repository).tokenizer)
    full = asdict(family.full)
    for (shown, question), tokens in zip(questions, expected, strict=True):
        found = await asked(service, shown, question, budget=full)
        text = Detokeniser(spelled)
        assert found["answer"] == text.push(token for token in tokens if token != card.end_id) + text.finish()
        assert found["finish_reason"] == ("stop" if card.end_id in tokens else "length")
        assert found["model"] == card.name


def test_it_is_verified_with_itself_as_the_reference(family: Family, address: str, tmp_path: Path) -> None:
    if family.card.architecture == "decoder-only":
        pytest.skip("test_verify.py does it for a decoder-only model")
    report = tmp_path / "report.json"
    told = ["--vision-url", address, "--reference", str(family.repository), "--scenes", "2", "--repeats", "1"]
    assert verify.main([str(family.repository), *told, "--report", str(report)]) == 0
    assert json.loads(report.read_text())["measured"]["answers_agree"] == 1.0


async def test_concurrent_answers_in_all_forms_are_those_of_single_requests(
    family: Family, questions: Asked, expected: list[list[int]], service: str
) -> None:
    """Mixed batches: whole, short, guided and streamed answers, and one whose caller leaves."""
    card, full, choices = family.card, asdict(family.full), ["red", "a circle"]
    spelled = token_bytes(PromptBuilder.load(card, family.repository).tokenizer)

    def text(tokens: list[int]) -> str:
        said = Detokeniser(spelled)
        return said.push(token for token in tokens if token != card.end_id) + said.finish()

    async with httpx.AsyncClient(base_url=service, timeout=TIMEOUT_S) as http:

        async def leaves(shown: list[bytes], question: str) -> None:
            body = about(shown, question) | {"max_tokens": 50, "stream": True}
            async with http.stream("POST", "/v1/vqa", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        return

        for _ in range(2):
            whole, short, chosen, _ = await asyncio.gather(
                asyncio.gather(*(asked(service, *each, budget=full) for each in questions)),
                asyncio.gather(*(asked(service, *each, budget=full, max_tokens=2) for each in questions)),
                asyncio.gather(
                    *(asked(service, *each, budget=full, choices=["red", "a circle"]) for each in questions)
                ),
                asyncio.gather(*(leaves(*each) for each in questions)),
            )
            assert [found["answer"] for found in whole] == [text(tokens) for tokens in expected]
            assert [found["answer"] for found in short] == [text(tokens[:2]) for tokens in expected]
            assert {found["answer"] for found in chosen} <= set(choices)
            assert {found["finish_reason"] for found in chosen} == {"stop"}
        told = (await http.get("/v1/models")).raise_for_status().json()["data"][0]
        assert told["architecture"] == card.architecture


async def test_the_ensemble_says_what_the_gateway_says(questions: Asked, server: TritonClient, service: str) -> None:
    """With the default budget, about one picture."""
    for (picture, *_), question in questions:
        text = Detokeniser(())
        pieces = server.answer(picture, question, max_tokens=LONGEST, timeout_s=TIMEOUT_S)
        said = "".join([text.push_bytes(piece) async for piece in pieces]) + text.finish()
        assert said == (await asked(service, [picture], question))["answer"]
