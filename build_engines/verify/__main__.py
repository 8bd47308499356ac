"""`glimpse verify`: check a repository's files, serving, answers and speed.

    glimpse verify model_repository                                     its files: on any machine
    glimpse verify engines --serve --reference fp32_repository          also serves it, on a machine that can
    glimpse verify engines --vision-url host:8001 --llm-url host:9001   also checks running servers

Prints one line a check and a verdict. --report writes both, and the measurements, as JSON. Exits with 1 if a check
failed.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from build_engines.verify.report import Report


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="glimpse verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("repository", type=Path, help="the repository to check")
    found.add_argument("--report", type=Path, help="file to write the report to, as JSON")
    found.add_argument("--serve", action="store_true", help="start servers for it, and stop them afterwards")
    found.add_argument("--vision-url", metavar="HOST:PORT", help="gRPC address of a Triton that serves it")
    found.add_argument("--llm-url", metavar="HOST:PORT", help="gRPC address of the LLM's Triton [--vision-url]")
    found.add_argument("--metrics-url", help="metrics of the vision server, http://HOST:8002/metrics")
    found.add_argument("--reference", type=Path, help="FP32 repository of the same checkpoint, to compare with")
    found.add_argument("--images", type=Path, help="folder of images to ask about [rendered scenes]")
    found.add_argument("--scenes", type=int, default=8, help="number of images")
    found.add_argument("--repeats", type=int, default=20, help="repetitions of each timing")
    found.add_argument("--first-port", type=int, default=18000, help="first of four ports that --serve uses")
    return found


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    report = Report()
    asyncio.run(look(given, report))
    print(report.text())
    if given.report:
        report.write(given.report)
    return 1 if report.failed else 0


async def look(given: argparse.Namespace, report: Report) -> None:
    from build_engines.verify.files import built_with, check_files  # noqa: PLC0415  (ONNX and PyTorch: not for --help)
    from build_engines.verify.live import Served, check_served  # noqa: PLC0415
    from build_engines.verify.serve import CannotServe, Images, check_loads, serving  # noqa: PLC0415
    from service.triton_server.access import Ports  # noqa: PLC0415
    from service.triton_server.installation import StartFailed  # noqa: PLC0415

    card = check_files(given.repository, report)
    if card is None or report.failed:
        report.not_run("serving", "checks of the files failed: fix these first")
        return

    def served(vision: str, llm: str, metrics: str | None) -> Served:
        return Served(vision, llm, metrics, given.reference, given.images, given.scenes, given.repeats)

    if given.vision_url:
        urls = (given.vision_url, given.llm_url or given.vision_url, given.metrics_url)
        await check_served(given.repository, card, served(*urls), report)
    elif given.serve:
        images = Images.of(given.repository)
        if images and shutil.which("docker"):
            check_loads(given.repository, images, built_with(given.repository)["tensorrt"], report)
        if report.failed:
            return
        ports = tuple(Ports(first, first + 1) for first in (given.first_port, given.first_port + 2))
        with tempfile.TemporaryDirectory() as folder:
            try:
                log = Path(folder) / "triton.log"
                async with serving(given.repository, card, images, ports, log) as urls:
                    await check_served(given.repository, card, served(*urls), report)
            except (CannotServe, StartFailed) as exc:
                report.not_run("serving", str(exc))
    else:
        report.not_run("serving", "needs --serve, or --vision-url of a Triton that serves it")


if __name__ == "__main__":
    sys.exit(main())
