"""The embedded Triton: what it says when it cannot start, what it does when a process dies, what it leaves behind."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import cast
from uuid import uuid4

import httpx
import numpy as np
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from service.core.card import ModelCard
from service.core.errors import DeadlineExceeded, GlimpseError, Overloaded, Unavailable
from service.core.models import Generation
from service.core.request import Budget, Sampling
from service.core.vision import UInt8Array
from service.text.prompt import PromptBuilder
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.installation import StartFailed
from service.triton_server.processes import SHARED_MEMORY
from service.triton_server.supervision import EmbeddedTriton
from tests.support.paths import SCENES
from tests.support.servers import StartGateway, eventually, eventually_async, free_ports

BACK_WITHIN_S = 10.0
QUESTION = "what colour is the small circle?"


def regions(prefix: str = "glimpse-") -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob(f"{prefix}*")}


def processes(group: int) -> list[int]:
    """The living processes of a group; a zombie that nobody collects in this container does not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, pgrp, *_ = stat.read_text().rpartition(")")[2].split()
            if int(pgrp) == group and state not in "ZX":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.servers
async def test_a_model_that_cannot_load_ends_the_start_with_its_own_words(
    repository: Path, card: ModelCard, tmp_path: Path
) -> None:
    broken = tmp_path / "repository"
    for name in ("see", "llm"):
        shutil.copytree(repository / name, broken / name, ignore=shutil.ignore_patterns("*.onnx"))
    shutil.copy(repository / "card.json", broken)
    (broken / "llm" / "1" / "model.py").write_text("raise RuntimeError('no weights here')\n")
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    async with TritonClient(access.url, access.url) as client:
        triton = EmbeddedTriton(broken, client=client, card=card, log_path=tmp_path / "log", access=access)
        with pytest.raises(StartFailed, match="no weights here"):
            async with triton:
                pass
    assert not regions(access.region_prefix)


@pytest.mark.servers
async def test_a_server_that_crashes_while_starting_is_started_again(
    repository: Path, card: ModelCard, tmp_path: Path
) -> None:
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    async with TritonClient(access.url, access.url) as client:
        triton = EmbeddedTriton(repository, client=client, card=card, log_path=tmp_path / "triton.log", access=access)
        entering = asyncio.create_task(triton.__aenter__())
        try:
            await eventually_async(lambda: asyncio.sleep(0, triton.pid), 20, "a process")
            crashed = triton.pid
            assert crashed is not None
            os.kill(crashed, signal.SIGABRT)
            await entering
            assert triton.ready
            assert triton.pid != crashed
        finally:
            entering.cancel()
            await triton.__aexit__()


class Stopping(TritonClient):
    """A client that stops the LLM's process once, when it is first probed."""

    triton: EmbeddedTriton
    stopped: int | None = None

    async def probe(self, model: str, card: ModelCard, timeout_s: float, fresh_s: float = 0.0) -> None:
        group = self.triton.pid
        if self.stopped is None and group is not None:
            (self.stopped,) = (pid for pid in processes(group) if "/llm/1/model.py" in arguments(pid))
            os.kill(self.stopped, signal.SIGSTOP)
        await super().probe(model, card, timeout_s, fresh_s)


@pytest.mark.servers
async def test_a_model_that_is_stopped_while_it_starts_is_not_waited_for(
    repository: Path, card: ModelCard, tmp_path: Path
) -> None:
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    async with Stopping(access.url, access.url) as client:
        client.triton = EmbeddedTriton(repository, client=client, card=card, log_path=tmp_path / "log", access=access)
        with capture_logs() as logs:
            async with client.triton as triton:
                assert triton.ready
                assert client.stopped not in processes(cast(int, triton.pid))
    (crash,) = (each for each in logs if each["event"] == "triton_crashed_at_start")
    assert "the processes of these models by SIGSTOP: llm" in crash["error"]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def reloading(
    repository: Path, card: ModelCard, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EmbeddedTriton]:
    """A Triton whose models are loaded again."""
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    log_path = tmp_path_factory.mktemp("reloading") / "triton.log"
    async with (
        TritonClient(access.url, access.url) as client,
        EmbeddedTriton(repository, client=client, card=card, log_path=log_path, access=access) as triton,
    ):
        yield triton


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.parametrize("model", ["llm", "qformer"])
async def test_a_model_can_be_loaded_again_and_again(reloading: EmbeddedTriton, card: ModelCard, model: str) -> None:
    """What a reload leaves wrong in Triton's memory ends it after a few more."""
    before = reloading.pid
    async with TritonClient(reloading.access.url, reloading.access.url) as client:
        for _ in range(15):
            await client.unload(model, 10.0)
            await client.load(model, 10.0)
            for called in card.called:
                await client.probe(called, card, 10.0)
    assert reloading.pid == before


@pytest.mark.servers
async def test_a_start_that_takes_too_long_is_given_up(repository: Path, card: ModelCard, tmp_path: Path) -> None:
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    async with TritonClient(access.url, access.url) as client:
        triton = EmbeddedTriton(
            repository, client=client, card=card, log_path=tmp_path / "log", access=access, start_timeout_s=0.05
        )
        with pytest.raises(StartFailed, match=r"not ready within 0\.05 s"):
            async with triton:
                pass
    group = triton.pid
    assert group is not None
    eventually(lambda: not processes(group), 5, "who was told to die is dead")
    assert not regions(access.region_prefix)


class Load:
    """Requests of every kind, again and again; what became of each is kept."""

    def __init__(self, client: TritonClient, prompts: PromptBuilder, card: ModelCard, pixels: UInt8Array) -> None:
        self.outcomes: Counter[str] = Counter()
        self.unexpected: list[BaseException] = []
        self._client = client
        self._card = card
        self._pixels = pixels
        self._question = prompts.question(QUESTION)
        self._prompt = prompts.compose(QUESTION, [(np.zeros((32, card.hidden_size), np.float32), b"load")])

    async def look(self) -> None:
        vision, _ = await self._client.see(self._pixels, self._question, Budget(), timeout_s=5)
        await self._client.attend(vision, self._question, Budget(), timeout_s=5)

    async def speak(self, tokens: int = 200) -> None:
        generation = Generation(
            self._prompt,
            Sampling(max_tokens=tokens),
            end_id=-1,
            pad_id=self._card.pad_id,
            request_id=uuid4().hex,
            stall_timeout_s=2,
        )
        assert sum([len(piece) async for piece in self._client.generate(generation, timeout_s=5)]) == tokens

    async def repeat(self, request: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                async with asyncio.timeout(8):  # a request that outlives its own deadline hangs
                    await request()
                self.outcomes[request.__name__] += 1
            except (Unavailable, Overloaded, DeadlineExceeded) as error:
                self.outcomes[type(error).__name__] += 1
                await asyncio.sleep(0.01)
            except Exception as error:
                self.unexpected.append(error)

    async def answers(self) -> bool:
        try:
            await self.look()
            await self.speak(10)
        except GlimpseError:
            return False
        return True


@pytest.mark.servers
async def test_a_killed_process_is_back_within_ten_seconds_and_nobody_hangs(
    repository: Path, card: ModelCard, prompts: PromptBuilder, pixels: UInt8Array, tmp_path: Path
) -> None:
    """kill -9, under load: the LLM's process, the vision encoder's, two at once, and at last the server itself."""
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    async with TritonClient(access.url, access.url) as client:
        triton = EmbeddedTriton(repository, client=client, card=card, log_path=tmp_path / "triton.log", access=access)
        begun = time.monotonic()
        async with triton:
            # A start takes 3 s on a quiet machine. One so crowded that it takes longer is given as much more.
            back_within_s = max(BACK_WITHIN_S, 3 * (time.monotonic() - begun))
            group = triton.pid
            load = Load(client, prompts, card, pixels)
            tasks = [asyncio.create_task(triton.supervise())]
            tasks += [asyncio.create_task(load.repeat(each)) for each in (load.look, load.look, load.speak, load.speak)]
            await eventually_async(load.answers, back_within_s, "answers before any dies")
            for victims in (["llm"], ["vision_encoder"], ["qformer", "finish"], ["tritonserver"]):
                pids = [triton.model_pids.get(victim, triton.pid) for victim in victims]
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                killed = time.monotonic()
                await eventually_async(_all_replaced(triton, pids), back_within_s, f"{victims} replaced")
                await eventually_async(load.answers, back_within_s, f"answers after {victims} died")
                assert time.monotonic() - killed < back_within_s
                await client.probe("vqa", card, timeout_s=5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert not load.unexpected
            assert load.outcomes["Unavailable"] > 0
            assert load.outcomes["look"] > 0
            assert load.outcomes["speak"] > 0
            second_group = triton.pid
            assert regions(access.region_prefix)
    assert not triton.ready
    for old in (group, second_group):
        eventually(lambda old=old: not processes(old), 2, "no process left")
    assert not regions(access.region_prefix)


def _all_replaced(triton: EmbeddedTriton, dead: list[int]) -> Callable[[], Awaitable[bool]]:
    async def replaced() -> bool:
        return triton.ready and not {*triton.model_pids.values(), triton.pid} & set(dead)

    return replaced


@pytest.mark.servers
async def test_a_hanging_server_is_noticed_and_restarted(
    repository: Path, card: ModelCard, prompts: PromptBuilder, pixels: UInt8Array, tmp_path: Path
) -> None:
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    async with TritonClient(access.url, access.url) as client:
        triton = EmbeddedTriton(
            repository,
            client=client,
            card=card,
            log_path=tmp_path / "triton.log",
            access=access,
            canary_interval_s=0.1,
            canary_timeout_s=1.0,
        )
        async with triton:
            supervisor = asyncio.create_task(triton.supervise())
            stopped = triton.model_pids["relevance_allocator"]
            assert triton.pid is not None
            os.kill(triton.pid, signal.SIGSTOP)
            await eventually_async(_all_replaced(triton, [stopped]), 20, "its models are replaced with it")
            assert await Load(client, prompts, card, pixels).answers()
            supervisor.cancel()


class Asking:
    """Clients of a gateway in threads of their own: the status of each answer, and how long the longest took."""

    def __init__(self, url: str, clients: int) -> None:
        scene = next(path for path in sorted(SCENES.rglob("*")) if path.suffix in {".jpg", ".jpeg", ".webp", ".png"})
        self.body = {
            "image": base64.b64encode(scene.read_bytes()).decode(),
            "question": QUESTION,
            "max_tokens": 16,
            "timeout_s": 8,
        }
        self.statuses: Counter[int] = Counter()
        self.longest_s = 0.0
        self.url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def once(self, http: httpx.Client | None = None) -> int:
        started = time.monotonic()
        status = (http or httpx).post(f"{self.url}/v1/vqa", json=self.body, timeout=20).status_code
        self.longest_s = max(self.longest_s, time.monotonic() - started)
        return status

    def _ask(self) -> None:
        with httpx.Client() as http:
            while not self._over.is_set():
                self.statuses[self.once(http)] += 1


def test_the_service_survives_its_models_and_its_models_do_not_survive_it(
    start_gateway: StartGateway,
) -> None:
    """Through HTTP, under load: a killed model is back; and when the gateway is killed, Triton ends by itself."""
    with start_gateway({}) as gateway:
        prefix = f"glimpse-{gateway.process.pid}-"
        (server,) = [pid for pid in children(gateway.process.pid) if "--model-repository" in arguments(pid)]
        (victim,) = [pid for pid in processes(server) if "/llm/1/model.py" in arguments(pid)]
        whole = len(regions(prefix))
        with Asking(gateway.url, clients=4) as asking:
            eventually(lambda: asking.statuses[200] >= 8, 10, "answers under load")
            os.kill(victim, signal.SIGKILL)
            eventually(lambda: sum(asking.statuses.values()) > asking.statuses[200], 10, "someone noticed")
            before = asking.statuses[200]
            eventually(lambda: asking.statuses[200] > before + 8, BACK_WITHIN_S, "answers again")
        assert set(asking.statuses) <= {200, 429, 503, 504}
        assert asking.longest_s < 10
        assert asking.once() == 200
        # Ended while it loads a model, Triton leaves the others' regions; the dead one's goes last.
        eventually(lambda: len(regions(prefix)) == whole, BACK_WITHIN_S, "the model was brought back")
        os.kill(gateway.process.pid, signal.SIGKILL)
        eventually(lambda: not processes(server), 15, "Triton ended with its gateway")


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
