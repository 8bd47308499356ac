"""Find the characters that an answer needs and a vocabulary cannot spell. FlanT5's, for example, has no { and no }."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from service.core.guide import Guide, schemas_in

_ESCAPES = re.compile(r"\\(.)|\|", re.DOTALL)  # of a guide that was made of choices
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True, slots=True)
class Spelling:
    """Know what the tokens of a vocabulary spell."""

    characters: frozenset[str]  # in any token
    single: frozenset[int]  # bytes that are tokens of their own

    @classmethod
    def of(cls, spelled: Sequence[bytes]) -> Self:
        """`spelled` are the tokens' bytes; a token without bytes never comes."""
        text = "".join(each.decode(errors="ignore") for each in spelled)
        return cls(frozenset(text), frozenset(each[0] for each in spelled if len(each) == 1))

    def lacks(self, characters: set[str]) -> list[str]:
        """Return those of the characters that no answer can have."""
        return sorted(each for each in characters - self.characters if not self.single.issuperset(each.encode()))


def needed(guide: Guide) -> set[str]:
    """Return the characters of all choices, or of a schema's objects, lists, strings and fixed texts.

    A regular expression has none: `Guides` leaves out what cannot be spelled.
    """
    if guide.kind == "json_schema":
        schema = json.loads(guide.text)
        return {character for node in schemas_in(schema) for text in _texts(node) for character in text}
    return set(_ESCAPES.sub(_unescaped, guide.text)) if guide.field == "choices" else set()


def _unescaped(found: re.Match[str]) -> str:
    return _ESCAPED.get(found[1], found[1] or "")


def _texts(node: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts that answers of one schema have."""
    brackets = {"object": "{}", "array": "[]", "string": '""'}
    kind, properties = node.get("type"), node.get("properties")
    if isinstance(kind, str):
        yield brackets.get(kind, "")
    if isinstance(properties, dict) and properties:
        yield brackets["object"]
        yield from (json.dumps(name, ensure_ascii=False) for name in properties)
    if "const" in node:
        yield json.dumps(node["const"], ensure_ascii=False)
    if isinstance(values := node.get("enum"), list):
        yield from (json.dumps(value, ensure_ascii=False) for value in values)
