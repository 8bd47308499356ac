"""Measure answers in a form.

    python -m benchmarks.structured                       # both parts
    python -m benchmarks.structured --forms 1000 --rounds 20

Part 1: random choices, regular expressions and JSON schemas, answered by a decoder of random scores over the reference
model's tokenizer. Every finished answer must fit its form. Part 2: 16 free answers beside 16 guided ones and beside 16
more free ones, in alternating rounds of one batcher with the reference model's LLM: what the free ones lose. `noise` is
the same comparison without guides.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.structured.answers import answered
from benchmarks.structured.beside import measured

REPOSITORY = Path(__file__).parents[2] / "model_repository"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=REPOSITORY)
    parser.add_argument("--forms", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20, help="pairs of rounds; 0 leaves part 2 out")
    parser.add_argument("--tokens", type=int, default=160, help="of each answer of part 2")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = answered(arguments.repository, arguments.forms, arguments.seed)
    print(
        f"{arguments.forms} forms: {found.finished} finished, {found.cut} cut by length, {len(found.faults)} faults, "
    )
    print(f"{found.seconds:.1f} s, slowest compilation {found.slowest_compile_ms:.1f} ms")
    for fault in found.faults[:10]:
        print(f"  {fault}")
    for name, guided in (("guided", True), ("noise", False)) if arguments.rounds else ():
        rate = measured(arguments.repository, arguments.rounds, arguments.tokens, guided=guided)
        alone, beside = (statistics.median(each.wall for each in rounds) for rounds in (rate.alone, rate.beside))
        print(
            f"{name}: free answers {alone:,.0f} tokens/s, beside {beside:,.0f} tokens/s, loss {100 * rate.loss:.1f} %"
        )
        print(f"{name}: loss by the decoding thread's CPU time {100 * rate.cpu_loss:.1f} %")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
