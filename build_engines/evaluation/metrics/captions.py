"""Score captions as COCO's evaluation does: CIDEr-D, BLEU and ROUGE-L.

Sources: Vedantam et al. 2015 (CIDEr-D, sigma 6, n-grams to 4, times 10); Papineni et al. 2002 (BLEU of a corpus, by the
closest reference's length); Lin 2004 (ROUGE-L) with COCO's beta of 1.2. COCO's script cuts text into words with a Java
program; `words` does the same for what captions hold. METEOR and SPICE need Java, and are left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LONGEST = 4  # words of an n-gram
SIGMA = 6.0  # words of difference in length, of CIDEr-D's penalty
BETA = 1.2  # how much more recall counts in ROUGE-L
SMALL, TINY = 1e-9, 1e-15  # no division by zero, and 0 if there is no n-gram

# In this order: abbreviations with their full stops; what stands before n't; the endings; words and numbers with the
# marks within them; marks that stand together; any other character.
WORD = re.compile(
    r"(?:\b[^\W\d_]\.){2,}|\b(?:mr|mrs|ms|dr|st|ave|etc|vs|jr|sr)\.|'n'|'\d\ds?\b"
    r"|[^\W_]+?(?=n't\b)|n't\b|'(?:s|m|d|ll|re|ve)\b"
    r"|\w+(?:(?:[-.&/@]|(?<=\d)[,:](?=\d)|'(?!(?:s|m|d|ll|re|ve)\b))\w+)*"
    r"|[?!]{2,}|\S"
)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
DROPPED = frozenset(".?!,:;-'`\"")  # what COCO's evaluation takes out. It means to take out brackets too, and does not
WHOLE = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "wanna": ("wan", "na"), "gimme": ("gim", "me")}

Floats = npt.NDArray[np.float64]
Words = list[str]
Ngrams = Counter[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Captioned:
    """An image's caption and those of people, in words."""

    said: Words
    references: list[Words]

    @classmethod
    def of(cls, said: str, references: Iterable[str]) -> Captioned:
        return cls(words(said), [words(reference) for reference in references])


def words(text: str) -> Words:
    """Lower-case words without punctuation; endings such as 's and n't are words of their own."""
    found: Words = []
    for word in WORD.findall(text.lower().replace("’", "'")):
        if word not in DROPPED:
            found += WHOLE.get(word, (BRACKETS.get(word, word),))
    return found


def ngrams(sentence: Sequence[str]) -> Ngrams:
    """How often each run of one to LONGEST words is there."""
    return Counter(
        tuple(sentence[start : start + length])
        for length in range(1, LONGEST + 1)
        for start in range(len(sentence) - length + 1)
    )


def cider_d(images: Sequence[Captioned]) -> Floats:
    """CIDEr-D of each image [n], from 0 to 10. How rare an n-gram is, the references of all n images say."""
    documents: Ngrams = Counter()
    references = [[ngrams(each) for each in image.references] for image in images]
    for of_one in references:
        documents.update({ngram for each in of_one for ngram in each})
    all_documents = math.log(max(1, len(images)))

    def weighted(counts: Ngrams) -> dict[tuple[str, ...], float]:
        return {ngram: many * (all_documents - math.log(max(1, documents[ngram]))) for ngram, many in counts.items()}

    scores = []
    for image, of_one in zip(images, references, strict=True):
        said = weighted(ngrams(image.said))
        similar = [
            _clipped_cosine(said, weighted(counts)) * _penalty(len(image.said) - len(sentence))
            for counts, sentence in zip(of_one, image.references, strict=True)
        ]
        scores.append(10 * sum(similar) / max(1, len(similar)))
    return np.array(scores)


def _clipped_cosine(said: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Mean over n of the cosine of the n-grams' weights, of which what is said has at most the reference's."""
    dot, left, right = ([0.0] * LONGEST for _ in range(3))
    for ngram, weight in said.items():
        other = reference.get(ngram, 0.0)
        dot[len(ngram) - 1] += min(weight, other) * other
        left[len(ngram) - 1] += weight * weight
    for ngram, weight in reference.items():
        right[len(ngram) - 1] += weight * weight
    lengths = [math.sqrt(one * other) for one, other in zip(left, right, strict=True)]
    return sum(part / length for part, length in zip(dot, lengths, strict=True) if length) / LONGEST


def _penalty(difference: int) -> float:
    return math.exp(-(difference**2) / (2 * SIGMA**2))


def rouge_l(image: Captioned) -> float:
    """F of the best precision and the best recall of the longest common subsequence, from 0 to 1."""
    if not image.said or not image.references:
        return 0.0
    common = [common_subsequence(image.said, reference) for reference in image.references]
    precision = max(common) / len(image.said)
    recall = max(many / max(1, len(reference)) for many, reference in zip(common, image.references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(right) + 1)
    for one in left:
        now = [0]
        for column, other in enumerate(right, 1):
            now.append(before[column - 1] + 1 if one == other else max(before[column], now[-1]))
        before = now
    return before[-1]


def bleu_counts(image: Captioned) -> Floats:
    """[2 + 2 LONGEST]: words said, words of the closest reference, n-grams said, n-grams that a reference has too."""
    said = ngrams(image.said)
    most: Ngrams = Counter()
    for reference in image.references:
        most |= ngrams(reference)
    closest = min((abs(len(each) - len(image.said)), len(each)) for each in image.references)[1]
    right = [0] * LONGEST
    for ngram, many in said.items():
        right[len(ngram) - 1] += min(many, most[ngram])
    guessed = [max(0, len(image.said) - length) for length in range(LONGEST)]
    return np.array([len(image.said), closest, *guessed, *right], np.float64)


def bleu(totals: Floats) -> Floats:
    """Counts [..., 2 + 2 LONGEST], summed over a corpus -> BLEU-1 to BLEU-4 [..., LONGEST]."""
    said, closest = totals[..., :1], totals[..., 1:2]
    guessed, right = totals[..., 2 : 2 + LONGEST], totals[..., 2 + LONGEST :]
    precisions = np.cumsum(np.log((right + TINY) / (guessed + SMALL)), -1) / np.arange(1, LONGEST + 1)
    brevity = np.minimum(0.0, 1 - (closest + SMALL) / (said + TINY))
    result: Floats = np.exp(precisions + brevity)
    return result
