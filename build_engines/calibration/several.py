"""Fit how sure the answers about clips and several images are, if the LLM has weights of its own for them.

    python -m build_engines.calibration.several model_repository --checkpoint reference

adds it to a calibration that was fitted before (`glimpse calibrate` does both). It prints the expected calibration
error on each half of the clips and groups, fitted on the other half.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain as chain_of
from pathlib import Path
from statistics import fmean

import numpy as np
from tqdm import tqdm

from build_engines.calibration.asking import as_webp
from build_engines.calibration.chain import Chain
from build_engines.calibration.fitting import LEAST_QUESTIONS, TooFew, regression
from build_engines.calibration.writing import write
from build_engines.scenes.held_out_clips import held_out_clips
from build_engines.scenes.held_out_several import held_out_groups
from build_engines.scenes.questions import Question
from service.core.card import ModelCard
from service.core.confidence import Calibration, Logistic, several_signals
from service.core.prompt import Prompt
from service.core.request import Budget
from service.core.vision import VisionFeatures

FIRST = 600_000  # seed of clips and groups that nothing else uses
CLIPS, GROUPS = 160, 200
FRAMES = (8, 4, 16)  # of each clip in turn
BINS = 10


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer about a clip or a group of images."""

    of: int  # which clip or group: its questions are not independent
    is_clip: bool
    log_prob: float  # as in Signals
    strangeness: float  # the mean over the images or frames
    right: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One clip or group of images, its questions, and the prompt of each."""

    is_clip: bool
    views: list[VisionFeatures]
    questions: list[Question]
    prompts: list[Prompt]


def answered(chain: Chain, calibration: Calibration, share: float = 1.0) -> list[Answered]:
    """Ask about clips and groups of images. `share` is that of the usual number."""
    clips, groups = (max(2, round(share * number)) for number in (CLIPS, GROUPS))
    found = []
    asked = chain_of(_of_clips(chain, clips), _of_groups(chain, groups))
    for index, shown in enumerate(tqdm(asked, desc="clips and groups", total=clips + groups)):
        strangeness = fmean(map(calibration.strangeness, shown.views))
        for said, question in zip(chain.answer_prompts(shown.prompts), shown.questions, strict=True):
            right = said.text.lower() == question.answer.strip().lower()
            found.append(Answered(index, shown.is_clip, said.log_prob, strangeness, right))
    return found


def _of_clips(chain: Chain, number: int) -> Iterator[Shown]:
    if chain.card.clip is None:  # then each frame is looked at as an image is, and nobody has learnt from that
        return
    budget = chain.card.clip.budget(Budget(chain.card.unasked_vision_tokens("low")))
    for index in range(number):
        frames = FRAMES[index % len(FRAMES)]
        (held_out,) = held_out_clips(1, frames, FIRST + index)
        views = [chain.look(as_webp(pixels)).vision for pixels in held_out.clip.pixels]
        prompts = []
        for question in held_out.questions:
            visual = chain.attend_clip(views, list(held_out.clip.times), question.text, budget)
            prompts.append(chain.prompts.compose(question.text, [(visual, b"clip")], is_clip=True))
        yield Shown(True, views, held_out.questions, prompts)


def _of_groups(chain: Chain, number: int) -> Iterator[Shown]:
    budget = Budget(chain.card.unasked_vision_tokens("low"), chain.card.default_visual_tokens)
    for group in held_out_groups(number, FIRST):
        views = [chain.look(as_webp(scene.pixels)) for scene in group.scenes]
        prompts = []
        for question in group.questions:
            seen = [chain.attend(view, question.text, budget).visual_tokens for view in views]
            images = [(tokens, str(place).encode()) for place, tokens in enumerate(seen)]
            prompts.append(chain.prompts.compose(question.text, images))
        yield Shown(False, [view.vision for view in views], group.questions, prompts)


def fit(answers: Sequence[Answered]) -> Logistic:
    """Raises TooFew."""
    right = np.array([each.right for each in answers])
    if min(right.sum(), (~right).sum()) < LEAST_QUESTIONS:
        raise TooFew(
            f"{right.sum()} of {len(right)} answers about clips and groups are right: {LEAST_QUESTIONS} right and "
            f"{LEAST_QUESTIONS} wrong ones are needed"
        )
    return regression(np.array([several_signals(each.log_prob, is_clip=each.is_clip) for each in answers]), right)


def with_several(calibration: Calibration, chain: Chain, share: float = 1.0) -> Calibration:
    """Add the regression if the LLM has weights of its own for clips and several images.

    If too few answers are right or too few are wrong, print so and add nothing.
    """
    if not chain.card.clip_weights:
        return calibration
    try:
        return _added(calibration, chain.card, answered(chain, calibration, share))
    except TooFew as error:
        print(f"clips and several images are not calibrated: {error}")
        return calibration


def keeping_several(calibration: Calibration, before: Calibration) -> Calibration:
    """Keep the regression that a calibration of the same repository had before."""
    weights = {name: value for name, value in before.fitted_on.items() if name == "clip_weights"}
    return replace(calibration, several=before.several, fitted_on=dict(calibration.fitted_on) | weights)


def _added(calibration: Calibration, card: ModelCard, answers: Sequence[Answered]) -> Calibration:
    questions = calibration.fitted_on.get("questions")
    told = dict(questions) if isinstance(questions, Mapping) else {}
    told |= {"clips": sum(each.is_clip for each in answers), "several": sum(not each.is_clip for each in answers)}
    weights = "" if card.clip is None else card.clip.fingerprint
    about = dict(calibration.fitted_on) | {"questions": told, "clip_weights": weights}
    return replace(calibration, several=fit(answers), fitted_on=about)


def calibration_error(answers: Iterable[Answered], calibration: Calibration) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over BINS bins of equally many answers.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599; with equal-mass bins.
    """
    told = []
    for each in answers:
        sure = calibration.confidence_of_several(each.log_prob, each.strangeness, is_clip=each.is_clip)
        if sure is not None:
            told.append((sure.value, each.right))
    told.sort(key=lambda pair: pair[0])  # equal ones stay as they came
    bins = np.array_split(np.array(told), BINS)
    return float(sum(len(part) * abs(part[:, 0].mean() - part[:, 1].mean()) for part in bins) / len(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="write it into its model_card.json too")
    options = parser.parse_args()
    chain = Chain.load(options.repository)
    calibration = chain.card.confidence
    if calibration is None:
        parser.error(f"{options.repository} is not calibrated: use glimpse calibrate, which does both")
    answers = answered(chain, calibration)
    halves = [[each for each in answers if each.of % 2 == half] for half in (0, 1)]
    for name, is_clip in (("clips", True), ("several", False)):
        for fitted, others in (halves, reversed(halves)):
            left = [each for each in others if each.is_clip is is_clip]
            error = calibration_error(left, replace(calibration, several=fit(fitted)))
            right = np.mean([each.right for each in left])
            print(f"{name}: {len(left)} answers, {right:.3f} right, expected calibration error {error:.3f}")
    write(_added(calibration, chain.card, answers), options.repository, options.checkpoint)


if __name__ == "__main__":
    main()
