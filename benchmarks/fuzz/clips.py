"""Mutated clips and documents of several pages. Number and seed determine each one."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping
from random import Random

from benchmarks.bench.load import form
from benchmarks.fuzz.films import clips, documents
from benchmarks.fuzz.images import MAX_BYTES, MUTATIONS, QUESTION
from benchmarks.fuzz.parts import mended, parts_of
from benchmarks.fuzz.sending import Mutant, request

NUMBERS = (0, 1, 2, 7, 255, 256, 4096, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
MOST_FRAMES, LAST_PAGE = 8, 9


def splice_films(random: Random, data: bytes) -> bytes:
    """The first parts of one file and the last of another."""
    ours, theirs = parts_of(data), parts_of(_file(random))
    return b"".join([*ours[: random.randrange(len(ours) + 1)], *theirs[random.randrange(len(theirs)) :]])


def insert_part_of_film(random: Random, data: bytes) -> bytes:
    parts = parts_of(data)
    parts.insert(random.randrange(len(parts) + 1), random.choice(parts_of(_file(random))))
    return b"".join(parts)


def set_number(random: Random, data: bytes) -> bytes:
    """A field of four bytes in one part: sizes, counts, times and offsets are such."""
    parts = parts_of(data)
    chosen = random.randrange(len(parts))
    changed = bytearray(parts[chosen])
    for _ in range(random.choice((1, 1, 2, 4))):
        if len(changed) >= 4:
            at = random.randrange(0, min(len(changed) - 3, 256))
            struct.pack_into(random.choice((">I", "<I")), changed, at, random.choice(NUMBERS))
    parts[chosen] = bytes(changed)
    return b"".join(parts)


OF_FILMS = (splice_films, insert_part_of_film, set_number, set_number, set_number)


def _file(random: Random) -> bytes:
    return random.choice([*clips().values(), *documents().values()])


def mutated(random: Random, files: Mapping[str, bytes]) -> tuple[bytes, tuple[str, ...]]:
    """One of the files after some mutations, and the names of the file and of its mutations."""
    name = random.choice(list(files))
    data, done = files[name], [name]
    for _ in range(random.choice((1, 1, 2, 3))):
        mutation = random.choice(OF_FILMS if data and random.random() < 0.4 else MUTATIONS)
        data = mutation(random, data)[:MAX_BYTES]
        done.append(mutation.__name__)
    return mended(data), tuple(done)


def clip(seed: int, number: int) -> tuple[bytes, tuple[str, ...]]:
    """A mutated clip, and what was done to it."""
    return mutated(Random(f"clip {seed} {number}"), clips())


def mutant(seed: int, number: int) -> Mutant:
    """A clip in a question; every fifth is a document, of which a page is asked about."""
    random = Random(f"request {seed} {number}")
    if number % 5 == 0:
        data, done = mutated(Random(f"document {seed} {number}"), documents())
        fields, name = {"page": random.randrange(1, LAST_PAGE + 1)}, "image"
    else:
        data, done = clip(seed, number)
        fields, name = {"video_frames": random.randrange(1, MOST_FRAMES + 1)}, "video"
        if random.random() < 0.3:
            fields |= {"video_sampling": "change"}
    asked = {"question": QUESTION, "max_tokens": 1} | fields
    if random.random() < 0.2:
        body = json.dumps(asked | {name: base64.b64encode(data).decode()}).encode()
        return Mutant(request("/v1/vqa", body, "application/json"), done)
    return Mutant(request("/v1/vqa", *form(asked, [data], name)), done)
