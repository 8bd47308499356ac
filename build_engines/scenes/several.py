"""Draw two to four scenes that belong together, and ask what tells them apart.

Two thirds of the groups are small edits of one scene (an object is removed, added, recoloured or given another shape),
so that a question cannot be answered from one image alone. The images of a group differ in ground, light and noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from build_engines.scenes.questions import NUMBERS, Name, Question
from build_engines.scenes.render import render
from build_engines.scenes.wide import draw_frame, paint
from build_engines.scenes.world import (
    COLOUR_NAMES,
    HELD_OUT,
    IMAGE_SIZE,
    NONE,
    SHAPES,
    Thing,
    World,
    named_rgb,
    sample_scene,
)

SEVERAL_KINDS = ("more", "which", "both", "same", "images", "together", "only")
ORDINALS = ("first", "second", "third", "fourth")
FEWEST, MOST = 2, 6  # objects of an image
EDITED_SHARE = 0.67  # of the groups that are edits of one scene
RELAID_SHARE = 0.35  # of the edited images whose objects lie at other places
EDIT_WEIGHTS = (0.2, 0.4, 0.4)  # of no edit, one and two
TRIES = 24
MARGIN = 2.0  # pixels between two objects, and to the border

Scenes = Sequence[Sequence[Thing]]


@dataclass(frozen=True)
class SeveralScene:
    """One image of a group.

    pixels: uint8 [224, 224, 3]. coverage: float32 [things, 16, 16], the share of each patch that an object fills.
    """

    things: tuple[Thing, ...]
    pixels: np.ndarray
    coverage: np.ndarray


def draw_several(rng: np.random.Generator, world: World, images: int) -> list[SeveralScene]:
    """Draw 2 to 4 images of 2 to 6 objects, in a random order, about 3 ms an image.

    Raises ValueError for another number, and for a world of nearer views or of unnamed colours.
    """
    frame = draw_frame(rng) if world.wide else None
    extent = frame.extent if frame else (float(IMAGE_SIZE), float(IMAGE_SIZE))
    found = []
    for things in draw_groups(rng, world, images, extent):
        seen = [frame.seen(thing) for thing in things] if frame else things
        picture = paint(rng, seen, 1, frame) if frame else render(seen, rng)
        found.append(SeveralScene(tuple(seen), picture.pixels, picture.coverage))
    return found


def draw_groups(
    rng: np.random.Generator, world: World, images: int, extent: tuple[float, float] = (IMAGE_SIZE, IMAGE_SIZE)
) -> list[list[Thing]]:
    """Draw the objects of each image, without pixels. extent: width and height that the places are in."""
    if not 2 <= images <= len(ORDINALS):
        raise ValueError(f"a group has 2 to {len(ORDINALS)} images, not {images}")
    if world.near or world.unnamed_share:
        raise ValueError("a group of images needs a world with named colours and whole pictures")
    world = replace(world, fewest=FEWEST, most=MOST)
    scenes = [_scene(rng, world, extent)]
    edited = rng.random() < EDITED_SHARE
    while len(scenes) < images:
        scenes.append(_edited(rng, world, scenes[0], extent) if edited else _scene(rng, world, extent))
    return [scenes[int(place)] for place in rng.permutation(images)]


def _scene(rng: np.random.Generator, world: World, extent: tuple[float, float]) -> list[Thing]:
    things: list[Thing] = []
    while len(things) < FEWEST:  # a narrow picture may have no room
        things = sample_scene(rng, world, extent)
    return things


def _edited(
    rng: np.random.Generator, world: World, things: Sequence[Thing], extent: tuple[float, float]
) -> list[Thing]:
    """A scene with none, one or two edits, some with all objects at other places."""
    found = list(things)
    for _ in range(int(rng.choice(3, p=EDIT_WEIGHTS))):
        edit, place = int(rng.integers(4)), int(rng.integers(len(found)))
        if edit == 0 and len(found) > FEWEST:
            found.pop(place)
        elif edit == 1 and len(found) < MOST:
            (added, *_) = sample_scene(rng, replace(world, fewest=1, most=1), extent)
            if all(_apart(added, thing) for thing in found):
                found.append(added)
        else:
            found[place] = _changed(rng, world, found[place])
    return _relaid(rng, found, extent) if rng.random() < RELAID_SHARE else found


def _apart(one: Thing, other: Thing) -> bool:
    return math.hypot(one.x - other.x, one.y - other.y) > (one.diameter + other.diameter) / 2 + MARGIN


def _changed(rng: np.random.Generator, world: World, thing: Thing) -> Thing:
    """The object with another colour or another shape. A ring has no character."""
    pairs = [
        *((c, thing.shape) for c in range(len(COLOUR_NAMES)) if c != thing.colour),
        *((thing.colour, s) for s in range(len(SHAPES)) if s != thing.shape),
    ]
    pairs = [pair for pair in pairs if world.held_out or pair not in HELD_OUT]
    colour, shape = pairs[int(rng.integers(len(pairs)))]
    rgb = thing.rgb if colour == thing.colour else named_rgb(rng, colour, world.wide)
    changed = replace(thing, colour=colour, shape=shape, rgb=rgb)
    return replace(changed, character=NONE, character_height=0.0) if SHAPES[shape] == "ring" else changed


def _relaid(rng: np.random.Generator, things: list[Thing], extent: tuple[float, float]) -> list[Thing]:
    """The same objects at other places; at the old ones if there is no room."""
    laid: list[Thing] = []
    for thing in sorted(things, key=lambda one: -one.diameter):
        margin = thing.diameter / 2 + MARGIN
        for _ in range(TRIES):
            x, y = (float(v) for v in rng.uniform(margin, np.subtract(extent, margin)))
            moved = replace(thing, x=x, y=y)
            if all(_apart(moved, other) for other in laid):
                laid.append(moved)
                break
        else:
            return things
    return laid


def ask_several(rng: np.random.Generator, scenes: Sequence[SeveralScene], kind: str) -> Question | None:
    """Return one question of a kind in `SEVERAL_KINDS`, or None if the images give none.

    `asked` are indices into the objects of all images, those of the first image first.
    """
    return ask_groups(rng, [scene.things for scene in scenes], kind)


def ask_groups(rng: np.random.Generator, scenes: Scenes, kind: str) -> Question | None:
    """As `ask_several`, of images that need not be drawn."""
    return _DRAW[kind](rng, scenes)


def _pick(rng: np.random.Generator, options: Sequence[Name]) -> Name:
    return options[int(rng.integers(len(options)))]


def _counts(scenes: Scenes, name: Name) -> list[int]:
    """How many objects of each image the name fits."""
    return [sum(name.fits(thing) for thing in things) for things in scenes]


def _asked(scenes: Scenes, fits: Callable[[Thing], bool]) -> tuple[int, ...]:
    """Indices of the objects that fit; of all objects if none does."""
    joined = [thing for things in scenes for thing in things]
    return tuple(i for i, thing in enumerate(joined) if fits(thing)) or tuple(range(len(joined)))


def _pairs(things: Sequence[Thing]) -> set[tuple[int, int]]:
    return {(thing.colour, thing.shape) for thing in things}


def _all_pairs(scenes: Scenes) -> list[tuple[int, int]]:
    """The colours and shapes of all images, each pair once."""
    return sorted(set().union(*(_pairs(things) for things in scenes)))


def _names(scenes: Scenes) -> list[Name]:
    """Colour and shape of every object."""
    return [Name(NONE, *pair) for pair in _all_pairs(scenes)]


def _groups(scenes: Scenes) -> list[Name]:
    """What can be counted: the colours, the shapes, and all objects."""
    pairs = _all_pairs(scenes)
    colours, shapes = sorted({colour for colour, _ in pairs}), sorted({shape for _, shape in pairs})
    return [*(Name(NONE, c) for c in colours), *(Name(NONE, NONE, s) for s in shapes), Name()]


def _any_names(rng: np.random.Generator, scenes: Scenes) -> list[Name]:
    """Names of one object each by colour and shape (mostly), by shape or by colour."""
    if rng.random() < 0.65:
        return _names(scenes)
    return [name for name in _groups(scenes) if name != Name()]


def _with_article(name: Name) -> str:
    text = name.text()
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _more(rng: np.random.Generator, scenes: Scenes) -> Question | None:
    names = [name for name in _groups(scenes) if _counts(scenes, name).count(max(_counts(scenes, name))) == 1]
    if not names:
        return None
    name = _pick(rng, names)
    counts = _counts(scenes, name)
    text = f"which image has {'more' if len(scenes) == 2 else 'the most'} {name.text(plural=True)}?"
    return Question(text, ORDINALS[counts.index(max(counts))], "more", _asked(scenes, name.fits))


def _which(rng: np.random.Generator, scenes: Scenes) -> Question | None:
    names = [name for name in _any_names(rng, scenes) if sum(map(bool, _counts(scenes, name))) == 1]
    if not names:
        return None
    name = _pick(rng, names)
    counts = _counts(scenes, name)
    noun = f"the {name.text()}" if max(counts) == 1 and rng.random() < 0.7 else _with_article(name)
    start = "which image has" if rng.random() < 0.6 else "in which image is"
    answer = ORDINALS[next(place for place, count in enumerate(counts) if count)]
    return Question(f"{start} {noun}?", answer, "which", _asked(scenes, name.fits))


def _together_word(scenes: Scenes) -> str:
    return "both" if len(scenes) == 2 else "all"


def _both(rng: np.random.Generator, scenes: Scenes) -> Question | None:
    """Half of the answers are yes. What is not in all images is in some."""
    wanted = rng.random() < 0.5
    names = [name for name in _any_names(rng, scenes) if all(_counts(scenes, name)) == wanted]
    if not names:
        return None
    name = _pick(rng, names)
    subject = f"is the {name.text()}" if max(_counts(scenes, name)) == 1 else f"is there {_with_article(name)}"
    text = f"{subject} in {_together_word(scenes)} images?"
    return Question(text, "yes" if wanted else "no", "both", _asked(scenes, name.fits))


def _same(rng: np.random.Generator, scenes: Scenes) -> Question | None:
    """Half of the answers are yes."""
    wanted = rng.random() < 0.5
    names = [name for name in _groups(scenes) if (len(set(_counts(scenes, name))) == 1) == wanted]
    if not names:
        return None
    name = Name() if Name() in names and rng.random() < 0.4 else _pick(rng, names)
    text = f"do {_together_word(scenes)} images have the same number of {name.text(plural=True)}?"
    return Question(text, "yes" if wanted else "no", "same", _asked(scenes, name.fits))


def _images(rng: np.random.Generator, scenes: Scenes) -> Question | None:
    """Count the images with an object. The numbers are about equally frequent."""
    wanted = int(rng.integers(len(scenes) + 1))
    names = _any_names(rng, scenes) if wanted else list(_absent(scenes))
    names = [name for name in names if sum(map(bool, _counts(scenes, name))) == wanted]
    if not names:
        return None
    name = _pick(rng, names)
    text = f"how many images {'have' if rng.random() < 0.7 else 'show'} {_with_article(name)}?"
    return Question(text, NUMBERS[wanted], "images", _asked(scenes, name.fits))


def _absent(scenes: Scenes) -> Iterator[Name]:
    """Near misses: names of no object whose colour and shape both occur. Held-out pairs are never named."""
    pairs = _all_pairs(scenes)
    for colour in sorted({colour for colour, _ in pairs}):
        for shape in sorted({shape for _, shape in pairs}):
            if (colour, shape) not in pairs and (colour, shape) not in HELD_OUT:
                yield Name(NONE, colour, shape)


def _together(rng: np.random.Generator, scenes: Scenes) -> Question | None:
    """Count over all images. The sum is drawn before the name, so that rare sums are asked for more often."""
    sums = {name: sum(_counts(scenes, name)) for name in _groups(scenes)}
    possible = sorted({total for total in sums.values() if total < len(NUMBERS)})
    if not possible:
        return None
    wanted = possible[int(rng.integers(len(possible)))]
    name = _pick(rng, [name for name, total in sums.items() if total == wanted])
    where = _together_word(scenes)
    text = f"how many {name.text(plural=True)} are there in {where} images{' together' if rng.random() < 0.7 else ''}?"
    return Question(text, NUMBERS[wanted], "together", _asked(scenes, name.fits))


def _only(rng: np.random.Generator, scenes: Scenes) -> Question | None:
    """Ask for the only colour and shape that one image has and another has not."""
    one, other = (int(place) for place in rng.permutation(len(scenes))[:2])
    alone = _pairs(scenes[one]) - _pairs(scenes[other])
    if len(alone) != 1:
        return None
    (pair,) = alone
    name = Name(NONE, *pair)
    text = f"what is in the {ORDINALS[one]} image but not in the {ORDINALS[other]}?"
    fits = {id(thing) for thing in scenes[one] if name.fits(thing)}
    return Question(text, name.text(), "only", _asked(scenes, lambda thing: id(thing) in fits))


_DRAW: dict[str, Callable[[np.random.Generator, Scenes], Question | None]] = {
    "more": _more,
    "which": _which,
    "both": _both,
    "same": _same,
    "images": _images,
    "together": _together,
    "only": _only,
}
