"""What a build knows about its checkpoint before it reads the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from build_engines.model.adapted import FILES as ADAPTED

INSTRUCT = ("InstructBlipForConditionalGeneration", "InstructBlipVideoForConditionalGeneration")
BLIP2, IMAGE_TEXT = "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"
IMAGE_TEXT_FILES = (".json", ".safetensors", ".txt")  # of the image-text checkpoint, by their endings
IDEFICS = "IdeficsForVisionText2Text"


@dataclass(frozen=True)
class Source:
    """One checkpoint that was inspected and can be built. Its weights are not in memory."""

    directory: Path
    name: str
    family: str  # the architecture's class name
    language: str  # "opt", "llama", "t5" or "idefics"
    vision_width: int  # D
    hidden_size: int  # H, the width of a visual token
    vocab_size: int  # V: visual ids start here
    max_positions: int
    parameters: Mapping[str, int]  # by component: vision_encoder, qformer, llm
    language_layers: int = 0  # of the language model
    closer_view: bool = False  # whether its allocator has a closer view
    clip: bool = False  # whether it has a clip resampler
    clip_weights: bool = False  # whether its language model has other weights for clips and several images
    files: tuple[Path, ...] = ()  # everything that a build reads
    zero_shot: bool = False  # whether a Q-Former that reads the question says where to look
    image_text: Path | None = None  # the checkpoint of that Q-Former, if it is not the own one
    allocator: Path | None = None  # a folder that `glimpse adapt` wrote, in place of the checkpoint's own allocator

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model has an encoder, as FlanT5 does."""
        return self.language == "t5"

    @property
    def is_idefics(self) -> bool:
        """Whether the language model sees images by cross-attention, and a resampler stands in the Q-Former's place."""
        return self.family == IDEFICS

    @property
    def has_prompt_reader(self) -> bool:
        """Whether a graph of its own reads a prompt, or its images, before the language model's decoder."""
        return self.is_encoder_decoder or self.is_idefics

    @property
    def reads_question(self) -> bool:
        """Whether the Q-Former reads the question, as InstructBLIP's does."""
        return self.family in INSTRUCT

    def digests(self) -> dict[str, str]:
        """blake3 of each file, by its name in the checkpoint; the adapted allocator's as allocator/NAME."""
        found = {str(path.relative_to(self.directory)): file_digest(path) for path in self.files}
        if self.allocator is not None:
            beside = [self.allocator / name for name in ADAPTED]
            found |= {f"allocator/{path.name}": file_digest(path) for path in beside if path.exists()}
        if self.image_text is not None:
            beside = [path for path in self.image_text.iterdir() if path.suffix in IMAGE_TEXT_FILES]
            found |= {f"image_text/{path.name}": file_digest(path) for path in sorted(beside)}
        return found | ({"allocator": "zero-shot"} if self.zero_shot else {})


def file_digest(path: Path) -> str:
    """blake3 in hex."""
    return (
        blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest() if path.stat().st_size else blake3().hexdigest()
    )
