"""Mutated JSON. A document is Python values, with two types more, so that what no JSON library writes can be said."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes that stand in the text as they are."""

    text: bytes


class Pairs(list[tuple[Any, Any]]):
    """An object whose names may repeat."""


MAX_REPEATED_BYTES = 500_000
DEPTHS = (3, 40, 300, 5000, 100_000)
ODD_VALUES: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 31, 32, 33, 64, 128, 400, 401, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63,
    2**64, 10**40, -(2**63), 0.5, -0.0, 1.0, 1e-7, 1e-46, 1e-310, 1e40, 1e308, Raw(b"1e400"), Raw(b"-1e400"),
    Raw(b"NaN"), Raw(b"Infinity"), Raw(b"-Infinity"), Raw(b"1" * 5000), Raw(b"0." + b"1" * 5000), Raw(b"1e999999999"),
    Raw(b"01"), Raw(b"+1"), Raw(b"0x10"), Raw(b"1_000"), Raw(b".5"), Raw(b"1."), Raw(b"undefined"), Raw(b""),
    "", " ", "0", "1", "16", "null", "true", "low", "high", "auto", "normal", "HIGH", "\0", "\ufeff", "\u202e",
    "é" * 50,
    "😀", "a" * 1999, "a" * 2001, "word " * 500, "\n" * 1000, Raw(b'"\\ud800"'), Raw(b'"\\udc00\\ud800"'),
    Raw(b'"\\u0000"'), Raw(b'"\\x41"'), Raw(b'"\xff\xfe"'), Raw(b'"\xc0\xaf"'), Raw(b'"\xed\xa0\x80"'), Raw(b'"a'),
    "<s>", "</s>", "<image>", "<pad>" * 20, "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a.png",
    "https://example.com/a.png", "data:image/png;base64,", "data:,", "data:image/png;base64,====", "img_",
    "img_" + "0" * 32,
    "img_" + "f" * 5000, "A", "AAAA", "AA=A", "====", "/9j/4AAQ", "iVBORw0KGgo", [], [[]], [None], [1, 2, 3], ["", ""],
    [64, 64], [64, 256], [256, 64], [0, 0], [-1, 10**9], [64, Raw(b"1e3")], ["."] * 9, [{}], Pairs(), Pairs([("a", 1)]),
    Pairs([("question", "what?"), ("answer", "red")]), [Pairs([("question", "what?"), ("answer", "red")])],
    [Pairs([("question", "what?"), ("answer", "red")])] * 65, Pairs([("vision_tokens", [64, 128])]),
    Pairs([("visual_tokens", [32, 128])]), Pairs([("vision_tokens", [400, 400]), ("visual_tokens", [128, 128])]),
)  # fmt: skip
NAMES = (
    "image", "images", "question", "turns", "max_tokens", "temperature", "top_k", "top_p", "seed", "repetition_penalty",
    "stop", "detail", "budget", "timeout_s", "priority", "stream", "explain", "answer", "vision_tokens",
    "visual_tokens",
)  # fmt: skip
UNKNOWN = ("", "Image", "image ", "imge", "file", "prompt", "__proto__", "$ref", "\0", "é", "a" * 5000, "image_url")

Mutation = Callable[[Random, Any], Any]
encode = json.JSONEncoder(ensure_ascii=False).encode


def written(value: Any) -> bytes:
    """The document as text."""
    match value:
        case Raw():
            return value.text
        case Pairs():
            return b"{" + b",".join(written(name) + b":" + written(each) for name, each in value) + b"}"
        case dict():
            return written(Pairs(value.items()))
        case list() | tuple():
            return b"[" + b",".join(map(written, value)) + b"]"
    return encode(value).encode("utf-8", "surrogatepass")


def copied(value: Any) -> Any:
    """Objects as Pairs, so that mutations find one kind."""
    if isinstance(value, Pairs | dict):
        items = value if isinstance(value, Pairs) else value.items()
        return Pairs((name, copied(each)) for name, each in items)
    return [copied(each) for each in value] if isinstance(value, list | tuple) else value


def odd_value(random: Random) -> Any:
    if random.random() < 0.1:
        return deep(random)
    return copied(random.choice(ODD_VALUES))


def deep(random: Random) -> Raw:
    """Nested lists or objects, closed or not."""
    depth = random.choice(DEPTHS)
    opened, closed = random.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"image":', b"}]")))
    return Raw(opened * depth + b"1" + closed * random.choice((depth, depth, depth - 1, 0)))


def _holders(value: Any) -> list[Any]:
    """Every list and object of the document that holds something."""
    if not isinstance(value, list):
        return []
    inner = [each[1] for each in value] if isinstance(value, Pairs) else value
    return ([value] if value else []) + [holder for each in inner for holder in _holders(each)]


def replace_value(random: Random, document: Any) -> Any:
    if not (holders := _holders(document)):
        return odd_value(random)
    holder = random.choice(holders)
    place = random.randrange(len(holder))
    holder[place] = (holder[place][0], odd_value(random)) if isinstance(holder, Pairs) else odd_value(random)
    return document


def set_field(random: Random, document: Any) -> Any:
    """A known field with an odd value; in half of the cases beside the same field."""
    if not isinstance(document, Pairs):
        return document
    name = random.choice(NAMES)
    if random.random() < 0.5:
        document[:] = [pair for pair in document if pair[0] != name]
    document.insert(random.randrange(len(document) + 1), (name, odd_value(random)))
    return document


def drop(random: Random, document: Any) -> Any:
    if holders := _holders(document):
        holder = random.choice(holders)
        del holder[random.randrange(len(holder))]
    return document


def repeat(random: Random, document: Any) -> Any:
    if holders := _holders(document):
        holder = random.choice(holders)
        place = random.randrange(len(holder))
        most = MAX_REPEATED_BYTES // (len(written(holder[place])) + 1) + 1
        holder[place:place] = [holder[place]] * min(most, random.choice((1, 2, 65, 3000)))
    return document


def rename(random: Random, document: Any) -> Any:
    objects = [holder for holder in _holders(document) if isinstance(holder, Pairs)]
    if objects:
        holder = random.choice(objects)
        place = random.randrange(len(holder))
        holder[place] = (random.choice((*UNKNOWN, *NAMES, 1, None)), holder[place][1])
    return document


def add_unknown(random: Random, document: Any) -> Any:
    if isinstance(document, Pairs):
        name = random.choice(UNKNOWN)
        for number in range(min(random.choice((1, 2, 100, 5000)), MAX_REPEATED_BYTES // (len(name) + 1))):
            document.append((name + str(number), odd_value(random) if number < 3 else 0))
    return document


def wrap(random: Random, document: Any) -> Any:
    return random.choice((lambda: [document], lambda: Pairs([("request", document)]), lambda: written(document).decode(
        "utf-8", "replace"), lambda: [document] * 3, lambda: odd_value(random)))()  # fmt: skip


OF_DOCUMENT: Sequence[Mutation] = (
    *(replace_value, replace_value, replace_value, set_field, set_field, set_field),
    *(drop, repeat, rename, add_unknown, wrap),
)


def flip_bits(random: Random, text: bytes) -> bytes:
    changed = np.frombuffer(text, np.uint8).copy()
    for _ in range(random.choice((1, 1, 4, 16)) if len(text) else 0):
        changed[random.randrange(min(len(text), 2000))] ^= 1 << random.randrange(8)
    return changed.tobytes()


def cut(random: Random, text: bytes) -> bytes:
    return text[: random.randrange(len(text) + 1)]


def insert(random: Random, text: bytes) -> bytes:
    pieces = (
        b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud83d", b"/*c*/", b"//c\n", b"\0", b"\xff",
        b"\r\n",
        b"\xef\xbb\xbf", b"'", b"null", b" " * 3000, b"\t\x0b", random.randbytes(8),
    )  # fmt: skip
    place = random.randrange(len(text) + 1)
    return text[:place] + random.choice(pieces) + text[place:]


def encode_otherwise(random: Random, text: bytes) -> bytes:
    name = random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "cp037"))
    return text.decode("utf-8", "replace").encode(name, "replace")


def surround(random: Random, text: bytes) -> bytes:
    before, after = random.choice((
        (b"", text), (b"\xef\xbb\xbf" * 2, b""), (b"", b"\0"), (b"\n" * 5000, b""), (b"", b"}"), (b"", b"," + text),
        (b")]}',\n", b""), (b"callback(", b")"), (b"question=", b"&image=1"), (b"\x1f\x8b", b""), (b"\x89PNG", b""),
    ))  # fmt: skip
    return before + text + after


OF_TEXT: Sequence[Callable[[Random, bytes], bytes]] = (flip_bits, cut, insert, insert, encode_otherwise, surround)


def mutated(random: Random, document: Any) -> tuple[bytes, list[str]]:
    """The text of a mutated document, and the mutations' names."""
    document, done = copied(document), []
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        mutation = random.choice(OF_DOCUMENT)
        document = mutation(random, document)
        done.append(mutation.__name__)
    text = written(document)
    if random.random() < 0.25 or not done:
        change = random.choice(OF_TEXT)
        text = change(random, text)
        done.append(change.__name__)
    return text, done
