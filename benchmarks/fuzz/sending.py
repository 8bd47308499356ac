"""Send one mutated request to a gateway, and judge what comes back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Literal

import orjson

from benchmarks.bench.http_client import Aborted, HttpClient, Response

HANG_S = 5.0  # an answer that takes longer counts as a hang
PATIENCE_S = 3.0  # for an answer to what may not be a whole request
OVERLOADED = ("saturated", "tenant_share", "deadline", "overloaded", "too_many_connections", "unavailable")
LEAKS = (b"Traceback", b'  File "', b"pydantic", b"Errno", b"<class ", b"object at 0x")

Fault = Literal[
    "",
    "server error",
    "no answer in time",
    "hung up",
    "error without its shape",
    "leak",
    "ended a decoder",
    "always overloaded",
]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One request, byte for byte."""

    request: bytes
    done: tuple[str, ...]  # what it was made from, and by which mutations
    is_whole: bool = True  # surely one HTTP message: an answer is due, and the connection goes on


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended."""

    word: str  # its status and error code, or what came in their place
    fault: Fault
    seconds: float
    response: Response | None = None


def request(path: str, body: bytes, content_type: str, *headers: str, method: str = "POST") -> bytes:
    """An HTTP/1.1 message."""
    lines = [f"{method} {path} HTTP/1.1", "host: localhost", f"content-type: {content_type}", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode("latin-1") + body


async def send(mutant: Mutant, client: HttpClient) -> Outcome:
    """One try. `client` keeps connections; a request that may not be whole gets a connection of its own."""
    started = time.monotonic()
    own = client if mutant.is_whole else HttpClient(client.host, client.port)
    try:
        response = await own.send(mutant.request, abort_after_s=4 * HANG_S if mutant.is_whole else PATIENCE_S)
    except Aborted:
        seconds = time.monotonic() - started
        return Outcome("left", "no answer in time" if mutant.is_whole else "", seconds)
    except OSError as error:
        hung_up = mutant.is_whole or isinstance(error, ConnectionRefusedError)
        return Outcome("hung up", "hung up" if hung_up else "", time.monotonic() - started)
    finally:
        if own is not client:
            own.close()
    return judge(mutant, response, time.monotonic() - started)


def judge(mutant: Mutant, response: Response, seconds: float) -> Outcome:
    """What a response says, and what is wrong with it."""
    code = code_of(response)
    word = f"{response.status} {code}".strip()
    fault: Fault = ""
    if (response.status >= 500 and not is_overload(response) and not _asked_for(mutant, response.status)) or (
        response.status == 200 and b'"code":"internal_error"' in response.body  # inside a stream
    ):
        fault = "server error"
    elif response.status >= 400 and not code:
        fault = "error without its shape"
    elif response.status >= 400 and any(leak in response.body for leak in LEAKS):
        fault = "leak"
    elif b"ends its decoder" in response.body:
        fault = "ended a decoder"
    elif seconds > HANG_S:
        fault = "no answer in time"
    return Outcome(word, fault, seconds, response)


def code_of(response: Response) -> str:
    """The error's code; empty if the body has not the shape of an error."""
    try:
        error = orjson.loads(response.body)["error"]
        shaped = set(error) == {"message", "type", "param", "code"} and isinstance(error["param"], str | None)
        shaped = shaped and all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
    except (ValueError, TypeError, KeyError):
        return ""
    return str(error["code"]) if shaped else ""


def is_overload(response: Response) -> bool:
    """The service has no room now: not the request's fault."""
    return response.status in (429, 503) and code_of(response) in OVERLOADED


def _asked_for(mutant: Mutant, status: int) -> bool:
    """A request that names its own timeout may miss it."""
    return status == 504 and b"timeout_s" in mutant.request


async def send_patiently(mutant: Mutant, client: HttpClient, tries: int = 8) -> tuple[Outcome, int]:
    """Try again while the service is overloaded, and once more after a slow answer: the machine may be slow.

    Returns the last outcome and how often the service was overloaded.
    """
    overloads, slow = 0, 0
    while True:
        outcome = await send(mutant, client)
        if outcome.response is not None and is_overload(outcome.response):
            if overloads == tries:
                waits_too_long = outcome.word == "429 deadline" and b"timeout_s" in mutant.request
                return replace(outcome, fault="" if waits_too_long else "always overloaded"), overloads
            overloads += 1
            await asyncio.sleep(min(0.1 * 2**overloads, 5.0))
        elif outcome.fault == "no answer in time" and not slow:
            slow += 1
        else:
            return outcome, overloads
