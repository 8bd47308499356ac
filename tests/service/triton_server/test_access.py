"""Who can reach the embedded Triton: only this user, and over an opened port nobody can change it."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import grpc
import httpx
import pytest
import pytest_asyncio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from service.core.card import ModelCard
from service.core.errors import GlimpseError
from service.triton import TritonClient
from service.triton_server import access as access_module
from service.triton_server.access import SOCKET_BYTES, Access, Ports
from service.triton_server.processes import SHARED_MEMORY
from service.triton_server.supervision import EmbeddedTriton
from tests.support.servers import eventually_async, free_ports

LISTENING = "0A"  # of /proc/net/tcp


def test_a_sockets_path_is_short_and_plain_whatever_the_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("short", "l" * 90, "with space", "100%", "a#b", "ü"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        url = Access.choose().url
        assert len(url.removeprefix("unix:").encode()) <= SOCKET_BYTES
        assert not set(url) & set(" %#ü?")
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert Access.choose().folder.parent == Path("/tmp")


def test_no_two_triton_share_a_folder_or_a_key() -> None:
    first, second = Access.choose(), Access.choose()
    assert first.folder != second.folder
    assert first.key != second.key
    assert access_module.FOLDER.fullmatch(first.folder.name)


def mode(path: Path) -> int:
    return path.stat().st_mode


def listeners(pids: set[int]) -> set[int]:
    """The TCP ports on which these processes listen."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(str(descriptor.readlink()))
            except OSError:
                continue
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {
        int(line[1].rpartition(":")[2], 16)
        for line in lines
        if line[3] == LISTENING and f"socket:[{line[9]}]" in inodes
    }


@pytest.mark.asyncio(loop_scope="session")
async def test_triton_listens_for_this_user_alone_and_for_readers_of_its_metrics(triton: EmbeddedTriton) -> None:
    assert triton.pid is not None
    assert listeners({triton.pid, *triton.model_pids.values()}) == {triton.access.ports.metrics}
    path = Path(triton.access.url.removeprefix("unix:"))
    assert stat.S_ISSOCK(mode(path))
    assert stat.S_IMODE(mode(triton.access.folder)) == 0o700
    assert not mode(path) & 0o077


@pytest.mark.asyncio(loop_scope="session")
async def test_no_region_stays_open_to_other_users_whenever_triton_makes_it(triton: EmbeddedTriton) -> None:
    later = SHARED_MEMORY / f"{triton.access.region_prefix}later"
    later.touch(0o644)

    async def closed() -> bool:
        return not any(mode(region) & 0o077 for region in SHARED_MEMORY.glob(f"{triton.access.region_prefix}*"))

    watch = asyncio.create_task(triton.supervise())
    try:
        assert len(list(SHARED_MEMORY.glob(f"{triton.access.region_prefix}*"))) > len(triton.model_pids)
        await eventually_async(closed, 10, "every region is closed")
    finally:
        later.unlink()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


@pytest.mark.asyncio(loop_scope="session")
async def test_no_port_takes_kserve_over_http(triton: EmbeddedTriton) -> None:
    """The port of the metrics is the only one, and reads."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{triton.access.ports.metrics}") as http:
        assert (await http.get("/metrics")).status_code == 200
        for path in ("/v2/repository/models/llm/load", "/v2/repository/models/llm/unload", "/v2/repository/index"):
            assert (await http.post(path, json={})).status_code >= 400
    async with TritonClient(triton.access.url, triton.access.url) as client:
        assert await client.ready()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def opened(
    repository: Path, card: ModelCard, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EmbeddedTriton]:
    """A Triton with a port for plain KServe clients."""
    access = Access.choose(Ports(*free_ports(2)))
    log_path = tmp_path_factory.mktemp("opened") / "triton.log"
    async with (
        TritonClient(access.url, access.url, access.metadata) as client,
        EmbeddedTriton(repository, client=client, card=card, log_path=log_path, access=access) as triton,
    ):
        yield triton


Call = Callable[[service_pb2_grpc.GRPCInferenceServiceStub], grpc.aio.UnaryUnaryCall]
CLOSED: dict[str, Call] = {
    "load": lambda stub: stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name="llm")),
    "unload": lambda stub: stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="llm")),
    "index": lambda stub: stub.RepositoryIndex(service_pb2.RepositoryIndexRequest()),
    "region": lambda stub: stub.SystemSharedMemoryRegister(
        service_pb2.SystemSharedMemoryRegisterRequest(name="a", key="/a", byte_size=1)
    ),
    "config": lambda stub: stub.ModelConfig(service_pb2.ModelConfigRequest(name="llm")),
    "statistics": lambda stub: stub.ModelStatistics(service_pb2.ModelStatisticsRequest()),
    "trace": lambda stub: stub.TraceSetting(service_pb2.TraceSettingRequest()),
    "log": lambda stub: stub.LogSettings(service_pb2.LogSettingsRequest()),
}


@pytest.mark.servers
@pytest.mark.asyncio(loop_scope="session")
async def test_an_opened_port_infers_for_everybody_and_changes_for_nobody(
    opened: EmbeddedTriton, card: ModelCard
) -> None:
    url = opened.access.url
    assert url.startswith("127.0.0.1:")
    async with TritonClient(url, url) as stranger, grpc.aio.insecure_channel(url) as channel:
        await stranger.probe("vqa", card, timeout_s=20)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name, call in CLOSED.items():
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(stub)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, name
            assert "protocol is restricted" in (refused.value.details() or ""), name
        with pytest.raises(GlimpseError):
            await stranger.unload("vqa")
        with pytest.raises(GlimpseError):
            await stranger.load("vqa")
        await stranger.probe("vqa", card, timeout_s=20)
    async with TritonClient(url, url, opened.access.metadata) as ours:
        await ours.unload("vqa")
        await ours.load("vqa")
        await ours.probe("vqa", card, timeout_s=20)


@pytest.mark.servers
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
async def test_a_proxy_of_the_environment_does_not_come_between(
    name: str, opened: EmbeddedTriton, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        monkeypatch.setenv(name, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        url = opened.access.url
        async with TritonClient(url, url) as client:
            assert await client.ready(timeout_s=5)


def test_a_client_of_all_addresses_connects_to_this_machine() -> None:
    hosts = {"127.0.0.1": "127.0.0.1:7", "0.0.0.0": "127.0.0.1:7", "::": "[::1]:7", "10.0.0.3": "10.0.0.3:7"}
    assert {host: Access.choose(Ports(7, 8, host)).url for host in hosts} == hosts
    assert "--grpc-address=0.0.0.0" in Access.choose(Ports(7, 8, "0.0.0.0")).options()
    assert any(option.startswith("--grpc-restricted-protocol=") for option in Access.choose(Ports(7)).options())
