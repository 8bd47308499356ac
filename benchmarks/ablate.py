"""What each part of the relevance allocator is worth: the ablations, as one JSON file and one page of plots.

    glimpse ablate                       # the shipped checkpoint; goes on where a killed run stopped
    glimpse ablate --quick               # a few scenes: does the machinery work?
    python -m benchmarks.ablate --checkpoint runs/reference/checkpoint --repository build/repository

Arms differ in what ranks the cells (relevance, one way of knowing, random, evenly spread, centre first), in the
budgets of vision and visual tokens, in a tension switched off, and in the closer view. All answer the same questions
about the same held-out scenes, in PyTorch, with the weights as they are. Shares have Wilson's 95 % interval, means and
differences a bootstrap over scenes, paired where arms are compared. Times are those of the exported graphs in ONNX
Runtime. Finished arms are kept by the weights: delete the folder when the code has changed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.ablation.plan import RESULTS, Plan


def main(given: list[str] | None = None) -> None:
    plan = Plan()
    parser = argparse.ArgumentParser(
        prog="glimpse ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=plan.checkpoint, help="default: reference/")
    parser.add_argument("--repository", type=Path, default=plan.repository, help="its exported graphs, to be timed")
    parser.add_argument("--scenes", type=int, default=plan.scenes, help="of the training world (default: %(default)s)")
    parser.add_argument("--small-print", type=int, default=plan.small_print, help="scenes (default: %(default)s)")
    parser.add_argument("--timed", type=int, default=plan.timed, help="runs of each graph (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="6 scenes of each split and 5 timed runs")
    parser.add_argument(
        "--kept", type=Path, default=plan.kept, help="finished arms, to go on from (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="where ablation.json and .png go (default: %(default)s)"
    )
    asked = parser.parse_args(given)
    plan = Plan(asked.checkpoint, asked.repository, asked.kept, asked.scenes, asked.small_print, asked.timed)
    if asked.quick:
        plan = replace(plan, scenes=6, small_print=6, timed=5)

    from benchmarks.ablation import measuring, plots  # noqa: PLC0415  (PyTorch: --help should not wait seconds for it)

    told = measuring.measure(plan)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "ablation.json").write_text(json.dumps(told, indent=1) + "\n")
    plots.page(told, asked.out / "ablation.png")
    print(json.dumps(told["verdict"], indent=2))


if __name__ == "__main__":
    main()
