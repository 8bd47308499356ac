"""Two processes that hold one language model together adapt as one process does that holds it alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from build_engines.adapt import run
from build_engines.adapt.__main__ import main
from build_engines.adapt.sharding import Peers, layers_of
from build_engines.model.checkpoint import Checkpoint
from tests.build_engines.adapt.test_adapting import write_data
from tests.support.servers import free_ports
from tests.support.tiny_checkpoints import save_blip2_opt

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def adapt(rank: int, arguments: list[str], environments: list[dict[str, str]], seen: Path) -> None:
    """In a process of its own: `glimpse adapt`, which tells what this process holds of the language model."""
    os.environ |= environments[rank]
    plain = run.frozen

    def told(job: run.Job, peers: Peers) -> Checkpoint:
        checkpoint = plain(job, peers)
        held = [weight for layer in layers_of(checkpoint.model.language_model) for weight in layer.parameters()]
        here = [weight.to_local() if job.shard else weight for weight in held]
        (seen / f"held_{rank}.json").write_text(
            json.dumps([sum(each.numel() for each in both) for both in (here, held)])
        )
        return checkpoint

    run.frozen = told
    assert main(arguments) == 0
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_two_processes_with_half_a_language_model_each_adapt_as_one_with_all(tmp_path: Path) -> None:
    save_blip2_opt(tmp_path / "checkpoint")
    write_data(tmp_path / "data")
    common = [str(tmp_path / "checkpoint"), "--data", str(tmp_path / "data"), "--teacher", "likelihood"]
    common += ["--batch", "8", "--questions", "2", "--steps", "6", "--threads", "1", "--closer-share", "0.5"]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "2"}
    runs = {
        "one": ([], [{}]),
        "two": (["--shard-llm"], [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]),
    }
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    for name, (more, environments) in runs.items():
        (tmp_path / f"{name}_seen").mkdir()
        told = ([*common, "--out", str(tmp_path / name), *more], environments, tmp_path / f"{name}_seen")
        multiprocessing.start_processes(adapt, told, nprocs=len(environments), start_method="forkserver")

    ((alone, whole),) = [json.loads(path.read_text()) for path in (tmp_path / "one_seen").iterdir()]
    halves = [json.loads(path.read_text()) for path in sorted((tmp_path / "two_seen").iterdir())]
    assert alone == whole
    assert sum(here for here, _ in halves) == whole
    assert max(here for here, _ in halves) < 0.6 * whole

    taught = [json.loads((tmp_path / name / "work" / "teacher.json").read_text()) for name in runs]
    assert taught[0]["answers"] == taught[1]["answers"]
    assert taught[0]["sure"] == pytest.approx(taught[1]["sure"], abs=1e-5)
    one, two = (torch.load(tmp_path / name / "work" / "training.pt", weights_only=True)["student"] for name in runs)
    assert max(float((weight - two[name]).abs().max()) for name, weight in one.items()) < 1e-4
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in runs]
    assert reports[0]["arms"] == reports[1]["arms"]


@pytest.mark.parametrize(
    ("more", "processes", "message"),
    [
        ([], "1", "start several by torchrun"),
        (["--teacher", "tokens"], "2", "which --teacher tokens leaves out"),
    ],
)
def test_a_model_that_cannot_be_shared_is_refused(
    more: list[str], processes: str, message: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", processes)
    arguments = [str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--shard-llm", *more]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
