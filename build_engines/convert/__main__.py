"""`glimpse build`: a checkpoint to a repository that Triton serves.

    glimpse build reference --profile embedded --out model_repository
    glimpse build Salesforce/blip2-opt-2.7b --profile tensorrt --precision fp16 --out engines --dry-run

Goes on where it was stopped: what is made lies in OUT.build, and is made again only where something that it depends on
has changed. OUT itself appears, or changes, when all of it is there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from build_engines.convert import estimate
from build_engines.convert.commands import resolved
from build_engines.convert.options import (
    LLM_IMAGE,
    PRECISIONS,
    VISION_IMAGE,
    LlmEngine,
    Options,
    Refused,
    checked,
)
from build_engines.convert.plan import Step, plan, told
from build_engines.convert.run import is_done, publish, recover, run
from build_engines.convert.source import Source, file_digest


class Bar:
    """Tells of each step on the terminal."""

    def __init__(self, steps: int) -> None:
        self.bar = tqdm(total=steps, desc="build", unit="step", mininterval=0.5)
        self.started = 0.0

    def skipped(self, step: Step) -> None:
        self.bar.update()
        tqdm.write(f"  {step.name:28} as it was")

    def begun(self, step: Step) -> None:
        self.started = time.monotonic()
        self.bar.set_postfix_str(step.name)

    def made(self, step: Step) -> None: ...

    def finished(self, step: Step) -> None:
        self.bar.update()
        tqdm.write(f"  {step.name:28} {time.monotonic() - self.started:7.1f} s")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="glimpse build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    llm = LlmEngine()
    found.add_argument("checkpoint", help="directory, or name on the Hugging Face hub, of a BLIP-2 or InstructBLIP")
    found.add_argument("--profile", choices=list(PRECISIONS), default="embedded", help="what will serve it")
    found.add_argument("--precision", choices=["fp32", "fp16", "fp8"], default="", help="[the profile's own]")
    found.add_argument("--out", type=Path, required=True, help="repository to write")
    found.add_argument("--dry-run", action="store_true", help="print what would be done, with its commands")
    found.add_argument("--until", metavar="STEP", help="stop after this step, such as parity")
    found.add_argument("--images", type=Path, help="folder of images for calibration and parity [rendered scenes]")
    found.add_argument("--calibration-images", type=int, default=512)
    found.add_argument("--max-batch", type=int, default=8, help="images of one run at most")
    found.add_argument("--opt-batch", type=int, default=4, help="images of the run that plans are tuned for")
    found.add_argument("--run-in", choices=["docker", "here"], default="docker", help="where TensorRT is")
    found.add_argument("--vision-image", default=VISION_IMAGE, help="Triton's image that serves the plans")
    found.add_argument("--llm-image", default=LLM_IMAGE, help="Triton's image that serves the LLM")
    found.add_argument("--mount", default="/models", help="where the serving container has the repository")
    found.add_argument("--tensor-parallel", type=int, default=llm.tensor_parallel, help="GPUs of the LLM")
    found.add_argument("--llm-max-batch", type=int, default=llm.max_batch, help="requests decoded at once")
    found.add_argument("--llm-max-tokens", type=int, default=llm.max_tokens, help="of one request, all kinds together")
    found.add_argument("--llm-max-visual-tokens", type=int, default=llm.max_visual_tokens, help="of one request")
    found.add_argument("--kv-memory-fraction", type=float, default=llm.kv_memory_fraction, help="of the free memory")
    found.add_argument("--no-kv-reuse", action="store_true", help="do not share the cache of prompts that begin alike")
    return found


def options_of(arguments: argparse.Namespace) -> Options:
    """Raises Refused."""
    return checked(
        Options(
            checkpoint=arguments.checkpoint,
            out=arguments.out,
            profile=arguments.profile,
            precision=arguments.precision,
            images=arguments.images,
            calibration_images=arguments.calibration_images,
            vision_batch=arguments.max_batch,
            opt_batch=min(arguments.opt_batch, arguments.max_batch),
            run_in=arguments.run_in,
            vision_image=arguments.vision_image,
            llm_image=arguments.llm_image,
            mount=arguments.mount,
            llm=LlmEngine(
                tensor_parallel=arguments.tensor_parallel,
                max_batch=arguments.llm_max_batch,
                max_tokens=arguments.llm_max_tokens,
                max_visual_tokens=arguments.llm_max_visual_tokens,
                kv_memory_fraction=arguments.kv_memory_fraction,
                kv_reuse=not arguments.no_kv_reuse,
            ),
        )
    )


def check_out(out: Path) -> None:
    """Raises Refused where OUT holds something that is no repository: a build replaces it as a whole."""
    if out.exists() and not (out / "card.json").exists() and any(out.iterdir()):
        raise Refused(f"{out} is no model repository and not empty: choose another --out")


def code_digest() -> str:
    """Of this project's files that the steps' outputs depend on."""
    package = Path(__file__).parents[1]
    own = sorted(path for folder in ("build", "model") for path in (package / folder).glob("*.py"))
    files = [*own, package / "export.py", package / "repository.py"]
    return "-".join(file_digest(path)[:8] for path in files)


def root_of(source: Source) -> dict[str, Any]:
    from build_engines.convert.steps import versions  # noqa: PLC0415  (as above)

    return {"checkpoint": source.digests(), "versions": versions(), "code": code_digest()}


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    from build_engines.convert.inspection import inspect  # noqa: PLC0415  (PyTorch: not for --help)

    try:
        options = options_of(given)
        check_out(options.out)
        source = inspect(options.checkpoint)
        needed = estimate.check(options, source)
        root = root_of(source)
        steps = plan(options, source, root)
        wanted = until(steps, given.until)
    except Refused as refused:
        print(f"glimpse build: {refused}", file=sys.stderr)
        return 2
    done = {step.name for step in steps if is_done(options.work, step)}
    if given.dry_run:
        print(f"{source.name}: {source.family}, {sum(source.parameters.values()) / 1e6:.1f} M parameters")
        print(f"needs {estimate.gigabytes(needed.memory)} of memory and {estimate.gigabytes(needed.disk)} of disk")
        print(told(wanted, done, lambda step: line_of(step, options, source)))
        return 0
    return build(options, source, root, steps, wanted)


def line_of(step: Step, options: Options, source: Source) -> list[str]:
    """The step's command as it is run."""
    out = options.work / f"{step.folder}.partial"
    return resolved(step.command, options, source.directory, out, step.settings["image"])


def until(steps: list[Step], last: str | None) -> list[Step]:
    """All steps, or those up to the named one. Raises Refused for a name that no step has."""
    if last is None:
        return steps
    names = [step.name for step in steps]
    if last not in names:
        raise Refused(f"--until {last}: the steps are {', '.join(names)}")
    return steps[: names.index(last) + 1]


def build(options: Options, source: Source, root: dict[str, Any], steps: list[Step], wanted: list[Step]) -> int:
    from build_engines.convert.steps import Maker, ToolFailed, ToolMissing  # noqa: PLC0415

    recover(options.out)
    try:
        run(wanted, options.work, Maker(options, source, root, steps), Bar(len(wanted)))
    except (Refused, ToolFailed, ToolMissing) as error:
        print(f"glimpse build: {error}", file=sys.stderr)
        return 3
    if wanted[-1].action == "repository":
        publish(options.work / wanted[-1].folder, options.out)
        print(f"{options.out} is ready; `glimpse verify {options.out}` checks it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
