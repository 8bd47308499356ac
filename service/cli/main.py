"""Define the command `glimpse`.

Asking needs only httpx and typer. Commands that need more replace this process by another program.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib.metadata import version
from typing import Annotated, Literal

import typer

from service.cli import cache, keys, variants
from service.cli.ask import ask
from service.cli.completion import NAME, completion, prepare
from service.cli.cost import cost
from service.cli.evaluate import evaluate
from service.cli.options import utf8
from service.cli.probes import canary, health
from service.cli.terminal import become, run

app = typer.Typer(
    name=NAME,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(cache.app, name="cache")
app.add_typer(keys.app, name="keys")
app.add_typer(variants.app, name="variants")


def show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"glimpse {version('glimpse')}")
        raise typer.Exit


@app.callback()
def glimpse(
    _: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ask questions about images: serve the models, ask them, measure them, train and build them."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [default: 8080].")] = None,
) -> None:
    """Serve until Ctrl-C: Triton with the models, and the gateway.

    \b
    The models are those of model_repository/, or of GLIMPSE_MODEL_REPOSITORY. All other settings are
    GLIMPSE_ variables too (docs/settings.md lists them), such as
      GLIMPSE_LOG_FORMAT=json glimpse serve --port 9000
      GLIMPSE_VISION_URL=triton:8001 GLIMPSE_LLM_URL=triton:8001 glimpse serve     # a Triton that runs elsewhere
    """
    given = {"GLIMPSE_HTTP_HOST": host, "GLIMPSE_HTTP_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    become("service", [], goal="serve", needs="uvicorn")


@app.command()
def triton(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", callback=utf8)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of gRPC.")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Triton's metrics.")] = 8002,
    pool: Annotated[
        Literal["vision", "llm", "both"],
        typer.Option(help="Which models: those before the LLM (vision), the LLM (llm), or all."),
    ] = "both",
) -> None:
    """Serve the models alone until Ctrl-C, for gateways elsewhere.

    \b
    Starts Triton with the models of model_repository/, or of GLIMPSE_MODEL_REPOSITORY, and loads a model again
    if its process dies. Gateways must have the same repository.
    Whoever reaches the port can ask the models, and only that: keep it in a network of your own.
      glimpse triton --host 0.0.0.0
      GLIMPSE_VISION_URL=triton:8001 GLIMPSE_LLM_URL=triton:8001 glimpse serve     # the gateway, elsewhere
    """
    become("service.triton_alone", [host, str(port), str(metrics_port), pool], goal="serve", needs="uvloop")


app.command()(health)
app.command()(canary)
app.command()(cost)
app.command()(ask)
app.command()(completion)
app.command("eval")(evaluate)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train the reference model from nothing. Needs PyTorch. `glimpse train --help` lists the options."""
    become("build_engines.train", context.args, goal="build", needs="torch")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def build(context: typer.Context) -> None:
    """Build a repository for Triton from a checkpoint. `glimpse build --help` lists the options."""
    become("build_engines.convert", context.args, goal="build", needs="torch")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def adapt(context: typer.Context) -> None:
    """Train an allocator for a checkpoint. Needs PyTorch. `glimpse adapt --help` lists the options."""
    become("build_engines.adapt", context.args, goal="build", needs="torch")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def calibrate(context: typer.Context) -> None:
    """Fit how sure a repository's models are of their answers. `glimpse calibrate --help` lists the options."""
    become("build_engines.calibration", context.args, goal="build", needs="sklearn")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure the service and other systems under load. `glimpse bench --help` lists the options."""
    become("benchmarks.bench", context.args, goal="bench", needs="litserve")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def verify(context: typer.Context) -> None:
    """Check a repository's files and, if it is served, its answers. `glimpse verify --help` lists the options."""
    become("build_engines.verify", context.args, goal="build", needs="torch")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def ablate(context: typer.Context) -> None:
    """Measure what each part of the relevance allocator is worth. `glimpse ablate --help` lists the options."""
    become("benchmarks.ablate", context.args, goal="build", needs="torch")


def main() -> None:
    prepare()
    sys.exit(run(partial(app, prog_name=NAME)))
