"""Time each graph in each precision and library of a CPU, in alternating rounds in one process.

    python -m benchmarks.cpu_engines --model base --out benchmarks/results/cpu_engines.json

A round runs every way once, so a busy machine slows all ways alike: the ratios hold, the milliseconds hardly. Each way
runs on one thread. CPU time and wall time are medians over the rounds, with the quartiles of the ratio to ONNX Runtime
in FP32. OpenVINO is measured if it is installed, and in BF16 if the CPU has it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.bench.engine import STAGES, Work, feeds
from benchmarks.bench.models import MODELS, PROJECT, ready
from benchmarks.precision_on_cpu import converted
from service.core.card import ModelCard
from service.core.precision import Cpu
from service.triton_server.engine_choice import CPUINFO, has_openvino
from triton_models.engine import Engine, open_engine
from triton_models.session import open_session

ROWS = {"vision_encoder": (1,), "qformer": (1,), "prefill": (1,), "step": (1, 16)}
WORK = Work(vision_tokens=101, text_tokens=14)


def ways(graph: Path, name: str, work: Path) -> Iterator[tuple[str, Engine]]:
    """The graph in every precision and library, FP32 in ONNX Runtime first. Integer graphs are written into `work`."""
    yield "onnxruntime fp32", open_engine(graph)
    for precision in ("int8", "int4") if name == "llm" else ("int8",):
        file = work / f"{name}.{precision}.onnx"
        if not file.exists():
            onnx.save(converted(graph, name, precision), file)
        yield f"onnxruntime {precision}", open_engine(file)
    if has_openvino():
        from triton_models.openvino_graph import OpenVinoGraph  # noqa: PLC0415  (not installed everywhere)

        for precision in ("f32", "bf16") if Cpu.of(CPUINFO.read_text()).bf16 else ("f32",):
            yield f"openvino {precision}", OpenVinoGraph(graph, 1, precision)


def timed(engines: Mapping[str, Engine], feed: Mapping[str, Any], outputs: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds by way, and how much faster than the first way it is in the same round."""
    for engine in engines.values():
        engine.run(feed, outputs)
    cpu: dict[str, list[float]] = {way: [] for way in engines}
    wall: dict[str, list[float]] = {way: [] for way in engines}
    for _ in range(rounds):
        for way, engine in engines.items():
            started, used = time.perf_counter(), time.process_time()
            engine.run(feed, outputs)
            cpu[way].append(1e3 * (time.process_time() - used))
            wall[way].append(1e3 * (time.perf_counter() - started))
    base = np.array(next(iter(cpu.values())))
    found = {}
    for way in engines:
        low, middle, high = np.percentile(base / np.array(cpu[way]), (25, 50, 75))
        found[way] = {
            "cpu_ms": round(float(np.median(cpu[way])), 2),
            "wall_ms": round(float(np.median(wall[way])), 2),
            "times_fp32": round(float(middle), 2),
            "times_fp32_quartiles": [round(float(low), 2), round(float(high), 2)],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="base")
    parser.add_argument("--stages", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file; stages that are not measured keep their figures")
    given = parser.parse_args()
    repository = ready(given.model).repository
    card = ModelCard.from_json((repository / "card.json").read_text())
    work = PROJECT / "build" / "bench" / f"{given.model}-integers"
    work.mkdir(parents=True, exist_ok=True)
    before = json.loads(given.out.read_text()) if given.out and given.out.exists() else {"stages": {}}
    report = {
        "model": given.model,
        "cpu": next(
            line.partition(":")[2].strip() for line in CPUINFO.read_text().splitlines() if "model name" in line
        ),
        "flags": sorted(Cpu.of(CPUINFO.read_text()).bf16 | Cpu.of(CPUINFO.read_text()).int8),
        "machine": platform.platform(),
        "threads": 1,
        "rounds": given.rounds,
        "stages": before["stages"],
    }
    for stage in given.stages:
        name = STAGES[stage]
        graph = repository / name / "1" / "model.onnx"
        engines = dict(ways(graph, name, work))
        for rows in ROWS[stage]:
            feed = feeds(stage, rows, open_session(graph), card, WORK)
            outputs = list(next(iter(engines.values())).outputs)
            report["stages"][f"{stage}, {rows} rows"] = timed(engines, feed, outputs, given.rounds)
            print(stage, rows, json.dumps(report["stages"][f"{stage}, {rows} rows"]), flush=True)
        if given.out:
            given.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
