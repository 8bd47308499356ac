"""The mutated images without HTTP: straight into decoding workers, so that nothing but decoders takes time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.bench.processes import TICKS
from benchmarks.fuzz import images
from service.core.errors import InvalidImage, TooLarge
from service.core.vision import CLOSER_SIZE, IMAGE_SIZE
from service.media.decoder import ImageLimits
from service.media.workers import DecodingWorkers

WORKERS = 2
CPU_S = 2.0  # the service's default limit
VIEWS = (IMAGE_SIZE, CLOSER_SIZE)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def kept(data: bytes, file: Path) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return str(file)


async def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """A report. Files that end a decoder or raise an error of another kind than refusals are kept in `folder`."""
    workers = DecodingWorkers(ImageLimits(), WORKERS, CPU_S)
    workers.start()
    first = set(workers.pids)
    outcomes: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []
    numbers = iter(range(count))
    slowest_s, started = 0.0, time.monotonic()

    async def sender() -> None:
        nonlocal slowest_s
        for number in numbers:
            data, done = images.image(seed, number)
            asked = time.monotonic()
            fault = ""
            try:
                await workers.decode(data, VIEWS)
                outcome = "decoded"
            except (InvalidImage, TooLarge) as error:
                outcome = type(error).__name__ + (" by CPU time" if "CPU time" in error.message else "")
                fault = "ended a decoder" if "ends its decoder" in error.message else ""
            except Exception as error:  # any other is what this looks for
                outcome = fault = repr(error)
            slowest_s = max(slowest_s, time.monotonic() - asked)
            outcomes[outcome] += 1
            if fault:
                file = kept(data, folder / f"image_{seed}_{number}")
                faults.append({"number": number, "done": done, "fault": fault, "file": file})

    async with asyncio.TaskGroup() as tasks:
        for _ in range(WORKERS):
            tasks.create_task(sender())
    report = {
        "seed": seed,
        "images": count,
        "elapsed_s": round(time.monotonic() - started, 1),
        "outcomes": dict(outcomes.most_common()),
        "slowest_s": round(slowest_s, 2),
        "decoders_replaced": len(set(workers.pids) - first),
        "faults": faults,
    }
    workers.close()
    return report
