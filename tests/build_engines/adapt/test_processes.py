"""Two processes train the weights that one process trains."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from build_engines.adapt.chain import new_allocator
from build_engines.adapt.train import Drawer, Student, Training, accelerator_of
from service.media.decoder import ImageLimits
from tests.build_engines.adapt.test_resuming import SCHEDULE, Parts
from tests.support.servers import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SHARED = replace(SCHEDULE, closer_images=2)  # a share for each process


def train(rank: int, folder: Path, drawer: Drawer, out: Path, environments: list[dict[str, str]]) -> None:
    """In a process of its own, because accelerate keeps its state in the process."""
    os.environ |= environments[rank]
    torch.set_num_threads(1)
    parts = Parts(folder)
    student = Student(new_allocator(parts.checkpoint, True, 5), parts.reader, parts.language, parts.questions)
    Training(accelerator_of(), student, SHARED, out).run(drawer)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_two_processes_train_the_weights_of_one(tmp_path: Path) -> None:
    """By DDP over gloo, with the environment that torchrun gives.

    None is forked from this process. A PyTorch with CUDA that has exported a graph starts threads at its first backward
    pass, even without a GPU, and then refuses backward passes in a fork.
    """
    torch.set_num_threads(1)
    parts = Parts.written(tmp_path)
    store = parts.store(tmp_path)
    store.fill(parts.checkpoint.vision_encoder(), ImageLimits())
    lessons = parts.teach(store, tmp_path)
    drawer = Drawer(store, parts.asked(store), lessons, SHARED, torch.device("cpu"))
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "2"}
    environments = {"one": [{}], "two": [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]}
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    for name, several in environments.items():
        (tmp_path / name).mkdir()
        told = (tmp_path, drawer, tmp_path / name, several)
        multiprocessing.start_processes(train, told, nprocs=len(several), start_method="forkserver")
    one, two = (torch.load(tmp_path / name / "training.pt", weights_only=True)["student"] for name in environments)
    furthest = max(float((weight - two[name]).abs().max()) for name, weight in one.items())
    assert furthest < 1e-4
    start = new_allocator(parts.checkpoint, True, 5).state_dict()["participatory.patch.weight"]
    assert (one["allocator.participatory.patch.weight"] - start).abs().max() > 1e-3
