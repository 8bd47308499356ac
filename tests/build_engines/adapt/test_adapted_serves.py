"""A checkpoint that was adapted is built and served: a real Triton, and a gateway in front of it."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from build_engines.adapt.__main__ import main
from build_engines.model.adapted import DISTILLED, Adapted
from service.core.card import ModelCard
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton
from tests.build_engines.adapt.test_adapting import SAVED, write_data
from tests.support.servers import StartGateway, free_ports
from tests.support.shared_exports import SharedExports

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and accelerate warn about themselves


@pytest.fixture(scope="module", params=SAVED)
def adapted_repository(
    request: pytest.FixtureRequest, exports: SharedExports, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Adapted in two steps, and built as if the allocator had gained something."""
    folder = tmp_path_factory.mktemp(request.param)
    SAVED[request.param](folder / "checkpoint")
    write_data(folder / "data")
    checkpoint, adapted, out = (str(folder / name) for name in ("checkpoint", "adapted", "repository"))
    data = ["--data", str(folder / "data"), "--batch", "4", "--steps", "2", "--threads", "1", "--closer-share", "0.5"]
    assert main([checkpoint, *data, "--out", adapted]) == 0
    told = Adapted.read(Path(adapted))
    dataclasses.replace(told, state=DISTILLED, default_vision_tokens=(96, 128)).write(Path(adapted))
    assert exports.build(checkpoint, "--allocator", adapted, "--out", out) == 0
    return Path(out)


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
    picture = base64.b64encode((adapted_repository.parent / "data" / "1.png").read_bytes()).decode()
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
