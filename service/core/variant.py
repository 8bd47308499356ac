"""Name the variants: one variant is one named set of models, with the Tritons that serve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

DEFAULT = "default"  # the name of the only variant of a service without variants, in metrics and logs
MOST_WEIGHT = 1_000_000
LABEL = "[A-Za-z0-9_-]{1,63}"  # of a host's name, as a pattern: no resolver takes an empty or a longer one
HOST_NAME = rf"{LABEL}(\.{LABEL})*\.?"


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


@dataclass(frozen=True, slots=True)
class VariantState:
    """Describe a variant to an administrator: what the store says of it, and what one gateway knows of it."""

    name: str
    weight: float
    share: float  # of the questions that name no variant, 0 to 1
    is_draining: bool
    model: str = ""  # its card's name; empty if this gateway has not read its models yet
    tritons: int = 0  # whose addresses this gateway knows
    tritons_out: int = 0  # that get no requests of this gateway
    in_flight: int = 0  # questions that it answers in this gateway


@dataclass(frozen=True, slots=True)
class VariantsChange:
    """Say what an administrator changes. Variants that it does not name stay as they are."""

    weights: Mapping[str, float] = field(default_factory=dict)
    draining: Mapping[str, bool] = field(default_factory=dict)


class VariantControl(Protocol):
    """Show the variants to an administrator, and change them for all gateways."""

    @property
    def sticky(self) -> str:
        """What stays with a variant: `session` or `tenant`."""
        ...

    def states(self) -> Sequence[VariantState]:
        """Return the variants as this gateway uses them."""
        ...

    async def change(self, change: VariantsChange, *, tenant: str, key: str, request_id: str) -> Sequence[VariantState]:
        """Make all of a change in the store, or nothing of it -> the variants as they are there. The log says whose
        change it was.

        Raises NotFound for an unknown name, InvalidRequest if no variant would get questions, Unavailable.
        """
        ...
