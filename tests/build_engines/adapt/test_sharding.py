"""Two processes that hold one language model together adapt as one process does that holds it alone."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.tensor import DTensor

from build_engines.adapt import estimate, run
from build_engines.adapt.__main__ import main
from build_engines.adapt.chain import Language
from build_engines.adapt.data import Asked
from build_engines.adapt.features import FeatureStore
from build_engines.adapt.sharding import layers_of
from build_engines.adapt.teacher import Lessons, Teacher
from tests.build_engines.adapt.test_adapting import write_data
from tests.support.servers import free_ports
from tests.support.tiny_checkpoints import save_blip2_flan_t5, save_blip2_opt

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Killed(Exception):
    pass


class Small(Teacher):
    """A teacher that in a first run ends after some questions, as a kill would."""

    stops = False

    def teach(self, asked: list[Asked], store: FeatureStore, work: Path, stop_after: int | None = None) -> Lessons:
        found = super().teach(asked, store, work, 3 if self.stops else None)
        if self.stops:
            raise Killed
        return found


class Held(Language):
    """A language model that notes how many of its layers' weights this process holds, whole and after each pass."""

    seen: list[int]

    def count(self) -> int:
        weights = [weight for layer in layers_of(self._model) for weight in layer.parameters()]
        return sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in weights)

    def speak(self, *given: Any) -> Any:
        said = super().speak(*given)
        self.seen.append(self.count())
        return said

    def answer(self, *given: Any) -> Any:
        said = super().answer(*given)
        self.seen.append(self.count())
        return said


def adapt(rank: int, arguments: list[str], environments: list[dict[str, str]], seen: Path, stops: bool) -> None:
    """In a process of its own: `glimpse adapt`, which tells what this process holds of the language model."""
    os.environ |= environments[rank]
    Small.stops, Held.seen = stops, []
    run.Teacher, run.Language = partial(Small, batch=4), Held
    if stops:
        with pytest.raises(Killed):
            main(arguments)
    else:
        assert main(arguments) == 0
    (seen / f"held_{rank}.json").write_text(json.dumps([min(Held.seen), max(Held.seen)]))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_two_processes_with_half_a_language_model_each_adapt_as_one_with_all(tmp_path: Path) -> None:
    """The two are killed once, while they teach."""
    save_blip2_opt(tmp_path / "checkpoint")
    write_data(tmp_path / "data")
    common = [str(tmp_path / "checkpoint"), "--data", str(tmp_path / "data")]
    common += ["--batch", "8", "--questions", "2", "--steps", "6", "--threads", "1", "--closer-share", "0.5"]
    runs = {"one": [], "two": ["--shard-llm"]}
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    for name, more in runs.items():
        (tmp_path / f"{name}_seen").mkdir()
        for stops in (True, False) if more else (False,):
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "2"}
            several = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)] if more else [{}]
            told = ([*common, "--out", str(tmp_path / name), *more], several, tmp_path / f"{name}_seen", stops)
            multiprocessing.start_processes(adapt, told, nprocs=len(several), start_method="forkserver")
            if stops:
                assert json.loads((tmp_path / name / "work" / "teacher.json").read_text())["done"] == 12

    ((alone, whole),) = [json.loads(path.read_text()) for path in (tmp_path / "one_seen").iterdir()]
    halves = [json.loads(path.read_text()) for path in sorted((tmp_path / "two_seen").iterdir())]
    assert alone == whole
    assert sum(least for least, _ in halves) == whole
    assert (
        max(most for _, most in halves) < 0.6 * whole
    )  # also after a pass, with and without a backward pass behind it

    taught = [json.loads((tmp_path / name / "work" / "teacher.json").read_text()) for name in runs]
    assert taught[0]["answers"] == taught[1]["answers"]
    assert taught[0]["sure"] == pytest.approx(taught[1]["sure"], abs=1e-5)
    one, two = (torch.load(tmp_path / name / "work" / "training.pt", weights_only=True)["student"] for name in runs)
    assert max(float((weight - two[name]).abs().max()) for name, weight in one.items()) < 1e-4
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in runs]
    assert reports[0]["teacher"] == reports[1]["teacher"] == "likelihood"
    assert reports[0]["arms"] == reports[1]["arms"]


def test_a_language_model_that_cannot_teach_cannot_be_shared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    save_blip2_flan_t5(tmp_path / "checkpoint")
    write_data(tmp_path / "data")
    arguments = [str(tmp_path / "checkpoint"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--shard-llm"]) == 2
    assert "can only be adapted by --teacher tokens" in capsys.readouterr().err


def test_a_shared_language_model_that_does_not_fit_is_told_by_its_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process could decide otherwise by itself for a teacher that needs less."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(estimate, "available_memory", lambda: 1_000_000)
    save_blip2_opt(tmp_path / "checkpoint")
    write_data(tmp_path / "data")
    arguments = [str(tmp_path / "checkpoint"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--shard-llm"]) == 2
    assert "of memory; 0.0 GB are free" in capsys.readouterr().err


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
