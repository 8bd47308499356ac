"""Serve until a signal: everything that `python -m service` needs once its settings are read."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import math
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType
from typing import cast

import uvicorn
import uvloop

from service.admission.scheduler import Scheduler
from service.app import App, build, running
from service.edges.grpc.server import GrpcServer
from service.edges.http.edge import Edge
from service.edges.http.listener import Listener
from service.edges.http.protocol import Protocols, limited_protocol
from service.logs import stream_to, tell
from service.settings import PROJECT, Settings
from service.system.output import Output, Stream
from service.triton_server.installation import StartFailed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# New objects before the next garbage collection. A request makes about a thousand objects and few cycles. With Python's
# default of 700, the collector often scanned the objects of all modules: 10 % of a follow-up's CPU time.
GARBAGE_AFTER = 20_000
TELLING_S = 1.0  # for callers to read that their requests are ended, after the grace


class Server(uvicorn.Server):
    """Run uvicorn with our listener, and without its signal handlers: they would raise the signals again before Triton
    has stopped."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._exiting = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on these sockets."""
        await super().startup([])
        protocols = cast(Protocols, self.config.http_protocol_class)
        made = functools.partial(
            protocols, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        admits, held = protocols.connections.admits, protocols.held
        listeners = [Listener(each, self.config.backlog, made, admits, held) for each in sockets or []]
        self.servers = cast(list[asyncio.base_events.Server], listeners)

    async def main_loop(self) -> None:
        """Keep the Date header right, once a second: uvicorn's own loop wakes ten times as often to see an exit."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._exiting.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._exiting.set()

    def cut_connections(self) -> None:
        """Close what is left, whether or not the other side reads."""
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def run(settings: Settings, output: Output, scheduling: type[Scheduler] | None = None) -> None:
    """Serve until SIGINT or SIGTERM. Raises SettingsError and StartFailed."""
    app = build(settings, scheduling or Scheduler)
    with bound(settings.http_host, settings.http_port, "GLIMPSE_HTTP_PORT") as listener:
        uvloop.run(serve(app, listener, stream_to(output, sys.stdout)))


async def serve(app: App, listener: socket.socket, out: Stream) -> None:
    """Answer HTTP and gRPC from the start, with 503 and UNAVAILABLE until Triton is ready. Raises StartFailed."""
    edge: Edge = app.api.state.edge
    config = uvicorn.Config(
        app.api,
        http=limited_protocol(edge),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # they are read where GLIMPSE_TRUSTED_PROXIES is known
        timeout_keep_alive=round(edge.connections.idle_timeout_s),
        timeout_graceful_shutdown=math.ceil(app.settings.stop_grace_s + 2 * TELLING_S),
    )
    server, rpc, stopped = Server(config), GrpcServer(app.rpc), asyncio.Event()
    rpc_port = listen_for_calls(rpc, listener.getsockname()[0], app.settings.grpc_port)

    def stop(number: int) -> None:
        """Be not ready first, then refuse new questions, and close the listeners when load balancers know. Tell the
        requests that still run after the grace, and cut what then is left."""
        later = asyncio.get_running_loop().call_later
        notice_s = app.settings.stop_notice_s if number == signal.SIGTERM and app.readiness.ready else 0.0
        app.readiness.stop()
        app.admission.stop()
        grace_s = notice_s + app.settings.stop_grace_s
        later(notice_s, close, number)
        later(grace_s, app.admission.end)
        later(grace_s + TELLING_S, server.cut_connections)

    def close(number: int) -> None:
        server.handle_exit(number, None)
        stopped.set()

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        async with asyncio.TaskGroup() as tasks:
            behind = tasks.create_task(run_behind(app, listener, rpc_port, out))
            calls = tasks.create_task(rpc.run(stopped, app.settings.stop_grace_s))
            await server.serve(sockets=[listener])
            stopped.set()
            if server.force_exit:
                calls.cancel()
            await asyncio.wait([calls])
            behind.cancel()
    except ExceptionGroup as group:
        for failure in group.exceptions:
            if isinstance(failure, StartFailed):
                raise failure from None
        raise


async def run_behind(app: App, listener: socket.socket, rpc_port: int, out: Stream) -> None:
    """Run everything behind the edges until cancelled."""
    async with running(app):
        gc.collect()
        gc.freeze()  # the objects of the start are never collected
        gc.set_threshold(GARBAGE_AFTER, *gc.get_threshold()[1:])
        event = "ready" if app.settings.embedded else "listening"
        url, model = url_of(listener), app.card.name
        tell(app.settings, out, event, greeting(app, url, rpc_port), url=url, grpc_port=rpc_port, model=model)
        await asyncio.Event().wait()


def bound(host: str, port: int, setting: str) -> socket.socket:
    """Bind a listening address before anything else is started. Raises StartFailed if that fails.

    `setting` is the one that chooses the port.
    """
    try:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as exc:
        raise StartFailed(
            f"cannot listen on {host} ({exc.strerror}): set GLIMPSE_HTTP_HOST to an IPv4 address"
        ) from exc
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # two processes can bind at the same time; only one can listen
    except OSError as exc:
        listener.close()
        if exc.errno == errno.EADDRNOTAVAIL:
            raise StartFailed(
                f"GLIMPSE_HTTP_HOST {host} is not an address of this machine: `ip -brief address` shows its own, and "
                "0.0.0.0 stands for all"
            ) from exc
        if exc.errno == errno.EACCES:
            raise StartFailed(
                f"this user may not listen on {setting} {port} ({exc.strerror}): choose one above 1023"
            ) from exc
        raise StartFailed(
            f"cannot listen on {host}:{port} ({exc.strerror}): stop the program that listens there "
            f"(`ss -ltnp 'sport = :{port}'` shows it), or set {setting} or GLIMPSE_HTTP_HOST"
        ) from exc
    return listener


def listen_for_calls(rpc: GrpcServer, host: str, port: int) -> int:
    """Bind gRPC's address, and return the port. Raises StartFailed if that fails."""
    bound(host, port, "GLIMPSE_GRPC_PORT").close()  # gRPC does not say why it cannot listen
    try:
        return rpc.listen(host, port)
    except OSError as exc:
        raise StartFailed(f"{exc}: set GLIMPSE_GRPC_PORT to another port") from exc


def url_of(listener: socket.socket) -> str:
    """Return where this machine reaches the service."""
    host, port = listener.getsockname()[:2]
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{reachable}:{port}"


def greeting(app: App, url: str, rpc_port: int) -> str:
    if not app.settings.embedded:
        return (
            f"Glimpse listens on {url} (gRPC on port {rpc_port}); {url}/health/ready says when the Triton servers "
            "answer.\n"
        )
    key = "-H 'x-api-key: KEY' " if app.gate.has_keys else ""
    scene = PROJECT / "benchmarks" / "scenes" / "new_003.webp"
    file = scene.relative_to(PROJECT) if scene.exists() else "photo.jpg"
    return (
        f"Glimpse is ready on {url} (model {app.card.name}; gRPC on port {rpc_port}); Ctrl-C stops it. Try, in another "
        "shell:\n"
        f"  curl {key}-F image=@{file} -F question='what character is on the pink square?' {url}/v1/vqa\n"
    )
