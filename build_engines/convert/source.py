"""What a build knows about its checkpoint before it reads the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

INSTRUCT = "InstructBlipForConditionalGeneration"


@dataclass(frozen=True)
class Source:
    """One checkpoint that was inspected and can be built. Its weights are not in memory."""

    directory: Path
    name: str
    family: str  # the architecture's class name
    language: str  # "opt" or "llama"
    vision_width: int  # D
    hidden_size: int  # H
    vocab_size: int  # V: visual ids start here
    max_positions: int
    parameters: Mapping[str, int]  # by component: vision_encoder, qformer, llm
    closer_view: bool = False  # whether its allocator has a closer view
    files: tuple[Path, ...] = ()  # everything that a build reads

    @property
    def reads_question(self) -> bool:
        """Whether the Q-Former reads the question, as InstructBLIP's does."""
        return self.family == INSTRUCT

    def digests(self) -> dict[str, str]:
        """blake3 of each file, by its name in the checkpoint."""
        return {str(path.relative_to(self.directory)): file_digest(path) for path in self.files}


def file_digest(path: Path) -> str:
    """blake3 in hex."""
    return (
        blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest() if path.stat().st_size else blake3().hexdigest()
    )
