"""Call a running service, and show its errors in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from service.cli.terminal import fail

TIMEOUT = httpx.Timeout(5.0, read=150.0, write=60.0)


class AskFailed(Exception):
    """The message is for the user."""


@contextmanager
def plain_words(url: str) -> Iterator[None]:
    """End the command with one line if the service or the connection fails."""
    try:
        yield
    except AskFailed as exc:
        fail(str(exc))
    except httpx.ConnectError:
        fail(f"nothing answers at {url}: start the service with `make serve` (or `glimpse serve`), or set --url")
    except httpx.TimeoutException:
        fail(f"{url} did not answer in time: try again, or check the service's log")
    except httpx.TransportError as exc:
        fail(f"the connection to {url} broke ({exc}): try again")
    except (json.JSONDecodeError, UnicodeDecodeError):
        fail(f"{url} did not answer with JSON: check that --url names a Glimpse service")
    except httpx.HTTPStatusError as exc:
        fail(f"{url} answered {exc.response.status_code}: {message_of(exc.response)}")


def read_image(source: str) -> bytes:
    """Read an image file, or standard input for "-". Raises AskFailed."""
    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as exc:
        raise AskFailed(f"cannot read {source}: {exc.strerror}") from exc


def upload(client: httpx.Client, data: bytes) -> str:
    """Send an image -> its id. Raises AskFailed."""
    return str(successful(client.post("/v1/images", content=data)).json()["id"])


def answer(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """Ask a question -> the whole answer. Raises AskFailed."""
    said: dict[str, Any] = successful(client.post("/v1/vqa", json=body)).json()
    return said


def stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """Stream the answer's text. Raises AskFailed."""
    with client.stream("POST", "/v1/vqa", json=body | {"stream": True}) as response:
        if not response.is_success:
            response.read()
        for line in successful(response).iter_lines():
            data = line.removeprefix("data: ")
            if data in ("", "[DONE]"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise AskFailed(event["error"]["message"])
            if "delta" in event:
                yield event["delta"]


def successful(response: httpx.Response) -> httpx.Response:
    """Return the response. Raises AskFailed with the service's message if it is an error."""
    if not response.is_success:
        raise AskFailed(message_of(response))
    return response


def message_of(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return (
            f"{response.url} answered {response.status_code} without a Glimpse error: "
            "check that --url names a Glimpse service"
        )
