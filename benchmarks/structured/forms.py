"""Draw random forms of bounded size, each with the check of a finished answer."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema_rs

from service.core.guide import Guide, guide_of

Fits = Callable[[str], bool]

WORDS = (
    "red",
    "blue ring",
    "Straße",
    "日本",
    'say "x"',
    "a/b\\c",
    "1.5",
    "x|y",
    "line\nbreak",
    "",
    "tab\t",
    "{}",
    "$&~#",
)
ATOMS = ("a", "[a-f]", "[^x]", "[0-9]", "[A-Za-z_]", r"\.", "/", "é", "(red|green|blue)", "(?:[0-9A-F]{2})", "(?:ab)")
MOST_DEPTH = 3
MOST_FLOAT = 1e300


def drawn(random: random.Random) -> tuple[Guide, Fits]:
    """Draw choices, a regular expression or a schema."""
    kind = random.choices(("choices", "regex", "json_schema"), (1, 2, 4))[0]
    if kind == "choices":
        choices = [f"{word.strip() or 'none'}{number}" for number, word in enumerate(random.choices(WORDS, k=5))]
        return _guide(choices=choices), choices.__contains__
    if kind == "regex":
        regex = expression(random)
        return _guide(regex=regex), lambda answer: re.fullmatch(regex, answer) is not None
    drawn = schema(random)
    validator = jsonschema_rs.validator_for(drawn)
    return _guide(json_schema=drawn), lambda answer: validator.is_valid(json.loads(answer, parse_float=_in_range))


def expression(random: random.Random) -> str:
    """Draw a regular expression that Rust and Python read alike, and whose matches do not begin with white space."""

    def term() -> str:
        least = random.randrange(4)
        return random.choice(ATOMS) + random.choice(
            ("", "", "?", "+", "*", f"{{{least}}}", f"{{{least},{least + random.randrange(5)}}}")
        )

    branches = ["".join(term() for _ in range(random.randint(1, 5))) for _ in range(random.randint(1, 3))]
    return f"[A-Z]({'|'.join(branches)})"


def schema(random: random.Random, depth: int = 0) -> dict[str, Any]:  # noqa: PLR0911
    """Draw a JSON schema of the kinds that products use."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    if depth < MOST_DEPTH:
        kinds += ["object"] * 4 + ["array"] * 3 + ["anyOf"]
    match random.choice(kinds) if depth else random.choice(("object", "array", "anyOf")):
        case "object":
            names = random.sample([*WORDS, "count", "where", "colour"], random.randint(0, 5))
            return {
                "type": "object",
                "properties": {name: schema(random, depth + 1) for name in names},
                "required": [name for name in names if random.random() < 0.7],
                "additionalProperties": random.random() < 0.1,
            }
        case "array":
            least = random.randrange(3)
            bounds = {"minItems": least, "maxItems": least + random.randrange(4)}
            return {"type": "array", "items": schema(random, depth + 1)} | bounds
        case "anyOf":
            return {"anyOf": [schema(random, depth + 1) for _ in range(random.randint(1, 3))]}
        case "enum":
            return {"enum": [*random.sample(WORDS, 3), 1, None, True]}
        case "const":
            return {"const": random.choice([*WORDS, 3, False, [1, "x"]])}
        case "pattern":
            return {"type": "string", "pattern": f"^{expression(random)}$"}
        case "string":
            return {"type": "string"} | random.choice(({}, {"maxLength": 5}, {"minLength": 2, "maxLength": 9}))
        case "integer" | "number" as kind:
            low = random.randrange(-50, 50)
            return {"type": kind} | random.choice(({}, {"minimum": low}, {"minimum": low, "maximum": low + 100}))
        case kind:
            return {"type": kind}


def _in_range(number: str) -> float:
    """Read a number of JSON; one beyond float64, such as 1e999, is JSON too, but the validator does not take it."""
    return max(-MOST_FLOAT, min(float(number), MOST_FLOAT))


def _guide(**form: Any) -> Guide:
    guide = guide_of(**{"choices": None, "regex": None, "json_schema": None} | form)
    assert guide is not None
    return guide
