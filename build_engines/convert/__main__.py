"""`glimpse build`: convert a checkpoint to a repository that Triton serves.

    glimpse build reference --profile embedded --out model_repository
    glimpse build Salesforce/blip2-opt-2.7b --profile tensorrt --precision fp16 --out engines --dry-run

A stopped build continues from its last finished step. The output of steps is in OUT.build; a step runs again only if
something that it depends on has changed. OUT itself appears or changes only when everything is finished.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from build_engines.convert import devices, estimate
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
from build_engines.convert.pictures import digest_of
from build_engines.convert.plan import Step, plan, told
from build_engines.convert.run import Make, is_done, publish, run
from build_engines.convert.source import Source, file_digest
from build_engines.replacing import recover, why_not
from service.core import tensors

SERVING_CODE = (
    *(f"service/core/{name}.py" for name in ("card", "confidence", "precision", "prompt", "tensors", "vision")),
    "service/media/decoder.py",
    "service/text/prompt.py",
    "triton_models/query_groups.py",
    "triton_models/session.py",
)  # what the card, the samples, parity and agreement are made with
KNOWN = list(dict.fromkeys(each for precisions in PRECISIONS.values() for each in precisions))


class Bar:
    """Show the progress of steps on the terminal."""

    def __init__(self, steps: int) -> None:
        self.bar = tqdm(total=steps, desc="build", unit="step", mininterval=0.5)
        self.started = 0.0

    def skipped(self, step: Step) -> None:
        self.bar.update()
        tqdm.write(f"  {step.name:28} unchanged")

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
    found.add_argument(
        "checkpoint", help="directory or Hugging Face hub name of a BLIP-2, InstructBLIP or IDEFICS checkpoint"
    )
    found.add_argument(
        "--profile", choices=list(PRECISIONS), default="embedded", help="how the repository is served [%(default)s]"
    )
    found.add_argument("--precision", choices=KNOWN, default="", help="[the profile's default]")
    found.add_argument("--out", type=Path, required=True, help="repository to write")
    found.add_argument(
        "--allocator", type=Path, metavar="DIR", help="an allocator from `glimpse adapt` [its own, if any]"
    )
    found.add_argument("--zero-shot", action="store_true",
                       help="look where InstructBLIP's Q-Former looks for this question, without training")  # fmt: skip
    found.add_argument("--image-text", default="", metavar="CHECKPOINT",
                       help="the same for a BLIP-2, by the Q-Former of a Blip2ForImageTextRetrieval that has the same "
                       "vision encoder, such as Salesforce/blip2-itm-vit-g")  # fmt: skip
    found.add_argument("--dry-run", action="store_true", help="print the steps and their commands, and do nothing")
    found.add_argument("--until", metavar="STEP", help="stop after this step, for example parity")
    found.add_argument("--images", type=Path, help="folder of images for calibration and parity [rendered scenes]")
    found.add_argument("--calibration-images", type=int, default=512, help="images for FP8 calibration [%(default)s]")
    found.add_argument("--agreement-questions", type=int, default=256,
                       help="questions to compare a CPU precision's answers with FP32's [%(default)s]")  # fmt: skip
    found.add_argument("--max-batch", type=int, default=8, help="most images in a batch [%(default)s]")
    found.add_argument(
        "--opt-batch", type=int, default=4, help="batch that plans are tuned for, in images [%(default)s]"
    )
    found.add_argument("--run-in", choices=["docker", "here"], default="docker",
                       help="where TensorRT is installed [%(default)s]")  # fmt: skip
    found.add_argument(
        "--vision-image", default=VISION_IMAGE, help="Triton's image that serves the plans [%(default)s]"
    )
    found.add_argument("--llm-image", default=LLM_IMAGE, help="Triton's image that serves the LLM [%(default)s]")
    found.add_argument(
        "--mount", default="/models", help="the repository's path in the serving container [%(default)s]"
    )
    found.add_argument("--tensor-parallel", type=int, default=llm.tensor_parallel,
                       help="GPUs for one copy of the LLM [%(default)s]")  # fmt: skip
    found.add_argument("--llm-max-batch", type=int, default=llm.max_batch,
                       help="sequences decoded at once [%(default)s]")  # fmt: skip
    found.add_argument("--llm-max-tokens", type=int, default=llm.max_tokens,
                       help="tokens of a request, of all kinds [%(default)s]")  # fmt: skip
    found.add_argument("--llm-max-visual-tokens", type=int, default=llm.max_visual_tokens,
                       help="visual tokens of a request [%(default)s]")  # fmt: skip
    found.add_argument("--kv-memory-fraction", type=float, default=llm.kv_memory_fraction,
                       help="share of free GPU memory for the KV cache [%(default)s]")  # fmt: skip
    found.add_argument("--no-kv-reuse", action="store_true", help="do not share the KV cache of equal prompt prefixes")
    return found


def options_of(arguments: argparse.Namespace) -> Options:
    """Raises Refused."""
    return checked(
        Options(
            checkpoint=arguments.checkpoint,
            out=arguments.out,
            profile=arguments.profile,
            precision=arguments.precision,
            allocator=arguments.allocator,
            zero_shot=arguments.zero_shot,
            image_text=arguments.image_text,
            images=arguments.images,
            images_digest="" if arguments.images is None else digest_of(arguments.images),
            calibration_images=arguments.calibration_images,
            agreement_questions=arguments.agreement_questions,
            vision_batch=arguments.max_batch,
            opt_batch=min(arguments.opt_batch, arguments.max_batch),
            run_in=arguments.run_in,
            installed=devices.installed() if arguments.run_in == "here" else {},
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
    """Raises Refused if a build cannot replace OUT as a whole."""
    if why := why_not(out):
        raise Refused(why)


def code_files() -> list[Path]:
    """This project's files that the steps' outputs depend on."""
    package = Path(__file__).parents[1]
    own = sorted(path for folder in ("convert", "model", "scenes") for path in (package / folder).glob("*.py"))
    own += [
        package / name for name in ("export.py", "repository.py", "left_out.py", "adapt/data.py", "datasets/images.py")
    ]
    return [*own, *(Path(tensors.__file__).parents[2] / name for name in SERVING_CODE)]


def code_digest() -> str:
    return "-".join(file_digest(path)[:8] for path in code_files())


def root_of(source: Source) -> dict[str, Any]:
    from build_engines.convert.steps import versions  # noqa: PLC0415  (as above)

    return {"checkpoint": source.digests(), "versions": versions(), "code": code_digest()}


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    from build_engines.convert.inspection import inspect  # noqa: PLC0415  (PyTorch: not for --help)
    from build_engines.convert.steps import Maker  # noqa: PLC0415

    try:
        options = options_of(given)
        check_out(options.out)
        source = inspect(
            options.checkpoint,
            options.allocator,
            options.zero_shot,
            options.image_text,
            allow=lambda parameters: estimate.check(options, parameters),  # before the weights are downloaded
        )
        root = root_of(source)
        steps = plan(options, source, root)
        wanted = until(steps, given.until)
        device = devices.gpu() if options.profile == "tensorrt" else ""
        done = {step.name for step in steps if is_done(options.work, step, device)}
        needed = estimate.check(options, source.parameters, {step.folder: step.name in done for step in steps})
    except Refused as refused:
        print(f"glimpse build: {refused}", file=sys.stderr)
        return 2
    if given.dry_run:
        print(f"{source.name}: {source.family}, {sum(source.parameters.values()) / 1e6:.1f} M parameters")
        print(f"needs {estimate.gigabytes(needed.memory)} of memory and {estimate.gigabytes(needed.disk)} of disk")
        print(told(wanted, done, lambda step: line_of(step, options, source)))
        return 0
    return build(options, wanted, Maker(options, source, root, steps), done)


def line_of(step: Step, options: Options, source: Source) -> list[str]:
    """The step's command line to run."""
    out = options.work / f"{step.folder}.partial"
    return resolved(step.command, options, source.directory, out, step.settings["image"])


def until(steps: list[Step], last: str | None) -> list[Step]:
    """All steps, or those up to the named one. Raises Refused for an unknown name."""
    if last is None:
        return steps
    names = [step.name for step in steps]
    if last not in names:
        raise Refused(f"--until {last} is not a step: choose one of {', '.join(names)}")
    return steps[: names.index(last) + 1]


def build(options: Options, wanted: list[Step], make: Make, done: set[str]) -> int:
    from build_engines.convert.steps import ToolFailed, ToolMissing  # noqa: PLC0415

    recover(options.out)
    try:
        run(wanted, options.work, make, Bar(len(wanted)), done)
    except (Refused, ToolFailed, ToolMissing) as error:
        print(f"glimpse build: {error}", file=sys.stderr)
        return 3
    if wanted[-1].action == "repository":
        publish(options.work / wanted[-1].folder, options.out)
        print(f"{options.out} is ready; check it with `glimpse verify {options.out}`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
