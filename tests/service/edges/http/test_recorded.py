"""Pin the HTTP interface: replay `recorded.json` against a real gateway and compare every response.

`GLIMPSE_RECORD=1 python -m pytest FILE`, with this file, sends the table's requests again and writes the responses into
the table. `git diff` then shows every change of the interface. To add an exchange, write its `name` and `request` into
the table and record.

A request's body is one of these:
    json     sent as JSON; an image's bytes in it become base64
    form     [[field, text], [field, {"file": bytes}], ...], sent as multipart/form-data
    content  sent as it is
These objects are placeholders anywhere in a body:
    {"scene": FILE}               bytes of a committed scene and OWN; with "first": N only the first N
    {"hex": DIGITS}               these bytes
    {"repeat": VALUE, "times": N} a text, bytes or a list, N times
    {"base64": BYTES}             text, with "before": TEXT in front of it
    {"id_of": NAME}               `id` in the response of the earlier exchange NAME
`declares_bytes` sends that content-length and no body. `open_chunk` sends the body as one chunk and never ends it.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.paths import PROJECT, SCENES
from tests.support.servers import Gateway

TABLE = Path(__file__).with_name("recorded.json")
EXCHANGES: list[dict[str, Any]] = json.loads(TABLE.read_text())
RECORD = bool(os.environ.get("GLIMPSE_RECORD"))

BOUNDARY = "glimpse"
# Appended to each scene, where no decoder looks. No other test sends these bytes, so the first answer is a miss.
OWN = b"recorded"
EXACT = {"answer", "error", "events", "finish_reason", "object", "status", "usage", "vision"}
EXACT |= {"bytes", "height", "width"}
OPAQUE = {"components", "metadata", "paths"}  # their contents are not recorded
HEADERS = ("allow", "cache-control", "x-accel-buffering")
LINE_CHARS = 160


@pytest.fixture(scope="module")
def replayed(gateway: Gateway, repository: Path) -> dict[str, dict[str, Any]]:
    """Send every request in the table's order; each response by its exchange's name."""
    if repository != PROJECT / "model_repository":
        pytest.skip("the table holds answers of the committed models")
    address = urlsplit(gateway.url).netloc
    responses: dict[str, dict[str, Any]] = {}
    ids: dict[str, str] = {}
    for exchange in EXCHANGES:
        name, request = exchange["name"], exchange["request"]
        status, headers, body = send(address, request, ids)
        content = read(headers.get("content-type", ""), body)
        if isinstance(content, dict) and "id" in content:
            ids[name] = content["id"]
        response = responses[name] = {"status": status, "content_type": headers.get("content-type")}
        if kept := selected(headers, request.get("headers", {})):
            response["headers"] = kept
        if content is not None:
            response["body"] = outline(content)
    if RECORD:
        table = [exchange | {"response": responses[exchange["name"]]} for exchange in EXCHANGES]
        TABLE.write_text(pretty(table) + "\n")
    return responses


def test_each_exchange_has_a_name_of_its_own():
    assert len({exchange["name"] for exchange in EXCHANGES}) == len(EXCHANGES)


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange["name"])
def test_the_response_is_as_recorded(exchange, replayed):
    if RECORD:
        pytest.skip("recorded")
    assert replayed[exchange["name"]] == exchange.get("response")


def send(address: str, request: dict[str, Any], ids: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """Sends exactly what the table says, on a connection of its own: status, headers by lower-case name, body."""
    content_type, body = body_of(request, ids)
    headers = ({"content-type": content_type} if content_type else {}) | request.get("headers", {})
    if request.get("open_chunk"):
        headers["transfer-encoding"] = "chunked"
        body = b"%x\r\n" % len(body) + body
    elif "declares_bytes" in request:
        headers["content-length"] = str(request["declares_bytes"])
    elif request["method"] == "POST":
        headers["content-length"] = str(len(body))
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.putrequest(request["method"], request["path"], skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def body_of(request: dict[str, Any], ids: dict[str, str]) -> tuple[str, bytes]:
    """The body's usual content-type, if it has one, and its bytes."""
    if "json" in request:
        return "application/json", json.dumps(resolve(request["json"], ids), default=in_base64).encode()
    if "form" in request:
        return f"multipart/form-data; boundary={BOUNDARY}", form(resolve(request["form"], ids))
    content = resolve(request.get("content", ""), ids)
    return "", content.encode() if isinstance(content, str) else content


def resolve(value: Any, ids: dict[str, str]) -> Any:
    """`value` with what its placeholders stand for."""
    if isinstance(value, list):
        return [resolve(each, ids) for each in value]
    return resolve_object(value, ids) if isinstance(value, dict) else value


def resolve_object(value: dict[str, Any], ids: dict[str, str]) -> Any:
    match value:
        case {"scene": name, **cut}:
            return ((SCENES / name).read_bytes() + OWN)[: cut.get("first")]
        case {"hex": digits}:
            return bytes.fromhex(digits)
        case {"repeat": repeated, "times": times}:
            return resolve(repeated, ids) * times
        case {"base64": data, **rest}:
            return rest.get("before", "") + in_base64(resolve(data, ids))
        case {"id_of": name}:
            return ids[name]
    return {name: resolve(each, ids) for name, each in value.items()}


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def form(fields: list[tuple[str, Any]]) -> bytes:
    body = b""
    for name, value in fields:
        is_file = isinstance(value, dict)
        data = value["file"] if is_file else value
        filename = '; filename="file"' if is_file else ""
        body += f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode()
        body += (data.encode() if isinstance(data, str) else data) + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


def read(content_type: str, body: bytes) -> Any:
    """A body's JSON. A stream gives its kinds of events in order, its text, and its last event before the end."""
    match content_type.partition(";")[0]:
        case "application/json" if body:
            return json.loads(body)
        case "text/event-stream":
            *events, done = [event.removeprefix("data: ") for event in body.decode().split("\n\n")[:-1]]
            parsed = [json.loads(event) for event in events]
            # The number of tokens in one event depends on timing, so equal kinds in a row count as one.
            kinds = [kind for kind, _ in groupby(", ".join(event) for event in parsed)]
            text = "".join(event.get("delta", "") for event in parsed)
            return {"events": [*kinds, done], "answer": text, "last": parsed[-1]}
    return None


def outline(value: Any, name: str = "") -> Any:
    """The exact value of an EXACT field; of all others names and types. A float is never exact: machines differ."""
    if name in EXACT and not isinstance(value, float):  # `timing_ms.vision` is a time
        return (
            {key: "<number>" if isinstance(each, float) else each for key, each in value.items()}
            if name == "vision"
            else value
        )
    match value:
        case str() if re.fullmatch("img_[0-9a-f]{32}", value):  # random
            return "<image id>"
        case dict() if name in OPAQUE:
            return "<object>"
        case dict():
            return {key: outline(each, key) for key, each in value.items()}
        case list():
            kinds = [outline(each) for each in value]
            return [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    names = {str: "<string>", bool: "<boolean>", int: "<integer>", float: "<number>", type(None): "<null>"}
    return names[type(value)]


def selected(headers: dict[str, str], sent: dict[str, str]) -> dict[str, str]:
    """The headers that callers rely on, with a word in <> for a value that varies."""
    found = {name: headers[name] for name in HEADERS if name in headers}
    if "location" in headers:
        found["location"] = urlsplit(headers["location"]).path
    if "retry-after" in headers:
        found["retry-after"] = "<seconds>"
    if "x-request-id" not in headers:
        found["x-request-id"] = "<none>"
    elif "x-request-id" in sent:
        echoed = headers["x-request-id"] == sent["x-request-id"]
        found["x-request-id"] = "<the request's>" if echoed else "<a new one>"
    return found


def pretty(value: Any, indent: int = 0) -> str:
    """JSON on one line if it fits and is not a whole exchange, else with one item a line."""
    flat = json.dumps(value, ensure_ascii=False)
    is_exchange = isinstance(value, dict) and "request" in value
    fits = indent + len(flat) <= LINE_CHARS and not is_exchange
    if fits or not value or not isinstance(value, dict | list):
        return flat
    before = "\n" + " " * (indent + 2)
    if isinstance(value, dict):
        items = [f"{json.dumps(name)}: {pretty(each, indent + 2)}" for name, each in value.items()]
    else:
        items = [pretty(each, indent + 2) for each in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + before + f",{before}".join(items) + "\n" + " " * indent + closing
