"""Count what each tenant and variant takes: requests, tokens, and CPU seconds of the gateway and its decoders.

The models count their own CPU and GPU seconds in the same way and under the same names (triton_models/costs.py), so a
sum over both is what a tenant cost.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from service.core.payer import HOLD_S, NOBODY, OTHERS, UNNAMED, Payer, current
from service.core.variant import DEFAULT

GATEWAY, DECODER = "gateway", "decoder"  # parts, beside the names of the models
# Nominal CPU seconds of the gateway, measured by `python -m benchmarks.gateway_cpu`. Only their proportions matter:
# they share the CPU seconds that the process really took.
REQUEST_S, ENCODED_IMAGE_S, STREAMED_TOKEN_S, WHOLE_TOKEN_S = 2.3e-3, 1.9e-3, 1.7e-4, 1.0e-5
MOST_OF_NOMINAL = (
    10.0  # a slow machine takes so much more; beyond that, the process was busy with something else than these requests
)
HALVED_EVERY_S = 3600.0
PROMOTED_FROM = 10.0  # requests


class TenantLabels:
    """Give the tenants that ask most a label of their own, and the others one together. `now` is monotonic seconds.

    The number of requests decides. It is halved every hour, so that a tenant that has gone makes room.
    """

    def __init__(self, most: int, now: float = 0.0) -> None:
        self._most = most
        self._own: dict[str, float] = {}
        self._waiting: dict[str, float] = {}  # as many again, which may get a label
        self._halved_at = now

    def __contains__(self, label: str) -> bool:
        return label in (OTHERS, NOBODY.tenant) or label in self._own

    def of(self, tenant: str, now: float) -> str:
        """Count one request of the tenant -> its label."""
        self._halve(now)
        label = tenant or UNNAMED
        if label in self._own or len(self._own) < self._most:
            self._own[label] = self._own.get(label, 0.0) + 1
            return label
        return label if self._is_promoted(label) else OTHERS

    def _is_promoted(self, label: str) -> bool:
        if not self._most:
            return False
        if label not in self._waiting and len(self._waiting) >= self._most:
            del self._waiting[min(self._waiting, key=self._waiting.__getitem__)]
        self._waiting[label] = count = self._waiting.get(label, 0.0) + 1
        least = min(self._own, key=self._own.__getitem__)
        if count < PROMOTED_FROM + 2 * self._own[least]:
            return False
        self._own[label] = self._waiting.pop(label)
        self._waiting[least] = self._own.pop(least)
        return True

    def _halve(self, now: float) -> None:
        halvings = int((now - self._halved_at) / HALVED_EVERY_S)
        if halvings > 0:
            self._halved_at += halvings * HALVED_EVERY_S
            for counts in (self._own, self._waiting):
                for label in counts:
                    counts[label] /= 2**halvings


@dataclass(slots=True)
class Account:
    """What one tenant and variant took since the gateway began."""

    opened_at: float
    requests: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))  # by outcome: ok, failed
    tokens: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))  # by kind
    cpu_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # by part
    nominal_s: float = 0.0  # of requests that ended since the process's CPU time was last shared


@dataclass(frozen=True, slots=True)
class Ended:
    """What one request took, as its ticket tells."""

    answered: bool
    waits: bool  # it is asked again, so it has not ended
    streamed: bool
    encoded_images: int
    prompt_tokens: int
    visual_tokens: int
    generated_tokens: int

    @property
    def nominal_s(self) -> float:
        """CPU seconds that such a request takes of a gateway that was once measured."""
        token_s = STREAMED_TOKEN_S if self.streamed else WHOLE_TOKEN_S
        return REQUEST_S + self.encoded_images * ENCODED_IMAGE_S + self.generated_tokens * token_s


class Costs(Collector):
    """Keep an account for each tenant and variant that is charged. Used on the event loop's thread."""

    def __init__(
        self,
        tenant_labels: int,
        hold_s: float = HOLD_S,
        cpu_s: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._labels = TenantLabels(tenant_labels, clock())
        self._hold_s, self._cpu_s, self._clock = hold_s, cpu_s, clock
        self._accounts: dict[Payer, Account] = {}
        self._shared_s = 0.0  # of the process's CPU seconds, those that are in the accounts

    def payer(self, tenant: str, variant: str = DEFAULT) -> Payer:
        """Return the tenant and variant that one more request is charged to, and charge later work in this context."""
        payer = Payer(self._labels.of(tenant, self._clock()), variant)
        current.set(payer)
        return payer

    def ended(self, payer: Payer, request: Ended) -> None:
        """Count a request that ended."""
        account = self._account(payer)
        if not request.waits:
            account.requests["ok" if request.answered else "failed"] += 1
        account.tokens["prompt"] += request.prompt_tokens
        account.tokens["visual"] += request.visual_tokens
        account.tokens["generated"] += request.generated_tokens
        account.nominal_s += request.nominal_s

    def decoded(self, cpu_s: float, other_cpu_s: float) -> None:
        """Charge a decoder's CPU seconds: an image's to the current tenant, and others, as of its start, to nobody."""
        self._account(current.get()).cpu_s[DECODER] += cpu_s
        self._account(NOBODY).cpu_s[DECODER] += other_cpu_s

    def collect(self) -> Iterator[Metric]:
        """Share the process's CPU time among the requests that ended since the last time, and tell all accounts."""
        self._share()
        requests = _family("requests", "Questions that ended, by tenant, variant and outcome: ok, failed.", "outcome")
        tokens = _family("tokens", "Tokens by tenant, variant and kind: prompt, visual, generated.", "kind")
        cpu = _family(
            "cpu_seconds",
            "CPU seconds by tenant, variant and part: gateway (shared by requests and tokens), decoder; Triton's "
            "metrics have the models'.",
            "part",
        )
        now = self._clock()
        for payer, account in self._accounts.items():
            is_held = now - account.opened_at < self._hold_s
            for family, values in ((requests, account.requests), (tokens, account.tokens), (cpu, account.cpu_s)):
                for name, value in values.items():
                    family.add_metric([*payer, name], 0.0 if is_held else value)
        yield from (requests, tokens, cpu)

    def _share(self) -> None:
        spent_s = self._cpu_s() - self._shared_s
        self._shared_s += spent_s
        nominal_s = sum(account.nominal_s for account in self._accounts.values())
        charged_s = min(spent_s, MOST_OF_NOMINAL * nominal_s)
        for account in self._accounts.values():
            if account.nominal_s:
                account.cpu_s[GATEWAY] += charged_s * account.nominal_s / nominal_s
                account.nominal_s = 0.0
        self._account(NOBODY).cpu_s[GATEWAY] += spent_s - charged_s

    def _account(self, payer: Payer) -> Account:
        """Return the tenant's account; without a label of its own it is that of the others."""
        if payer.tenant not in self._labels:
            payer = Payer(OTHERS, payer.variant)
        if payer not in self._accounts:
            for known in [known for known in self._accounts if known.tenant not in self._labels]:
                del self._accounts[known]  # their label went to another tenant
            account = Account(self._clock())
            account.requests |= {"ok": 0, "failed": 0}
            account.tokens |= {"prompt": 0, "visual": 0, "generated": 0}
            account.cpu_s |= {GATEWAY: 0.0, DECODER: 0.0}
            self._accounts[payer] = account
        return self._accounts[payer]


def _family(name: str, documentation: str, last_label: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"glimpse_tenant_{name}", documentation, labels=("tenant", "variant", last_label))
