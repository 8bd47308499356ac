"""The tokenizer: lower-casing byte-level BPE. Every answer is one token after "Answer:"."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from build_engines.scenes.questions import ANSWERS, DESCRIBE, TYPES, ask
from build_engines.scenes.world import World, sample_scene

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<image>")  # OPT's ids 0..3, then BLIP-2's image placeholder
BOS, PAD, EOS, UNKNOWN, IMAGE = range(5)
PROMPT = "Question: {question} Answer:"
LARGEST_VOCABULARY = 640


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of generated questions. Each caller gets one of its own."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_trained(),  # copied by transformers
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_max_length=320,
    )


@cache
def _trained() -> Tokenizer:
    """Train on generated questions, reproducibly. It takes seconds, so once in a process.

    All 256 bytes are tokens, so no text is unknown.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LARGEST_VOCABULARY,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    for answer in ANSWERS:
        if len(tokenizer.encode(f" {answer}", add_special_tokens=False).ids) != 1:
            raise ValueError(f"the answer {answer!r} is not one token: raise LARGEST_VOCABULARY")
    return tokenizer


def _corpus() -> Iterator[str]:
    """Yield every answer often enough to be merged, then questions with their answers."""
    for answer in ANSWERS:
        yield from [f"Answer: {answer}"] * 40
    rng = np.random.default_rng(0)
    for _ in range(1500):
        things = sample_scene(rng, World())
        for kind in (*TYPES, DESCRIBE, "position"):
            question = ask(rng, things, kind)
            if question is not None:
                yield f"{PROMPT.format(question=question.text)} {question.answer}"
