"""Test the ablations' intervals and arms, and run all once on the shipped weights over a few scenes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.ablate import Plan, main
from benchmarks.ablation import arms
from benchmarks.ablation.arms import ADAPTIVE, fixed
from benchmarks.ablation.exams import Scenes, either
from benchmarks.ablation.measuring import fingerprint, measure
from benchmarks.ablation.report import Json
from build_engines.evaluation import intervals
from build_engines.scenes.held_out import NEW, SMALL
from build_engines.scenes.questions import TYPES
from build_engines.train.evaluation import Answers, Exam
from build_engines.train.selection import CENTRE, GUIDED, RANDOM

pytestmark = pytest.mark.slow

SCENES = 2


def test_a_share_has_wilsons_interval():
    figure = intervals.share(np.array([True] * 81 + [False] * 182))
    assert figure is not None
    assert (figure.low, figure.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert intervals.share(np.array([], bool)) is None


def test_questions_of_one_scene_count_as_one_draw():
    """Ten fully correlated questions per scene count as one: the bootstrap draws scenes, not questions."""
    generator = np.random.default_rng(1)
    each = (generator.random(200) < 0.5).astype(float)
    alone = intervals.mean(each, np.arange(200))
    together = intervals.mean(np.repeat(each, 10), np.repeat(np.arange(200), 10))
    assert alone is not None
    assert together is not None
    assert together.low == pytest.approx(alone.low)
    assert together.high == pytest.approx(alone.high)
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(200), rel=0.1)


def test_pairing_takes_out_what_both_arms_share():
    generator = np.random.default_rng(2)
    theirs = (generator.random(2000) < 0.7).astype(float)
    ours = np.where(np.arange(2000) % 50 == 0, 1.0, theirs)
    found = intervals.mean(ours - theirs, np.arange(2000) // 5)
    assert found is not None
    assert found.value == pytest.approx((ours - theirs).mean())
    assert 0 < found.low < found.value < found.high < 0.02
    assert intervals.mean(ours - ours, np.arange(2000) // 5) == intervals.Figure(0.0, 0.0, 0.0)


def test_a_medians_interval_holds_it():
    figure = intervals.median(np.arange(101.0))
    assert (figure.value, figure.low, figure.high) == (50.0, 40.0, 61.0)


def test_arms_are_told_apart_by_name_and_shared_where_all_cells_are_alike():
    every = [*arms.curves(True), ADAPTIVE, *arms.visual(), *arms.without_tensions()]
    every += [arms.detail(split, level) for split in (NEW, SMALL) for level in (arms.LOW, arms.AUTO, arms.HIGH)]
    by_name = {each.name: each for each in every}
    assert all(by_name[each.name] == each or each.name.endswith(arms.AUTO) for each in every)
    assert fixed(RANDOM, 64) == fixed(GUIDED, 64)
    assert fixed(RANDOM, 256) == fixed(CENTRE, 256)
    assert fixed(RANDOM, 120) != fixed(GUIDED, 120)
    assert not any(each.arm.closer for each in arms.curves(False))


@pytest.mark.parametrize(("mean", "size"), [(64.0, 64), (98.4, 97), (119.0, 118), (256.0, 256)])
def test_a_budget_next_to_a_mean(mean, size):
    assert arms.reachable(mean) == size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def told(folder: Path) -> Json:
    run(folder)
    told: Json = json.loads((folder / "ablation.json").read_text())
    return told


def run(folder: Path) -> None:
    main(["--kept", str(folder / "kept"), "--out", str(folder), "--scenes", str(SCENES), "--small-print", "1",
          "--timed", "1"])  # fmt: skip


def test_every_arm_is_there_and_counts_every_question(told):
    closer = told["closer_view"]
    expected = [*arms.curves(closer), ADAPTIVE, *arms.visual(), *arms.without_tensions()]
    assert {each.name for each in expected} <= set(told["arms"])
    first = {row["split"]: name for name, row in reversed(told["arms"].items())}
    for name, row in told["arms"].items():
        kinds = row["accuracy"]
        counted = [kinds[kind]["n"] for kind in TYPES if kind in kinds]
        assert sum(counted) == kinds["all"]["n"] == told["arms"][first[row["split"]]]["accuracy"]["all"]["n"], name
        for figure in kinds.values():
            assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1, name
        least, most = row["vision_tokens"]
        assert least - 3 * (5 if row["closer"] else 1) < row["mean_vision_tokens"]["value"] <= most, name
        assert row["cost"]["latency_ms"]["all"] > 0


def test_differences_are_those_of_the_arms(told):
    for name, row in told["comparisons"].items():
        assert row["all"]["low"] <= row["all"]["value"] <= row["all"]["high"], name
        ours, theirs = (accuracy(told["arms"][row[side]], row["n"]) for side in ("ours", "theirs"))
        assert row["all"]["value"] == pytest.approx(100 * (ours - theirs), abs=0.02), name
    assert set(told["shown"]) <= set(told["comparisons"])


def accuracy(arm: Json, asked: int) -> float:
    """Return the arm's accuracy over `asked` questions."""
    found = [arm["accuracy"], arm["accuracy_over_all_scenes"]]
    return next(each["all"]["value"] for each in found if each and each["all"]["n"] == asked)


def test_what_must_show_is_asked_of_all_scenes(told):
    for name in ("adaptive less 256 tokens", "adaptive less random of its size"):
        assert told["comparisons"][name]["n"] == told["questions"][NEW]


def test_the_verdict_says_of_each_line_whether_it_shows(told):
    assert len(told["verdict"]) >= 8
    assert all(line["met"] in (True, False, None) for line in told["verdict"].values())
    assert told["checkpoint"] == {"name": "glimpse-reference", "fingerprint": told["checkpoint"]["fingerprint"]}
    assert told["command"] == f"python -m benchmarks.ablate --scenes {SCENES} --small-print 1"


def test_a_page_of_plots_is_drawn(told, folder):
    with Image.open(folder / "ablation.png") as page:
        assert page.size == (1900, 2000)


def test_a_second_run_answers_nothing_again(told, folder):
    kept = {path: path.stat().st_mtime_ns for path in (folder / "kept").rglob("*.*")}
    assert kept
    again = json.loads(json.dumps(measure(Plan(kept=folder / "kept", scenes=SCENES, small_print=1, timed=1))))
    assert {path: path.stat().st_mtime_ns for path in (folder / "kept").rglob("*.*")} == kept
    same = ("arms", "commit", "cost", "verdict")  # may differ: times, and the checkout
    assert {name: value for name, value in again.items() if name not in same} == {
        name: value for name, value in told.items() if name not in same
    }


def test_auto_takes_one_or_the_other_question_by_question():
    def answers(value: int) -> Answers:
        exam = Exam(None, [])  # type: ignore[arg-type]
        columns = (np.full(3, value) for _ in range(4))
        return Answers(exam, *columns, *(np.full((3, width), value) for width in (64, 3, 3)))

    mixed = either(answers(0), answers(1), np.array([True, False, True]))
    assert mixed.right.tolist() == [1, 0, 1]
    assert mixed.tensions[:, 2].tolist() == [1, 0, 1]


def test_answers_are_kept_by_the_weights_that_gave_them(tmp_path: Path):
    for name in ("model", "allocator"):
        (tmp_path / f"{name}.safetensors").write_text(name)
    before = fingerprint(tmp_path)
    for name in ("clip", "clip_language"):
        (tmp_path / f"{name}.safetensors").write_text(name)
    assert fingerprint(tmp_path) == before
    (tmp_path / "allocator.safetensors").write_text("another")
    assert fingerprint(tmp_path) != before


def test_the_defaults_are_those_of_the_shipped_model():
    plan = Plan()
    assert plan.checkpoint.name == "reference"
    assert Scenes(NEW, plan.scenes, plan.kept, plan.kept).number == 1000
