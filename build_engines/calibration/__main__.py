"""`glimpse calibrate`: fit how sure a repository's models are of their answers, and write it into its card.

    glimpse calibrate model_repository --checkpoint reference
    glimpse calibrate engines --questions held_out.jsonl --foreign photographs/ --words words.json

Without --questions the reference model's scenes are rendered. --questions is a file of JSON lines with image (a file
beside it), question, answer and, if the question names something, found (true or false). The questions must not be
those that the model learnt from. A run that was stopped goes on where it was. The graphs must be those of the profile
`embedded`. The calibration goes into card.json; with --checkpoint also into the checkpoint's model_card.json, from
which later builds take it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from itertools import chain as chain_of
from pathlib import Path

from tqdm import tqdm

from build_engines import left_out
from build_engines.calibration.asking import ABSENT, FOREIGN, WORDS, Picture, Task, ask, budget_of, scenes, told
from build_engines.calibration.chain import Chain
from build_engines.calibration.fitting import Asked, TooFew, fitted
from build_engines.calibration.foreign import foreign
from build_engines.calibration.kept import Kept
from build_engines.calibration.several import keeping_several, with_several
from build_engines.calibration.writing import write
from build_engines.datasets.entries import NotReadable
from build_engines.scenes.held_out import NEW, PAIRS, SMALL
from service.core.card import ModelCard
from service.core.confidence import Words, summary
from service.core.errors import GlimpseError

FIRST = 600_000  # scenes that nothing else uses
SCENES = {NEW: 480, PAIRS: 400, SMALL: 520}
KEPT = Path("build/calibrate")
FOREIGN_IMAGES = 50  # of each kind
FOREIGN_QUESTIONS = 3  # about each of them


def collected(
    chain: Chain,
    pictures: list[Picture],
    foreign_files: Mapping[str, bytes],
    kept: Path | None = None,
    skipped: dict[str, str] | None = None,
) -> list[Asked]:
    """Ask every picture's questions, and the same questions about the foreign files, where no answer is right.

    What each picture brings is kept in the file `kept`, and is not asked for again. `skipped` gets the pictures and
    foreign files that cannot be used, by name, with the reason.
    """
    left = {} if skipped is None else skipped

    def material(known: Kept, picture: Picture, *, is_foreign: bool) -> list[Asked]:
        budget = budget_of(chain.card, closely=picture.closely)
        if (asked := known.get(picture, budget)) is None:
            try:
                ((view, outcomes),) = ask(chain, [picture])
            except GlimpseError as exc:
                left[picture.name] = str(exc)
                return []
            asked = Asked(summary(view.vision), outcomes, is_foreign)
            known.put(picture, budget, asked)
        return [asked]

    with Kept(kept) as known:
        own = [material(known, each, is_foreign=False) for each in tqdm(pictures, desc="questions", unit="image")]
        used = [picture for picture, found in zip(pictures, own, strict=True) if found]
        asked = [task for picture in used for task in picture.tasks if task.group != ABSENT]
        strangers = []
        number = min(FOREIGN_QUESTIONS, len(asked))
        for index, (name, data) in enumerate(foreign_files.items()):
            some = [asked[(7 * index + place) % len(asked)] for place in range(number)]
            tasks = [Task(0, FOREIGN, task.question, None, None) for task in some]
            strangers.append(Picture(data, tasks, name=name))
        others = [material(known, each, is_foreign=True) for each in tqdm(strangers, desc="foreign", unit="image")]
    return list(chain_of(*own, *others))


def reference_material(chain: Chain, share: float = 1.0, kept: Path | None = None) -> list[Asked]:
    """Ask about rendered scenes of all splits, and about out-of-distribution images."""
    numbers = {split: max(2, round(number * share)) for split, number in SCENES.items()}
    pictures = [picture for split, number in numbers.items() for picture in scenes(split, number, FIRST)]
    files = {each.name: each.data for each in foreign("fit", max(2, round(FOREIGN_IMAGES * share)))}
    return collected(chain, pictures, files, kept)


def own_material(chain: Chain, questions: Path, folder: Path | None, kept: Path) -> list[Asked]:
    """Ask the questions of a file, and about the foreign images of a folder. Files that cannot be used are told, and
    listed beside `kept`. Raises ValueError if no question, or no file of the folder, can be used."""
    skipped: dict[str, str] = {}
    (kept.parent / left_out.FILE).unlink(missing_ok=True)  # of an earlier run
    pictures = list(told(questions, skipped))
    files = {} if folder is None else read_files(folder, skipped)
    found = collected(chain, pictures, files, kept, skipped)
    if skipped:
        left_out.write(skipped, kept.parent)
        print(f"{left_out.told(skipped)}. See {kept.parent / left_out.FILE}", file=sys.stderr)
    if not any(not each.is_foreign for each in found):
        raise ValueError(f"no question of {questions} can be used")
    if folder is not None and not any(each.is_foreign for each in found):
        raise ValueError(f"no file of {folder} is an image that can be used")
    return found


def read_files(folder: Path, skipped: dict[str, str]) -> dict[str, bytes]:
    """Read the files of a folder, by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        try:
            found[path.name] = path.read_bytes()
        except OSError as exc:
            skipped[path.name] = str(exc)
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="glimpse calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("repository", type=Path, help="model repository of the profile embedded")
    found.add_argument("--checkpoint", type=Path, help="directory of the checkpoint that it was built from")
    found.add_argument("--questions", type=Path, help="held-out questions as JSON lines [rendered scenes]")
    found.add_argument(
        "--foreign", type=Path, help="folder of out-of-distribution images, which show nothing that the model knows"
    )
    found.add_argument("--words", type=Path, help="JSON with names, presence and denials [those of the scenes]")
    found.add_argument(
        "--kept", type=Path, default=KEPT, help="folder of what a run that was stopped has asked [%(default)s]"
    )
    return found


def weights_of(card: ModelCard) -> dict[str, str]:
    """What a calibration is of: it says nothing about other models, another prompt or another tokenizer.

    Raises ValueError for a card that does not tell the language model.
    """
    if not card.language_fingerprint:
        raise ValueError(
            "card.json has no language_fingerprint, so that a calibration could not tell its language model: "
            "build the repository again, into a new folder"
        )
    return {"weights": card.visual_fingerprint, "language": card.language_fingerprint}


def words_of(path: Path | None) -> Words:
    if path is None:
        return WORDS
    try:
        given = json.loads(path.read_text("utf-8-sig"))
        return Words(frozenset(given["names"]), tuple(given["presence"]), frozenset(given["denials"]))
    except (ValueError, KeyError, TypeError) as exc:
        raise ValueError(f"{path}: give names, presence and denials, each a list of texts ({exc!r})") from exc


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        chain = Chain.load(given.repository, threads=1)
        weights, words = weights_of(chain.card), words_of(given.words)
        kept = given.kept / f"{'-'.join(weights.values())}.jsonl"
        if given.questions is None:
            material = reference_material(chain, kept=kept)
        else:
            material = own_material(chain, given.questions, given.foreign, kept)
        calibration = fitted(material, words, weights)
        if given.questions is None:
            calibration = with_several(calibration, chain)
        elif chain.card.confidence is not None:
            calibration = keeping_several(calibration, chain.card.confidence)
    except (TooFew, NotReadable, ValueError, OSError) as error:
        print(f"glimpse calibrate: {error}", file=sys.stderr)
        return 2
    write(calibration, given.repository, given.checkpoint)
    print(f"{given.repository}: {calibration.about()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
