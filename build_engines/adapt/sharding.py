"""A language model that is too large for one device: every process keeps a share of each layer's weights.

PyTorch's FSDP gathers one layer after the other as it runs, forward and backward. So all processes must run the same
passes of the language model, also where one process alone would be enough: what they decide by, they take from the main
process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

Made = TypeVar("Made")


@dataclass(frozen=True)
class Peers:
    """The processes of a run. Only with shards must they run the same passes of the language model together."""

    accelerator: Accelerator | None = None  # None: there is one process
    sharded: bool = False  # whether they hold one language model together

    @property
    def is_main(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process

    @property
    def takes_part(self) -> bool:
        """Whether this process takes part in work whose result is needed once."""
        return self.is_main or self.sharded

    @property
    def writes(self) -> bool:
        """Whether this process writes what it computes. If several compute the same, the main process writes."""
        return self.is_main or not self.sharded

    def once(self) -> AbstractContextManager[object]:
        """Let the main process go first, so that the others load what it wrote; all at once if they share a model."""
        if self.accelerator is None or self.sharded:
            return nullcontext()
        return self.accelerator.main_process_first()

    def wait(self) -> None:
        """Wait for the other processes, if they share a model."""
        if self.accelerator is not None and self.sharded:
            self.accelerator.wait_for_everyone()

    def agree(self, values: Tensor) -> Tensor:
        """Return the main process's values: on other devices the last bits may differ, and with them a decision."""
        if self.accelerator is None or not self.sharded:
            return values
        return broadcast(values.to(self.accelerator.device).contiguous()).to(values.device)

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """Make something in one process after the other: a whole model is in memory once at a time."""
        if self.accelerator is None or not self.sharded:
            return make()
        found: list[Made] = []
        for turn in range(self.accelerator.num_processes):
            if turn == self.accelerator.process_index:
                found.append(make())
            self.accelerator.wait_for_everyone()
        return found[0]

    def opened(self, path: Path, mode: Any, shape: tuple[int, ...]) -> np.ndarray:
        """An FP16 array in a file. If this process does not write it, its changes stay in its memory."""
        self.wait()  # every process has seen the file as it was
        if self.writes:
            array = np.memmap(path, np.float16, mode, shape=shape)
        self.wait()
        return array if self.writes else np.memmap(path, np.float16, "c", shape=shape)

    def shard(self, language: nn.Module) -> None:
        """Keep this process's share of each layer, on its device. Embeddings and the head stay whole."""
        if self.accelerator is not None and self.sharded:
            mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
            for layer in layers_of(language):
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def layers_of(language: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the longest list of modules."""
    return max((each for each in language.modules() if isinstance(each, nn.ModuleList)), key=len)
