"""Name the tenant and variant that a request's work is charged to: labels of metrics, and a parameter for Triton."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

from service.core.variant import DEFAULT

PAYER = "glimpse_payer"  # the parameter of a request to Triton
# No tenant has one of these names: brackets are not allowed in one.
UNNAMED = "(unnamed)"  # callers without a name
OTHERS = "(others)"  # tenants without a label of their own
SERVICE = "(service)"  # start, probes and idle time, which no tenant caused

# A new series stays at zero so long, because `increase` in PromQL does not see what a series begins with. Longer than
# the interval at which Prometheus asks.
HOLD_S = 20.0


class Payer(NamedTuple):
    """The tenant that pays for a request, by its label, and the variant that answered, by its name."""

    tenant: str
    variant: str

    @classmethod
    def read(cls, text: str) -> Payer:
        """Read what `str` wrote; an empty text is the service itself."""
        tenant, _, variant = text.partition("/")
        return cls(tenant or SERVICE, variant or DEFAULT)

    def __str__(self) -> str:
        return f"{self.tenant}/{self.variant}"


NOBODY = Payer(SERVICE, DEFAULT)

current: ContextVar[Payer] = ContextVar("current payer", default=NOBODY)


def pay_for(variant: str) -> None:
    """Charge later work in this context to the same tenant and another variant."""
    current.set(current.get()._replace(variant=variant))
