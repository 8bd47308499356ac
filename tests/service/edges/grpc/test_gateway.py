"""The gateway as a process of its own, asked over gRPC and HTTP, in front of a real Triton."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image as Pillow

from service.core.card import ModelCard
from service.edges.grpc.server import SERVICE
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.grpc.stubs.vqa_pb2_grpc import VisualQuestionAnsweringStub
from service.triton_server.supervision import EmbeddedTriton
from tests.support.calls import UNLIMITED, chunks, failure, question, streamed
from tests.support.paths import PROJECT, SCENES
from tests.support.servers import Gateway, StartGateway, eventually, eventually_async

QUESTION = "how many objects are there?"
OVER_GRPCS_OWN_LIMIT = 4 * 1024 * 1024
OUT = ("--python_out=.", "--grpc_python_out=.")
PROTO = PROJECT / "service" / "edges" / "grpc" / "proto"


@pytest_asyncio.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
        yield http


@pytest_asyncio.fixture
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(gateway.rpc, options=UNLIMITED) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> VisualQuestionAnsweringStub:
    return VisualQuestionAnsweringStub(channel)


@pytest.fixture(scope="module")
def scene() -> bytes:
    return sorted(SCENES.glob("new_*.webp"))[7].read_bytes()


@pytest.fixture(scope="module")
def large_png() -> bytes:
    """Noise that does not compress: more bytes than gRPC takes in one message by default."""
    out = BytesIO()
    Pillow.fromarray(np.random.default_rng(20).integers(0, 255, (1300, 1300, 3), np.uint8)).save(out, "PNG")
    assert len(out.getvalue()) > OVER_GRPCS_OWN_LIMIT
    return out.getvalue()


async def value_of(http: httpx.AsyncClient, sample: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(sample))


async def test_an_answer_is_the_one_that_http_gives(http, stub, scene):
    kept = (await http.post("/v1/images", content=scene)).json()
    body = {"image": kept["id"], "question": QUESTION, "explain": True, "max_tokens": 8}
    said = (await http.post("/v1/vqa", json=body)).raise_for_status().json()
    answer = await stub.Answer(question(kept["id"], QUESTION, explain=True, max_tokens=8))
    assert (answer.answer, answer.model, list(answer.image_ids)) == (said["answer"], said["model"], said["image_ids"])
    assert {name: getattr(answer.usage, name) for name in said["usage"]} == said["usage"]
    assert (answer.vision.vision_tokens, answer.vision.cache) == (said["vision"]["vision_tokens"], pb.CACHE_HIT)
    (here,), (there,) = answer.relevance, said["relevance"]
    assert np.allclose(np.reshape(here.map, (16, 16)), there["map"], atol=1e-4)
    assert np.reshape(here.levels, (8, 8)).tolist() == there["levels"]
    text, end = await streamed(stub.StreamAnswer(question(scene, QUESTION, max_tokens=8)))
    assert (text, list(end.image_ids)) == (said["answer"], said["image_ids"])


async def test_turns_and_images_in_their_places_are_those_of_http(http, stub, scene):
    other = sorted(SCENES.glob("new_*.webp"))[8].read_bytes()
    ids = [(await http.post("/v1/images", content=each)).json()["id"] for each in (scene, other)]
    earlier = {"question": QUESTION, "answer": "3"}
    body = {"images": ids, "question": "is there a circle?", "turns": [earlier], "max_tokens": 8}
    said = (await http.post("/v1/vqa", json=body)).raise_for_status().json()
    turn = pb.Turn(parts=question(*ids, QUESTION).parts, answer="3")  # where HTTP puts them
    answer = await stub.Answer(question("is there a circle?", turns=[turn], max_tokens=8))
    assert (answer.answer, list(answer.image_ids)) == (said["answer"], said["image_ids"])
    assert answer.usage.prompt_tokens == said["usage"]["prompt_tokens"]
    placed = await stub.Answer(question("is there", ids[1], "a circle?", max_tokens=8))
    assert list(placed.image_ids) == [ids[1]]


async def test_an_image_over_the_limit_of_plain_clients_comes_in_chunks(stub, large_png):
    kept = await stub.PutImage(chunks(large_png))
    assert (kept.bytes, kept.width) == (len(large_png), 1300)
    answer = await stub.Answer(question(kept.id, QUESTION, max_tokens=8))
    whole = await stub.Answer(question(large_png, QUESTION, max_tokens=8))  # the server's limit is that of HTTP
    assert (whole.answer, list(whole.image_ids)) == (answer.answer, [kept.id])


async def test_a_caller_that_cancels_ends_the_work_in_triton(http, stub, scene, triton: EmbeddedTriton):
    kept = await stub.PutImage(chunks(scene))
    saved = await value_of(http, 'glimpse_tokens_saved_total{reason="cancelled"}')
    # A form that no short answer has: which answer the model prefers depends on its weights and on the CPU's rounding.
    asked = question(kept.id, QUESTION, max_tokens=150, regex="[0-9]{200}")
    for _ in range(5):
        call = stub.StreamAnswer(asked)
        assert (await call.read()).delta
        call.cancel()

    async def nothing_runs() -> bool:
        async with httpx.AsyncClient() as metrics:
            text = (await metrics.get(f"http://127.0.0.1:{triton.access.ports.metrics}/metrics")).text
        running = re.findall(r'^glimpse_llm_\w+{.*state="running".*} (\S+)$', text, re.MULTILINE)
        return bool(running) and not any(map(float, running))

    async def nothing_is_held() -> bool:
        return not await value_of(http, "glimpse_requests_in_flight") + await value_of(http, "glimpse_resource_used")

    await eventually_async(nothing_is_held, 10, "every reservation given back")
    await eventually_async(nothing_runs, 10, "the LLM idle")
    assert await value_of(http, 'glimpse_tokens_saved_total{reason="cancelled"}') > saved
    assert await value_of(http, 'glimpse_grpc_requests_total{method="StreamAnswer",status="CANCELLED"}') >= 5


async def test_a_deadline_ends_with_its_reason(http, stub, scene):
    kept = await stub.PutImage(chunks(scene))
    failed = await failure(stub.Answer(question(kept.id, QUESTION), timeout=0.003))
    assert failed.code in ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")  # or it was seen coming


async def test_errors_have_the_codes_of_http(http, stub):
    wrong = {"image": "img_0", "question": QUESTION}
    said = (await http.post("/v1/vqa", json=wrong)).json()["error"]
    failed = await failure(stub.Answer(question("img_0", QUESTION), metadata=(("x-request-id", "mine"),)))
    assert (failed.code, failed.reason, failed.field) == ("NOT_FOUND", said["code"], "parts.0.image_id")
    assert failed.message == said["message"].replace("image", "parts.0.image_id", 1)
    assert failed.details[error_details_pb2.RequestInfo].request_id == "mine"


async def test_health_follows_readiness(channel, gateway):
    assert gateway.status("/health/ready") == 200
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE):
        assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == 1


def test_a_client_whose_stub_is_its_own_gets_an_answer(gateway, scene, tmp_path: Path):
    """As a user elsewhere has it: stubs generated from the proto, no module of ours."""
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *OUT, "glimpse/v1/vqa.proto"],
        cwd=tmp_path,
        check=True,
    )
    (tmp_path / "scene.webp").write_bytes(scene)
    page = (PROJECT / "docs" / "api.md").read_text()
    (code,) = re.findall(r"```python\n(import grpc\n.*?)```", page, re.DOTALL)
    assert "127.0.0.1:8081" in code
    code = code.replace("127.0.0.1:8081", gateway.rpc).replace("photo.jpg", "scene.webp")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_port_that_is_taken_is_told_by_name(gateway, repository, tmp_path):
    port = gateway.rpc.rpartition(":")[2]
    environment = {"GLIMPSE_GRPC_PORT": port, "GLIMPSE_HTTP_PORT": "0", "GLIMPSE_MODEL_REPOSITORY": str(repository)}
    done = subprocess.run(
        [sys.executable, "-m", "service"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"glimpse: cannot listen on 127.0.0.1:{port} (Address already in use)")
    assert "set GLIMPSE_GRPC_PORT" in line


async def test_a_gateway_that_stops_refuses_and_lets_streams_finish(
    start_gateway: StartGateway, triton: EmbeddedTriton, scene, card: ModelCard
):
    url = triton.access.url
    with start_gateway({"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_STOP_NOTICE_S": "5"}) as gateway:
        async with grpc.aio.insecure_channel(gateway.rpc) as channel:
            stub, health = VisualQuestionAnsweringStub(channel), health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == 1
            gateway.process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == 2
            failed = await failure(stub.Answer(question(scene, QUESTION)))
            assert (failed.code, failed.reason) == ("UNAVAILABLE", "shutting_down")
            gateway.process.send_signal(signal.SIGTERM)  # ends the notice
            assert await watch.read() is grpc.aio.EOF
            eventually(lambda: gateway.process.poll() is not None, 10, "stopped, although a watch was open")
            assert gateway.process.returncode == 0
            assert "Traceback" not in gateway.log()
