"""Ask about objects that are not in a scene: such questions have no right answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from build_engines.scenes.questions import Name, absent_name
from build_engines.scenes.world import NONE, Thing

# By the attribute that is asked for, which the name must not have.
TEMPLATES = {
    "colour": ("what colour is the {}?", "what color is the {}?", "which colour does the {} have?"),
    "shape": ("what shape is the {}?", "which shape is the {}?", "what is the shape of the {}?"),
    "size": ("what size is the {}?", "how big is the {}?"),
    "read": ("what character is on the {}?", "what does the {} say?", "read the {}."),
}


def about_nothing(rng: np.random.Generator, things: Sequence[Thing]) -> str | None:
    """Ask for an attribute of one object that is absent. None if the scene gives no near miss."""
    name = absent_name(rng, things)
    if name is None:
        return None
    given = {"colour": name.colour, "shape": name.shape, "size": name.size, "read": NONE}
    kinds = [kind for kind, attribute in given.items() if attribute == NONE]
    templates = TEMPLATES[kinds[int(rng.integers(len(kinds)))]]
    return templates[int(rng.integers(len(templates)))].format(name.text())


def about_half(rng: np.random.Generator, things: Sequence[Thing]) -> str | None:
    """Ask how one object of the scene stands to one that is absent."""
    absent = absent_name(rng, things)
    if absent is None:
        return None
    thing = things[int(rng.integers(len(things)))]
    present = Name(NONE, thing.colour, thing.shape)
    first, second = (present, absent) if rng.random() < 0.5 else (absent, present)
    relation = ("left of", "to the right of", "above", "below")[int(rng.integers(4))]
    return f"is the {first.text()} {relation} the {second.text()}?"
