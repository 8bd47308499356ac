"""Killed, changed or damaged steps: outputs are whole, and the final result is always the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from build_engines.convert import devices
from build_engines.convert.__main__ import code_files
from build_engines.convert.plan import Step, keyed
from build_engines.convert.run import TOOL, digests, is_done, publish, run
from build_engines.replacing import recover


def test_a_plan_of_another_gpu_is_made_again_where_there_is_one(tmp_path: Path) -> None:
    (step,) = keyed([Step("plan a", "write", "", settings={"text": "a"})], {})

    def write(_: Step, out: Path) -> None:
        (out / TOOL).write_text(json.dumps({"tensorrt": "10.14.1.48", "device": "H200, 9.0"}))

    run([step], tmp_path, write, Log())
    assert is_done(tmp_path, step, "H200, 9.0")
    assert is_done(tmp_path, step, "")  # a machine without a GPU could not repeat it
    assert not is_done(tmp_path, step, "L40S, 8.9")
    log = Log()
    run([step], tmp_path, write, log, done=())
    assert log.told[0] == ("begun", "plan a")


def test_the_gpu_is_what_the_driver_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.gpu() == ""
    tool = tmp_path / "nvidia-smi"
    for script, told in (("echo 'NVIDIA H200, 9.0'; echo 'NVIDIA L40S, 8.9'", "NVIDIA H200, 9.0"), ("exit 9", "")):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert devices.gpu() == told


PHASES = ("begun", "made", "finished")


def steps(setting: int = 1) -> list[Step]:
    found = [
        Step("first", "write", "", settings={"text": "one"}),
        Step("second thing", "write", "", needs=("first",), settings={"text": f"two {setting}"}),
        Step("third", "write", "", needs=("first", "second thing"), settings={"text": "three"}),
    ]
    return keyed(found, {"format": 1})


class Log:
    """Records events by step, and kills the process at a chosen one."""

    def __init__(self, dies_at: tuple[str, str] = ("", "")) -> None:
        self.told: list[tuple[str, str]] = []
        self.dies_at = dies_at

    def _tell(self, what: str, step: Step) -> None:
        self.told.append((what, step.name))
        if (what, step.name) == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def skipped(self, step: Step) -> None:
        self._tell("skipped", step)

    def begun(self, step: Step) -> None:
        self._tell("begun", step)

    def made(self, step: Step) -> None:
        self._tell("made", step)

    def finished(self, step: Step) -> None:
        self._tell("finished", step)


def make(work: Path):
    def write(step: Step, out: Path) -> None:
        read = [(work / name.replace(" ", "-") / "text").read_text() for name in step.needs]
        (out / "text").write_text(" ".join([*read, step.settings["text"]]))

    return write


def until_death(work: Path, dies_at: tuple[str, str]) -> None:
    run(steps(), work, make(work), Log(dies_at))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", [step.name for step in steps()])
def test_a_run_killed_anywhere_ends_the_same(tmp_path: Path, phase: str, name: str) -> None:
    untouched, work = tmp_path / "untouched", tmp_path / "work"
    run(steps(), untouched, make(untouched), Log())
    process = multiprocessing.get_context("spawn").Process(target=until_death, args=(work, (phase, name)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for step in steps():  # a step's folder appears only when it is complete
        folder = work / step.folder
        assert not folder.exists() or digests(folder) == digests(untouched / step.folder)
    log = Log()
    run(steps(), work, make(work), log)
    assert digests(work) == digests(untouched)
    assert [step for what, step in log.told if what == "begun"][:1] == [
        step.name for step in steps() if (step.name == name and phase != "finished") or step.name > name
    ][:1]  # finished steps do not run again


def test_only_what_a_change_reaches_is_made_again(tmp_path: Path) -> None:
    run(steps(), tmp_path, make(tmp_path), Log())
    log = Log()
    run(steps(), tmp_path, make(tmp_path), log)
    assert {what for what, _ in log.told} == {"skipped"}
    log = Log()
    run(steps(setting=2), tmp_path, make(tmp_path), log)
    assert [(what, step) for what, step in log.told if what in ("skipped", "begun")] == [
        ("skipped", "first"), ("begun", "second thing"), ("begun", "third"),
    ]  # fmt: skip
    assert (tmp_path / "third" / "text").read_text() == "one one two 2 three"


def test_a_step_whose_files_were_touched_is_made_again(tmp_path: Path) -> None:
    (first, *_) = steps()
    run([first], tmp_path, make(tmp_path), Log())
    assert is_done(tmp_path, first)
    (tmp_path / "first" / "text").write_text("spoilt")
    assert not is_done(tmp_path, first)
    run([first], tmp_path, make(tmp_path), Log())
    assert (tmp_path / "first" / "text").read_text() == "one"
    (tmp_path / "first" / "done.json").write_text("{")
    assert not is_done(tmp_path, first)


def test_a_step_that_fails_leaves_what_was_made_before_it(tmp_path: Path) -> None:
    def fails_at_third(step: Step, out: Path) -> None:
        make(tmp_path)(step, out)
        if step.name == "third":
            raise ValueError("no third")

    with pytest.raises(ValueError, match="no third"):
        run(steps(), tmp_path, fails_at_third, Log())
    assert [is_done(tmp_path, step) for step in steps()] == [True, True, False]
    assert not (tmp_path / "third").exists()


def repository(folder: Path, text: str) -> Path:
    (folder / "llm" / "1").mkdir(parents=True)
    (folder / "card.json").write_text(text)
    (folder / "llm" / "1" / "model.onnx").write_bytes(b"0" * 20_000_000)
    (folder / "done.json").write_text(json.dumps({}))
    return folder


def test_a_repository_takes_its_place_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(repository(tmp_path / "a", "a"), out)
    publish(repository(tmp_path / "b", "b"), out)
    assert (out / "card.json").read_text() == "b"
    assert not (out / "done.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
    assert (out / "llm/1/model.onnx").samefile(tmp_path / "b/llm/1/model.onnx")  # large files are not copied
    assert not (out / "card.json").samefile(tmp_path / "b/card.json")


def test_a_kill_between_two_names_is_mended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    publish(repository(tmp_path / "a", "a"), out)
    out.rename(tmp_path / ".out.old")  # a killed `publish` can stop here
    repository(tmp_path / ".out.new", "half")
    recover(out)
    assert (out / "card.json").read_text() == "a"
    publish(tmp_path / "a", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_a_change_of_what_the_outputs_depend_on_builds_them_again():
    names = {f"{path.parent.name}/{path.name}" for path in code_files()}
    assert names >= {"convert/steps.py", "model/allocator.py", "build_engines/repository.py", "core/tensors.py"}
    assert names >= {"scenes/render.py", "core/card.py", "core/confidence.py", "media/decoder.py", "text/prompt.py"}
    assert all(path.is_file() for path in code_files())
