"""Score one short answer, from 0 to 1, against what people answered."""

from __future__ import annotations

from collections.abc import Sequence

from build_engines.evaluation.metrics import answer_text

AGREEING = 3  # people whose answer counts as fully right
ANLS_THRESHOLD = 0.5


def vqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """VQAv2's consensus accuracy. Source: Antol et al. 2015, Goyal et al. 2017, visualqa.org/evaluation.

    As in the evaluation's script, people's answers lose only their punctuation, and only if people disagree: the
    published files have them in lower case, without articles and number words. A mark that goes may leave two spaces,
    and no answer of a model is then the same.
    """
    told = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    if len(set(told)) > 1:
        told = [answer_text.unpunctuated(answer) for answer in told]
    return consensus(answer_text.vqa(said), told)


def textvqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """The same consensus of answers in TextVQA's own form. Source: Singh et al. 2019."""
    return consensus(answer_text.textvqa(said), [answer_text.textvqa(answer) for answer in answers])


def consensus(said: str, answers: Sequence[str]) -> float:
    """Mean of min(people who say the same / 3, 1) over every choice of all people but one.

    With a single answer there is nobody to leave out: 1 if it is the same.
    """
    same = sum(answer == said for answer in answers)
    if len(answers) == 1:
        return float(same)
    left_out_agrees = min((same - 1) / AGREEING, 1.0) if same else 0.0
    left_out_differs = min(same / AGREEING, 1.0)
    return (same * left_out_agrees + (len(answers) - same) * left_out_differs) / len(answers)


def exact_match(said: str, answers: Sequence[str]) -> float:
    """1 if the answer is one of those accepted, but for case, outer space and a full stop at the end."""
    return float(answer_text.exact(said) in {answer_text.exact(answer) for answer in answers})


def anls(said: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity, for one question. Source: Biten et al. 2019, equation 1.

    Case and repeated spaces do not count. A similarity below the threshold counts 0, as in the evaluation's script.
    """
    best = max(similarity(_spaced(said), _spaced(answer)) for answer in answers)
    return best if best >= ANLS_THRESHOLD else 0.0


def similarity(left: str, right: str) -> float:
    """1 minus the edit distance as a share of the longer text."""
    longer = max(len(left), len(right))
    return 1 - edit_distance(left, right) / longer if longer else 1.0


def edit_distance(left: str, right: str) -> int:
    """Fewest insertions, deletions and replacements. Source: Levenshtein 1966."""
    before = list(range(len(right) + 1))
    for row, one in enumerate(left, 1):
        now = [row]
        for column, other in enumerate(right, 1):
            now.append(min(now[-1] + 1, before[column] + 1, before[column - 1] + (one != other)))
        before = now
    return before[-1]


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())
