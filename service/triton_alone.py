"""Start and watch a Triton without a gateway, for `glimpse triton`: `python -m service.triton_alone HOST PORT ...`.

Gateways reach it by GLIMPSE_VISION_URL and GLIMPSE_LLM_URL. It reads the same settings as a gateway: the model
repository, the log, and how long a start may take. How long the end may take is a setting of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence

import structlog
import uvloop

from service.core.card import ModelCard
from service.logs import configure_log, stream_to
from service.settings import Settings, SettingsError, read_settings
from service.system.output import Output
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.engine_choice import choice
from service.triton_server.installation import StartFailed
from service.triton_server.supervision import EmbeddedTriton

log = structlog.get_logger()


def called(pool: str, card: ModelCard) -> Sequence[str] | None:
    """List the models that a gateway calls in this pool; None for all of the repository. Raises SettingsError."""
    match pool:
        case "both":
            return None
        case "vision":
            return [model for model in card.called if model != "llm"]
        case "llm":
            return ["llm"]
    raise SettingsError(f"{pool!r} is not a pool: choose vision, llm or both")


def read_card(settings: Settings) -> ModelCard:
    """Raises SettingsError."""
    try:
        return ModelCard.from_json((settings.model_repository / "card.json").read_text())
    except Exception as exc:
        raise SettingsError(
            f"{settings.model_repository} is not a model repository that can be read ({exc}): "
            "set GLIMPSE_MODEL_REPOSITORY to a folder that `glimpse build` wrote"
        ) from exc


async def serve(settings: Settings, ports: Ports, pool: str) -> None:
    """Serve until SIGINT or SIGTERM. Triton then ends its requests in flight. Raises StartFailed, SettingsError."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    serving = asyncio.create_task(run(settings, ports, pool))
    told = asyncio.create_task(stopped.wait())
    await asyncio.wait([serving, told], return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    serving.cancel()  # once: another signal must not cut Triton's end short
    with contextlib.suppress(asyncio.CancelledError):
        await serving


async def run(settings: Settings, ports: Ports, pool: str) -> None:
    """Start Triton and watch it until cancelled. Raises StartFailed, SettingsError."""
    card = read_card(settings)
    chosen = choice(settings, card, gateways_elsewhere=True)
    card = card.computed_in(chosen.precision)
    models = called(pool, card)
    access = Access.choose(ports)
    async with (
        TritonClient(access.url, access.url, access.metadata, card.text_type) as client,
        EmbeddedTriton(
            settings.model_repository,
            client=client,
            card=card,
            log_path=settings.triton_log,
            access=access,
            called=models,
            precision=card.precision,
            start_timeout_s=settings.triton_start_timeout_s,
            exit_timeout_s=settings.triton_exit_timeout_s,
        ) as triton,
    ):
        log.info(
            "triton_ready", address=access.url, pool=pool, model=card.name, precision=card.precision, why=chosen.why
        )
        await triton.supervise()


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 after SIGINT or SIGTERM, 1 if Triton cannot run, 2 for wrong settings."""
    host, port, metrics_port, pool = arguments
    output = Output()
    try:
        settings = read_settings()
        configure_log(settings, stream_to(output, sys.stderr))
        uvloop.run(serve(settings, Ports(int(port), int(metrics_port), host), pool))
    except SettingsError as exc:
        sys.stderr.write(f"glimpse: {exc}\n")
        return 2
    except StartFailed as exc:
        sys.stderr.write(f"glimpse: {exc}\n")
        return 1
    finally:
        output.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
