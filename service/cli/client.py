"""Call a running service, and show its errors in one line."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from service.cli.terminal import fail

TIMEOUT = httpx.Timeout(5.0, read=150.0, write=60.0)
API_KEY = "GLIMPSE_API_KEY"  # the variable with the user's key
# What httpx takes from the environment, in lower or upper case.
SURROUNDINGS = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir")


IMAGE_ID = re.compile(r"img_[0-9a-f]{32}")
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".tif", ".tiff", ".bmp", ".heic", ".pdf"}
)
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv"})


class AskFailed(Exception):
    """The message is for the user."""


class ImageRefused(AskFailed):
    """The service cannot use this image file: it is broken, too large, or of another format."""


@contextmanager
def plain_words(url: str) -> Iterator[None]:
    """End the command with one line if the service or the connection fails."""
    try:
        yield
    except AskFailed as exc:
        fail(str(exc))
    except httpx.ConnectError as exc:
        if "certificate" in str(exc).lower() or "[Errno -" in str(exc):  # an unknown host has a negative number
            fail(f"cannot connect to {url}: {exc}")
        fail(f"nothing answers at {url}: start the service with `glimpse serve`, or set --url")
    except httpx.TimeoutException:
        fail(f"{url} did not answer in time: try again, or check the service's log")
    except httpx.RequestError as exc:
        fail(f"the connection to {url} broke ({exc}): try again")
    except (json.JSONDecodeError, UnicodeDecodeError):
        fail(f"{url} did not answer with JSON: check that --url names a Glimpse service")
    except httpx.HTTPStatusError as exc:
        fail(f"{url} answered {exc.response.status_code}: {message_of(exc.response)}")


def connected(url: str) -> httpx.Client:
    """A client of the service at `url`, with the key of GLIMPSE_API_KEY. A proxy is never asked for this machine.

    Raises AskFailed.
    """
    address = checked(url)
    # A transport of our own keeps httpx from reading the proxies. Without TLS it needs no certificates either.
    transport = httpx.HTTPTransport(verify=address.scheme == "https") if is_loopback(address.host) else None
    try:
        return httpx.Client(base_url=address, timeout=TIMEOUT, transport=transport, headers=key_headers())
    except Exception as exc:  # ImportError for SOCKS, OSError for certificates, ValueError for addresses of proxies
        names = [name for name in os.environ if name.lower() in SURROUNDINGS and os.environ[name]]
        raise AskFailed(
            f"cannot connect with {' and '.join(names)} of the environment ({first_line(exc)}): correct or unset it"
        ) from exc


def key_headers() -> dict[str, str]:
    """Raises AskFailed for a key that no header can hold, and does not show it."""
    key = os.environ.get(API_KEY, "").strip()
    if not key.isascii() or not key.isprintable():
        raise AskFailed(f"{API_KEY} has characters that no key has: copy the key again")
    return {"authorization": f"Bearer {key}"} if key else {}


def checked(url: str) -> httpx.URL:
    """Raises AskFailed."""
    mend = "write it as http://HOST:PORT"
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError) as exc:
        raise AskFailed(f"the service's address {url!r} is not a URL ({first_line(exc)}): {mend}") from exc
    if address.scheme not in ("http", "https") or not address.host:
        raise AskFailed(f"the service's address {url!r} is not an HTTP URL: {mend}")
    if address.port is not None and not 1 <= address.port <= 65535:
        raise AskFailed(f"the service's address {url!r} has no port that can be: {mend}, with PORT from 1 to 65535")
    return address


def is_loopback(host: str) -> bool:
    """Whether this machine itself is meant, by its name or in any way to write its addresses."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host)).is_loopback  # 127.1 too
    except OSError:
        pass
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return (address.ipv4_mapped or address).is_loopback


def first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]


def read_image(source: str) -> bytes:
    """Read an image or a video file, or standard input for "-". Raises AskFailed."""
    if source == "-":
        if sys.stdin is None:
            raise AskFailed("standard input is closed: name the image's file, or pipe it in")
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as exc:
        raise AskFailed(f"cannot read {source}: {exc.strerror}") from exc


def upload(client: httpx.Client, data: bytes) -> str:
    """Send an image or a video -> its id. Raises AskFailed."""
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
        for line in lines_of(successful(response)):
            data = line.removeprefix("data: ")
            if data in ("", "[DONE]"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise AskFailed(event["error"]["message"])
            if "delta" in event:
                yield event["delta"]


def lines_of(response: httpx.Response) -> Iterator[str]:
    """Split at line feeds only. httpx's `iter_lines` splits at U+2028 and others, too, which an answer may have."""
    rest = b""
    for piece in response.iter_bytes():
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.decode() for line in whole)


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
