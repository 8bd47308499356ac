"""Two variants under load, while one of the first variant's two Tritons dies and the other stalls.

No caller sees an error that a healthy variant could have prevented: one before the first token.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from service.triton_server.supervision import EmbeddedTriton
from service.upstreams.variants import Variant, Variants
from tests.support.fakes import png
from tests.support.servers import StartGateway, eventually, eventually_async, free_ports

CLIENTS = 8
DELAY_S = 1.5  # of one answer of the slow variant: less than a budget that its two calls exceed
BUDGET_MS = 4_000  # the machine is slow while three Tritons and other tests share it


@dataclass
class Alone:
    """A `glimpse triton`: a process of ours, Triton, and its models."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def signal(self, number: signal.Signals) -> None:
        """Send it to the server and to the models; our own process watches on."""
        for child in descendants(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(child, number)

    def kill(self) -> None:
        """Let all of it die at once."""
        children = descendants(self.process.pid)
        self.process.kill()
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the children of a process, theirs, and so on."""
    found, parents = [pid], {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


@contextmanager
def alone(folder: Path, repository: Path) -> Iterator[Alone]:
    folder.mkdir()
    port, metrics_port = free_ports(2)
    command = [sys.executable, "-m", "service.triton_alone", "127.0.0.1", str(port), str(metrics_port), "both"]
    environment = os.environ | {"GLIMPSE_LOG_DIR": str(folder), "GLIMPSE_MODEL_REPOSITORY": str(repository)}
    environment |= {"GLIMPSE_TRITON_START_TIMEOUT_S": "240"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        yield (triton := Alone(f"127.0.0.1:{port}", process, folder / "log"))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                triton.kill()
        process.wait()


@pytest.mark.servers
@pytest.mark.slow
async def test_no_caller_sees_an_error_while_a_triton_dies_and_another_stalls(
    start_gateway: StartGateway, repository: Path, tmp_path: Path
) -> None:
    with ExitStack() as parts:
        tritons = [parts.enter_context(alone(tmp_path / str(number), repository)) for number in range(3)]
        for triton in tritons:
            eventually(lambda triton=triton: "triton_ready" in triton.log.read_text(), 300, f"see {triton.log}")
        pools = {"stable": tritons[:2], "next": tritons[2:]}
        variants = Variants(
            {
                name: Variant(name, str(repository), (told := tuple(each.address for each in pool)), told, 1.0)
                for name, pool in pools.items()
            }
        )
        file = tmp_path / "variants.json"
        file.write_bytes(variants.to_json())
        settings = {"GLIMPSE_VARIANTS": str(file), "GLIMPSE_FIRST_TOKEN_BUDGET_MS": str(BUDGET_MS)}
        gateway = parts.enter_context(start_gateway(settings))
        load = Load(gateway.url)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.run())
            await load.answered(30)
            assert set(load.variants) == {"stable", "next"}
            tritons[0].kill()
            await load.answered(30)
            tritons[1].signal(signal.SIGSTOP)  # now stable has no Triton that answers
            await load.answered(60)
            async with httpx.AsyncClient() as http:
                health = (await http.get(f"{gateway.url}/health/ready")).json()
                metrics = (await http.get(f"{gateway.url}/metrics")).text
            tritons[1].signal(signal.SIGCONT)
            load.stop()
        began = {request_id for request_id in load.errors if had_a_token(gateway.log(), request_id)}
        assert set(load.errors) == began, load.errors
        assert len(began) <= 2 * CLIENTS  # in flight at the Tritons that died or stalled
        assert health["status"] == "ok"
        assert {f"stable/{tritons[0].address}", f"stable/{tritons[1].address}"} >= set(health["degraded"]) > set()
        assert load.fallbacks["stable"] > 0
        assert 'glimpse_fallbacks_total{reason="' in metrics
        told = f"{sum(load.variants.values())} answers, {dict(load.variants)}; fell back {dict(load.fallbacks)}"
        print(f"{told}; {len(began)} errors after a first token")  # noqa: T201


class Slow:
    """A port of 127.0.0.1 whose connections go to a Triton's unix socket. Its answers come DELAY_S later."""

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self.address = ""

    async def __aenter__(self) -> Slow:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(self._socket)
        later = asyncio.get_running_loop().call_later

        async def ask() -> None:
            while data := await reader.read(65536):
                server_writer.write(data)

        async def answer() -> None:
            while data := await server_reader.read(65536):
                later(DELAY_S, writer.write, data)

        ends = [asyncio.create_task(ask()), asyncio.create_task(answer())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        writer.close()
        server_writer.close()


@pytest.mark.servers
async def test_calls_that_take_the_first_token_budget_together_move_to_the_next_variant(
    start_gateway: StartGateway, triton: EmbeddedTriton, repository: Path, tmp_path: Path
) -> None:
    socket = triton.access.url.removeprefix("unix:")
    async with Slow(socket) as vision, Slow(socket) as llm:
        pools = {"slow": ((vision.address,), (llm.address,)), "next": ((triton.access.url,), (triton.access.url,))}
        variants = Variants({name: Variant(name, str(repository), *pool, 1.0) for name, pool in pools.items()})
        file = tmp_path / "variants.json"
        file.write_bytes(variants.to_json())
        settings = {"GLIMPSE_VARIANTS": str(file), "GLIMPSE_FIRST_TOKEN_BUDGET_MS": f"{1.6e3 * DELAY_S:.0f}"}
        with ExitStack() as parts:
            gateway = await asyncio.to_thread(parts.enter_context, start_gateway(settings))
            async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
                await eventually_async(  # its probes are slow too
                    lambda: slow_answers(http), 60, "the slow variant answers its probes"
                )
                answers = [await ask(http, number) for number in range(6)]
                metrics = (await http.get("/metrics")).text
    moved = [answer for answer in answers if answer.get("fallback_from") == "slow"]
    assert {answer["variant"] for answer in answers} == {"next"}
    assert moved
    assert f'glimpse_fallbacks_total{{reason="late",variant="slow"}} {len(moved)}.0' in metrics
    assert (
        'outcome="late",upstream="' + llm.address in metrics
    )  # the LLM's call was late, though shorter than all of it
    assert 'outcome="ok",upstream="' + vision.address in metrics


async def slow_answers(http: httpx.AsyncClient) -> bool:
    """Whether no Triton of the slow variant is out."""
    degraded = (await http.get("/health/ready")).json().get("degraded", {})
    return not any(each.startswith("slow/") for each in degraded)


async def ask(http: httpx.AsyncClient, number: int) -> dict[str, str]:
    response = await http.post(
        "/v1/vqa",
        data={"question": "which colour?", "max_tokens": "4"},
        files={"image": png((number, 90, 20))},
        headers={"x-session-id": f"s{number}"},
    )
    assert response.status_code == 200, response.text
    return dict(response.json())


def had_a_token(log: str, request_id: str) -> bool:
    """Whether a question failed after its first token, when no other Triton may take over."""
    (line,) = [line for line in log.splitlines() if f"request_id={request_id} " in line]
    return "first_token_ms=0.0 " not in line


class Load:
    """Clients that ask without a pause, each with images and sessions of its own; half of them read streams."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.count = 0
        self.errors: dict[str, str] = {}  # by request id
        self.variants: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self._stopped = False
        self._more = asyncio.Event()

    def stop(self) -> None:
        self._stopped = True

    async def answered(self, more: int, timeout_s: float = 120.0) -> None:
        """Wait for so many further answers."""
        wanted = self.count + more
        async with asyncio.timeout(timeout_s):
            while self.count < wanted:
                self._more.clear()
                await self._more.wait()

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as http, asyncio.TaskGroup() as tasks:
            for number in range(CLIENTS):
                tasks.create_task(self._client(http, number))

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        turn = 0
        while not self._stopped:
            turn += 1
            shade = (turn // 3 * 16 + number) % 256
            response = await http.post(
                "/v1/vqa",
                files={"image": png((shade, 40 * number % 256, 90))},
                data={"question": f"what color is the square {turn % 3}?", "max_tokens": "8"}
                | ({"stream": "true"} if number % 2 else {}),
                headers={"x-session-id": f"{number}-{turn}"},
            )
            if response.status_code != 200 or '"error"' in response.text:
                self.errors[response.headers["x-request-id"]] = response.text
            else:
                self.variants[response.headers["x-glimpse-variant"]] += 1
                for name in ("stable", "next"):
                    self.fallbacks[name] += f'"fallback_from":"{name}"' in response.text
            self.count += 1
            self._more.set()
