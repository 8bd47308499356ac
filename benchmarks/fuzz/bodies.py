"""Mutated bodies of questions and uploads: JSON, forms, their encoding, and the head in front of them."""

from __future__ import annotations

import base64
import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from benchmarks.fuzz import texts
from benchmarks.fuzz.pictures import files
from benchmarks.fuzz.sending import Mutant, request

BOUNDARY = b"glimpse-fuzz-7f3a"
MAX_BYTES = 3_000_000
Part = tuple[bytes, bytes]  # headers, content

TENANTS = ("", "a", "a" * 64, "a" * 65, "é", "a b", "\t", "a,b", "../..", "%00", "1", "\x7f")
TYPES = (
    "application/json", "application/json; charset=utf-8", "application/json;charset=utf-16", "APPLICATION/JSON",
    "application/json;;;", "application/x-www-form-urlencoded", "text/plain", "multipart/form-data", "multipart/mixed",
    "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "a" * 300,
    'multipart/form-data; boundary="a b"',
    "multipart/form-data; boundary*=utf-8''x", "multipart/form-data; boundary=a; boundary=b", "image/png", "", "é", "/",
    "multipart/form-data; boundary=\xff\xfe", "multipart/form-data; " + "a=b; " * 500, "*/*",
    'multipart/form-data; boundary="',
)  # fmt: skip
HEADERS = (
    "expect: 100-continue", "expect: 200-ok", "upgrade: h2c", "upgrade: websocket", "connection: upgrade",
    "connection: close", "connection: keep-alive, close, x", "te: trailers", "accept: text/event-stream",
    "accept: " + "a" * 500,
    "accept-encoding: gzip, br", "range: bytes=0-1", "if-none-match: *", "cookie: " + "a=b; " * 200,
    "x-forwarded-for: ::1",
    "x-request-id: ", "x-request-id: a b", "x-request-id: " + "a" * 200, "x-request-id: ok",
    "x-http-method-override: DELETE",
    "content-disposition: attachment", "authorization: Basic ====", "x: \xff\xfe", "priority: u=0", "origin: null",
)  # fmt: skip
PATHS = (
    "/v1/vqa", "/v1/vqa/", "/v1//vqa", "/v1/vqa?", "/v1/vqa?stream=true", "/v1/%76qa", "/v1/vqa%00", "/v1/../v1/vqa",
    "/v1/images", "/v1/images/img_0", "/v1/models", "/health/live", "/health/ready", "/metrics", "/openapi.json",
    "/docs",
    "/", "//", "*", "/%ff%fe", "/" + "a" * 4000, "/?" + "a=b&" * 800, "http://localhost/v1/vqa", "/v1/vqa#x", "/é",
)  # fmt: skip
FRAMING = (
    "content-length: 3", "transfer-encoding: chunked", "transfer-encoding: gzip, chunked", "no colon", ": empty",
    "transfer-encoding: xchunked", "host: evil.example", "host: ", "host: [::1", " folded: x", "x y: z", "x: \0",
    "x: a\rb", "a" * 40_000 + ": b",
)  # fmt: skip
METHODS = ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "post", "QUERY", "SOURCE")


def documents(random: Random, image_ids: Sequence[str]) -> dict[str, Any]:
    """A question that is answered as it stands; most ask about an image that was sent before, which costs little."""
    asked: dict[str, Any] = {"image": random.choice(image_ids), "question": "what colour is it?", "max_tokens": 1}
    if random.random() < 0.15:
        asked["image"] = base64.b64encode(random.choice(list(files().values()))).decode()
    elif random.random() < 0.2:
        asked["images"] = [asked.pop("image")] * random.choice((1, 2))
    more = {
        "turns": [{"question": "is there a ring?", "answer": "yes"}], "temperature": 0.7, "top_k": 40, "top_p": 0.9,
        "seed": 7, "repetition_penalty": 1.1, "stop": ["."], "detail": "auto", "priority": "low", "stream": True,
        "explain": True, "timeout_s": 20, "budget": {"vision_tokens": [64, 128], "visual_tokens": [32, 64]},
    }  # fmt: skip
    return asked | {name: more[name] for name in random.sample(list(more), random.choice((0, 1, 2, 5)))}


def form_parts(document: dict[str, Any]) -> list[Part]:
    """The fields of a form. An image that is no id becomes a file."""
    parts: list[Part] = []
    for name, value in document.items():
        for each in value if name in ("images", "stop") else [value]:
            field = "image" if name == "images" else name
            head = b'content-disposition: form-data; name="%b"' % field.encode()
            if field == "image" and not each.startswith("img_"):
                head += b'; filename="i.png"\r\ncontent-type: image/png'
                parts.append((head, base64.b64decode(each)))
            else:
                parts.append((head, each.encode() if isinstance(each, str) else texts.written(texts.copied(each))))
    return parts


def _odd_part(random: Random, parts: list[Part]) -> None:
    """One part gets another head or content, or comes again."""
    place = random.randrange(len(parts))
    head, content = parts[place]
    name = random.choice(texts.NAMES).encode()
    heads = (
        b"", b"content-disposition: form-data", b'content-disposition: form-data; name=""', b"content-disposition:",
        b'content-disposition: form-data; name="%b"; name="image"' % name,
        b"content-disposition: form-data; name=%b" % name,
        b"content-disposition: form-data; name*=utf-8''%b" % name, b'content-disposition: attachment; name="%b"' % name,
        b'content-disposition: form-data; name="%b\0"' % name, b'content-disposition: form-data; name="\xff\xfe"',
        b'content-disposition: form-data; name="%b"; filename="../../etc/passwd"' % name,
        b'content-disposition: form-data; name="%b"; filename="' % name + b"a" * 5000 + b'"',
        b'content-disposition: form-data; name="',
        head + b"\r\ncontent-type: text/plain; charset=utf-16", head + b"\r\ncontent-transfer-encoding: base64",
        head + b"\r\ncontent-transfer-encoding: quoted-printable", head + b"\r\nx: y" * random.choice((1, 100, 20_000)),
        head + b"\r\n folded", head + b"\r\n: empty", head + b"\r\nno colon", head.upper(), head.replace(b"\r\n",
        b"\n"),
        head + b"\r\ncontent-type: multipart/mixed; boundary=x", head + b"\r\nx: " + b"a" * 100_000,
    )  # fmt: skip
    value = texts.odd_value(random)
    contents = (
        b"", b"\0", b"null", b"\xff\xfe", b"--", b"--" + BOUNDARY[:-1], b"\r\n" * 50, b"a" * 70_000,
        random.randbytes(100),
        value.encode("utf-8", "surrogatepass") if isinstance(value, str) else texts.written(value),
        random.choice(list(files().values())),
    )  # fmt: skip
    changed = (random.choice(heads), content) if random.random() < 0.5 else (head, random.choice(contents))
    match random.randrange(4):
        case 0:
            most = texts.MAX_REPEATED_BYTES // (len(head) + len(content) + 1) + 1
            parts[place:place] = [parts[place]] * min(most, random.choice((1, 2, 63, 64, 65, 5000)))
        case 1:
            parts.insert(random.randrange(len(parts) + 1), changed)
        case 2 if len(parts) > 1:
            del parts[place]
        case _:
            parts[place] = changed


def joined(random: Random, parts: Sequence[Part]) -> bytes:
    """The body, in one case of three with a wrong line end, boundary or end."""
    end = b"\n" if random.random() < 0.05 else b"\r\n"
    body = b"".join(b"--" + BOUNDARY + end + head + end * 2 + content + end for head, content in parts)
    body += b"--" + BOUNDARY + b"--" + end
    if random.random() < 0.3:
        changes: Sequence[Callable[[], bytes]] = (
            lambda: body.removesuffix(b"--" + end),
            lambda: body + b"epilogue" * 10,
            lambda: b"preamble\r\n" * random.choice((1, 5000)) + body,
            lambda: body.replace(b"--" + BOUNDARY, b"--" + BOUNDARY + b"  ", 1),
            lambda: body.replace(b"--" + BOUNDARY, b"-" + BOUNDARY, 1),
            lambda: body.replace(b"\r\n\r\n", b"\r\n", 1),
            lambda: body.replace(BOUNDARY, BOUNDARY + b"x"),
            lambda: texts.flip_bits(random, body),
            lambda: texts.cut(random, body),
            lambda: texts.insert(random, body),
            lambda: body[2:],
            lambda: b"\r\n" + body,
            lambda: body * 2,
        )
        return random.choice(changes)()
    return body


def encoded(random: Random, body: bytes) -> tuple[bytes, str]:
    """The body under a content-encoding, honest or not."""
    packed = gzip.compress(body, 1, mtime=0)
    return random.choice((
        lambda: (packed, "gzip"), lambda: (packed, "x-gzip"), lambda: (packed, "GZIP"), lambda: (packed, "identity"),
        lambda: (body, "gzip"), lambda: (packed[: random.randrange(len(packed))], "gzip"), lambda: (packed + b"x",
        "gzip"),
        lambda: (packed * 2, "gzip"), lambda: (texts.flip_bits(random, packed), "gzip"),
        lambda: (gzip.compress(packed, mtime=0), "gzip"),
        lambda: (gzip.compress(packed, mtime=0), "gzip, gzip"), lambda: (zlib.compress(body), "deflate"),
        lambda: (body, "br"),
        lambda: (zlib.compress(body), "gzip"), lambda: (b"", "gzip"), lambda: (body, "zstd"), lambda: (body, "\xff"),
        lambda: (gzip.compress(body + b" " * random.choice((10**6, 30 * 10**6)), 1, mtime=0), "gzip"),  # much of little
    ))()  # fmt: skip


def chunked(random: Random, body: bytes) -> tuple[bytes, bool]:
    """A body in chunks, and whether they surely are well formed."""
    sizes = random.choice(((len(body) + 1,), (1, 7, 64), (1000,)))
    pieces, place = [], 0
    while place < len(body) and len(pieces) < 3000:
        size = len(body) if len(pieces) == 2999 else random.choice(sizes)
        pieces.append(body[place : place + size])
        place += size
    good = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    if random.random() < 0.4:
        return b"".join(good) + b"0\r\n\r\n", True
    whole = b"".join(good)
    return random.choice((
        whole + b"0\r\nx-trailer: y\r\n\r\n", whole + b"0\r\n" + b"x: y\r\n" * 3000 + b"\r\n", whole, whole + b"0\r\n",
        b"ffffffffffffffff\r\n" + body, b"-1\r\n" + body, b"zz\r\n" + body,
        b"5;" + b"e" * 20_000 + b"\r\nhello\r\n0\r\n\r\n",
        whole.replace(b"\r\n", b"\n") + b"0\n\n", b"0\r\n\r\n" + whole, b"1\r\n" * 3000,
    )), False  # fmt: skip


@dataclass(frozen=True, slots=True)
class Message:
    """A request before its head is written."""

    path: str
    body: bytes
    kind: str  # content-type
    headers: tuple[str, ...]

    def written(self, *headers: str, **changes: str) -> bytes:
        """With more headers, and another `path`, `kind` or `method`."""
        path, kind = changes.get("path", self.path), changes.get("kind", self.kind)
        method = changes.get("method", "POST")
        return request(path, self.body, kind, *headers, *self.headers, method=method)


OddHead = tuple[bytes, bool]  # the request, and whether it surely is one whole message


def odd_type(random: Random, message: Message) -> OddHead:
    return message.written(kind=random.choice(TYPES)), True


def odd_tenant(random: Random, message: Message) -> OddHead:
    return message.written(f"x-tenant-id: {random.choice(TENANTS)}"), True


def odd_header(random: Random, message: Message) -> OddHead:
    return message.written(random.choice(HEADERS)), False


def odd_path(random: Random, message: Message) -> OddHead:
    return message.written(path=random.choice(PATHS)), False


def odd_method(random: Random, message: Message) -> OddHead:
    return message.written(method=random.choice(METHODS)), False


def odd_chunks(random: Random, message: Message) -> OddHead:
    pieces, is_whole = chunked(random, message.body)
    head = replace(message, body=b"").written("transfer-encoding: chunked").replace(b"content-length: 0\r\n", b"")
    return head + pieces, is_whole


def odd_length(random: Random, message: Message) -> OddHead:
    nbytes = len(message.body)
    lies = ("-1", "+5", "0x5", "5, 5", "5,6", "", " ", "1e3", str(10**20), "20000001", str(nbytes + 9))
    told = b"content-length: %d" % nbytes
    return message.written().replace(told, b"content-length: " + random.choice(lies).encode(), 1), False


def odd_framing(random: Random, message: Message) -> OddHead:
    return message.written(random.choice(FRAMING)), False


def many_headers(random: Random, message: Message) -> OddHead:
    return message.written(*(f"x-{number}: y" for number in range(random.choice((50, 101, 3000))))), False


ODD_HEADS: Sequence[Callable[[Random, Message], OddHead]] = (
    *(odd_type, odd_tenant, odd_header, odd_path, odd_method),
    *(odd_chunks, odd_length, odd_framing, many_headers),
)


def mutant(seed: int, number: int, image_ids: Sequence[str]) -> Mutant:
    """A mutated body in a request; its head is mutated too in one case of five."""
    random = Random(f"body {seed} {number}")
    document = documents(random, image_ids)
    headers: list[str] = []
    path, kind = "/v1/vqa", "application/json"
    if random.random() < 0.6:
        body, done = texts.mutated(random, document)
        done.insert(0, "JSON")
    else:
        parts, done = form_parts(document), ["form"]
        for _ in range(random.choice((0, 1, 1, 2, 4))):
            _odd_part(random, parts)
            done.append("odd_part")
        body, kind = joined(random, parts), f"multipart/form-data; boundary={BOUNDARY.decode()}"
        if random.random() < 0.2:
            path = "/v1/images"
    body = body[:MAX_BYTES]
    if random.random() < 0.1:
        body, encoding = encoded(random, body)
        headers.append(f"content-encoding: {encoding}")
        done.append("encoded")
    message = Message(path, body, kind, tuple(headers))
    if random.random() < 0.2:
        odd = random.choice(ODD_HEADS)
        sent, is_whole = odd(random, message)
        return Mutant(sent, (*done, odd.__name__), is_whole)
    return Mutant(message.written(), tuple(done))
