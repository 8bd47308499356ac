"""A checkpoint that was adapted is built and served: a real Triton, and a gateway in front of it."""

from __future__ import annotations

import base64
import dataclasses
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from build_engines.model.adapted import DISTILLED, Adapted
from service.core.card import ModelCard
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton
from tests.build_engines.adapt.test_adapting import SAVED, adapted
from tests.support.once import Once
from tests.support.servers import StartGateway, free_ports
from tests.support.shared_exports import SharedExports

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and accelerate warn about themselves


@pytest.fixture(scope="module", params=SAVED)
def adapted_repository(
    request: pytest.FixtureRequest, exports: SharedExports, once: Once, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Built as if the allocator had gained something."""
    family, folder = adapted(request.param, once), tmp_path_factory.mktemp(request.param)
    allocator, out = folder / "adapted", folder / "repository"
    shutil.copytree(family.out, allocator)
    told = Adapted.read(allocator)
    dataclasses.replace(told, state=DISTILLED, default_vision_tokens=(96, 128)).write(allocator)
    assert exports.build(str(family.checkpoint), "--allocator", str(allocator), "--out", str(out)) == 0
    shutil.copyfile(family.data / "1.png", folder / "picture.png")
    return out


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def address(adapted_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """gRPC address of a Triton that serves the repository."""
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    card = ModelCard.from_json((adapted_repository / "card.json").read_text())
    log_path = tmp_path_factory.mktemp("triton") / "triton.log"
    async with (
        TritonClient(access.url, access.url) as client,
        EmbeddedTriton(adapted_repository, client=client, card=card, log_path=log_path, access=access),
    ):
        yield access.url


async def test_it_looks_by_the_question_and_says_how_it_came_about(
    adapted_repository: Path, address: str, start_gateway: StartGateway
) -> None:
    settings = {
        "GLIMPSE_MODEL_REPOSITORY": str(adapted_repository), "GLIMPSE_VISION_URL": address, "GLIMPSE_LLM_URL": address,
    }  # fmt: skip
    picture = base64.b64encode((adapted_repository.parent / "picture.png").read_bytes()).decode()
    body = {"image": picture, "max_tokens": 4, "temperature": 0, "explain": True}
    with start_gateway(settings) as gateway:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
            (model,) = (await http.get("/v1/models")).json()["data"]
            assert (model["allocator"], model["default_vision_tokens"]) == ("distilled", [96, 128])
            maps = []
            for question in ("what is red?", "which colour has the big circle"):
                answer = (await http.post("/v1/vqa", json=body | {"question": question})).raise_for_status().json()
                assert 90 < answer["vision"]["vision_tokens"] <= 128
                maps.append(answer["relevance"][0]["map"])
            assert maps[0] != maps[1]
            nearer = (await http.post("/v1/vqa", json=body | {"question": "what?", "detail": "high"})).json()
            assert nearer["vision"]["detail"] == "high"
