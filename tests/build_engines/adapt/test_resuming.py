"""A training that is killed again and again ends as one that was not; features and lessons continue too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from build_engines.adapt import data
from build_engines.adapt.chain import Language, Questions, Reader, new_allocator, prompts_of
from build_engines.adapt.data import Data
from build_engines.adapt.features import FeatureStore
from build_engines.adapt.teacher import LIKELIHOOD, Lessons, Teacher
from build_engines.adapt.train import Drawer, Schedule, Student, Training, accelerator_of
from build_engines.model.allocation import Allocation
from build_engines.model.checkpoint import Checkpoint
from service.media.decoder import ImageLimits
from tests.build_engines.adapt.test_adapting import write_data
from tests.support.tiny_checkpoints import save_blip2_opt

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SCHEDULE = Schedule(steps=5, relevance_steps=3, images=2, asked=2, closer_images=1, map_images=2, checkpoint_s=1e9)


class Parts:
    """The parts of an adaptation, on a tiny checkpoint."""

    def __init__(self, folder: Path) -> None:
        """Read what `written` wrote."""
        self.found: Data = data.read(folder / "data")
        self.checkpoint = Checkpoint.load(folder / "checkpoint")
        self.checkpoint.model.requires_grad_(False)
        self.questions = Questions(prompts_of(self.checkpoint))
        self.reader = Reader(self.checkpoint.qformer(), False)
        self.language = Language(self.checkpoint.model.language_model, self.questions)

    @classmethod
    def written(cls, folder: Path) -> Parts:
        save_blip2_opt(folder / "checkpoint")
        write_data(folder / "data")
        return cls(folder)

    def store(self, work: Path) -> FeatureStore:
        return FeatureStore(work, self.found.images, 48, 3, "encoder")

    def teach(self, store: FeatureStore, work: Path, stop_after: int | None = None) -> Lessons:
        teacher = Teacher(self.reader, self.language, self.questions, Allocation(), LIKELIHOOD, batch=4)
        return teacher.teach(self.asked(store), store, work, stop_after)

    def asked(self, store: FeatureStore) -> list[data.Asked]:
        return [one for one in self.found.questions if one.image not in store.broken]

    def training(self, out: Path, lessons: str = "") -> Training:
        out.mkdir(exist_ok=True)
        student = Student(new_allocator(self.checkpoint, True, 5), self.reader, self.language, self.questions)
        return Training(accelerator_of(), student, SCHEDULE, out, lessons)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    torch.set_num_threads(1)
    return Parts.written(tmp_path_factory.mktemp("parts"))


def test_features_and_lessons_continue_after_a_kill(parts: Parts, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    encoder = parts.checkpoint.vision_encoder()
    store = parts.store(whole)
    store.fill(encoder, ImageLimits())
    assert [reason.split(":")[0] for reason in store.broken.values()] != []
    parts.store(stopped).fill(encoder, ImageLimits(), stop_after=0)
    again = parts.store(stopped)
    again.fill(encoder, ImageLimits())
    assert (again.features == store.features).all()
    assert again.closer == store.closer
    lessons = parts.teach(store, whole)
    for _ in range(3):
        parts.teach(again, stopped, stop_after=1)
    resumed = parts.teach(parts.store(stopped), stopped)
    assert resumed.answers == lessons.answers
    assert (resumed.importance == lessons.importance).all()
    assert lessons.importance.max() == 1.0


def test_other_images_start_the_features_again(parts: Parts, tmp_path: Path) -> None:
    encoder = parts.checkpoint.vision_encoder()
    parts.store(tmp_path).fill(encoder, ImageLimits())
    other = FeatureStore(tmp_path, parts.found.images[:5], 48, 3, "encoder")
    assert other.features.shape[0] == 5
    assert not other.features.any()


def test_a_training_killed_three_times_ends_as_one_that_was_not(parts: Parts, tmp_path: Path) -> None:
    store = parts.store(tmp_path)
    store.fill(parts.checkpoint.vision_encoder(), ImageLimits())
    lessons = parts.teach(store, tmp_path)
    drawer = Drawer(store, parts.asked(store), lessons, SCHEDULE, torch.device("cpu"))
    whole = parts.training(tmp_path / "whole")
    whole.run(drawer)
    for steps, lost in ((2, 1), (3, 2), (1, 0)):  # saved, and lost with the kill
        training = parts.training(tmp_path / "killed")
        training.run(drawer, stop_after=steps)
        training.save()
        training.run(drawer, stop_after=lost)
    last = parts.training(tmp_path / "killed")
    assert last.step == 6  # past the steps of relevance alone
    last.run(drawer)
    assert last.finished
    assert parts.training(tmp_path / "killed").finished
    assert parts.training(tmp_path / "killed", "other lessons").step == 0
    for name, weight in whole.student.state_dict().items():
        assert torch.equal(weight, last.student.state_dict()[name]), name
    start = new_allocator(parts.checkpoint, True, 5).state_dict()
    assert not torch.equal(start["participatory.patch.weight"], whole.student.allocator.participatory.patch.weight)


def test_relevance_is_settled_once_and_stays_as_it_is(parts: Parts, tmp_path: Path) -> None:
    store = parts.store(tmp_path)
    store.fill(parts.checkpoint.vision_encoder(), ImageLimits())
    drawer = Drawer(store, parts.asked(store), parts.teach(store, tmp_path), SCHEDULE, torch.device("cpu"))
    training = parts.training(tmp_path / "settled")
    training.run(drawer, relevance=True)
    assert (training.step, training.finished) == (SCHEDULE.relevance_steps, False)
    student = training.student
    before = student.relevance(drawer)
    for _ in range(2):  # a continued training settles again
        student.settle_level(drawer)
        found = student.relevance(drawer)
        greatest = np.sort(found.max(1))
        assert greatest[(len(greatest) - 1) // 2] == pytest.approx(0.9, abs=1e-4)  # the median
    assert (found.argmax(1) == before.argmax(1)).all()
    training.run(drawer)
    assert training.finished
    assert (student.relevance(drawer) == found).all()
