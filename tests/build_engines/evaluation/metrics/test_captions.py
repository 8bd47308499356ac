"""The figures of COCO's metrics for captions.

Unless a test says otherwise, they are what the package pycocoevalcap 1.2 (COCO's scripts, with Stanford's tokenizer in
Java) gave for official.json's five captions, run once by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from build_engines.evaluation.metrics.captions import (
    Captioned,
    bleu,
    bleu_counts,
    cider_d,
    common_subsequence,
    rouge_l,
    words,
)

SAMPLE = [
    Captioned.of(one["said"], one["references"])
    for one in json.loads((Path(__file__).parent / "official.json").read_text())["captions"]
]
# As PTBTokenizer of pycocoevalcap 1.2 gave them.
TOKENS = {
    "The man's surfboard isn't on the wave!": "the man 's surfboard is n't on the wave",
    "This is a kitchen with a 1950's-style stove.": "this is a kitchen with a 1950 's style stove",
    "There's a clock (it is old) on the tower.": "there 's a clock -lrb- it is old -rrb- on the tower",
    "It's 10:30 o'clock in the U.S. today...": "it 's 10:30 o'clock in the u.s. today",
    "Mr. Smith's 2 cats & 3 dogs": "mr. smith 's 2 cats & 3 dogs",
    "she cannot stop; he won't go": "she can not stop he wo n't go",
    "an old-fashioned, well-lit room with 3-d glasses": "an old-fashioned well-lit room with 3-d glasses",
    "people at the 1,000-seat arena": "people at the 1,000-seat arena",
    "a black/white photo": "a black/white photo",
    "$5.00 for 50% off!": "$ 5.00 for 50 % off",
    "the dogs' toys aren't here": "the dogs toys are n't here",
    'a sign reading "STOP" at 5th ave.': "a sign reading stop at 5th ave.",
}


@pytest.mark.parametrize("text", list(TOKENS))
def test_words_are_those_of_cocos_tokenizer(text: str) -> None:
    assert " ".join(words(text)) == TOKENS[text]


def test_cider_d() -> None:
    expected = [1.85383214, 2.04549649, 3.29114672, 0.92341467, 0.0]
    np.testing.assert_allclose(cider_d(SAMPLE), expected, atol=1e-7)


def test_bleu_of_the_corpus() -> None:
    expected = [0.77515670, 0.68817910, 0.57048202, 0.44637704]
    np.testing.assert_allclose(bleu(np.sum([bleu_counts(one) for one in SAMPLE], 0)), expected, atol=1e-7)


def test_rouge_l() -> None:
    expected = [0.85017422, 0.66256336, 0.87142857, 0.51988636, 0.0]
    np.testing.assert_allclose([rouge_l(one) for one in SAMPLE], expected, atol=1e-7)


def test_a_caption_that_people_wrote_too_is_best() -> None:
    """By the definitions: every n-gram and the length agree, so CIDEr-D is 10 and the others are 1."""
    told = [Captioned.of(text, [text]) for text in ("a red bus on the road", "two brown dogs in some grass")]
    np.testing.assert_allclose(cider_d(told), [10, 10])
    np.testing.assert_allclose(bleu(np.sum([bleu_counts(one) for one in told], 0)), 1, atol=1e-6)
    assert [rouge_l(one) for one in told] == pytest.approx([1, 1])


def test_common_subsequence() -> None:
    """Lin 2004, section 3.2."""
    assert (
        common_subsequence(["police", "killed", "the", "gunman"], ["police", "kill", "the", "gunman"]) == 3
    )  # Lin 2004
