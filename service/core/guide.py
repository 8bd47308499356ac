"""Define constrained output (structured output, constrained decoding): one of some texts, a regular expression, or JSON
of a schema.

The bounds here keep a guide's compilation small. Whether it can be compiled is for `service.text.guides`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from service.core.errors import InvalidRequest

GUIDE = "guided_decoding_guide"  # the LLM's tensor with the constraint, which its errors begin with

MAX_CHOICES = 256
MAX_CHOICE_CHARS = 256
MAX_REGEX_CHARS = 2048
MAX_SCHEMA_BYTES = 16 * 1024  # as compact JSON
MAX_DEPTH = 60  # of lists and objects in a schema
MAX_COUNT = 256  # of a repetition in a regular expression, and of items and properties in a schema
MAX_TOTAL_COUNT = 1024  # of all those together
MAX_LENGTH = 4096  # of a string in a schema
MAX_MULTIPLE = 1000  # of all multipleOf of a schema, multiplied

MAX_GUIDE_BYTES = 4 * MAX_CHOICES * (2 * MAX_CHOICE_CHARS + 1)  # of any: choices, with all characters escaped

_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&~\-\s]")  # ASCII and white space that has a meaning in some dialect
_CHOICES = re.compile(r"(?:[^\\.+*?()\[\]{}^$#&~\-\t\n\r\v\f]|\\[^a-zA-Z0-9]|\\[nrt])*")  # what `_regex_of` writes
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties")
_LENGTHS = ("minLength", "maxLength")
_VALUES = ("enum", "const", "default", "examples")  # of a schema, they hold values in place of schemas


@dataclass(frozen=True, slots=True)
class Guide:
    """The constraint on an answer, in TensorRT-LLM's words for guided decoding."""

    kind: Literal["json_schema", "regex"]
    text: str  # the schema as JSON, or the regular expression
    field: str = field(default="", compare=False)  # the request's field, for errors


def guide_of(choices: Sequence[str] | None, regex: str | None, json_schema: Mapping[str, Any] | None) -> Guide | None:
    """Make the guide of a request; None without a constraint. Raises InvalidRequest for one that is out of bounds."""
    given = {"choices": choices, "regex": regex, "json_schema": json_schema}
    first, *more = [name for name, value in given.items() if value is not None] or [""]
    if more:
        raise InvalidRequest(f"{first} and {more[0]} are both given: leave one out", param=more[0])
    if choices is not None:
        return Guide("regex", _regex_of(choices), "choices")
    if regex is not None:
        _require_small_regex(regex, "regex")
        return Guide("regex", regex, "regex")
    if json_schema is not None:
        return Guide("json_schema", _schema_text(json_schema), "json_schema")
    return None


def require_small(guide: Guide) -> None:
    """Check a guide that a client made for the LLM as `guide_of` checks a request's. Raises InvalidRequest.

    A regular expression of choices alone may be as long as those of a request.
    """
    if guide.kind == "json_schema":
        try:
            schema = json.loads(guide.text) if len(guide.text) <= MAX_GUIDE_BYTES else None
        except (ValueError, RecursionError):
            schema = None
        if not isinstance(schema, dict):
            raise InvalidRequest(f"{guide.field} must be a JSON object", param=guide.field)
        _schema_text(schema)
    elif len(guide.text) > MAX_GUIDE_BYTES or not _CHOICES.fullmatch(guide.text):
        _require_small_regex(guide.text, guide.field)


def _regex_of(choices: Sequence[str]) -> str:
    """Write choices as a regular expression that every dialect reads alike."""
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidRequest(f"choices has {len(choices)} texts: send 1 to {MAX_CHOICES}", param="choices")
    for index, choice in enumerate(choices):
        place = f"choices.{index}"
        if not 1 <= len(choice) <= MAX_CHOICE_CHARS:
            text = f"{place} has {len(choice)} characters: send 1 to {MAX_CHOICE_CHARS}"
            raise InvalidRequest(text, param="choices")
        if choice != choice.strip():
            raise InvalidRequest(f"{place} has white space around it: send it without", param="choices")
    return "|".join(_SPECIAL.sub(_escaped, choice) for choice in dict.fromkeys(choices))


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    known = {"\n": r"\n", "\r": r"\r", "\t": r"\t", " ": " "}
    return known.get(character) or ("\\" + character if character.isascii() else character)


def _require_small_regex(regex: str, param: str) -> None:
    if not 1 <= len(regex) <= MAX_REGEX_CHARS:
        raise InvalidRequest(f"{param} has {len(regex)} characters: send 1 to {MAX_REGEX_CHARS}", param=param)
    counts = [int(number) for found in _REPEAT.finditer(regex) for number in found.groups() if number]
    _require_counts(counts, param)


def _require_counts(counts: Sequence[int], param: str) -> None:
    if max(counts, default=0) > MAX_COUNT:
        raise InvalidRequest(f"{param} repeats something {max(counts)} times: repeat at most {MAX_COUNT}", param=param)
    if sum(counts) > MAX_TOTAL_COUNT:
        text = f"the counts of {param} make {sum(counts)} together: lower them to at most {MAX_TOTAL_COUNT}"
        raise InvalidRequest(text, param=param)


def _schema_text(schema: Mapping[str, Any]) -> str:
    _require_shallow(schema)
    text = json.dumps(schema, separators=(",", ":"), ensure_ascii=False)
    nbytes = len(text.encode(errors="replace"))
    if nbytes > MAX_SCHEMA_BYTES:
        raise InvalidRequest(
            f"json_schema has {nbytes:,} bytes: shorten it to at most {MAX_SCHEMA_BYTES:,}", param="json_schema"
        )
    counts: list[int] = []
    multiples = Fraction(1)
    for node in schemas_in(schema):
        counts += [_whole(name, node[name]) for name in _COUNTS if name in node]
        for name in _LENGTHS:
            if name in node and _whole(name, node[name]) > MAX_LENGTH:
                text = f"json_schema has a {name} of {node[name]}: lower it to at most {MAX_LENGTH}"
                raise InvalidRequest(text, param="json_schema")
        if isinstance(pattern := node.get("pattern"), str):
            _require_small_regex(pattern, "json_schema")
        if isinstance(patterns := node.get("patternProperties"), dict):
            for pattern in patterns:
                _require_small_regex(pattern, "json_schema")
        if "multipleOf" in node:
            multiples *= _multiple(node["multipleOf"])
    _require_counts(counts, "json_schema")
    if multiples > MAX_MULTIPLE:
        raise InvalidRequest(
            f"json_schema asks for multiples of large numbers: keep the product of all multipleOf, without decimal "
            f"points, at most {MAX_MULTIPLE}",
            param="json_schema",
        )
    return text


def _require_shallow(schema: object) -> None:
    """Check the depth without recursion, because what serialises it recurses."""
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            text = f"json_schema is nested more than {MAX_DEPTH} levels deep: flatten it"
            raise InvalidRequest(text, param="json_schema")
        level = [child for each in level for child in _children(each) if isinstance(child, dict | list)]


def _children(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def schemas_in(schema: object) -> Iterator[Mapping[str, Any]]:
    """Yield every object of a schema that may be a schema itself."""
    if isinstance(schema, dict):
        yield schema
        for name, child in schema.items():
            if name not in _VALUES:
                yield from schemas_in(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from schemas_in(child)


def _whole(name: str, value: object) -> int:
    """Return a count. A property of that name has a schema in place of a number, and counts as 0."""
    if isinstance(value, dict | bool):
        return 0
    if isinstance(value, int | float) and 0 <= value < float("inf") and value == int(value):
        return int(value)
    raise InvalidRequest(f"json_schema has a {name} that is not a whole number: correct it", param="json_schema")


def _multiple(value: object) -> int:
    """Return a multipleOf without its decimal point: 25 for 0.25."""
    if isinstance(value, dict):  # a property of that name
        return 1
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        exact = Fraction(str(value))
        return exact.numerator if exact.denominator == 1 else int(exact * 10 ** len(str(exact.denominator)))
    raise InvalidRequest("json_schema has a multipleOf that is not a number above 0: correct it", param="json_schema")
