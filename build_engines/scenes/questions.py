"""Generate questions about a scene, their answers, and the objects they depend on.

Every question has one answer. A named object is the only one that fits its name. Compared sizes differ by a clear step.
left, right, above and below are only used if the offset is clear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from build_engines.scenes.world import CHARACTERS, COLOUR_NAMES, NONE, SHAPES, SIZE_NAMES, Thing, draw_index

TYPES = ("colour", "shape", "count", "exist", "relation", "size", "read")
DESCRIBE = "describe"
NUMBERS = tuple(str(n) for n in range(10))
RELATIONS = ("left", "right", "above", "below")
LEAST_OFFSET = 20.0  # pixels between two centres along the axis of the question
LEAST_STEP = 1.25  # ratio of two diameters that counts as bigger
# 8 and 9 are among the characters. The tokenizer is trained on this list, so its order and repetitions stay.
ANSWERS = (*COLOUR_NAMES, *SHAPES, *NUMBERS[:8], "yes", "no", *RELATIONS, *SIZE_NAMES, *CHARACTERS)


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    asked: indices of the objects that the answer depends on; all objects for counts over the whole scene.
    """

    text: str
    answer: str
    type: str
    asked: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A reference to objects by any of size, colour and shape. NONE: not mentioned."""

    size: int = NONE
    colour: int = NONE
    shape: int = NONE

    def fits(self, thing: Thing) -> bool:
        return (
            self.size in (NONE, thing.size)
            and self.colour in (NONE, thing.colour)
            and self.shape in (NONE, thing.shape)
        )

    def text(self, plural: bool = False) -> str:
        noun = "object" if self.shape == NONE else SHAPES[self.shape]
        if plural:
            noun += "es" if noun == "cross" else "s"
        words = [SIZE_NAMES[self.size]] if self.size != NONE else []
        words += [COLOUR_NAMES[self.colour]] if self.colour != NONE else []
        return " ".join([*words, noun])


Draw = Callable[[np.random.Generator, Sequence[Thing]], Question | None]


def ask(rng: np.random.Generator, things: Sequence[Thing], kind: str) -> Question | None:
    """Return one question of this type, or None if the scene gives none."""
    return _DRAW[kind](rng, things)


def rephrase(rng: np.random.Generator, question: Question) -> Question:
    """Replace a word by a common alternative in up to a quarter of questions (training only)."""
    if rng.random() > 0.25:
        return question
    kind = "digit" if question.answer.isdigit() else "letter"
    old, new = (("?", ""), ("image", "picture"), ("object", "thing"), ("character", kind), ("colour", "color"))[
        int(rng.integers(5))
    ]
    if old == "character" and question.type != "read":
        return question
    return replace(question, text=question.text.replace(old, new))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _fitting(things: Sequence[Thing], name: Name) -> list[int]:
    return [index for index, thing in enumerate(things) if name.fits(thing)]


def _unique_name(
    rng: np.random.Generator, things: Sequence[Thing], index: int, without: Sequence[str] = ()
) -> Name | None:
    """A name that fits only this object: mostly colour and shape, sometimes fewer or more words."""
    thing = things[index]
    candidates = []
    for use_size, use_colour, use_shape in (
        *((False, True, True), (False, False, True), (True, False, True)),
        *((True, True, True), (False, True, False), (True, True, False)),
    ):
        if (
            (use_colour and "colour" in without)
            or (use_shape and "shape" in without)
            or (use_size and "size" in without)
        ):
            continue
        name = Name(
            thing.size if use_size else NONE, thing.colour if use_colour else NONE, thing.shape if use_shape else NONE
        )
        if len(_fitting(things, name)) == 1:
            candidates.append(name)
    if not candidates:
        return None
    if rng.random() < 0.5:
        return candidates[0]
    return candidates[int(rng.integers(len(candidates)))]


def _named(
    rng: np.random.Generator, things: Sequence[Thing], among: Sequence[int], without: Sequence[str] = ()
) -> tuple[int, Name] | None:
    for index in rng.permutation(np.asarray(among, dtype=int)):
        name = _unique_name(rng, things, int(index), without)
        if name is not None:
            return int(index), name
    return None


def _colour(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    found = _named(rng, things, range(len(things)), ("colour",))
    if found is None:
        return None
    index, name = found
    template = _pick(rng, ("what colour is the {}?", "what color is the {}?", "which colour does the {} have?"))
    return Question(template.format(name.text()), COLOUR_NAMES[things[index].colour], "colour", (index,))


def _shape(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    if rng.random() < 0.15:
        carriers = _legible(things)
        if carriers:
            index = int(rng.choice(carriers))
            text = f"what shape has the character {CHARACTERS[things[index].character]}?"
            return Question(text, SHAPES[things[index].shape], "shape", (index,))
    found = _named(rng, things, range(len(things)), ("shape",))
    if found is None:
        return None
    index, name = found
    template = _pick(rng, ("what shape is the {}?", "which shape is the {}?", "what is the shape of the {}?"))
    return Question(template.format(name.text()), SHAPES[things[index].shape], "shape", (index,))


def _any_name(rng: np.random.Generator, things: Sequence[Thing]) -> Name:
    """A reference of random kind to a random object of the scene.

    A caller may change it so that it fits fewer objects or none.
    """
    thing = things[int(rng.integers(len(things)))]
    kind = rng.random()
    size = thing.size if rng.random() < 0.15 else NONE
    if kind < 0.35:
        return Name(size, thing.colour, NONE)
    if kind < 0.65:
        return Name(size, NONE, thing.shape)
    return Name(size, thing.colour, thing.shape)


def _count(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    """Draw names until the number fits, so that counts from 0 to 5 are about equally frequent."""
    if rng.random() < 0.08:
        template = _pick(rng, ("how many objects are there?", "how many shapes are in the image?"))
        if len(things) >= len(NUMBERS):
            return None
        return Question(template, NUMBERS[len(things)], "count", tuple(range(len(things))))
    wanted = draw_index(rng, (0.16, 0.22, 0.24, 0.18, 0.12, 0.08))
    for _ in range(8):
        name = _any_name(rng, things) if wanted else absent_name(rng, things)
        if name is None:
            return None
        fitting = _fitting(things, name)
        if len(fitting) == wanted:
            break
    else:
        if rng.random() < 0.6 or len(fitting) >= len(NUMBERS):
            return None
    template = _pick(rng, ("how many {} are there?", "how many {} are in the image?", "how many {} do you see?"))
    asked = tuple(fitting) if fitting else tuple(range(len(things)))
    return Question(template.format(name.text(plural=True)), NUMBERS[len(fitting)], "count", asked)


def absent_name(rng: np.random.Generator, things: Sequence[Thing]) -> Name | None:
    """A near miss: an object's name with one word changed so that nothing fits."""
    for _ in range(6):
        name = _any_name(rng, things)
        swap_colour = name.colour != NONE and (name.shape == NONE or rng.random() < 0.5)
        changed = (
            Name(name.size, int(rng.integers(len(COLOUR_NAMES))), name.shape)
            if swap_colour
            else Name(name.size, name.colour, int(rng.integers(len(SHAPES))))
        )
        if not _fitting(things, changed):
            return changed
    return None


def _exist(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    present = rng.random() < 0.5
    if rng.random() < 0.1:
        return _exist_character(rng, things, present)
    name = _any_name(rng, things) if present else absent_name(rng, things)
    if name is None:
        return None
    article = "an" if name.text()[0] in "aeiou" else "a"
    template = _pick(rng, ("is there {} {}?", "is there {} {} in the image?", "do you see {} {}?"))
    fitting = _fitting(things, name)
    near = [i for i, t in enumerate(things) if t.colour == name.colour or t.shape == name.shape]
    asked = fitting or near or range(len(things))
    return Question(template.format(article, name.text()), "yes" if fitting else "no", "exist", tuple(asked))


def _exist_character(rng: np.random.Generator, things: Sequence[Thing], present: bool) -> Question | None:
    shown = {t.character: i for i, t in enumerate(things) if t.character != NONE}
    if present:
        if not shown:
            return None
        character = int(rng.choice(list(shown)))
        return Question(f"is there the character {CHARACTERS[character]}?", "yes", "exist", (shown[character],))
    character = int(rng.integers(len(CHARACTERS)))
    if character in shown:
        return None
    asked = tuple(shown.values()) or tuple(range(len(things)))
    return Question(f"is there the character {CHARACTERS[character]}?", "no", "exist", asked)


def _offset(a: Thing, b: Thing, horizontal: bool) -> float:
    """How far a lies to the right of (or below) b, in pixels."""
    return a.x - b.x if horizontal else a.y - b.y


def _relation(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    found = _named(rng, things, range(len(things)))
    if found is None:
        return None
    first, first_name = found
    horizontal = rng.random() < 0.5
    far = [i for i, t in enumerate(things) if i != first and abs(_offset(things[first], t, horizontal)) >= LEAST_OFFSET]
    other = _named(rng, things, far) if far else None
    if other is None:
        return None
    second, second_name = other
    beyond = _offset(things[first], things[second], horizontal) > 0
    low, high = ("left", "right") if horizontal else ("above", "below")
    truth = high if beyond else low
    one, two = first_name.text(), second_name.text()
    asked = (first, second)
    kind = rng.random()
    if kind < 0.35:
        options = ("left", "right") if horizontal else ("above", "below")
        template = _pick(rng, ("is the {} {} or {} of the {}?",)) if horizontal else "is the {} {} or {} the {}?"
        return Question(template.format(one, *options, two), truth, "relation", asked)
    said = truth if rng.random() < 0.5 else (low if beyond else high)
    answer = "yes" if said == truth else "no"
    phrase = _pick(rng, ("{} of", "to the {} of", "on the {} of")).format(said) if horizontal else said
    return Question(f"is the {one} {phrase} the {two}?", answer, "relation", asked)


def _size(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    found = _named(rng, things, range(len(things)), ("size",))
    if found is None:
        return None
    first, first_name = found
    kind = rng.random()
    if kind < 0.3:
        template = _pick(rng, ("what size is the {}?", "how big is the {}?"))
        return Question(template.format(first_name.text()), SIZE_NAMES[things[first].size], "size", (first,))
    clear = [i for i, t in enumerate(things) if i != first and t.size != things[first].size]
    clear = [i for i in clear if _ratio(things[i], things[first]) >= LEAST_STEP]
    other = _named(rng, things, clear, ("size",)) if clear else None
    if other is None:
        return None
    second, second_name = other
    one, two = first_name.text(), second_name.text()
    bigger_first = things[first].diameter > things[second].diameter
    word = _pick(rng, ("bigger", "smaller"))
    asked = (first, second)
    if kind < 0.6 and first_name.colour != second_name.colour and NONE not in (first_name.colour, second_name.colour):
        winner = first_name if bigger_first == (word == "bigger") else second_name
        return Question(f"which is {word}, the {one} or the {two}?", COLOUR_NAMES[winner.colour], "size", asked)
    if kind < 0.6 and first_name.shape != second_name.shape and NONE not in (first_name.shape, second_name.shape):
        winner = first_name if bigger_first == (word == "bigger") else second_name
        return Question(f"which is {word}, the {one} or the {two}?", SHAPES[winner.shape], "size", asked)
    answer = "yes" if bigger_first == (word == "bigger") else "no"
    return Question(f"is the {one} {word} than the {two}?", answer, "size", asked)


def _ratio(a: Thing, b: Thing) -> float:
    return max(a.diameter, b.diameter) / min(a.diameter, b.diameter)


def _legible(things: Sequence[Thing]) -> list[int]:
    """Objects whose character appears once in the scene."""
    shown = [t.character for t in things]
    return [i for i, character in enumerate(shown) if character != NONE and shown.count(character) == 1]


def _read(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    carriers = [i for i, t in enumerate(things) if t.character != NONE]
    found = _named(rng, things, carriers) if carriers else None
    if found is None:
        return None
    index, name = found
    template = _pick(
        rng, ("what character is on the {}?", "what does the {} say?", "read the {}.", "which character is on the {}?")
    )
    return Question(template.format(name.text()), CHARACTERS[things[index].character], "read", (index,))


def _describe(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    """Describe all objects from left to right."""
    order = sorted(range(len(things)), key=lambda i: things[i].x)
    phrases = []
    for index in order:
        thing = things[index]
        phrase = f"a {SIZE_NAMES[thing.size]} {COLOUR_NAMES[thing.colour]} {SHAPES[thing.shape]}"
        if thing.character != NONE:
            phrase += f" with {CHARACTERS[thing.character]}"
        phrases.append(phrase)
    text = _pick(rng, ("describe the image.", "what is in the image?"))
    answer = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    return Question(text, answer, DESCRIBE, tuple(order))


def _position(rng: np.random.Generator, things: Sequence[Thing]) -> Question | None:
    """Ask for an object's place in the image, a first step to relations (training only)."""
    found = _named(rng, things, range(len(things)))
    if found is None:
        return None
    index, name = found
    horizontal = rng.random() < 0.5
    offset = (things[index].x if horizontal else things[index].y) - 112
    if abs(offset) < 10:
        return None
    low, high = ("left", "right") if horizontal else ("above", "below")
    truth = high if offset > 0 else low
    if rng.random() < 0.5:
        text = f"is the {name.text()} {low} or {high}?"
        return Question(text, truth, "position", (index,))
    said = _pick(rng, (low, high))
    return Question(f"is the {name.text()} {said}?", "yes" if said == truth else "no", "position", (index,))


_DRAW: dict[str, Draw] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "exist": _exist,
    "relation": _relation,
    "size": _size,
    "read": _read,
    DESCRIBE: _describe,
    "position": _position,
}
