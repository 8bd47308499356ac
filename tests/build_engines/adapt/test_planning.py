"""What an adaptation needs, and the teacher that it keeps."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from build_engines.adapt import estimate
from build_engines.adapt.estimate import Needs, Work
from build_engines.adapt.planning import _automatic
from build_engines.adapt.teacher import ANSWERS, LIKELIHOOD, TOKENS
from build_engines.adapt.train import Schedule
from build_engines.convert.options import Refused

GB = 10**9
VICUNA = Work(
    1000, 300, 8000, 1408, Schedule(images=8, closer_images=8), True,
    {"vision_encoder": 10**9, "qformer": 2 * 10**8, "llm": 7 * GB}, 4096, 32,
)  # fmt: skip


def memory(work: Work) -> int:
    return estimate.needs(work, 1e12, cuda=False).memory


def test_the_language_models_backward_pass_counts() -> None:
    """Of 48 questions of a step, or 32 that the teacher is asked at once if they are more."""
    weights = 4 * (8 * GB + 2 * 10**8)
    kept = 48 * 96 * 4096 * 32 * 10 * 4
    assert memory(VICUNA) > weights + kept > weights + 20 * GB
    small = replace(VICUNA, schedule=Schedule(images=1, asked=1, closer_images=0))
    assert memory(small) > weights + 32 * 96 * 4096 * 32 * 10 * 4
    assert memory(replace(VICUNA, language=False)) < 10 * GB


def test_each_process_of_a_machine_holds_its_weights() -> None:
    one, two = memory(VICUNA), memory(replace(VICUNA, processes=2))
    assert two > one + 4 * 8 * GB
    larger = dict(VICUNA.parameters) | {"llm": 14 * GB}
    for shard, times in ((False, 4), (True, 2)):  # shares of all, and the model of the one that loads it
        several = replace(VICUNA, processes=4, shard=shard)
        assert memory(replace(several, parameters=larger)) - memory(several) == times * 4 * 7 * GB


def test_a_gpu_holds_the_weights_and_the_machine_loads_them() -> None:
    alone = estimate.needs(VICUNA, 1e12, cuda=True)
    assert alone.device > 4 * 8 * GB + 20 * GB > alone.memory > 4 * 8 * GB
    shared = estimate.needs(replace(VICUNA, processes=4, shard=True), 1e12, cuda=True)
    assert shared.device < alone.device - 4 * 5 * GB
    assert "on each GPU" in alone.told()
    with pytest.raises(Refused, match=r"needs 5\.0 GB on each GPU; 4\.0 GB are free"):
        estimate.check(Needs(0, 0, 1, 5 * GB), Path("/tmp"), GB, GB, 4 * GB)


def test_the_teacher_of_an_earlier_start_stays_whatever_memory_is_free(tmp_path: Path) -> None:
    options = Namespace(out=tmp_path, shard_llm=False)
    little, much = Needs(0, 0, 1), Needs(10**18, 0, 1)
    assert [_automatic(options, wanted) for wanted in (little, much)] == [LIKELIHOOD, TOKENS]
    (tmp_path / "work").mkdir()
    record = tmp_path / "work" / "job.json"
    for kept in (LIKELIHOOD, TOKENS):
        record.write_text(json.dumps({"teacher": kept}))
        assert [_automatic(options, wanted) for wanted in (little, much)] == [kept, kept]
    for kept in (json.dumps({"teacher": ANSWERS}), "{", "[]"):  # chosen by hand, or cut short
        record.write_text(kept)
        assert [_automatic(options, wanted) for wanted in (little, much)] == [LIKELIHOOD, TOKENS]
    assert _automatic(Namespace(out=tmp_path, shard_llm=True), much) == LIKELIHOOD
