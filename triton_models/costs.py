"""Charge the CPU and GPU seconds of one model's process to the payers of its requests, through Triton's metrics.

The gateway names the payer in a parameter of each request. What the process takes while a batch runs is shared among
the batch's requests, by rows or tokens. What it takes beside that, for messages and threads, follows in proportion;
start, probes and idle time are the service's. So the sum over all payers is the CPU time of the process.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.core.payer import HOLD_S, NOBODY, OTHERS, PAYER, Payer
from triton_models.metrics import counter_family, metric_of

PERIOD_S = 1.0
MOST_PAYERS = 1000  # with series of their own; each gateway names only the tenants that ask it most
MOST_PAYER_CHARS = 160  # of a tenant's label, which has at most 64, and a variant's name
MOST_BESIDE = 1.0  # of what a period's requests took: the CPU time beside them that may follow them
LEAST_S = 0.01  # of a series' growth before Triton is told
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
CPU_SECONDS = "glimpse_tenant_cpu_seconds_total"
GPU_SECONDS = "glimpse_tenant_gpu_seconds_total"


def payer_of(request: Any) -> Payer:
    """Read which tenant is charged for a request. A request that no gateway sent is the service's own.

    Clients of Triton can write anything there. What no gateway writes becomes the label of nobody.
    """
    told = json.loads(request.parameters() or "{}").get(PAYER, "")
    if isinstance(told, str) and len(told) <= MOST_PAYER_CHARS:
        return Payer.read(told)
    return Payer(OTHERS, NOBODY.variant)


@dataclass(slots=True)
class Series:
    """One counter in Triton's metrics. It stays at zero at first: see HOLD_S."""

    metric: Any
    opened_at: float
    untold_s: float = 0.0

    def tell(self, now: float, least_s: float, hold_s: float) -> None:
        if self.untold_s > least_s and now - self.opened_at >= hold_s:
            self.metric.increment(self.untold_s)
            self.untold_s = 0.0


@dataclass(slots=True)
class Spent:
    """Seconds since the last report."""

    cpu_s: defaultdict[Payer, float] = field(default_factory=lambda: defaultdict(float))
    gpu_s: defaultdict[Payer, float] = field(default_factory=lambda: defaultdict(float))


class ServerCpu:
    """Read the CPU time of the Triton that started this process. Of its models' processes, one does it."""

    def __init__(self, proc: Path = Path("/proc"), server: int | None = None) -> None:
        self._stat = proc / str(os.getppid() if server is None else server) / "stat"
        self._claim: socket.socket | None = None
        self._told_s = 0.0

    def spent_s(self) -> float:
        """Return the seconds since the last call, and since the server's start at the first; 0 if another reads."""
        try:
            fields = self._stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # the server has ended
            return 0.0
        if self._claim is None and not self._claimed(f"glimpse-costs-{self._stat.parent.name}-{fields[19]}"):
            return 0.0
        now_s = (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND
        spent_s, self._told_s = now_s - self._told_s, now_s
        return spent_s

    def close(self) -> None:
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _claimed(self, name: str) -> bool:
        """An abstract socket has one owner and ends with its process. What the owner before told is unknown: if it
        died, the server's time until now counts twice."""
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0{name}")
        except OSError:
            claim.close()
            return False
        self._claim = claim
        return True


class Costs:
    """The accounts of one process. `begin` and `end` stand around each run of the model, on one thread at a time."""

    def __init__(
        self,
        model: str,
        *,
        on_gpu: bool = False,
        server: ServerCpu | None = None,
        hold_s: float = HOLD_S,
        cpu_s: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._on_gpu, self._server, self._hold_s = model, on_gpu, server, hold_s
        self._cpu_s, self._clock = cpu_s, clock
        self._lock = threading.Lock()
        self._begun: tuple[float, float] | None = None  # CPU time and time, while a run lasts
        self._spent = Spent()
        self._accounted_s = 0.0  # of the process's CPU time, what was charged to anyone
        self._payers = {NOBODY}
        self._families = {
            name: counter_family(name, text)
            for name, text in (
                (CPU_SECONDS, "CPU seconds by tenant, variant and part: a model, or triton, the server itself"),
                (GPU_SECONDS, "Seconds that a model computed on a GPU, by tenant, variant and part"),
            )
        }
        self._series: dict[tuple[str, Payer, str], Series] = {}
        self._ended = threading.Event()
        self._work = threading.Event()  # set while there may be something to tell
        self._worked_at = clock()
        self._thread = threading.Thread(target=self._run, name=f"{model}-costs", daemon=True)

    def start(self) -> None:
        """Report once a second, until everything of the last run is told."""
        self._thread.start()

    def close(self) -> None:
        """Send the last values."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._work.set()
        if self._thread.is_alive():
            self._thread.join()
        self.report()
        if self._server is not None:
            self._server.close()

    def begin(self) -> None:
        with self._lock:
            self._begun = self._cpu_s(), self._clock()
            self._worked_at = self._begun[1]
        self._work.set()

    def end(self, shares: Iterable[tuple[Payer, float]]) -> None:
        """Charge the time since `begin`, in proportion to these shares; without any, it was nobody's."""
        weights: defaultdict[Payer, float] = defaultdict(float)
        for payer, share in shares:
            weights[payer] += share
        with self._lock:
            assert self._begun is not None
            cpu_s, seconds = self._cpu_s() - self._begun[0], self._clock() - self._begun[1]
            self._begun = None
            self._accounted_s += cpu_s
            for payer, share in shared(self._known(weights or {NOBODY: 1.0})).items():
                self._spent.cpu_s[payer] += cpu_s * share
                if self._on_gpu:
                    self._spent.gpu_s[payer] += seconds * share

    @contextmanager
    def of(self, requests: Sequence[Any]) -> Iterator[None]:
        """Charge the block to the requests of a batch, by their rows."""
        self.begin()
        try:
            yield
        finally:
            self.end([(payer_of(request), rows_of(request)) for request in requests])

    def report(self) -> None:
        """Charge what the process took beside its runs, and tell Triton."""
        with self._lock:
            spent, self._spent = self._spent, Spent()
            now_s = self._cpu_s() if self._begun is None else self._begun[0]  # a run that lasts is charged at its end
            beside_s, self._accounted_s = now_s - self._accounted_s, now_s
        requests_s = dict(spent.cpu_s)
        for part, seconds in ((self._model, beside_s), ("triton", self._server.spent_s() if self._server else 0.0)):
            for payer, share_s in following(requests_s, seconds).items():
                self._add(CPU_SECONDS, payer, part, share_s)
        for name, charged in ((CPU_SECONDS, requests_s), (GPU_SECONDS, spent.gpu_s)):
            for payer, seconds in charged.items():
                self._add(name, payer, self._model, seconds)
        least_s, hold_s = (0.0, 0.0) if self._ended.is_set() else (LEAST_S, self._hold_s)
        for series in self._series.values():
            series.tell(self._clock(), least_s, hold_s)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._work.wait()  # an idle process does not wake
            self._work.clear()
            if self._clock() - self._worked_at <= self._hold_s + PERIOD_S:
                self._work.set()
            self.report()
            self._ended.wait(PERIOD_S)

    def _add(self, name: str, payer: Payer, part: str, seconds: float) -> None:
        if not seconds:
            return
        key = (name, payer, part)
        if key not in self._series:
            labels = {"tenant": payer.tenant, "variant": payer.variant, "part": part}
            self._series[key] = Series(metric_of(self._families[name], labels), self._clock())
        self._series[key].untold_s += seconds

    def _known(self, weights: Mapping[Payer, float]) -> Mapping[Payer, float]:
        """Put payers together that are beyond the bound of series."""
        self._payers.update(list(weights)[: max(0, MOST_PAYERS - len(self._payers))])
        if self._payers.issuperset(weights):
            return weights
        known: defaultdict[Payer, float] = defaultdict(float)
        for payer, weight in weights.items():
            known[payer if payer in self._payers else Payer(OTHERS, NOBODY.variant)] += weight
        return known


def rows_of(request: Any) -> float:
    """Return the rows of the first input."""
    return float(max(1, request.inputs()[0].shape()[0]))


def shared(weights: Mapping[Payer, float]) -> dict[Payer, float]:
    """Return each one's part of the whole, whose sum is 1."""
    total = sum(weights.values())
    return {payer: weight / total for payer, weight in weights.items()}


def following(requests_s: Mapping[Payer, float], seconds: float) -> dict[Payer, float]:
    """Share seconds beside the requests in proportion to theirs; more than MOST_BESIDE of theirs is nobody's."""
    total_s = sum(requests_s.values())
    with_them_s = min(seconds, MOST_BESIDE * total_s)
    found = defaultdict(float, {payer: with_them_s * own_s / total_s for payer, own_s in requests_s.items() if total_s})
    found[NOBODY] += seconds - with_them_s
    return dict(found)
