"""`glimpse adapt`: give a checkpoint an allocator of its own, from images and questions, labelled or not.

    glimpse adapt Salesforce/blip2-opt-2.7b --data photographs --out adapted
    glimpse build Salesforce/blip2-opt-2.7b --allocator adapted --out model_repository

The encoder and the language model stay frozen. Without answers, the model's own view of the whole image is the
teacher. A stopped run continues from its last checkpoint: give the same command again. `torchrun` or `accelerate
launch` run the training on several processes: `torchrun --nproc-per-node 2 -m build_engines.adapt ...`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from build_engines.adapt import data
from build_engines.convert.options import Refused

TEACHERS = ("auto", "tokens", "likelihood", "answers")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="glimpse adapt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("checkpoint", help="directory or Hugging Face hub name of a BLIP-2 or InstructBLIP checkpoint")
    found.add_argument("--data", type=Path, required=True, help="folder of images and questions")
    found.add_argument("--out", type=Path, required=True, help="folder to write; a stopped run continues in it")
    found.add_argument("--teacher", choices=TEACHERS, default="auto",
                       help="what is learned from: tokens (no LLM), likelihood of the LLM's answers, or the data's "
                       "answers [likelihood if the LLM fits in memory]")  # fmt: skip
    found.add_argument(
        "--steps",
        type=int,
        default=600,
        help="training steps, after twice as many of relevance alone (default: %(default)s)",
    )
    found.add_argument("--batch", type=int, default=16, help="images a step (default: %(default)s)")
    found.add_argument("--questions", type=int, default=8, help="most questions an image (default: %(default)s)")
    found.add_argument("--images", type=int, help="use only this many images [all]")
    found.add_argument("--closer-share", type=float, default=0.3,
                       help="greatest share of the images with a closer view, of 448 pixels or more; 0 leaves the "
                       "closer view out (default: %(default)s)")  # fmt: skip
    found.add_argument("--least-agreement", type=float, default=0.97, metavar="SHARE",
                       help="agreement with the full view, from which a budget may be the default "
                       "(default: %(default)s)")  # fmt: skip
    found.add_argument("--large-budgets", action="store_true", help="draw large budgets more often, 2:3:5 by thirds")
    found.add_argument("--lora-rank", type=int, default=0,
                       help="rank of LoRA on the Q-Former's cross-attention [the Q-Former stays frozen]")  # fmt: skip
    found.add_argument("--shard-llm", action="store_true",
                       help="with several processes: each keeps a share of the language model's layers")  # fmt: skip
    found.add_argument("--seed", type=int, default=5, help="of the weights and the data's order (default: %(default)s)")
    found.add_argument("--checkpoint-s", type=float, default=60.0, help="seconds between checkpoints")
    found.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: %(default)s)")
    found.add_argument("--dry-run", action="store_true", help="print memory, disk and time, and do nothing")
    return found


def check(options: argparse.Namespace) -> None:
    """Raises Refused for options that cannot be."""
    for name, least in (("steps", 1), ("batch", 1), ("questions", 1), ("threads", 1), ("images", 2), ("lora_rank", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise Refused(f"--{name.replace('_', '-')} {value} is too small: use at least {least}")
    for name in ("closer_share", "least_agreement"):
        if not 0 <= getattr(options, name) <= 1:
            raise Refused(f"--{name.replace('_', '-')} {getattr(options, name)} must be between 0 and 1")
    if options.shard_llm and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise Refused(
            "--shard-llm shares the language model among processes, and there is one: start several by torchrun"
        )
    if options.shard_llm and options.teacher == "tokens":
        raise Refused("--shard-llm shares the language model, which --teacher tokens leaves out: leave one of them out")
    earlier = any((options.out / name).exists() for name in ("work", "adapted.json"))
    if options.out.exists() and any(options.out.iterdir()) and not earlier:
        raise Refused(f"{options.out} is not empty and of no earlier run: choose another --out")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        check(options)
        found = data.read(options.data, options.images)
        # PyTorch takes seconds: wrong data is refused before.
        from build_engines.adapt.planning import planned  # noqa: PLC0415

        job, wanted, source = planned(options, found)
    except Refused as refused:
        print(f"glimpse adapt: {refused}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")) == 0:
        questions = f"{len(found.questions)} questions (format {found.form})"
        print(f"{source}: teacher {job.teacher}, {len(found.images)} images, {questions}")
        print(wanted.told() + (f"; {len(found.skipped)} entries of the data are left out" if found.skipped else ""))
    if options.dry_run:
        return 0
    from build_engines.adapt.run import adapt, threads  # noqa: PLC0415  (as above)

    threads(options.threads)
    try:
        adapted = adapt(job, found)
    except Refused as refused:  # what is seen only once the images are decoded
        print(f"glimpse adapt: {refused}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")) == 0:
        print(outcome(adapted.state, options.out, adapted.default_vision_tokens))
    return 0


def outcome(state: str, out: Path, budget: tuple[int, int]) -> str:
    if state == "fixed":
        return (
            f"{out}: the allocator gains nothing over the best other choice on the images that were kept apart. "
            "A repository built with it stays with the full view. Give more images, or questions like your users'"
        )
    return (
        f"{out} is ready ({state}); default budget {budget[0]} to {budget[1]} vision tokens, see {out}/report.json. "
        f"Build with `glimpse build CHECKPOINT --allocator {out}`"
    )


if __name__ == "__main__":
    sys.exit(main())
