"""Say which variants there are, and which of them a caller gets.

    {"sticky": "session", "variants": {
        "stable": {"models": "/models/7", "tritons": ["triton-a:8001", "triton-b:8001"], "weight": 95},
        "next": {"models": "/models/8", "vision": ["vision-8:8001"], "llm": ["llm-8:8001"], "weight": 5}}}

Every gateway assigns a key to the same variant, because the assignment depends on the key and the weights only. If a
weight changes, only as many keys move as must (weighted rendezvous hashing).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import orjson

from service.core.precision import PRECISIONS, Precision
from service.core.variant import HOST_NAME, MOST_WEIGHT

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
ADDRESS = re.compile(rf"unix:.+|(\[[0-9A-Fa-f:.]+\]|{HOST_NAME}):[0-9]{{1,5}}")
EVERY = "glimpse"  # as a model's name: the weights decide
FIELDS = frozenset({"models", "tritons", "vision", "llm", "precision", "weight", "draining"})

Sticky = Literal["session", "tenant"]


class VariantsError(ValueError):
    """The variants are wrong or cannot be read; the message says why and what to do."""


class UnknownVariant(VariantsError):
    """No variant has this name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"there is no variant {name[:64]!r}: {words(known)}")
        self.name = name


class NoVariantLeft(VariantsError):
    """A change would leave no variant that gets questions, or none that has a weight and does not drain."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One named set of models."""

    name: str
    models: str  # folder of the model repository, for its card and tokenizers
    vision: tuple[str, ...]  # addresses of gRPC; a name may stand for several Tritons
    llm: tuple[str, ...]
    weight: float = 0.0  # 0: only callers that name it get it, unless no variant has a weight
    is_draining: bool = False  # gets no new questions
    precision: Precision | None = None  # in which its Tritons compute; None: as the models were built

    @property
    def serves(self) -> tuple[str, tuple[str, ...], tuple[str, ...], Precision | None]:
        """What needs new connections if it changes."""
        return self.models, self.vision, self.llm, self.precision

    @classmethod
    def parse(cls, name: str, told: Any) -> Self:
        """Raises VariantsError."""
        if not NAME.fullmatch(name) or name == EVERY:
            raise VariantsError(
                f"{name[:64]!r} is not a valid name of a variant: write 1 to 63 small letters, digits and . _ -, and "
                f"not {EVERY}"
            )
        if not isinstance(told, dict) or not told.keys() <= FIELDS:
            raise VariantsError(
                f"the variant {name} must be an object with these fields only: {', '.join(sorted(FIELDS))}"
            )
        weight = parsed_weight(name, told.get("weight", 0))
        if not isinstance(told.get("models"), str) or not told["models"]:
            raise VariantsError(f"the variant {name} has no models: name the folder of its model repository")
        both = addresses(name, "tritons", told.get("tritons", []))
        vision, llm = (addresses(name, pool, told.get(pool, [])) or both for pool in ("vision", "llm"))
        if not vision or not llm:
            raise VariantsError(f"the variant {name} has no Tritons: set tritons, or vision and llm")
        if not isinstance(told.get("draining", False), bool):
            raise VariantsError(f"draining of {name} must be true or false")
        if (precision := told.get("precision")) is not None and precision not in PRECISIONS:
            raise VariantsError(f"precision of {name} must be one of {', '.join(PRECISIONS)}, or left out")
        return cls(name, told["models"], vision, llm, weight, bool(told.get("draining", False)), precision)

    def told(self) -> dict[str, Any]:
        """Return the fields as `parse` takes them."""
        pools = {"tritons": self.vision} if self.vision == self.llm else {"vision": self.vision, "llm": self.llm}
        weight = int(self.weight) if float(self.weight).is_integer() else self.weight
        told = {"models": self.models, **pools, "weight": weight}
        told |= {"precision": self.precision} if self.precision else {}
        return told | ({"draining": True} if self.is_draining else {})


@dataclass(frozen=True, slots=True)
class Variants:
    """All variants, by their names."""

    variants: Mapping[str, Variant] = field(default_factory=dict)
    sticky: Sticky = "session"  # what stays with a variant: a session, or all questions of a tenant

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Raises VariantsError."""
        try:
            told = orjson.loads(text)
        except orjson.JSONDecodeError as exc:
            raise VariantsError(f"not JSON ({exc})") from exc
        if not isinstance(told, dict) or not told.keys() <= {"sticky", "variants"}:
            raise VariantsError('write an object with "variants" and, if you like, "sticky"')
        variants, sticky = told.get("variants", {}), told.get("sticky", "session")
        if sticky not in ("session", "tenant"):
            raise VariantsError('sticky must be "session" or "tenant"')
        if not isinstance(variants, dict):
            raise VariantsError("variants must be an object: the name of each variant, and its fields")
        return cls({name: Variant.parse(name, each) for name, each in variants.items()}, sticky)

    def to_json(self) -> bytes:
        told = {"sticky": self.sticky, "variants": {name: each.told() for name, each in self.variants.items()}}
        return orjson.dumps(told, option=orjson.OPT_INDENT_2) + b"\n"

    def added(self, variant: Variant) -> Self:
        """Add a variant, or replace the one of this name."""
        return replace(self, variants={**self.variants, variant.name: variant})

    def weighted(self, weights: Mapping[str, float]) -> Self:
        """Set these weights; the other variants keep theirs. Raises VariantsError."""
        changed = {
            name: replace(self.named(name), weight=parsed_weight(name, weight)) for name, weight in weights.items()
        }
        return replace(self, variants={**self.variants, **changed})

    def drained(self, name: str, *, draining: bool = True) -> Self:
        """Raises VariantsError."""
        return self.added(replace(self.named(name), is_draining=draining))

    def changed(self, weights: Mapping[str, float], draining: Mapping[str, bool]) -> Self:
        """Set weights, and which variants drain. Raises UnknownVariant, NoVariantLeft, VariantsError.

        Without any weight all variants that do not drain get questions. So weights that take the last one away were
        hardly meant.
        """
        before = self
        for name, drains in draining.items():
            before = before.drained(name, draining=drains)
        after = before.weighted(weights)
        drained = [each for each in after.variants.values() if each.is_draining]
        if len(drained) == len(after.variants):
            kept = next((each.name for each in drained if each.name not in draining), next(iter(draining), "NAME"))
            raise NoVariantLeft(f"no variant would get questions, because all of them drain: {undrain(kept)}")
        if before.weighing and not after.weighing:
            least = next(each.name for each in after.variants.values() if not each.is_draining)
            back = next((f", or {undrain(each.name)}" for each in drained if each.weight > 0), "")
            raise NoVariantLeft(
                "no variant that does not drain would have a weight: leave one of them a weight above 0, such as "
                f"{least}=100{back}"
            )
        return after

    @property
    def weighing(self) -> Mapping[str, float]:
        """Return the weights above 0 of variants that do not drain."""
        return {each.name: each.weight for each in self.variants.values() if each.weight > 0 and not each.is_draining}

    @property
    def shares(self) -> Mapping[str, float]:
        """Return what part of the questions each variant gets, 0 to 1, if all of them answer."""
        weights = self.weighing or {each.name: 1.0 for each in self.variants.values() if not each.is_draining}
        total = sum(weights.values())
        return {name: weights.get(name, 0.0) / total if total else 0.0 for name in self.variants}

    def without(self, name: str) -> Self:
        """Remove a variant. Raises UnknownVariant, or NoVariantLeft if only this one gets questions."""
        gone = self.named(name)
        after = replace(self, variants={other: each for other, each in self.variants.items() if each is not gone})
        if self.takes_last_share(after):
            other = next(iter(after.variants), "NAME")
            raise NoVariantLeft(
                f"only {name} gets questions: give another variant a weight before you remove it "
                f"(`glimpse variants weights {other}=100`)"
            )
        return after

    def replaced(self, variant: Variant) -> Self:
        """Add a variant, or replace the one of this name. Raises NoVariantLeft if it takes the last weight away."""
        after = self.added(variant)
        if self.takes_last_share(after):
            raise NoVariantLeft(
                f"only {variant.name} gets questions, and it would have no weight: keep one above 0, such as "
                "`--weight 100`"
            )
        return after

    def takes_last_share(self, after: Variants) -> bool:
        """Return whether nobody would get questions, or nobody by weight, though somebody does now."""
        return (any(self.shares.values()) and not any(after.shares.values())) or bool(
            self.weighing and not after.weighing
        )

    def named(self, name: str) -> Variant:
        """Raises VariantsError."""
        if name not in self.variants:
            raise UnknownVariant(name, self.variants)
        return self.variants[name]


def parsed_weight(name: str, told: object) -> float:
    """Raises VariantsError."""
    if isinstance(told, bool) or not isinstance(told, int | float) or not 0 <= told <= MOST_WEIGHT:
        raise VariantsError(f"the weight of {name} must be a number from 0 to {MOST_WEIGHT:,}")
    return float(told)


def undrain(name: str) -> str:
    return f"let {name} get questions again (`glimpse variants drain {name} --undo`)"


def words(names: Iterable[str]) -> str:
    return f"the variants are {', '.join(names) or 'none'}"


def addresses(name: str, pool: str, told: Any) -> tuple[str, ...]:
    """Raises VariantsError."""
    if not isinstance(told, list | tuple) or not all(map(is_address, told)):
        raise VariantsError(
            f"{pool} of {name} must be a list of gRPC addresses, HOST:PORT without http:// or unix:/PATH: {told!r:.100}"
        )
    return tuple(dict.fromkeys(told))


def is_address(told: object) -> bool:
    if not isinstance(told, str) or not ADDRESS.fullmatch(told):
        return False
    return told.startswith("unix:") or 1 <= int(told.rpartition(":")[2]) <= 65535


def assigned(key: str, weights: Sequence[tuple[str, float]]) -> str:
    """Return the name that this key belongs to. `weights` are not empty; without any weight, all names are equal."""
    some = [(name, weight) for name, weight in weights if weight > 0] or [(name, 1.0) for name, _ in weights]
    return max(some, key=lambda each: (each[1] / -math.log(_chance(key, each[0])), each[0]))[0]


def _chance(key: str, name: str) -> float:
    """Return a number that is as good as random, above 0 and below 1."""
    digest = hashlib.blake2b(f"{name}\0{key}".encode(), digest_size=7).digest()
    return (int.from_bytes(digest) + 0.5) / 2**56
