"""What answers need, and what a vocabulary such as FlanT5's cannot spell."""

import pytest

from service.core.guide import Guide, guide_of
from service.text.spelling import Spelling, needed

NO_BRACES = [*(chr(byte).encode() for byte in range(32, 127) if chr(byte) not in "{}<\\"), "né".encode(), b""]
BYTES = [bytes([byte]) for byte in range(256)]


def guide(choices=None, regex=None, json_schema=None) -> Guide:
    found = guide_of(choices, regex, json_schema)
    assert found is not None
    return found


def test_what_no_token_has_is_lacking():
    spelling = Spelling.of(NO_BRACES)
    assert spelling.lacks(set('a{é\nü"')) == ["\n", "{", "ü"]
    assert spelling.lacks({"n", "é"}) == []


def test_bytes_spell_everything():
    assert Spelling.of(BYTES).lacks(set("a{é\n中")) == []
    assert Spelling.of([each for each in BYTES if each != b"\xe4"]).lacks({"中", "é"}) == ["中"]


@pytest.mark.parametrize(
    ("wanted", "lacking"),
    [
        (guide(choices=["yes", "no.", "a|b"]), []),
        (guide(choices=["yes", "<no>"]), ["<"]),
        (guide(choices=["a\\b"]), ["\\"]),
        (guide(choices=["a\nb"]), ["\n"]),
        (guide(regex=r"\{.{2}\}"), []),
        (guide(json_schema={"type": "integer"}), []),
        (guide(json_schema={"type": "array", "items": {"enum": ["red", 1]}}), []),
        (guide(json_schema={"type": "object"}), ["{", "}"]),
        (guide(json_schema={"properties": {"a": {}}}), ["{", "}"]),
        (guide(json_schema={"type": "array", "items": {"type": "object"}}), ["{", "}"]),
        (guide(json_schema={"enum": ["red", "<blue>"]}), ["<"]),
        (guide(json_schema={"const": "a\nb"}), ["\\"]),
        (guide(json_schema={}), []),
    ],
)
def test_the_characters_that_a_guide_needs_are_known(wanted, lacking):
    assert Spelling.of(NO_BRACES).lacks(needed(wanted)) == lacking
