"""Estimate how sure an answer is, from outputs that the models give anyway. Fitted by build_engines/calibration.

Three probabilities, each a logistic regression of a few smooth signals:
  - `familiar`: the image is of the kind that the models were trained on. Its signal is the distance of the image's
    features from those of the calibration's images, in standard deviations.
  - `found`: what the question names is in the image. Its signals are the peak of the participatory map, and the answer
    if the question asks for presence ("is there", "how many").
  - `right`: the answer is right. Its signals are the LLM's own probability of the answer, the mean of the participatory
    map, `particularize`, whether the closer view was used, and the logarithms of the other two. Words of the question,
    and the answer itself, shift it: a model may be as sure of a count as of a colour, and be wrong more often. So does
    the participatory map, if the question asks for presence: it may show more than the answer says, or less.

The confidence is `right`, in proportion less if one of the other two is below HALF. A question for presence may have a
right answer about an absent object, so `found` is left out there.

If an LLM has weights of its own for clips and several images, a fourth regression, `several`, takes the place of
`right` for their answers. Its signals are the LLM's own probability of the answer, and whether it is about a clip.
Nothing is said of what is found.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from service.core.vision import Seen, VisionFeatures, dense

Reason = Literal["not_found", "unsure", "unfamiliar_image"]

HALF = 0.5  # below it an image is rather out of distribution, or an object rather absent: no answer can be trusted
AREA_ABOVE = 0.9  # of the participatory map: what has all that the question names; 0.6 to 0.8 has a part of it
TINY = 1e-6  # added to a probability before its logarithm
LEAST, MOST = 0.01, 0.9999  # of a probability whose log odds are taken
SPREAD = 1e-3  # added to a standard deviation before its logarithm
PLAIN_SIGNALS = (
    *("log_odds", "mass", "particularize", "closer"),  # mass: logarithm of the participatory map's mean
    *("log_odds_squared", "mass_squared", "particularize_squared"),
    *("log_odds_mass", "log_odds_particularize", "mass_particularize", "log_odds_closer"),
)
RIGHT_SIGNALS = (*PLAIN_SIGNALS, "log_familiar", "log_found")
SEVERAL_SIGNALS = ("log_odds", "log_odds_squared", "clip", "log_odds_clip")
# Of an answer to a question for presence that names something. less, more: the answer counts fewer, or more, than
# the areas that the participatory map shows.
SHOWN_SIGNALS = ("peak_denied", "peak_affirmed", "denied", "less", "more")
FOUND_SIGNALS = ("peak", "denied", "affirmed", "log_odds_denied", "log_odds_affirmed", "log_odds_other")


@dataclass(frozen=True, slots=True)
class Logistic:
    """A logistic regression: the probability that `weights` x signals + `bias` has as log odds."""

    weights: tuple[float, ...]
    bias: float

    def of(self, signals: Sequence[float], shift: float = 0.0) -> float:
        """The probability for these signals; `shift` is added to its log odds."""
        return _probability(self.log_odds(signals) + shift)

    def log_odds(self, signals: Sequence[float]) -> float:
        return math.fsum(w * s for w, s in zip(self.weights, signals, strict=True)) + self.bias

    @classmethod
    def from_json(cls, told: object, signals: int) -> Self:
        """Raises ValueError unless there is one finite weight a signal, and a bias."""
        if not isinstance(told, Mapping) or set(told) != {"weights", "bias"}:
            raise ValueError("a logistic regression has the fields weights and bias")
        numbers = [*told["weights"], told["bias"]]
        if len(numbers) != signals + 1 or not all(map(_is_finite, numbers)):
            raise ValueError(f"a logistic regression of {signals} signals has {signals} finite weights and a bias")
        return cls(tuple(map(float, told["weights"])), float(told["bias"]))


Shift = tuple[float, float]  # of the log odds of `right`: an offset, and a multiple of the answer's own log odds


@dataclass(frozen=True, slots=True)
class Shifts:
    """How words shift the log odds of a right answer. Those that are not here shift nothing."""

    question: Mapping[str, Shift]  # by a word of the question, in lower case
    answer: Mapping[str, Shift]  # by the whole answer, in lower case

    def found(self, question: str, answer: str) -> list[Shift]:
        """Return the shifts that apply to an answer."""
        shifts = [self.question[word] for word in sorted(words_of(question)) if word in self.question]
        whole = self.answer.get(plain_answer(answer))
        return shifts if whole is None else [*shifts, whole]

    def of(self, signals: Signals) -> float:
        odds = _answer_odds(signals)
        return math.fsum(offset + slope * odds for offset, slope in self.found(signals.question, signals.answer))

    @classmethod
    def from_json(cls, told: object) -> Self:
        """Raises ValueError."""
        if not isinstance(told, Mapping) or set(told) != {"question", "answer"}:
            raise ValueError("confidence.shifts has the fields question and answer")
        return cls(
            *({word: cls._shift(shift) for word, shift in told[each].items()} for each in ("question", "answer"))
        )

    @staticmethod
    def _shift(told: object) -> Shift:
        if not isinstance(told, Sequence) or len(told) != 2 or not all(map(_is_finite, told)):
            raise ValueError("a word of confidence.shifts has two finite numbers")
        return float(told[0]), float(told[1])

    def to_json(self) -> dict[str, dict[str, Shift]]:
        return {"question": dict(self.question), "answer": dict(self.answer)}


NO_SHIFTS = Shifts({}, {})
NOTHING_SHOWN = Logistic((0.0,) * len(SHOWN_SIGNALS), 0.0)


@dataclass(frozen=True, slots=True)
class Words:
    """What the words of a question and of an answer mean to the calibration. Everything is in lower case."""

    names: frozenset[str]  # a question with one of these words names something that can be found
    presence: tuple[str, ...]  # phrases of questions that ask whether, or how often, something is there
    denials: frozenset[str]  # answers to such a question that say that it is not there

    def name_something(self, question: str) -> bool:
        return not self.names.isdisjoint(words_of(question))

    def ask_for_presence(self, question: str) -> bool:
        spaced = " ".join(re.findall(r"\w+", question.lower()))
        return any(f" {phrase} " in f" {spaced} " for phrase in self.presence)

    def suppose(self, question: str) -> bool:
        """Whether it takes for granted that what it names is there."""
        return self.name_something(question) and not self.ask_for_presence(question)

    def deny(self, answer: str) -> bool:
        return plain_answer(answer) in self.denials


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known of one answer. Several images count as the most relevant, and as the least familiar, of them."""

    question: str
    answer: str
    log_prob: float  # sum over the answer's tokens, the end token included; the model's own
    peak: float  # most of the participatory map, in [0, 1]
    mean: float  # of the participatory map
    particularize: float
    closer: bool
    strangeness: float
    areas: int  # that the participatory map shows, of all images

    @classmethod
    def of(cls, question: str, answer: str, log_prob: float, seen: Sequence[Seen]) -> Self:
        maps = [each.relevance.scores[2] for each in seen]
        return cls(
            question,
            answer,
            log_prob,
            peak=max(float(each.max()) for each in maps),
            mean=max(float(each.mean()) for each in maps),
            particularize=max(each.relevance.particularize for each in seen),
            closer=any(each.detail == "high" for each in seen),
            strangeness=max(each.strangeness for each in seen),
            areas=sum(map(areas, maps)),
        )


@dataclass(frozen=True, slots=True)
class Confidence:
    """How sure an answer is. Probabilities."""

    value: float  # that the answer is right
    found: float | None  # that what the question names is in the image; None if it names nothing
    familiar: float  # that the images are of the kind that the models were trained on
    weakest: Reason  # why the value is no higher


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The parameters of one repository's models (`confidence` in card.json)."""

    centre: npt.NDArray[np.float32]  # [3 D]: mean of `summary` over familiar images
    scale: npt.NDArray[np.float32]  # [3 D]: its standard deviation, above 0
    familiar: Logistic  # of the strangeness
    found: Logistic  # of FOUND_SIGNALS
    right: Logistic  # of RIGHT_SIGNALS
    words: Words
    fitted_on: Mapping[str, object]  # numbers of questions and images, for people
    several: Logistic | None = None  # of SEVERAL_SIGNALS; None: such answers have no confidence
    shifts: Shifts = NO_SHIFTS  # of `right`
    shown: Logistic = NOTHING_SHOWN  # of SHOWN_SIGNALS; its log odds are added to those of `right`
    digest: str = field(init=False)  # of what decides strangeness
    _known: WeakKeyDictionary[VisionFeatures, float] = field(init=False, default_factory=WeakKeyDictionary)

    def __post_init__(self) -> None:
        told = blake3(self.centre.tobytes() + self.scale.tobytes()).hexdigest(16)
        object.__setattr__(self, "digest", told)

    def strangeness(self, vision: VisionFeatures) -> float:
        """Measure how far an image is from the familiar ones: the logarithm of the mean squared z-score.

        It is measured once for as long as these features are cached, since every question about them asks for it.
        """
        if (known := self._known.get(vision)) is None:
            away = (summary(vision) - self.centre) / self.scale
            self._known[vision] = known = math.log(float(np.dot(away, away)) / away.size + 1e-9)
        return known

    def confidence(self, signals: Signals) -> Confidence:
        familiar = self.familiar.of([signals.strangeness])
        found = self.found.of(found_signals(signals, self.words))
        is_named, is_supposed = self.words.name_something(signals.question), self.words.suppose(signals.question)
        plain, shift = plain_signals(signals), self.shift(signals)
        doubts: dict[Reason, float] = {
            "unfamiliar_image": familiar,
            "unsure": self.right.of((*plain, 0.0, 0.0), shift),
            **({"not_found": found} if is_supposed else {}),
        }
        known = min(1.0, familiar / HALF) * min(1.0, doubts.get("not_found", 1.0) / HALF)
        return Confidence(
            value=self.right.of(_right_signals(plain, familiar, found if is_supposed else 1.0), shift) * known,
            found=found if is_named else None,
            familiar=familiar,
            weakest=min(doubts, key=lambda reason: doubts[reason]),
        )

    def confidence_of_several(self, log_prob: float, strangeness: float, *, is_clip: bool) -> Confidence | None:
        """How sure an answer by the weights for clips and several images is.

        strangeness: the mean over the images, or over a clip's frames. The greatest of 32 says little: among so
        many familiar images, one is strange by chance. None if such answers were not calibrated.
        """
        if self.several is None:
            return None
        familiar, right = self.familiar.of([strangeness]), self.several.of(several_signals(log_prob, is_clip=is_clip))
        return Confidence(
            value=right * min(1.0, familiar / HALF),
            found=None,
            familiar=familiar,
            weakest="unfamiliar_image" if familiar < right else "unsure",
        )

    def shift(self, signals: Signals) -> float:
        """What the words, and what the map shows, add to the log odds of a right answer."""
        return self.shifts.of(signals) + self.shown.log_odds(shown_signals(signals, self.words))

    def right_signals(self, signals: Signals) -> tuple[float, ...]:
        """RIGHT_SIGNALS of an answer."""
        familiar = self.familiar.of([signals.strangeness])
        found = self.found.of(found_signals(signals, self.words)) if self.words.suppose(signals.question) else 1.0
        return _right_signals(plain_signals(signals), familiar, found)

    @classmethod
    def from_json(cls, told: object, vision_width: int) -> Self:
        """Read the field `confidence` of a card. Raises ValueError, which says what is wrong."""
        names = {each.name for each in fields(cls) if each.init}
        if not isinstance(told, Mapping) or set(told) | {"several", "shifts", "shown"} != names:
            raise ValueError(f"confidence does not have exactly the fields {', '.join(sorted(names))}")
        centre, scale = (_array(told[name], 3 * vision_width, name) for name in ("centre", "scale"))
        if (scale <= 0).any():
            raise ValueError("confidence.scale is not above 0")
        try:
            words = told["words"]
            return cls(
                centre,
                scale,
                Logistic.from_json(told["familiar"], 1),
                Logistic.from_json(told["found"], len(FOUND_SIGNALS)),
                Logistic.from_json(told["right"], len(RIGHT_SIGNALS)),
                Words(frozenset(words["names"]), tuple(words["presence"]), frozenset(words["denials"])),
                dict(told["fitted_on"]),
                Logistic.from_json(several, len(SEVERAL_SIGNALS)) if (several := told.get("several")) else None,
                Shifts.from_json(shifts) if (shifts := told.get("shifts")) else NO_SHIFTS,
                Logistic.from_json(shown, len(SHOWN_SIGNALS)) if (shown := told.get("shown")) else NOTHING_SHOWN,
            )
        except (KeyError, TypeError, AttributeError) as exc:
            raise ValueError(f"confidence is not a calibration: {exc!r}") from exc

    def about(self) -> str:
        """Say what the confidence rests on, for the card's metadata."""
        on = self.fitted_on
        asked = on.get("questions")
        number = sum(asked.values()) if isinstance(asked, Mapping) else 0
        return (
            f"calibrated on {number} questions about {on.get('images', 0)} images, and on "
            f"{on.get('foreign_images', 0)} out-of-distribution images"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "centre": _text(self.centre),
            "scale": _text(self.scale),
            **{
                name: None if each is None else {"weights": list(each.weights), "bias": each.bias}
                for name, each in (
                    ("familiar", self.familiar),
                    ("found", self.found),
                    ("right", self.right),
                    ("several", self.several),
                    ("shown", self.shown),
                )
            },
            "words": {
                "names": sorted(self.words.names),
                "presence": list(self.words.presence),
                "denials": sorted(self.words.denials),
            },
            "shifts": self.shifts.to_json(),
            "fitted_on": dict(self.fitted_on),
        }


def summary(vision: VisionFeatures) -> npt.NDArray[np.float32]:
    """Summarise an image's features [257, D] -> [3 D]: CLS, mean and log standard deviation of the patches."""
    rows = np.asarray(dense(vision.features), np.float32)
    patches = rows[1:]
    mean = patches.mean(0)
    away = patches - mean
    deviation = np.sqrt(np.einsum("nd,nd->d", away, away) / len(patches))
    return np.concatenate([rows[0], mean, np.log(deviation + np.float32(SPREAD))])


def plain_signals(signals: Signals) -> tuple[float, ...]:
    """PLAIN_SIGNALS of an answer: those of RIGHT_SIGNALS that do not need the other regressions."""
    odds, mass, particularize = _answer_odds(signals), math.log(signals.mean + 1e-3), signals.particularize
    closer = float(signals.closer)
    squares = (odds**2, mass**2, particularize**2)
    return (
        *(odds, mass, particularize, closer),
        *squares,
        *(odds * mass, odds * particularize, mass * particularize, odds * closer),
    )


def _right_signals(plain: tuple[float, ...], familiar: float, found: float) -> tuple[float, ...]:
    return (*plain, math.log(familiar + TINY), math.log(found + TINY))


def several_signals(log_prob: float, *, is_clip: bool) -> tuple[float, ...]:
    """SEVERAL_SIGNALS of an answer. log_prob: as in Signals."""
    odds = _odds_of(log_prob)
    return (odds, odds**2, float(is_clip), odds * is_clip)


def found_signals(signals: Signals, words: Words) -> tuple[float, ...]:
    """FOUND_SIGNALS of an answer."""
    odds, presence = _answer_odds(signals), words.ask_for_presence(signals.question)
    denied = float(presence and words.deny(signals.answer))
    affirmed = float(presence) - denied
    return (_log_odds(signals.peak), denied, affirmed, odds * denied, odds * affirmed, odds * (1 - presence))


def shown_signals(signals: Signals, words: Words) -> tuple[float, ...]:
    """SHOWN_SIGNALS of an answer. All are 0 unless the question asks for the presence of something that it names."""
    if not (words.name_something(signals.question) and words.ask_for_presence(signals.question)):
        return (0.0,) * len(SHOWN_SIGNALS)
    peak, denied, answer = _log_odds(signals.peak), float(words.deny(signals.answer)), plain_answer(signals.answer)
    counted = int(answer) if re.fullmatch("[0-9]{1,3}", answer) else signals.areas
    less, more = float(counted < signals.areas), float(counted > signals.areas)
    return (peak * denied, peak * (1 - denied), denied, less, more)


def areas(scores: npt.NDArray[np.floating]) -> int:
    """Count the separate areas of a map [rows, columns] above AREA_ABOVE. Patches of one area touch along sides."""
    shown = np.zeros((scores.shape[0], scores.shape[1] + 1), bool)  # an empty column divides a row from the next one
    shown[:, :-1] = scores > AREA_ABOVE
    width = shown.shape[1]
    left = int.from_bytes(np.packbits(shown, bitorder="little").tobytes(), "little")  # one bit a patch
    number = 0
    while left:
        number += 1
        area, before = left & -left, 0
        while area != before:
            before = area
            area |= left & (area << 1 | area >> 1 | area << width | area >> width)
        left ^= area
    return number


def words_of(question: str) -> set[str]:
    return set(re.findall(r"\w+", question.lower()))


def plain_answer(answer: str) -> str:
    return answer.strip().lower().rstrip(".")


def _is_finite(number: object) -> bool:
    return isinstance(number, int | float) and math.isfinite(number)


def _answer_odds(signals: Signals) -> float:
    return _odds_of(signals.log_prob)


def _odds_of(log_prob: float) -> float:
    return _log_odds(math.exp(min(0.0, log_prob)))


def _log_odds(probability: float) -> float:
    within = min(max(probability, LEAST), MOST)
    return math.log(within / (1 - within))


def _probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-min(max(log_odds, -500.0), 500.0)))


def _array(told: object, length: int, name: str) -> npt.NDArray[np.float32]:
    """Read base64 of little-endian FP32. Raises ValueError."""
    try:
        array = np.frombuffer(base64.b64decode(str(told), validate=True), "<f4")
    except (binascii.Error, ValueError) as exc:
        raise ValueError(f"confidence.{name} is not base64 of FP32 numbers") from exc
    if array.shape != (length,) or not np.isfinite(array).all():
        raise ValueError(f"confidence.{name} does not have {length} finite numbers")
    return array


def _text(array: npt.NDArray[np.float32]) -> str:
    return base64.b64encode(array.astype("<f4").tobytes()).decode()
