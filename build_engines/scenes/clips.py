"""Draw short clips of the reference world, and ask what happened in them.

A clip has 2 to 6 objects and 1 to 3 events: an object moves along a straight line, appears, vanishes or changes its
colour. An object has at most one event. A frame follows from the clip and its time alone, so 4, 8, 16 and 32 frames of
a clip show the same story. Every question can be answered from 4 evenly spaced frames or more: nothing happens before
the first frame or after the last one, and of two events in a question, one is over for `LEAST_PAUSE` when the other
starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from build_engines.scenes.questions import NUMBERS, Name, Question
from build_engines.scenes.render import background, draw, light, noise
from build_engines.scenes.wide import PADDING, Frame, Style, degraded, draw_frame, draw_ground, draw_style, draw_thing
from build_engines.scenes.world import (
    COLOUR_NAMES,
    GRID,
    HELD_OUT,
    IMAGE_SIZE,
    NONE,
    SHAPES,
    Thing,
    World,
    named_rgb,
    sample_scene,
)

CLIP_KINDS = ("moved", "way", "appeared", "vanished", "came", "recoloured", "before", "order", "happened", "count")
WHEN = "when"  # a kind that only training asks
EVENTS = ("moved", "appeared", "vanished", "recoloured")
WAYS = ("left", "right", "up", "down")
FEWEST, MOST = 2, 6  # objects
EVENT_WEIGHTS = (0.25, 0.35, 0.4)  # of one, two and three events
THEME_SHARE = 0.45  # of the clips whose events are of one kind, so that "how many appeared" is not always 0 or 1
FIRST, LAST = 0.06, 0.94  # times between which everything happens
LEAST_FRAMES = 4
# Between the events of an order question. Four of 32 frames are at most 11 / 31 apart, so one of them lies between.
LEAST_PAUSE = 0.36
DURATION = (0.15, 0.5)  # of a movement
DISTANCE = (45.0, 150.0)  # of a movement, in pixels
LEAST_CLEARANCE = 2.0  # pixels between an object and another's path
SLANT = 0.25  # of a movement, across its way
SHIMMER_SHARE = 0.3  # of the plain clips whose noise differs from frame to frame


@dataclass(frozen=True)
class Event:
    """What happens to one object between two times. `after` is the object then, if it moved or changed its colour."""

    kind: str
    index: int
    start: float
    end: float
    after: Thing | None = None


@dataclass(frozen=True)
class Story:
    """A clip before it is drawn.

    things: the objects at the start, or when they appear. events: the earliest first. look: seed of the background and
    of everything else that the drawing draws at random. frame: where the picture lies, in a wide world.
    """

    things: tuple[Thing, ...]
    events: tuple[Event, ...]
    look: int
    frame: Frame | None = None

    def event_of(self, index: int) -> Event | None:
        return next((event for event in self.events if event.index == index), None)

    def at(self, index: int, time: float) -> Thing | None:
        """Return the object as it is at a time from 0 to 1; None if it is not in the picture."""
        thing, event = self.things[index], self.event_of(index)
        if event is None:
            return thing
        if event.kind in ("appeared", "vanished"):
            return thing if (time >= event.start) == (event.kind == "appeared") else None
        after = event.after
        if after is None or time < event.start:
            return thing
        if time >= event.end:
            return after
        share = (time - event.start) / (event.end - event.start)
        return replace(thing, x=thing.x + share * (after.x - thing.x), y=thing.y + share * (after.y - thing.y))

    def scene(self, time: float) -> list[Thing | None]:
        """Every object at a time, in the order of `things`."""
        return [self.at(index, time) for index in range(len(self.things))]

    def states(self, index: int) -> list[Thing]:
        """The object before and after its event; once if that leaves it as it was."""
        event = self.event_of(index)
        return [self.things[index], *([event.after] if event and event.after else [])]


@dataclass(frozen=True)
class SceneClip:
    """A drawn clip of T frames.

    times: float64 [T], evenly spaced from 0 to 1. pixels: uint8 RGB [T, 224, 224, 3]. coverage: float32
    [T, things, 16, 16], the share of each patch that an object fills in a frame.
    """

    story: Story
    times: np.ndarray
    pixels: np.ndarray
    coverage: np.ndarray

    def scene(self, frame: int) -> list[Thing | None]:
        """Every object in a frame, in the order of `story.things`."""
        return self.story.scene(float(self.times[frame]))


def draw_clip(rng: np.random.Generator, world: World, frames: int) -> SceneClip:
    """Draw a clip. The number of frames changes neither the story nor what `rng` gives next. About 1 ms a frame.

    The world gives the colours, sizes, characters and the renderer; the clip has 2 to 6 objects of it.
    Raises ValueError for a world of small print, of nearer views or of unnamed colours.
    """
    return shoot(draw_story(rng, world), frames)


def draw_story(rng: np.random.Generator, world: World) -> Story:
    """Draw the objects and events of a clip."""
    if world.near or world.unnamed_share or world.small_print:
        raise ValueError("a clip needs a world with named colours and whole pictures at 224 pixels")
    world = replace(world, fewest=FEWEST, most=MOST)
    frame = draw_frame(rng) if world.wide else None
    extent = frame.extent if frame else (float(IMAGE_SIZE), float(IMAGE_SIZE))
    things: list[Thing] = []
    while len(things) < FEWEST:  # a narrow picture may have no room
        things = sample_scene(rng, world, extent)
    if frame:
        things = [frame.seen(thing) for thing in things]
    story = Story(tuple(things), (), int(rng.integers(2**62)), frame)
    number = min(1 + int(rng.choice(3, p=EVENT_WEIGHTS)), len(things) - 1)
    theme = EVENTS[int(rng.integers(len(EVENTS)))] if rng.random() < THEME_SHARE else None
    kinds = [theme or EVENTS[int(rng.integers(len(EVENTS)))] for _ in range(number)]
    times = _draw_times(rng, kinds)
    for index, kind, (start, end) in zip(rng.permutation(len(things)), kinds, times, strict=False):
        event = _draw_event(rng, story, world, Event(kind, int(index), start, end))
        story = replace(story, events=tuple(sorted((*story.events, event), key=lambda one: one.start)))
    return story


def _draw_times(rng: np.random.Generator, kinds: Sequence[str]) -> list[tuple[float, float]]:
    """Start and end of each event. Some two of them are one after the other for sure, if there are two."""
    for _ in range(16):
        times = []
        for kind in kinds:
            duration = float(rng.uniform(*DURATION)) if kind == "moved" else 0.0
            start = float(rng.uniform(FIRST, LAST - duration))
            times.append((start, start + duration))
        if max(start for start, _ in times) - min(end for _, end in times) >= LEAST_PAUSE:
            break
    return times


def _draw_event(rng: np.random.Generator, story: Story, world: World, event: Event) -> Event:
    """Fill in what an object becomes. One without room to move changes its colour instead."""
    thing = story.things[event.index]
    if event.kind == "moved":
        for _ in range(24):
            after = _moved(rng, thing)
            if _is_clear(story, event.index, after):
                return replace(event, after=after)
        event = replace(event, kind="recoloured", end=event.start)
    if event.kind == "recoloured":
        free = [c for c in range(len(COLOUR_NAMES)) if c != thing.colour]
        free = [c for c in free if world.held_out or (c, thing.shape) not in HELD_OUT]
        colour = free[int(rng.integers(len(free)))]
        return replace(event, after=replace(thing, colour=colour, rgb=named_rgb(rng, colour, world.wide)))
    return event


def _moved(rng: np.random.Generator, thing: Thing) -> Thing:
    way, distance = WAYS[int(rng.integers(4))], float(rng.uniform(*DISTANCE))
    across, sign = float(rng.uniform(-SLANT, SLANT)) * distance, 1 if way in ("right", "down") else -1
    dx, dy = (sign * distance, across) if way in ("left", "right") else (across, sign * distance)
    return replace(thing, x=thing.x + dx, y=thing.y + dy)


def _is_clear(story: Story, index: int, after: Thing) -> bool:
    """Whether an object can move in the picture without touching another one or another one's path."""
    left, top = (story.frame.left, story.frame.top) if story.frame else (0.0, 0.0)
    radius = _reach(after)
    if not (left + radius <= after.x <= IMAGE_SIZE - left - radius):
        return False
    if not (top + radius <= after.y <= IMAGE_SIZE - top - radius):
        return False
    path = _path(story.things[index], after)
    for other, thing in enumerate(story.things):
        if other == index:
            continue
        theirs = _path(thing, story.states(other)[-1])
        nearest = np.linalg.norm(path[:, None] - theirs[None], axis=-1).min()
        if nearest < radius + _reach(thing) + LEAST_CLEARANCE:
            return False
    return True


def _reach(thing: Thing) -> float:
    return thing.diameter / 2 * math.sqrt(max(thing.stretch, 1 / thing.stretch))


def _path(before: Thing, after: Thing) -> np.ndarray:
    """[steps, 2] places on the way, at most about 5 pixels apart."""
    length = math.hypot(after.x - before.x, after.y - before.y)
    share = np.linspace(0, 1, 2 + int(length / 5))[:, None]
    return (1 - share) * (before.x, before.y) + share * (after.x, after.y)


def shoot(story: Story, frames: int) -> SceneClip:
    """Draw evenly spaced frames. The ground and the objects without an event are drawn once."""
    times = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    camera = _Camera(story)
    pixels = np.empty((frames, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    coverage = np.zeros((frames, len(story.things), GRID, GRID), np.float32)
    shown: list[Thing | None] | None = None
    for frame, time in enumerate(times):
        scene = story.scene(float(time))
        if scene == shown and not camera.shimmers:
            pixels[frame], coverage[frame] = pixels[frame - 1], coverage[frame - 1]
        else:
            pixels[frame] = camera.draw(scene, float(time), coverage[frame])
        shown = scene
    return SceneClip(story, times, pixels, coverage)


class _Camera:
    """Draw a story's frames, with one ground, light, style and noise."""

    def __init__(self, story: Story) -> None:
        rng = np.random.default_rng(story.look)
        self._frame = story.frame
        self._seed = story.look
        self._style: Style | None = None
        if story.frame:
            self._style = draw_style(rng)
            everything = [state for index in range(len(story.things)) for state in story.states(index)]
            self._canvas = draw_ground(rng, everything, 1)
        else:
            self._canvas = background(rng, 1)
            self._gain = light(rng, IMAGE_SIZE)
            self._amplitude = float(rng.uniform(2, 9))
        self.shimmers = story.frame is None and bool(rng.random() < SHIMMER_SHARE)
        self._noise = None if story.frame or self.shimmers else noise(rng, self._amplitude, IMAGE_SIZE)
        self._still = {event.index for event in story.events} ^ set(range(len(story.things)))
        self._coverage = np.zeros((len(story.things), GRID, GRID), np.float32)
        for index in sorted(self._still):
            self._put(self._canvas, self._coverage[index], index, story.things[index])

    def _put(self, canvas: np.ndarray, shares: np.ndarray, index: int, thing: Thing) -> None:
        rng = np.random.default_rng((self._seed, index))  # an object looks the same in every frame
        if self._style:
            shares[:] = draw_thing(canvas, thing, self._style, rng, 1)
        else:
            draw(canvas, shares, thing, rng, 1)

    def draw(self, scene: Sequence[Thing | None], time: float, coverage: np.ndarray) -> np.ndarray:
        """Return uint8 [224, 224, 3] and fill in the coverage [things, 16, 16]."""
        canvas = self._canvas.copy()
        coverage[:] = self._coverage
        for index, thing in enumerate(scene):
            if thing and index not in self._still:
                self._put(canvas, coverage[index], index, thing)
        if self._frame:
            canvas = degraded(canvas, np.random.default_rng((self._seed, len(scene))))
        else:
            canvas *= self._gain
            canvas += self._noise_at(time)
        pixels = np.clip(canvas, 0, 255).astype(np.uint8)
        if self._frame:
            left, top = round(self._frame.left), round(self._frame.top)
            pixels[:, :left] = pixels[:, IMAGE_SIZE - left :] = round(PADDING)
            pixels[:top] = pixels[IMAGE_SIZE - top :] = round(PADDING)
        return pixels

    def _noise_at(self, time: float) -> np.ndarray:
        if self._noise is not None:
            return self._noise
        return noise(np.random.default_rng((self._seed, round(1e6 * time))), self._amplitude, IMAGE_SIZE)


def ask_clip(rng: np.random.Generator, clip: SceneClip, kind: str) -> Question | None:
    """Return one question of a kind in `CLIP_KINDS`, or None if the clip gives none.

    `asked` are indices of `clip.story.things`. Raises ValueError for a clip of fewer than 4 frames.
    """
    if len(clip.times) < LEAST_FRAMES:
        raise ValueError(f"a question about a clip needs at least {LEAST_FRAMES} frames, not {len(clip.times)}")
    return ask_story(rng, clip.story, kind)


def ask_story(rng: np.random.Generator, story: Story, kind: str) -> Question | None:
    """As `ask_clip`, of a clip that need not be drawn."""
    return _DRAW[kind](rng, story)


# What is said of an event: in the past, after "did", and after "how many objects".
_PAST = {
    "moved": ("moved",),
    "appeared": ("appeared", "came"),
    "vanished": ("vanished", "disappeared"),
    "recoloured": ("changed colour",),
}
_DID = {
    "moved": ("move",),
    "appeared": ("appear", "come"),
    "vanished": ("vanish", "disappear"),
    "recoloured": ("change colour",),
}


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _of_kind(story: Story, kind: str) -> list[Event]:
    return [event for event in story.events if event.kind == kind]


def _full_name(thing: Thing) -> str:
    return Name(NONE, thing.colour, thing.shape).text()


def _fitting(story: Story, name: Name) -> list[int]:
    """The objects that the name fits before or after their event."""
    return [i for i in range(len(story.things)) if any(name.fits(state) for state in story.states(i))]


def _name(rng: np.random.Generator, story: Story, index: int) -> str | None:
    """A name that fits only this object, whenever one looks; without the colour if that changes."""
    thing = story.things[index]
    uses = [(False, True)] if len({state.colour for state in story.states(index)}) > 1 else _USES
    names = [Name(NONE, thing.colour if colour else NONE, thing.shape if shape else NONE) for colour, shape in uses]
    names = [name for name in names if _fitting(story, name) == [index]]
    if not names:
        return None
    return names[0 if rng.random() < 0.5 else int(rng.integers(len(names)))].text()


_USES = [(True, True), (False, True), (True, False)]  # colour and shape


def _only(kind: str) -> Callable[[np.random.Generator, Story], Question | None]:
    """Ask which object the only event of this kind happened to."""

    def ask(rng: np.random.Generator, story: Story) -> Question | None:
        events = _of_kind(story, kind)
        if len(events) != 1:
            return None
        said = _pick(rng, _PAST[kind])
        text = f"{_pick(rng, ('what', 'what', 'which object'))} {said}?"
        return Question(text, _full_name(story.things[events[0].index]), kind, (events[0].index,))

    return ask


def way_of(event: Event, before: Thing) -> str:
    """left, right, up or down: the axis along which an object moved further."""
    if event.after is None:
        raise ValueError("only an object that moved has a way")
    dx, dy = event.after.x - before.x, event.after.y - before.y
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _way(rng: np.random.Generator, story: Story) -> Question | None:
    moved = _of_kind(story, "moved")
    if not moved:
        return None
    event = moved[int(rng.integers(len(moved)))]
    name = _name(rng, story, event.index)
    if len(moved) == 1 and (name is None or rng.random() < 0.2):
        name = "object"
    if name is None:
        return None
    text = _pick(rng, ("which way did the {} move?", "which way did the {} go?"))
    return Question(text.format(name), way_of(event, story.things[event.index]), "way", (event.index,))


def _came(rng: np.random.Generator, story: Story) -> Question | None:
    """Count the events of a kind. The numbers from 0 to 3 are about equally frequent."""
    wanted = int(rng.choice(4, p=(0.13, 0.16, 0.24, 0.47)))
    fitting = [kind for kind in EVENTS if len(_of_kind(story, kind)) == wanted]
    if not fitting:
        return None
    kind = _pick(rng, fitting)
    asked = tuple(event.index for event in _of_kind(story, kind)) or tuple(range(len(story.things)))
    return Question(f"how many objects {_pick(rng, _PAST[kind])}?", NUMBERS[wanted], "came", asked)


def _recoloured(rng: np.random.Generator, story: Story) -> Question | None:
    """Ask for the shape that changed its colour, as its colour is not one."""
    events = _of_kind(story, "recoloured")
    if len(events) != 1:
        return None
    text = _pick(rng, ("what changed colour?", "what changed colour?", "which shape changed colour?"))
    return Question(text, SHAPES[story.things[events[0].index].shape], "recoloured", (events[0].index,))


def _before(rng: np.random.Generator, story: Story) -> Question | None:
    """Ask for the colour before or after a change."""
    events = _of_kind(story, "recoloured")
    if not events:
        return None
    event = events[int(rng.integers(len(events)))]
    name = _name(rng, story, event.index)
    if name is None:
        return None
    start = rng.random() < 0.5
    told = ("what colour was the {} before?", "what colour was the {} at the start?")
    told = told if start else ("what colour is the {} after?", "what colour is the {} at the end?")
    thing = story.states(event.index)[0 if start else -1]
    return Question(_pick(rng, told).format(name), COLOUR_NAMES[thing.colour], "before", (event.index,))


def _order(rng: np.random.Generator, story: Story) -> Question | None:
    """Ask which of two events came first, of two that are clearly one after the other."""
    pairs = [(a, b) for a in story.events for b in story.events if b.start - a.end >= LEAST_PAUSE]
    if not pairs:
        return None
    pair = pairs[int(rng.integers(len(pairs)))]
    names = [_name(rng, story, event.index) for event in pair]
    said = _pick(rng, ("before", "after"))
    order = (0, 1) if rng.random() < 0.5 else (1, 0)
    first, second = (pair[place] for place in order)
    if None in names:
        return None
    one, other = (names[place] for place in order)
    text = f"did the {one} {_DID[first.kind][0]} {said} the {other} {_PAST[second.kind][0]}?"
    right = (first.start < second.start) == (said == "before")
    return Question(text, "yes" if right else "no", "order", (first.index, second.index))


def _when(rng: np.random.Generator, story: Story) -> Question | None:
    """Ask in which quarter of the clip something happened: 1 to 4. Training only, so that "before" can be learned."""
    event = story.events[int(rng.integers(len(story.events)))]
    name = _name(rng, story, event.index)
    if name is None:
        return None
    quarter = 1 + min(3, int(2 * (event.start + event.end)))
    return Question(f"when did the {name} {_DID[event.kind][0]}?", NUMBERS[quarter], WHEN, (event.index,))


def _happened(rng: np.random.Generator, story: Story) -> Question | None:
    """Ask whether something happened, to anything or to one object. Half of the answers are yes."""
    wanted = rng.random() < 0.5
    if rng.random() < 0.5:
        kinds = [kind for kind in EVENTS if bool(_of_kind(story, kind)) == wanted]
        if not kinds:
            return None
        kind = _pick(rng, kinds)
        asked = tuple(event.index for event in _of_kind(story, kind)) or tuple(range(len(story.things)))
        return Question(f"did anything {_pick(rng, _DID[kind])}?", "yes" if wanted else "no", "happened", asked)
    kind = _pick(rng, [event.kind for event in story.events])
    busy = {event.index for event in _of_kind(story, kind)}
    fitting = [index for index in range(len(story.things)) if (index in busy) == wanted]
    if not fitting:
        return None
    index = fitting[int(rng.integers(len(fitting)))]
    name = _name(rng, story, index)
    if name is None:
        return None
    text = f"did the {name} {_pick(rng, _DID[kind])}?"
    return Question(text, "yes" if wanted else "no", "happened", (index,))


def _count(rng: np.random.Generator, story: Story) -> Question | None:
    """Count the objects of the first or the last frame: all, or those of a colour or a shape."""
    start = rng.random() < 0.5
    shown = {index: thing for index, thing in enumerate(story.scene(0.0 if start else 1.0)) if thing}
    name = Name()
    if rng.random() < 0.5:
        states = [state for index in range(len(story.things)) for state in story.states(index)]
        thing = states[int(rng.integers(len(states)))]
        name = Name(NONE, thing.colour) if rng.random() < 0.5 else Name(NONE, NONE, thing.shape)
    fitting = tuple(index for index, thing in shown.items() if name.fits(thing))
    text = f"how many {name.text(plural=True)} are there at the {'start' if start else 'end'}?"
    return Question(text, NUMBERS[len(fitting)], "count", fitting or tuple(range(len(story.things))))


_DRAW: dict[str, Callable[[np.random.Generator, Story], Question | None]] = {
    "moved": _only("moved"),
    "way": _way,
    "appeared": _only("appeared"),
    "vanished": _only("vanished"),
    "came": _came,
    "recoloured": _recoloured,
    "before": _before,
    "order": _order,
    WHEN: _when,
    "happened": _happened,
    "count": _count,
}
