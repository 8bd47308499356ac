"""Mutated bodies: each one is made again from its seed and number, and they reach every parser."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest

from benchmarks.fuzz import bodies, texts
from benchmarks.fuzz.texts import Pairs, Raw

IDS = ["img_" + "0" * 32]


def test_a_document_is_written_as_json_writes_it():
    document = {"a": [1, None, True, "é\n"], "b": {"c": 0.5}}
    assert json.loads(texts.written(texts.copied(document))) == document
    assert texts.written(Pairs([("a", 1), ("a", Raw(b"NaN"))])) == b'{"a":1,"a":NaN}'


@pytest.mark.parametrize("mutation", tuple(dict.fromkeys(texts.OF_DOCUMENT)), ids=lambda mutation: mutation.__name__)
def test_a_mutation_of_a_document_takes_any_document(mutation):
    for document in ({"image": "a", "turns": [{"question": "b"}]}, [], {}, None, 1, "text", [[[]]]):
        for seed in range(20):
            assert isinstance(texts.written(mutation(Random(seed), texts.copied(document))), bytes)


@pytest.mark.parametrize("mutation", tuple(dict.fromkeys(texts.OF_TEXT)), ids=lambda mutation: mutation.__name__)
@pytest.mark.parametrize("text", [b"", b"{}", '{"a": "é"}'.encode(), b"\xff\xfe"])
def test_a_mutation_of_text_takes_any_bytes(mutation, text):
    for seed in range(20):
        assert isinstance(mutation(Random(seed), text), bytes)


def test_a_mutation_leaves_the_values_that_all_start_from():
    before = repr(texts.ODD_VALUES)
    for number in range(100):
        bodies.mutant(3, number, IDS)
    assert repr(texts.ODD_VALUES) == before


def test_repeating_something_large_stays_small():
    for seed in range(50):
        large = Pairs([("image", "a" * 400_000), ("question", "what?")])
        assert len(texts.written(texts.repeat(Random(seed), large))) < 2_000_000


def test_a_number_and_a_seed_make_the_same_body_again():
    made = [bodies.mutant(7, number, IDS) for number in range(50)]
    assert made == [bodies.mutant(7, number, IDS) for number in range(50)]
    assert max(len(bodies.mutant(7, number, IDS).request) for number in range(100)) < bodies.MAX_BYTES * 1.1


def test_forms_json_encodings_and_heads_are_all_reached():
    found = Counter()
    for number in range(600):
        found.update(bodies.mutant(1, number, IDS).done)
    names = {each.__name__ for each in (*texts.OF_DOCUMENT, *texts.OF_TEXT, *bodies.ODD_HEADS)}
    assert {"JSON", "form", "encoded", "odd_part", *names} <= set(found)


def test_a_form_holds_the_fields_of_the_document():
    parts = bodies.form_parts({"image": IDS[0], "question": "what?", "stop": [".", "!"], "budget": {"a": 1}})
    names = [head.split(b'"')[1] for head, _ in parts]
    assert names == [b"image", b"question", b"stop", b"stop", b"budget"]
    assert [content for _, content in parts] == [IDS[0].encode(), b"what?", b".", b"!", b'{"a":1}']


def test_a_whole_message_has_a_length_or_chunks():
    for number in range(200):
        made = bodies.mutant(2, number, IDS)
        if made.is_whole:
            head, body = made.request.split(b"\r\n\r\n", 1)
            assert b"content-length: %d" % len(body) in head or b"transfer-encoding: chunked" in head
