"""Run a repository's ONNX graphs in this process: encoder, allocator, Q-Former, LLM. No server is needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from service.core.card import ModelCard
from service.core.prompt import Prompt
from service.core.request import Budget, Sampling
from service.core.vision import (
    CELLS,
    CLOSER_SIZE,
    GRID,
    IMAGE_SIZE,
    CloserFeatures,
    FloatArray,
    Relevance,
    Seen,
    UInt8Array,
    VisionFeatures,
)
from service.media.decoder import ImageLimits, decode
from service.text.prompt import PromptBuilder
from triton_models.batcher import Batcher, Limits
from triton_models.batcher import Sequence as Running
from triton_models.language_model import open_language_model
from triton_models.query_groups import GroupRunner
from triton_models.session import Graph

MAX_QUEUE = 1024
VISION = ("features", "saliency", "entropy", "texture")
ALLOCATED = ("vision_tokens", "vision_mask", "query_groups", "relevance", "scores", "levels", "tensions")


@dataclass(frozen=True, slots=True)
class View:
    """The encoder's output for one image, with the closer view if it was asked for."""

    vision: VisionFeatures
    closer: CloserFeatures | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """A greedy answer. `log_prob` sums the model's own log probabilities of all its tokens, the end token included."""

    text: str
    log_prob: float
    tokens: int


class Chain:
    """Answer questions with the graphs of a repository of the profile `embedded`."""

    def __init__(self, repository: Path, threads: int = 1) -> None:
        """Raises ValueError if card.json is no card, FileNotFoundError for a missing file."""

        def graph(model: str) -> Graph:
            return Graph(repository / model / "1" / "model.onnx", threads)

        self.card = ModelCard.from_json((repository / "card.json").read_text())
        self.prompts = PromptBuilder.load(self.card, repository)
        self._encoder, self._allocator = graph("vision_encoder"), graph("relevance_allocator")
        self._closer = graph("relevance_allocator_448") if self.card.closer_view else None
        self._clip = graph("attend_clip") if self.card.clip is not None else None
        self._qformer = GroupRunner(repository / "qformer" / "1" / "model.onnx", threads)
        self._decoder = open_language_model(
            repository / "llm" / "1" / "model.onnx", self.card, max_rows=32, intra_op_threads=threads
        )
        self._batcher = Batcher(self._decoder, Limits(max_queue=MAX_QUEUE, max_prefill_tokens=1600))

    @classmethod
    def load(cls, repository: Path, threads: int = 1) -> Self:
        return cls(repository, threads)

    def look(self, data: bytes, *, closely: bool = False) -> View:
        """Decode an image's file as the gateway does, and encode it."""
        decoded = decode(data, ImageLimits(), (IMAGE_SIZE, CLOSER_SIZE) if closely else (IMAGE_SIZE,))
        (vision,) = self._encode(decoded.pixels[np.newaxis])
        return View(vision, CloserFeatures.joined(list(self._encode(decoded.crops))) if closely else None)

    def _encode(self, images: UInt8Array) -> Iterator[VisionFeatures]:
        for image in images:
            yield VisionFeatures(*(each[0] for each in self._encoder.run({"image": image[np.newaxis]}, VISION)))

    def attend(self, view: View, question: str, budget: Budget) -> Seen:
        """Choose vision tokens for the question, and make visual tokens of them."""
        asked, vision = self.prompts.question(question), view.vision
        feeds = {name: getattr(vision, name)[np.newaxis] for name in VISION} | {
            "question_ids": asked.ids[np.newaxis],
            "question_mask": asked.mask[np.newaxis],
            "budget": budget.to_array()[np.newaxis],
        }
        allocator = self._allocator
        if view.closer is not None and self._closer is not None:
            allocator = self._closer
            feeds["detail_features"] = view.closer.features[np.newaxis]
        feeds = {name: feeds[name] for name in allocator.inputs}
        found = dict(zip(ALLOCATED, allocator.run(feeds, ALLOCATED), strict=True))
        question_fed = {name: each for name, each in feeds.items() if name.startswith("question_")}
        visual = self._qformer.run({name: found[name] for name in ALLOCATED[:3]} | question_fed)
        relevance = Relevance(
            map=found["relevance"][0].reshape(GRID, GRID),
            scores=found["scores"][0].reshape(3, GRID, GRID),
            levels=found["levels"][0].reshape(CELLS, CELLS),
            tensions=found["tensions"][0],
        )
        tokens = visual["visual_tokens"][0, : int(visual["visual_count"][0, 0])].copy()
        return Seen(tokens, relevance, budget, "low" if view.closer is None else "high")

    def attend_clip(
        self, frames: Sequence[VisionFeatures], times: Sequence[float], question: str, budget: Budget
    ) -> FloatArray:
        """Make visual tokens [64, H] of a whole clip. Only for a card with a clip resampler."""
        asked = self.prompts.question(question)
        feeds = {name: np.stack([getattr(frame, name) for frame in frames]) for name in VISION} | {
            "times": np.array(times, np.float32),
            "question_ids": asked.ids,
            "question_mask": asked.mask,
            "clip_budget": np.array(budget.vision_tokens, np.int32),
        }
        if self._clip is None:
            raise ValueError(f"{self.card.name} has no clip resampler")
        (visual_tokens,) = self._clip.run(feeds, ["visual_tokens"])
        return visual_tokens

    def answer(self, asked: Iterable[tuple[Seen, str]], max_tokens: int = 64) -> list[Said]:
        """Answer questions, each about what was seen of one image for it. They share batches."""
        return self.answer_prompts(
            (
                self.prompts.compose(question, [(seen.visual_tokens, str(number).encode())])
                for number, (seen, question) in enumerate(asked)
            ),
            max_tokens,
        )

    def answer_prompts(self, prompts: Iterable[Prompt], max_tokens: int = 64) -> list[Said]:
        """Answer prompts. They share batches."""
        card, sequences, ids = self.card, [], {}
        for number, prompt in enumerate(prompts):
            room = card.max_positions - prompt.input_ids.size
            sampling = Sampling(max_tokens=min(max_tokens, room), streaming=False, log_probs=True)
            sequences.append(Running(str(number), prompt, sampling, card.end_id, owner=number))
            ids[number] = []
        waiting = list(reversed(sequences))
        while waiting or self._batcher.running or self._batcher.waiting:
            while waiting and self._batcher.waiting < MAX_QUEUE:
                self._batcher.submit(waiting.pop())
            for event in self._batcher.iterate():
                if event.error is not None:
                    raise RuntimeError(event.error)
                if event.token is not None and event.token != card.end_id:
                    ids[event.sequence.owner].append(event.token)
        return [
            Said(self.prompts.tokenizer.decode(ids[each.owner]).strip(), each.log_prob, each.generated)
            for each in sequences
        ]
