"""Name the variants: one variant is one named set of models, with the Tritons that serve it."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT = "default"  # the name of the only variant of a service without variants, in metrics and logs


@dataclass(frozen=True, slots=True)
class Route:
    """Say what a caller asks for: a variant by its name, a model by its name, and the session that stays with one."""

    variant: str = ""  # empty: the weights decide
    model: str = ""  # empty: any
    session: str = ""  # empty: the first image's id stands for it


ANY = Route()


@dataclass(frozen=True, slots=True)
class Served:
    """Say which variant answers a request."""

    variant: str
    model: str  # its card's name
    fingerprint: str  # of its weights up to the visual tokens
    fallback_from: str = ""  # the variant that would have answered, if it had not failed
    is_named: bool = True  # False without variants: answers then do not speak of one
