"""Data parallelism on CPU cores: one process a core, with averaged gradients.

Small matrices do not fill several threads. Two processes with one thread each train nearly twice as fast as one process
with two threads.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable

import torch
from torch import distributed, multiprocessing

from build_engines.train.stages import Plan, set_threads


def run_replicas(stage: Callable[[Plan], None], plan: Plan, number: int) -> None:
    """Run a stage in `number` processes. A single one is this process."""
    if number == 1:
        stage(plan)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_replica, (stage, plan, number, port), nprocs=number)


def _replica(rank: int, stage: Callable[[Plan], None], plan: Plan, number: int, port: int) -> None:
    set_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=number)
    stage(plan)
    distributed.barrier()
    distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average gradients over all replicas, in place, in one message."""
    if size() == 1:
        return
    present = [p for p in parameters if p.requires_grad]
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in present]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= size()
    for parameter, part in zip(present, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)
