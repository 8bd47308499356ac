"""`glimpse health` and `glimpse canary`: the probes of containers and load balancers. Exit status 0 or 1."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Annotated, Literal

import typer

from service.cli.client import answer, connected, plain_words
from service.cli.options import Url, url_of
from service.cli.terminal import fail, require

Triton = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Ask the Triton at this gRPC address, instead of a gateway."),
]
TIMEOUT_S = 10.0
# 1x1, black.
_PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


def health(
    url: Url = None,
    triton: Triton = None,
    live: Annotated[bool, typer.Option("--live", help="Ask only whether the gateway's process answers.")] = False,
) -> None:
    """Exit with 0 if the service is ready, with 1 and why if not. It runs no model."""
    if triton is not None:
        triton_health(triton)
        return
    address = url_of(url)
    with plain_words(address), connected(address) as client:
        said = client.get("/health/live" if live else "/health/ready", timeout=TIMEOUT_S)
        if not said.is_success:
            fail(f"{address} is not ready: {' '.join(said.text.split())}")


def canary(
    url: Url = None,
    triton: Triton = None,
    pool: Annotated[
        Literal["vision", "llm", "both"], typer.Option(help="With --triton: the models that it serves.")
    ] = "both",
) -> None:
    """Ask a real question and exit with 0 if it is answered. It runs every model, so ask less often than `health`."""
    began = time.monotonic()
    if triton is not None:
        triton_canary(triton, pool)
        typer.echo(f"answered in {1000 * (time.monotonic() - began):.0f} ms")
        return
    address = url_of(url)
    with plain_words(address), connected(address) as client:
        body = {
            "image": base64.b64encode(_PNG).decode(),
            "question": "what is in the image?",
            "max_tokens": 1,
            "timeout_s": TIMEOUT_S,
        }
        said = answer(client, body)
        typer.echo(f"{said['model']} answered in {1000 * (time.monotonic() - began):.0f} ms")


def triton_health(address: str) -> None:
    """Ask by grpc.health.v1, which Triton speaks: it needs no library of Triton's."""
    require("grpc", "serve")
    import grpc  # type: ignore[import-untyped]  # noqa: PLC0415
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # noqa: PLC0415

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            said = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as exc:
            fail(f"the Triton at {address} does not answer: {exc.details()}")
    if said.status != health_pb2.HealthCheckResponse.SERVING:
        fail(f"the Triton at {address} is not ready")


def triton_canary(address: str, pool: str) -> None:
    """Infer each model of the pool once."""
    require("tritonclient", "serve")
    from service.core.errors import GlimpseError  # noqa: PLC0415
    from service.settings import SettingsError, read_settings  # noqa: PLC0415
    from service.triton import TritonClient  # noqa: PLC0415
    from service.triton_alone import called, read_card  # noqa: PLC0415

    async def infer() -> None:
        card = read_card(read_settings())
        async with TritonClient(address, address, text_type=card.text_type) as client:
            for model in called(pool, card) or card.called:
                await client.probe(model, card, TIMEOUT_S)

    try:
        asyncio.run(infer())
    except (GlimpseError, SettingsError) as exc:
        fail(str(exc))
