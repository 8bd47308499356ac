"""The data's answers are read as they stand behind the prompt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from build_engines.adapt.chain import MOST_ANSWER, Questions
from service.text.prompt import PromptBuilder

LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyz?:{}QA"))


def llama() -> Tokenizer:
    """As LlamaTokenizer's legacy mode: a space is put before every text."""
    pieces = [("<unk>", 0.0), ("\u2581", -3.0), ("\u2581red", -1.0), ("\u2581bus", -1.0), *((c, -5.0) for c in LETTERS)]
    found = Tokenizer(Unigram(pieces, 0, byte_fallback=False))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return found


def opt() -> Tokenizer:
    vocabulary = {letter: number for number, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = [("\u0120", "r"), ("\u0120r", "e"), ("\u0120re", "d"), ("\u0120", "b")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    found = Tokenizer(BPE(vocabulary, merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return found


@pytest.mark.parametrize(
    ("tokenizer", "template", "answer", "tokens"),
    [
        (llama(), "{question}", " red ", ["\u2581red"]),
        (llama(), "Question: {question} Answer:", "red bus", ["\u2581red", "\u2581bus"]),
        (opt(), "Question: {question} Answer:", "red bus", ["\u0120red", "\u0120b", "u", "s"]),
        (opt(), "{question}", "red", ["\u0120red"]),
        (llama(), "{question}", "a" * 30, ["\u2581", *"a" * (MOST_ANSWER - 1)]),
    ],
)
def test_an_answer_begins_with_one_space(tokenizer: Tokenizer, template: str, answer: str, tokens: list[str]) -> None:
    card = SimpleNamespace(
        prompt_template=template, bos_id=None, text_end_id=None, image_marks=None, end_id=0, pad_id=0
    )
    questions = Questions(PromptBuilder(card, tokenizer))  # type: ignore[arg-type]
    found = questions.answer("what?", answer)
    assert [tokenizer.id_to_token(number) for number in found] == tokens
    assert [*questions.text("what?"), *found] == tokenizer.encode(
        f"{template.replace('{question}', 'what?')} {answer.strip()}", add_special_tokens=False
    ).ids[: len(questions.text("what?")) + len(found)]


def test_an_answer_that_joins_the_prompts_last_token_has_no_stray_space() -> None:
    card = SimpleNamespace(
        prompt_template="{question}\u2581b", bos_id=None, text_end_id=None, image_marks=None, end_id=0, pad_id=0
    )
    tokenizer = llama()
    pieces = [
        ("<unk>", 0.0),
        ("\u2581", -3.0),
        ("\u2581red", -1.0),
        ("b\u2581red", -0.5),
        *((c, -5.0) for c in LETTERS),
    ]
    tokenizer.model = Unigram(pieces, 0, byte_fallback=False)
    found = Questions(PromptBuilder(card, tokenizer)).answer("what?", "red")  # type: ignore[arg-type]
    assert [tokenizer.id_to_token(number) for number in found] == ["\u2581red"]
