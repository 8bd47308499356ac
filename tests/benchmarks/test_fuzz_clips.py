"""Mutated clips and documents: each one is made again from its seed and number, and they reach every decoder."""

from __future__ import annotations

import os
from collections import Counter
from random import Random

import pytest

from benchmarks.fuzz import clips
from benchmarks.fuzz.films import ANIMATIONS, CODECS, DOCUMENTS, FRAMES, documents
from benchmarks.fuzz.films import clips as films
from benchmarks.fuzz.images import MUTATIONS
from benchmarks.fuzz.parts import format_of, parts_of
from service.core.errors import InvalidImage, TooLarge
from service.media.clip import decode_clip
from service.media.decoder import ImageLimits
from service.media.document import decode_page

pytestmark = pytest.mark.slow  # together: video is encoded

LIMITS = ImageLimits()


@pytest.mark.parametrize("name", [*CODECS, *ANIMATIONS])
def test_every_clip_to_start_from_is_decoded(name):
    assert len(decode_clip(films()[name], LIMITS, FRAMES).frames) == FRAMES


def test_no_encoder_leaves_this_thread_a_real_time_one():
    clips_again = films.__wrapped__()
    assert clips_again.keys() == films().keys()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_page_of_a_document_to_start_from_is_drawn(name):
    assert decode_page(documents()[name], LIMITS, (224,), None, FRAMES).pages == FRAMES


@pytest.mark.parametrize("name", [*CODECS, *ANIMATIONS, *DOCUMENTS])
def test_the_parts_joined_are_the_file(name):
    data = {**films(), **documents()}[name]
    assert b"".join(parts_of(data)) == data
    assert name.startswith(format_of(data))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MP4 H.264", [b"ftyp", b"mdat", b"moov", b"mvhd", b"trak", b"tkhd", b"mdia", b"mdhd", b"stsd", b"stts"]),
        ("MP4 fragmented", [b"moov", b"mvex", b"moof", b"traf", b"tfhd", b"trun", b"mdat"]),
    ],
)
def test_parts_of_an_mp4_are_its_boxes(name, expected):
    found = [part[4:8] for part in parts_of(films()[name])]
    assert [kind for kind in found if kind in expected][: len(expected)] == expected


def test_parts_of_a_webm_are_its_elements():
    found = [part[:4].hex() for part in parts_of(films()["EBML VP8"])]
    assert found[:2] == ["1a45dfa3", "18538067"]  # its header and its segment
    assert "1654ae6b" in found  # the tracks
    assert sum(each.startswith("a3") for each in found) == FRAMES  # a block each


@pytest.mark.parametrize(
    "mutation", [*dict.fromkeys(MUTATIONS), *dict.fromkeys(clips.OF_FILMS)], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("data", [b"", b"\0\0\0\x08ftyp", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\x01", b"%PDF"])
def test_a_mutation_takes_any_bytes(mutation, data):
    for seed in range(20):
        assert isinstance(mutation(Random(seed), data), bytes)


def test_a_seed_and_a_number_make_the_same_request_again():
    assert clips.mutant(3, 41) == clips.mutant(3, 41)
    assert clips.mutant(3, 41).request != clips.mutant(4, 41).request


def test_mutated_clips_reach_every_decoder():
    decoded: Counter[str] = Counter()
    refused = 0
    for number in range(400):
        data, done = clips.clip(5, number)
        try:
            decode_clip(data, LIMITS, 4)
        except (InvalidImage, TooLarge):
            refused += 1
        else:
            decoded[done[0]] += 1
    assert decoded.keys() == films().keys()
    assert refused > 100
