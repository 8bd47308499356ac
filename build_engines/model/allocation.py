"""Choose which cells of the image get detail, and pack the vision tokens.

The 16x16 grid of patches is an 8x8 grid of cells. A cell at level 0 is one token, the mean of its four patch features.
At level 1 it is its four patch features. At level 2 it is the sixteen patches of the closer view inside it. 64 cells at
level 0 cost 64 tokens. The step to level 1 adds 3 tokens and the step to level 2 another 12. All costs are therefore
counted in refinements of 3 tokens.

With the closer view, a budget can be smaller than what the question calls for. The least relevant cells are then left
out (level -1, no token), and their tokens refine other cells.

Every operation has fixed sizes, so that TensorRT can build the graph. Cells are ordered by comparing all pairs instead
of sorting. Tokens are packed by comparing running sums with a constant range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.model.closer import CloserView

GRID = 16
CELLS = 8
CELL_COUNT = CELLS * CELLS
PATCH_COUNT = GRID * GRID
DETAIL_GRID = 2 * GRID
DETAIL_COUNT = DETAIL_GRID * DETAIL_GRID
DETAILS = DETAIL_COUNT // CELL_COUNT  # closer patches in a cell
MOST_TOKENS = PATCH_COUNT  # of the 224-pixel view alone
MAX_VISION_TOKENS = 400  # with the closer view
GROUP = 32  # visual tokens of one group of queries
MAX_VISUAL_TOKENS = 4 * GROUP
REGIONS = MAX_VISUAL_TOKENS // GROUP - 1  # focus regions, each with a group of its own
LEVELS = 3  # of detail
LEFT_OUT = -1  # the level of a cell without a token
# At least so many cells for each token that is spent, and so many more, keep a token. All refined cells and the peaks
# of all focus regions are then among them.
SEEN_PER_TOKEN = 0.25
FEWEST_SEEN = 3
REFINEMENT_COST = 3  # tokens that a cell's step from level 0 to level 1 adds
DEEP_COST = 4  # refinements that a cell's step from level 1 to level 2 costs: 12 tokens


def spread_turns(side: int = CELLS) -> Tensor:
    """float [side**2]: each place's turn in an order in which every prefix covers the grid evenly.

    side: a power of two. Bayer's dispersed-dot dither matrix (Bayer 1973, "An optimum method for two-level rendition").
    """
    turns = torch.zeros(1, 1)
    while len(turns) < side:
        upper = torch.cat([4 * turns, 4 * turns + 2], dim=1)
        lower = torch.cat([4 * turns + 3, 4 * turns + 1], dim=1)
        turns = torch.cat([upper, lower])
    return turns.flatten()


def cell_distances() -> Tensor:
    """float [64, 64, 2]: distance between two cells in rows and columns, at least 0."""
    index = torch.arange(CELL_COUNT)
    place = torch.stack([index // CELLS, index % CELLS], dim=1).float()
    return (place.unsqueeze(1) - place.unsqueeze(0)).abs()


def cells_of(patches: Tensor, side: int = 2) -> Tensor:
    """[B, 64 * side**2, ...] by patch, row by row -> [B, 64, side**2, ...] by cell, row by row in each."""
    batch, rest = patches.shape[0], patches.shape[2:]
    grid = patches.reshape(batch, CELLS, side, CELLS, side, *rest)
    return grid.transpose(2, 3).reshape(batch, CELL_COUNT, side * side, *rest)


def patch_around() -> Tensor:
    """int64 [1024]: the patch that contains each patch of the closer view."""
    line = torch.arange(DETAIL_GRID) // 2
    return (GRID * line.unsqueeze(1) + line).flatten()


def before(score: Tensor) -> Tensor:
    """float [B, n] -> float [B, n, n]: [b, i, j] is 1 if j comes before i, by a higher score or a lower index."""
    ours, theirs = score.unsqueeze(2), score.unsqueeze(1)
    index = torch.arange(score.shape[1], device=score.device)
    earlier = (index.unsqueeze(0) < index.unsqueeze(1)).unsqueeze(0)  # [1, ours, theirs]
    return ((theirs > ours) | ((theirs == ours) & earlier)).float()


def affordable(particularize: Tensor, budget: Tensor, closer: bool = False) -> Tensor:
    """Vision tokens and visual tokens that the budget allows, real numbers [B, 2].

    particularize [B, 1] goes from the least (0) to the most (1) of budget int32 [B, 4], within the number of tokens
    that exist. If the least is above the most, the most wins.
    """
    most_vision = MAX_VISION_TOKENS if closer else MOST_TOKENS
    fewest = budget.new_tensor([CELL_COUNT, CELL_COUNT, GROUP, GROUP], dtype=torch.float32)
    greatest = budget.new_tensor([most_vision, most_vision, MAX_VISUAL_TOKENS, MAX_VISUAL_TOKENS], dtype=torch.float32)
    asked = budget.float().clamp(fewest, greatest).unflatten(1, (2, 2))
    most = asked[:, :, 1]
    least = torch.minimum(asked[:, :, 0], most)
    return least + particularize * (most - least)


class Steps(NamedTuple):
    """Which cells are refined, and why.

    The K steps are those of the 64 cells to level 1, then those to level 2, if any.
    """

    taken: Tensor  # bool [B, K]: by rank
    position: Tensor  # float [B, K]: each step's place in the order of gains
    spread: Tensor  # bool [B, 64]: to level 1 in its turn; never a cell that rank refines
    turn: Tensor  # float [B, 64]: each cell's turn among those that rank has not refined; the refined come last
    crowded: Tensor  # bool [B, 1]: fewer cells are left than the spread share would refine

    @property
    def levels(self) -> Tensor:
        """int64 [B, 64]."""
        first = self.taken[:, :CELL_COUNT] | self.spread
        if self.taken.shape[1] == CELL_COUNT:
            return first.long()
        return first.long() + self.taken[:, CELL_COUNT:].long()


class Allocation(nn.Module):
    """Refine cells by rank and evenly, and pack the tokens of all cells."""

    sooner: Tensor
    neighbours: Tensor
    earlier: Tensor
    step: Tensor
    slots: Tensor
    patch_of: Tensor
    detail_of: Tensor
    detail_at: Tensor
    cells: Tensor
    source_of: Tensor

    def __init__(self) -> None:
        super().__init__()
        # x @ sooner sums over the cells with an earlier turn.
        turns = spread_turns()
        self.register_buffer("sooner", (turns.unsqueeze(1) < turns.unsqueeze(0)).float(), persistent=False)
        self.register_buffer("neighbours", (cell_distances().amax(2) == 1).float() / 8, persistent=False)
        # tokens @ earlier: tokens of the cells before each cell.
        self.register_buffer("earlier", torch.ones(CELL_COUNT, CELL_COUNT).triu(1), persistent=False)
        self.register_buffer("cells", torch.arange(CELL_COUNT, dtype=torch.float32), persistent=False)
        # For the 64 steps to level 1, then the 64 to level 2: refinements, and cells that each step opens.
        step = torch.tensor([[1.0, 1.0], [DEEP_COST, 0.0]]).repeat_interleave(CELL_COUNT, dim=0)
        self.register_buffer("step", step, persistent=False)
        self.register_buffer("slots", torch.arange(MAX_VISION_TOKENS, dtype=torch.float32), persistent=False)
        patches = cells_of(torch.arange(PATCH_COUNT).unsqueeze(0))[0]
        details = cells_of(torch.arange(DETAIL_COUNT).unsqueeze(0), DETAILS // 4)[0]
        self.register_buffer("patch_of", patches, persistent=False)
        self.register_buffer("detail_of", details, persistent=False)
        # Slots after the last token read past the last cell, and the mask hides them. Any row will do.
        self.register_buffer("detail_at", _padded(details.flatten().repeat(LEVELS)), persistent=False)  # by level too
        pooled = (1 + PATCH_COUNT + torch.arange(CELL_COUNT)).unsqueeze(1).expand(-1, DETAILS)
        padded = torch.cat([patches, patches[:, -1:].expand(-1, DETAILS - patches.shape[1])], dim=1)
        # Row in `sources` of each cell's tokens at each level. At level 2, the row of the patch around each token.
        by_level = torch.stack([pooled, 1 + padded, 1 + patch_around()[details]])
        self.register_buffer("source_of", _padded(by_level.flatten()), persistent=False)

    def gains(self, cell_relevance: Tensor, diversify: Tensor) -> Tensor:
        """What a cell's first step gains, [B, 64] in [0, 1].

        It is the cell's relevance [B, 64], less the crowding by neighbours that come before it. diversify is [B, 1] in
        [0, 1]. At 1, a cell with all eight neighbours before it gains nothing.
        """
        crowded = (before(cell_relevance) * self.neighbours).sum(2)
        return cell_relevance * (1 - diversify * crowded)

    def extra(self, particularize: Tensor, budget: Tensor, closer: bool) -> Tensor:
        """`affordable` vision tokens beyond one a cell, a real number [B, 1]."""
        return affordable(particularize, budget, closer)[:, :1] - CELL_COUNT

    def spendable(self, particularize: Tensor, extra: Tensor, closer: bool) -> Tensor:
        """Tokens that refinements may cost, a real number [B, 1]: `extra`, and those of cells that are left out."""
        return extra + self.saved(particularize, extra) if closer else extra

    def saved(self, particularize: Tensor, extra: Tensor) -> Tensor:
        """How many cells the closer view may leave out, a whole number, float [B, 1].

        A question calls for `particularize` of all tokens from 64 to 400. Half of what `extra` lacks of that is saved,
        as long as enough cells keep a token. It is 0 if the budget's range is the whole one.
        """
        lacking = particularize * (MAX_VISION_TOKENS - CELL_COUNT) - extra
        seen = torch.floor(SEEN_PER_TOKEN * (CELL_COUNT + extra)) + FEWEST_SEEN
        return torch.floor(torch.minimum(torch.relu(lacking) / 2, torch.relu(CELL_COUNT - seen)))

    def refinements(self, extra: Tensor) -> Tensor:
        """Round extra tokens, a real number [B, 1], down to whole refinements of 3 tokens, float [B, 1]."""
        # Adding half a token keeps the quotient away from whole numbers, so that rounding never loses a refinement.
        return torch.floor((torch.floor(extra) + 0.5) / REFINEMENT_COST)

    def steps(self, gains: Tensor, refinements: Tensor, explore: Tensor, closer: bool = False) -> Steps:
        """Choose the steps within a number of refinements.

        gains float [B, 64] in [0, 1]; refinements float [B, 1], whole numbers from 0; explore float [B, 1] in [0, 1],
        the share of the refinements that is spread evenly; closer: whether level 2 exists.

        By rank: a cell's second step gains the square of its first, so that it never comes before the first. Only the
        most relevant cells get level 2. The longest run of steps is taken that fits together with the even spread of
        what is left. More refinements never take detail from a cell. Fewer than 4 refinements stay unspent with the
        closer view, else 0.
        """
        share = torch.floor(refinements * explore)
        order = before(torch.cat([gains, gains * gains], dim=1) if closer else gains)
        position = order.sum(2)
        if closer:
            spent, opened = (order @ self.step + self.step).unbind(2)
        else:  # every step costs one refinement and opens one cell
            spent = opened = position + 1
        left = CELL_COUNT - opened
        taken = spent + torch.minimum(share, left) <= refinements
        by_rank = taken[:, :CELL_COUNT]
        refined = by_rank.float()
        unrefined = CELL_COUNT - refined.sum(1, keepdim=True)
        # The spread share goes to cells that rank has not refined. The refined cells move behind them.
        turn = (1 - refined) @ self.sooner + CELL_COUNT * refined
        spread = turn < torch.minimum(share, unrefined)
        return Steps(taken, position, spread, turn, share > unrefined)

    def spend(self, cell_relevance: Tensor, tensions: Tensor, extra: Tensor, peaks: Tensor, closer: bool) -> Tensor:
        """Spend `extra` tokens [B, 1] beyond one a cell -> level of each cell, int64 [B, 64] from -1.

        cell_relevance float [B, 64] in [0, 1]; tensions float [B, 3]; peaks int64 [B, 3] of the focus regions.
        """
        particularize, explore, diversify = tensions.split(1, dim=1)
        gains = self.gains(cell_relevance, diversify)
        refinements = self.refinements(self.spendable(particularize, extra, closer))
        levels = self.levels(gains, refinements, explore, closer)
        return self.leave_out(levels, cell_relevance, extra, peaks) if closer else levels

    def levels(self, gains: Tensor, refinements: Tensor, explore: Tensor, closer: bool = False) -> Tensor:
        """Level of detail of each cell, int64 [B, 64], with none left out. The arguments are those of `steps`."""
        return self.steps(gains, refinements, explore, closer).levels

    def leave_out(self, levels: Tensor, cell_relevance: Tensor, extra: Tensor, peaks: Tensor) -> Tensor:
        """Leave out the least relevant cells of level 0 until the tokens fit -> levels int64 [B, 64] from -1.

        levels int64 [B, 64] from 0; cell_relevance float [B, 64] in [0, 1]; `extra` tokens beyond one a cell, float
        [B, 1]; peaks int64 [B, 3] of the focus regions, which keep a token.
        """
        spent = REFINEMENT_COST * self.refined(levels).sum(1, keepdim=True)
        surplus = torch.relu(spent - torch.floor(extra))
        is_peak = (peaks.unsqueeze(2) == self.cells.long()).float().sum(1)
        worth = cell_relevance + 2.0 * is_peak + 4.0 * (levels > 0).float()
        place = before(worth).sum(2)
        return torch.where(place < CELL_COUNT - surplus, levels, LEFT_OUT)

    def refined(self, levels: Tensor) -> Tensor:
        """Refinements that levels int64 [B, 64] cost, float [B, 64]. A cell that is left out costs none."""
        level = levels.float()
        return torch.relu(level) + (DEEP_COST - 1) * torch.relu(level - 1.0)

    def sources(self, features: Tensor, closer: Tensor | None = None) -> Tensor:
        """Every candidate token: features, means of the cells, and the closer view's tokens if any.

        features [B, 257, D], closer [B, 1024, D] or None -> [B, 321 or 1345, D].
        """
        pooled = cells_of(features[:, 1:]).mean(2)
        return torch.cat([features, pooled] if closer is None else [features, pooled, closer], dim=1)

    def pack(
        self,
        features: Tensor,
        levels: Tensor,
        regions: Tensor | None = None,
        detail: Tensor | None = None,
        closer: CloserView | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Pack the tokens of all cells -> tokens [B, 1 + N, D] and mask int32 [B, 1 + N].

        features [B, 257, D], levels int64 [B, 64] from -1, focus regions int32 [B, 64] (0 = none), detail: the closer
        view's tokens [B, 1024, D]. The mask is 0 for padding, 1 for a token, and 1 + region for a token in a region. N
        is 256, or 400 with detail.

        With `closer`, detail is the closer view's features. Tokens are then computed only for packed features, less
        than half. CLS comes first, then the cells row by row, then padding (copies of CLS, masked). Without detail,
        levels are 0 and 1.
        """
        refinements, seen = self.refined(levels), (levels > LEFT_OUT).float()
        slots = self.slots[: MOST_TOKENS if detail is None else MAX_VISION_TOKENS]
        start = (REFINEMENT_COST * refinements + seen) @ self.earlier  # [B, 64]
        cell = (start.unsqueeze(1) <= slots.view(1, -1, 1)).float().sum(2).long() - 1  # [B, slots]
        # Index of a cell's first token in the tables by level, cell and place in the cell, less the slot it is packed
        # in.
        table = (CELL_COUNT * DETAILS) * torch.relu(levels.float()) + DETAILS * self.cells - start
        place = (table.gather(1, cell) + slots).long()
        index = self.source_of[place]
        tokens = _rows(self.sources(features), functional.pad(index, (1, 0)))
        if detail is not None:
            around, deep = tokens[:, 1:], place.unsqueeze(2) >= 2 * CELL_COUNT * DETAILS
            found = _rows(detail, self.detail_at[place])
            found = torch.where(deep, found if closer is None else closer.look(around, found), around)
            tokens = torch.cat([tokens[:, :1], found], dim=1)
        used = slots < (REFINEMENT_COST * refinements + seen).sum(1, keepdim=True)
        mask = used.int() if regions is None else torch.where(used, (1 + regions).gather(1, cell), 0)
        return tokens, functional.pad(mask, (1, 0), value=1)


def _padded(table: Tensor) -> Tensor:
    return functional.pad(table, (0, MAX_VISION_TOKENS))


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """table [B, n, D] and int64 [B, m] -> [B, m, D]."""
    return table.gather(1, index.unsqueeze(2).expand(-1, -1, table.shape[2]))
