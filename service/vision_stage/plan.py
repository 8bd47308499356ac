"""Decide which step comes next for one image of a request. Pure: everything that it depends on is an argument.

A `Look` is the state of that work: what is known of the image for this question so far. A frame of a clip has a look
of its own, as an image with detail low has.

    Recall         ask the visual cache for this image's visual tokens for this question
    See            find the features of the first view; if they are new, encode and attend in the same call
    Encode         find the features of the first view; if they are new, encode
    EncodeCloser   find the features of the closer view; if they are new, encode its crops in one batch
    ChooseTile     choose the tile that the question is about, or go on with the whole image
    Attend         make visual tokens from the features and the question
    Done           the visual tokens are complete

Every look begins with detail low. It becomes a closer look, with detail high, as soon as a closer view is both wanted
and possible. The result with detail low is kept, and the look falls back to it if there is no capacity. After a
fallback, the look does not look closer again.

A look at a page begins with the whole page, squashed, with detail low. If one tile holds what the question is about,
the look begins anew with that tile, and falls back to the whole page if there is no capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from service.core.prompt import Question
from service.core.request import Detail
from service.core.viewport import Viewport, viewed
from service.core.vision import GRID, IMAGE_SIZE, CloserFeatures, Frame, Relevance, Seen, VisionFeatures
from service.media.decoder import Decoded
from service.media.store import Image

# The least share of the squared relevance that a tile must hold to be looked at in place of the whole page. Chosen on
# pages of `benchmarks.pages`: counts and relations, whose objects lie far apart, are then asked of the whole page.
TILE_SHARE = 5 / 6


@dataclass(frozen=True, slots=True)
class Recall:
    """Ask the visual cache. With `detail` high, the look becomes a closer look."""

    detail: Literal["low", "high"]


@dataclass(frozen=True, slots=True)
class See:
    """Find or encode the first view, with detail low, and attend in the same call if it is encoded."""


@dataclass(frozen=True, slots=True)
class Encode:
    """Find or encode the first view, with detail high.

    Without capacity, an optional step falls back to the result with detail low.
    """

    is_optional: bool


@dataclass(frozen=True, slots=True)
class EncodeCloser:
    """Find or encode the closer view. `is_optional` is as for Encode."""

    is_optional: bool


@dataclass(frozen=True, slots=True)
class ChooseTile:
    """Choose the tile that the question is about, or go on with the whole image."""


@dataclass(frozen=True, slots=True)
class Attend:
    """Attend to all views of this detail."""


@dataclass(frozen=True, slots=True)
class Done:
    is_denied: bool = False  # a closer view was wanted but not possible


@dataclass(slots=True, eq=False)
class Film:
    """The file of a request's clip, of which at most `most` frames are decoded."""

    file: Image
    most: int
    pixels: int = 0  # that are reserved to decode it
    is_remembered: bool = False  # it can be asked about by its id


Step = Recall | See | Encode | EncodeCloser | ChooseTile | Attend | Done


@dataclass(slots=True)
class Look:
    """Hold one image, or one frame of a clip, and its results so far."""

    number: int  # its place among the images of the request; of a frame, its index in the clip
    image: Image  # of a frame, the clip's file, or the image that the frame came as
    question: Question
    viewport: Viewport | None = None  # what is seen of the image; None: all of it, squashed
    tiles: tuple[Viewport, ...] = ()  # of which one may be chosen; empty once that is decided
    overview: Seen | None = None  # the result with the whole image, if this is a look at a tile
    is_tile_denied: bool = False  # a tile was wanted but not possible
    detail: Literal["low", "high"] = "low"
    is_recalled: bool = False  # the visual cache was asked at this detail
    vision: VisionFeatures | None = None
    closer: CloserFeatures | None = None
    seen: Seen | None = None  # at this detail
    low: Seen | None = None  # the result with detail low, if this is or was a closer look
    step: Step = Recall("low")
    pixels: int = 0  # that are reserved to decode it
    encoded: int = 0  # the most pictures that were encoded for one view of it: 4 for a closer view
    decoded: Decoded | None = None  # both views, until the closer one is encoded
    frame: Frame | None = None  # that is looked at, squashed and with detail low; None: the image itself
    film: Film | None = None  # the file of the frame; None if it came as an image
    is_read: bool = True  # False: only its features are needed
    is_remembered: bool = False  # its image can be asked about by its id

    @property
    def is_done(self) -> bool:
        return isinstance(self.step, Done)

    @property
    def is_frame(self) -> bool:
        return self.frame is not None

    @property
    def digest(self) -> str:
        """Return what cache keys have for what is seen of the image."""
        return self.frame.digest if self.frame is not None else viewed(self.image.digest, self.viewport)

    @property
    def has_more_pixels(self) -> bool:
        """Return whether the picture has more pixels than the first view; true if its header does not say."""
        return self.image.larger_than(IMAGE_SIZE) if self.viewport is None else self.viewport.side > IMAGE_SIZE

    def recall(self, detail: Literal["low", "high"], seen: Seen | None) -> None:
        """Record what the visual cache holds at this detail."""
        if detail != self.detail:
            self.detail, self.low = detail, self.seen
        self.seen, self.is_recalled = seen, True

    def fall_back(self) -> None:
        """Record that there is no capacity for a closer look, or not even for the tile's first view."""
        if self.low is None and self.overview is not None:
            self.viewport, self.seen, self.overview, self.is_tile_denied = None, self.overview, None, True
            self.detail, self.low, self.is_recalled = "low", self.seen, True
        else:
            self.detail, self.seen = "low", self.low

    def choose(self, tile: Viewport | None, is_possible: bool) -> None:
        """Begin anew with one tile, or go on with the whole image."""
        self.tiles = ()
        if tile is None or not is_possible:
            self.is_tile_denied = tile is not None
            return
        self.viewport, self.overview = tile, self.seen
        self.seen = self.vision = None
        self.is_recalled = False


@dataclass(frozen=True, slots=True)
class Situation:
    """Hold the facts, besides the look, that decide the next step."""

    asks: Detail  # the request
    needs_closer: bool  # the request's least vision tokens are more than the first view has
    offers_closer: bool  # the model
    closer_view_at: float  # with detail auto: the least `particularize` that wants a closer view
    allows_closer: bool  # the fidelity level now
    holds_closer: bool  # the visual cache: a hit costs nothing, whatever the fidelity level


# A frame of a clip is looked at with detail low, whatever is asked of the images beside the clip.
OF_FRAME = Situation(
    asks="low",
    needs_closer=False,
    offers_closer=False,
    closer_view_at=1.0,
    allows_closer=False,
    holds_closer=False,
)


def next_step(look: Look, situation: Situation) -> Step:
    """Decide the next step; change nothing. Whatever each step brings, the steps of a look end in Done."""
    is_wanted = look.detail == "low" and wants_closer(look, situation)
    has_fallen_back = look.detail == "low" and look.low is not None
    if is_wanted and is_possible(situation) and not has_fallen_back:
        return Recall("high")
    if not look.is_recalled:
        return Recall("low")
    if look.seen is not None:
        return ChooseTile() if look.tiles else Done(is_denied=is_wanted)
    if look.detail == "low":
        return See() if look.vision is None else Attend()
    is_optional = look.low is not None
    if look.vision is None:
        return Encode(is_optional)
    return EncodeCloser(is_optional) if look.closer is None else Attend()


def next_step_to_features(look: Look) -> Encode | Done:
    """Decide the next step of a look that only needs features."""
    return Encode(is_optional=False) if look.vision is None else Done()


def wants_closer(look: Look, situation: Situation) -> bool:
    """Return whether the look wants a closer view.

    With detail auto, the first view's result decides, and the image must have more pixels than that view. A page whose
    tile is not chosen yet wants none.
    """
    if look.tiles:
        return False
    if situation.asks == "high" or situation.needs_closer:
        return True
    if situation.asks == "low" or not situation.offers_closer or look.seen is None:
        return False
    return look.seen.relevance.particularize >= situation.closer_view_at and look.has_more_pixels


def tile_of(relevance: Relevance, tiles: Sequence[Viewport], closer_view_at: float | None) -> Viewport | None:
    """Return the tile that holds most of what the question is about; None if the whole page answers it better.

    The whole page does if no tile holds TILE_SHARE of it. But if `particularize` reaches `closer_view_at`, the
    allocator asks for a closer look, and the best tile is returned. `closer_view_at` is None if the model has no closer
    view. Relevance is squared, so that a few clear places count more than a faint background.
    """
    mass = relevance.map.astype(np.float64) ** 2
    held = [
        mass[np.ix_(_within(tile.top, tile.side, tile.height), _within(tile.left, tile.side, tile.width))].sum()
        for tile in tiles
    ]
    best = int(np.argmax(held))
    asks_closer = closer_view_at is not None and relevance.particularize >= closer_view_at
    is_chosen = held[best] > 0 and (asks_closer or held[best] >= TILE_SHARE * mass.sum())
    return tiles[best] if is_chosen else None


def _within(start: int, side: int, whole: int) -> npt.NDArray[np.bool_]:
    """[16]: along one axis, the patches of the squashed image whose centres lie in a tile."""
    centres = (np.arange(GRID) + 0.5) * whole / GRID
    return (centres >= start) & (centres < start + side)


def is_possible(situation: Situation) -> bool:
    return situation.needs_closer or situation.allows_closer or situation.holds_closer
