"""The options that tritonserver has, as the bundled one tells them, and those that a Triton elsewhere needs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache

from service.triton.contract import CALLED
from service.triton_server.access import RESTRICTED
from service.triton_server.installation import Installation

EXIT_TIMEOUT_S = 30  # tritonserver's own, unless the command has another


@cache
def known_options() -> frozenset[str]:
    installation = Installation.find()
    told = subprocess.run(
        [installation.server, "--help"], env=installation.environment(), capture_output=True, text=True, check=False
    )
    return frozenset(re.findall(r"^\s+(--[a-z-]+)", told.stdout + told.stderr, re.MULTILINE))


def options(command: str) -> list[tuple[str, str]]:
    """(option, value) of the tritonserver in a command; none if there is no such program in it."""
    _, found, after = command.partition("tritonserver ")
    return re.findall(r"(--[a-z-]+)(?:=(\S+))?", after) if found else []


def faults_of_options(command: str) -> Iterator[str]:
    """Unknown options and models, and what a Triton must close to its callers."""
    given = options(command)
    if not given:
        return
    yield from (f"tritonserver has no option {option}" for option, _ in given if option not in known_options())
    yield from (f"no call needs the model {model}" for option, model in given
                if option == "--load-model" and model not in CALLED)  # fmt: skip
    if ("--allow-http", "false") not in given:
        yield "tritonserver opens HTTP"
    closed = [value.partition(":")[0] for option, value in given if option == "--grpc-restricted-protocol"]
    if closed != [",".join(RESTRICTED)]:
        yield "tritonserver lets every caller load models"
