"""The chain that is adapted: a frozen checkpoint, and the allocator in front of its Q-Former."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.adapt.sharding import Peers
from build_engines.export import card
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.checkpoint import Checkpoint
from build_engines.model.closer import CloserView
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.model.qformer import InstructQFormer, QFormer
from service.text.prompt import PromptBuilder

ALONE = Peers()
IGNORED = -100  # no target
SPACE = "\u2581"  # of SentencePiece's vocabularies
MOST_ANSWER = 10  # tokens of the teacher's answer; a longer one is cut


def new_allocator(checkpoint: Checkpoint, closer: bool, seed: int) -> RelevanceAllocator:
    """An untrained allocator of the checkpoint's sizes, with the same weights for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = checkpoint.model.config
        width = config.vision_config.hidden_size
        words = config.qformer_config if checkpoint.reads_question else config.text_config
        participatory = ParticipatoryKnowing(words.vocab_size, width)
        balancing = OpponentProcessing(participatory.coupling_width)
        return RelevanceAllocator(participatory, balancing, CloserView(width) if closer else None)


def prompts_of(checkpoint: Checkpoint) -> PromptBuilder:
    """The server's own prompts. Raises ValueError for a model_card.json with wrong values."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = checkpoint.tokenizers(folder)
        beside = folder / "all"
        beside.mkdir()
        for name, path in files.items():
            (beside / name).write_bytes(path.read_bytes())
        return PromptBuilder.load(card(checkpoint), beside)


class Questions:
    """Turn questions into ids for the allocator and the LLM, as the server does."""

    def __init__(self, prompts: PromptBuilder) -> None:
        self._prompts = prompts
        self.end_id, self.pad_id = prompts.card.end_id, prompts.card.pad_id
        self._question = lru_cache(100_000)(self._read)
        self._text = lru_cache(100_000)(lambda text: tuple(prompts.text_ids(text)))

    def _read(self, text: str) -> tuple[Tensor, Tensor]:
        asked = self._prompts.question(text)
        return torch.from_numpy(asked.ids), torch.from_numpy(asked.mask)

    def tensors(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask, int32 [R, 32]."""
        ids, mask = zip(*(self._question(text) for text in texts), strict=True)
        return torch.stack(ids), torch.stack(mask)

    def text(self, question: str) -> tuple[int, ...]:
        """The ids after the visual tokens: BOS and the template with the question."""
        return self._text(question)

    def answer(self, question: str, text: str) -> list[int]:
        """The ids of an answer, without the end: its text follows the prompt after a space.

        They are read behind the prompt, because tokenizers of Llamas put a space of their own before a text.
        """
        prompt = self._prompts.card.prompt_template.replace("{question}", question)
        before, whole = self._ids(prompt), self._ids(f"{prompt} {text.strip()}")
        if whole[: len(before)] == before:
            return whole[len(before) :][:MOST_ANSWER]
        alone = self._ids(f" {text.strip()}")  # the answer's first letters join the prompt's last token
        stray = len(alone) > 1 and self._prompts.tokenizer.id_to_token(alone[0]) == SPACE
        return alone[stray : MOST_ANSWER + stray]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._prompts.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


@dataclass(frozen=True)
class Spoken:
    """How the language model takes given answers, one a row."""

    losses: Tensor  # [R], mean cross-entropy of the answer's tokens, nats
    right: Tensor  # bool [R]: the greedy answer is this one
    margins: Tensor  # [R], sum of the log odds of the answer's tokens; the end counts only after an empty answer
    probability: Tensor  # [R], of the whole answer


class Language:
    """The frozen language model, on visual tokens and questions. Its layers may be shared with `peers`."""

    def __init__(self, model: nn.Module, questions: Questions, peers: Peers = ALONE) -> None:
        self._peers = peers
        self._body, self._head = model.base_model, model.get_output_embeddings()
        self._words, self._model, self._questions = model.get_input_embeddings(), model, questions

    @property
    def device(self) -> torch.device:
        return self._words.weight.device

    def speak(self, visual: Tensor, questions: Sequence[str], answers: Sequence[Sequence[int]]) -> Spoken:
        """Score answers (ids without the end) after visual tokens [R, P, H]."""
        ids, targets = self._rows(questions, answers)
        embedded = torch.cat([visual.to(self._words.weight.dtype), self._words(ids)], dim=1)
        mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=self.device)
        hidden = self._body(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        rows, columns = torch.nonzero(targets != IGNORED, as_tuple=True)
        logits = self._head(hidden[:, visual.shape[1] :][rows, columns]).float()
        truth = targets[rows, columns]
        chosen = logits.gather(1, truth[:, None])[:, 0]
        entropy = functional.cross_entropy(logits, truth, reduction="none")
        # The log odds do not saturate where the model is sure, so that their gradient still says why.
        others = logits.scatter(1, truth[:, None], -torch.inf).logsumexp(1)
        zero = entropy.new_zeros(len(visual))
        number = zero.index_add(0, rows, torch.ones_like(entropy))
        total = zero.index_add(0, rows, entropy)
        wrong = zero.index_add(0, rows, (logits.argmax(1) != truth).float())
        # That the answer ends says little of what it is about: with the end, patches matter that show something else.
        empty = torch.tensor([not answer for answer in answers], device=self.device)[rows]
        margins = torch.where(empty | (truth != self._questions.end_id), chosen - others, 0.0)
        return Spoken(total / number, wrong == 0, zero.index_add(0, rows, margins), (-total.detach()).exp())

    def _rows(self, questions: Sequence[str], answers: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """ids and targets int64 [R, T], padded at the end, where causal attention hides it from what comes before."""
        texts = [self._questions.text(question) for question in questions]
        length = max(len(text) + len(answer) for text, answer in zip(texts, answers, strict=True))
        ids = torch.full((len(texts), length), self._questions.pad_id)
        targets = torch.full((len(texts), length), IGNORED)
        for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            ids[row, : len(text) + len(answer)] = torch.tensor([*text, *answer])
            ending = [self._questions.end_id] if len(answer) < MOST_ANSWER else []
            told = [*answer, *ending]
            targets[row, len(text) - 1 : len(text) - 1 + len(told)] = torch.tensor(told)
        return ids.to(self.device), targets.to(self.device)

    @torch.no_grad()
    def answer(self, visual: Tensor, questions: Sequence[str]) -> list[list[int]]:
        """Greedy answers to questions after visual tokens [R, P, H]: ids without the end, at most MOST_ANSWER."""
        texts = [self._questions.text(question) for question in questions]
        length = max(len(text) for text in texts)
        ids = torch.full((len(texts), length), self._questions.pad_id, device=self.device)
        # Padding comes first, so that every row goes on at the end. The mask hides it, and positions do not count it.
        mask = torch.ones(len(texts), visual.shape[1] + length, dtype=torch.long, device=self.device)
        embedded = visual.new_zeros(len(texts), visual.shape[1] + length, visual.shape[2]).to(self._words.weight.dtype)
        for row, text in enumerate(texts):
            ids[row, length - len(text) :] = torch.tensor(text)
            first = length - len(text)
            mask[row, :first] = 0
            embedded[row, first : first + visual.shape[1]] = visual[row]
            embedded[row, first + visual.shape[1] :] = self._words(ids[row, first:])
        return self._continue(embedded, mask)

    def _continue(self, embedded: Tensor, mask: Tensor) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in mask]
        past, running = None, [True] * len(found)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(MOST_ANSWER):
            out = self._body(
                inputs_embeds=embedded,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            said = self._peers.agree(self._head(out.last_hidden_state[:, -1]).argmax(1))
            for row, token in enumerate(said.tolist()):
                running[row] = running[row] and token != self._questions.end_id
                if running[row]:
                    found[row].append(token)
            if not any(running):
                break
            embedded, positions = self._words(said)[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return found


class Reader:
    """The Q-Former of either family, on candidate tokens with gates."""

    def __init__(self, qformer: QFormer | InstructQFormer, reads_question: bool) -> None:
        self.qformer, self.reads_question = qformer, reads_question

    def visual(self, candidates: Tensor, gates: Tensor, owner: Tensor, question: tuple[Tensor, Tensor]) -> Tensor:
        """Visual tokens [R, 32, H] from candidates [B, N, D] of images owner [R], and gates [R, N]."""
        if self.reads_question:
            hidden = self.qformer.read(candidates, question, gates=gates, owner=owner)
        else:
            hidden = self.qformer.read(candidates, gates=gates, owner=owner)
        return self.qformer.language_projection(hidden)
