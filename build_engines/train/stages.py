"""Parts that all stages share: sizes, devices, compilation and optimizers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Blip2Config, PreTrainedTokenizerFast

from build_engines.model.checkpoint import Checkpoint
from build_engines.train.architecture import new_config
from build_engines.train.muon import Fp32Muon
from service.core.precision import Cpu

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Plan:
    """Settings of a whole training run. Step numbers are for scale 1; `scale` changes every stage."""

    out: Path
    scale: float = 1.0
    compiled: bool = True
    tiny: bool = False  # sizes for a smoke test of a few seconds
    large_budgets: bool = False  # stage `allocator`: large budgets of vision tokens more often, 2:3:5
    start: Path | None = None  # a published checkpoint to go on from
    adapter_rank: int = 0  # stage `allocator`: rank of LoRA on the language model; 0 leaves it frozen

    @property
    def settings(self) -> dict[str, Any]:
        """What a stage's data, batch, rates and steps depend on, by option: alike at every start of it."""
        return {
            "--scale": self.scale,
            "--tiny": self.tiny,
            "--start": str(self.start.resolve()) if self.start else "none",
            "--large-budgets": self.large_budgets,
            "--adapter-rank": self.adapter_rank,
        }

    def steps(self, number: int) -> int:
        return 3 if self.tiny else max(4, round(number * self.scale))

    def size(self, number: int, tiny: int) -> int:
        return tiny if self.tiny else number

    def config(self, tokenizer: PreTrainedTokenizerFast) -> Blip2Config:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        return new_config(len(tokenizer), sizes, layers=1) if self.tiny else new_config(len(tokenizer))

    def published(self) -> Checkpoint:
        """The checkpoint to go on from. Only for a plan with a start."""
        return Checkpoint.load(cast(Path, self.start))

    def finished(self, stage: str) -> dict[str, dict[str, Any]]:
        """The state dicts that a finished stage saved."""
        path = self.out / f"{stage}.pt"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run the stage {stage!r} first")
        modules: dict[str, dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=False)["modules"]
        return modules


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensor(array: np.ndarray) -> Tensor:
    """Move the array to the model's device."""
    return torch.from_numpy(array).to(device())


@cache
def has_bfloat16() -> bool:
    """Whether the device multiplies in bfloat16. A CPU without it takes 40 times as long as in FP32."""
    return device().type != "cpu" or bool(Cpu.of(CPUINFO.read_text()).bf16)


def mixed() -> torch.autocast:
    """bfloat16 for operations that tolerate it: matrix products."""
    return torch.autocast(device().type, dtype=torch.bfloat16, enabled=has_bfloat16())


def faster(function: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    """Compile if the plan says so: about 1.5 times as fast on a CPU with AVX-512."""
    return torch.compile(function) if plan.compiled else function


def set_threads(threads: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)


def muon_and_adam(
    bodies: Sequence[nn.Module], others: Sequence[nn.Parameter], muon: float, adam: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer bodies; AdamW for their other parameters and for `others`."""
    kind = torch.optim.Muon if has_bfloat16() else Fp32Muon
    inner = [p for body in bodies for p in body.parameters()]
    return [
        kind([p for p in inner if p.ndim == 2], lr=muon, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(
            [p for p in inner if p.ndim != 2] + list(others), lr=adam, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]
