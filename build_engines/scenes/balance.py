"""Choose the questions of held-out splits, so that no kind and no answer is much more frequent than another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from build_engines.scenes.questions import Question

TRIES = 24  # questions drawn of each kind, of which one is kept

Ask = Callable[[str], Question | None]  # a question of a kind, or None


class Balance:
    """Counts what was asked so far, by kind and by answer. `most` questions of a kind are asked in all."""

    def __init__(self, kinds: Sequence[str], most: int) -> None:
        self.most = most
        self.kinds: Counter[str] = Counter(dict.fromkeys(kinds, 0))
        self.answers: Counter[tuple[str, str]] = Counter()

    def worth(self, ask: Ask) -> float:
        """How much could be asked here that was rarely asked so far."""
        possible = [kind for kind in self.kinds if any(ask(kind) for _ in range(TRIES))]
        return sum((1 + self.kinds[kind]) ** -2 for kind in possible)

    def choose(self, ask: Ask, number: int, each: int) -> list[Question]:
        """Keep up to `number` questions, of the rarest kinds first, at most `each` of one kind, and count them."""
        chosen: dict[object, Question] = {}
        for _ in range(each):
            for kind in sorted(self.kinds, key=self.kinds.__getitem__):
                drawn = [question for question in (ask(kind) for _ in range(TRIES)) if question]
                new = [question for question in drawn if _told(question) not in chosen]
                if not new or len(chosen) == number or self.kinds[kind] == self.most:
                    continue
                rarest = min(new, key=lambda question: self.answers[question.type, question.answer])
                chosen[_told(rarest)] = rarest
                self.kinds[kind] += 1
                self.answers[kind, rarest.answer] += 1
        return list(chosen.values())


def _told(question: Question) -> object:
    """The same for two phrasings of one question."""
    return question.type, question.answer, question.asked
