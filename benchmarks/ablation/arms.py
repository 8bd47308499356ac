"""Define the arms: each is one way of spending vision and visual tokens on the same questions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.ablation.pruning import METHODS, Pruned
from build_engines.scenes.held_out import NEW, SMALL
from build_engines.train.evaluation import Arm
from build_engines.train.selection import CENTRE, GUIDED, RANDOM, UNIFORM, WAYS

POLICIES = (GUIDED, *WAYS, RANDOM, UNIFORM, CENTRE)
BUDGETS = (64, 96, 120, 144, 192, 256)  # vision tokens of the 224-pixel view
LEAST, MOST, CLOSER_MOST = 64, 256, 400
CLOSER_BUDGETS = (120, CLOSER_MOST)
LOW, AUTO, HIGH = "low", "auto", "high"  # as in a request's `detail`


@dataclass(frozen=True)
class Named:
    """An arm on one split's scenes."""

    name: str
    arm: Arm | Pruned = field(default_factory=Arm)
    split: str = NEW


ADAPTIVE_ARM = Arm()
ADAPTIVE = Named("adaptive", ADAPTIVE_ARM)


def fixed(policy: str, tokens: int, closer: bool = False, split: str = NEW) -> Named:
    """Spend `tokens` on every question, at the cells that the policy ranks first.

    With 64 or 256 tokens of the 224-pixel view, all cells get the same level of detail. All policies therefore share
    guided's arm.
    """
    if tokens in (LEAST, MOST) and not closer:
        policy = GUIDED
    name = f"{policy}, {tokens} tokens{', closer view' if closer else ''}{f', {split}' if split != NEW else ''}"
    return Named(name, Arm(policy, (tokens, tokens), closer=closer), split)


def nothing_left_out(tokens: int, split: str) -> Named:
    """Spend `tokens` on every question with the closer view, and leave no cell out: no question calls for more."""
    named = fixed(GUIDED, tokens, True, split)
    return Named(f"{named.name}, nothing left out", replace(named.arm, tensions={"particularize": 0.0}), split)


def curves(closer: bool) -> list[Named]:
    """List every policy at every budget, and with the closer view if there is one."""
    arms = [fixed(policy, tokens) for tokens in BUDGETS for policy in POLICIES]
    if closer:
        arms += [fixed(policy, CLOSER_MOST, True) for policy in POLICIES]
        arms += [fixed(policy, tokens, True, SMALL) for tokens in CLOSER_BUDGETS for policy in POLICIES]
    return arms


def visual() -> list[Named]:
    """List other numbers of visual tokens than 32, with adaptive vision tokens.

    Nothing was trained for 16 visual tokens.
    """
    arms = [Named("16 visual tokens", replace(ADAPTIVE_ARM, queries=16))]
    arms += [Named(f"{n} visual tokens", replace(ADAPTIVE_ARM, visual_tokens=(n, n))) for n in (64, 96, 128)]
    return [*arms, Named("32 to 128 visual tokens", replace(ADAPTIVE_ARM, visual_tokens=(32, 128)))]


def without_tensions() -> list[Named]:
    """Switch off explore and diversify, one at a time.

    Particularize switched off equals a fixed budget of the adaptive arm's mean.
    """
    return [Named(f"without {name}", replace(ADAPTIVE_ARM, tensions={name: 0.0})) for name in ("explore", "diversify")]


def rivals(split: str, tokens: int, closer: bool) -> list[Named]:
    """List the field's methods with as many tokens, each in both of its forms.

    Where a method ranks cells, each cell keeps a token, so with 64 tokens a ranking decides nothing.
    """
    forms = {"kept": False} if tokens == LEAST else {"kept": False, "ranked": True}
    return [
        Named(f"{method}, {form}, {tokens} tokens, {split}", Pruned(method, tokens, closer, ranked), split)
        for method in METHODS
        for form, ranked in forms.items()
    ]


def detail(split: str, level: str) -> Named:
    """Name the adaptive arm of a request's `detail`; `auto` is computed from the other two."""
    if (split, level) == (NEW, LOW):
        return ADAPTIVE
    closer = level != LOW
    return Named(f"{split}, {level}", Arm(vision_tokens=(LEAST, CLOSER_MOST if closer else MOST), closer=closer), split)


def reachable(mean_tokens: float) -> int:
    """Return the fixed budget nearest to this mean, in whole cells of 3 tokens each."""
    return LEAST + 3 * round((mean_tokens - LEAST) / 3)
