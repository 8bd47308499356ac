"""That the small InstructBLIP is one, and that only what reads the question is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import InstructBlipForConditionalGeneration

from benchmarks import instruct
from benchmarks.adapting import chains_of
from build_engines.adapt.chain import Language, Questions, new_allocator, prompts_of
from build_engines.model.adapted import WEIGHTS
from build_engines.model.checkpoint import Checkpoint, save_allocator
from build_engines.scenes.held_out import NEW
from build_engines.scenes.questions import DESCRIBE
from build_engines.train.evaluation import Arm, answer, held_out_exam

REFERENCE = Path(__file__).parents[2] / "reference"
pytestmark = pytest.mark.slow  # builds and trains models
LEARNING = ("qformer.", "language_projection.", "query_tokens")


def test_a_small_instructblip_reads_the_question_and_trains_its_qformer_alone(tmp_path, monkeypatch):
    for name, value in {"STORED": 6, "FRESH": 3, "IMAGES": 4, "VALIDATED": 4}.items():
        monkeypatch.setattr(instruct, name, value)
    instruct.instructed(REFERENCE, tmp_path)
    checkpoint = Checkpoint.load(tmp_path)
    assert checkpoint.reads_question
    ids, mask = Questions(prompts_of(checkpoint)).tensors(["what colour is the star?", "how many objects are there?"])
    visual = torch.rand(1, 257, 160).expand(2, -1, -1)
    ones = torch.ones(2, 257, dtype=torch.int32)
    first, second = checkpoint.qformer()(visual, ones, ids, mask)
    assert not torch.allclose(first, second, atol=1e-3)
    before = InstructBlipForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    found = instruct.train(tmp_path, steps=2)
    assert 0 <= found["new_all"] <= 1
    after = InstructBlipForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, weight in before.items():
        same = torch.allclose(weight, after[name], rtol=1e-3, atol=1e-6)  # it is rounded to FP16 at the end
        learns = name.startswith(LEARNING)
        assert same or learns, name
    moved = [name for name in before if not torch.equal(before[name].half().float(), after[name])]
    assert any("word_embeddings" in name for name in moved)
    assert any("crossattention" in name for name in moved)


def test_a_training_that_is_over_is_not_repeated(tmp_path, monkeypatch):
    for name, value in {"STORED": 6, "FRESH": 3, "IMAGES": 4, "VALIDATED": 4}.items():
        monkeypatch.setattr(instruct, name, value)
    monkeypatch.setattr("build_engines.train.course.Course.rate", lambda self: 0.0)
    instruct.main(["--out", str(tmp_path), "--reference", str(REFERENCE), "--steps", "2"])
    saved = (tmp_path / "work" / "instruct.pt").stat().st_mtime_ns
    instruct.main(["--out", str(tmp_path), "--reference", str(REFERENCE), "--steps", "2"])
    assert (tmp_path / "work" / "instruct.pt").stat().st_mtime_ns == saved


@torch.no_grad()
def test_the_exam_of_one_answers_as_the_model_itself(tmp_path):
    """Also where the Q-Former reads the question. With the full view the allocator has no choice."""
    instruct.instructed(REFERENCE, tmp_path)
    checkpoint = Checkpoint.load(tmp_path)
    adapted = tmp_path / "adapted"
    adapted.mkdir()
    save_allocator(new_allocator(checkpoint, closer=True, seed=1), adapted / WEIGHTS)
    chains = chains_of(tmp_path, adapted)
    assert chains.keys() == {"adapted", "fixed", "zero-shot"}
    exam = held_out_exam(chains["adapted"], NEW, 3, closely=False, first=500_000)
    questions = Questions(prompts_of(checkpoint))
    texts = [one.question.text for one in exam.asked]
    features = exam.looks.features[[one.scene for one in exam.asked]]
    everything = torch.ones(features.shape[:2], dtype=torch.int32)
    visual = checkpoint.qformer()(features, everything, *questions.tensors(texts))
    said = Language(checkpoint.model.language_model, questions).answer(visual, texts)
    right = [
        ids == questions.answer(one.question.text, one.question.answer)
        for ids, one in zip(said, exam.asked, strict=True)
    ]
    short = [index for index, one in enumerate(exam.asked) if one.question.type != DESCRIBE]
    assert 0 < sum(right[index] for index in short) < len(short)
    full = Arm(vision_tokens=(256, 256))
    for chain in chains.values():
        found = answer(chain, exam, full)
        assert [bool(found.right[index]) for index in short] == [right[index] for index in short]
        assert set(found.vision_tokens.tolist()) == {256}
    few = [answer(chain, exam, Arm(vision_tokens=(112, 112))).levels for chain in chains.values()]
    assert any((few[0] != each).any() for each in few[1:])  # they look elsewhere


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
