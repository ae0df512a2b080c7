"""From a policy to a mask: challengers to the best mask known, raced on the same fresh text.

Letters: N masks, U units, W windows.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bernprune.policy.budget import Budget
from bernprune.policy.search import MaskSearch
from bernprune.policy.selection import Limits, select

MOST_FINALISTS = 4  # what was learned, its widths in the metric's order, and the metric's own selections
CHALLENGERS = 7  # of a heat, besides the mask they challenge


@dataclass(frozen=True)
class Heat:
    """The end of a heat.

    Attributes:
        winner: its index among the masks.
        difference: loss of the best challenger, whether it won or not, less that of mask 0 on the windows that both
            saw, nats per token; None where a loss of either was not finite.
        error: standard error of that.
    """

    winner: int
    difference: float | None
    error: float | None


def stages(num_masks: int, windows: int) -> Iterator[tuple[int, int]]:
    """Masks, and fresh windows for each, of every stage of a heat; the last two have then seen ``windows``."""
    seen = 0
    for left in range(max(1, math.ceil(math.log2(num_masks))) - 1, -1, -1):
        upto = math.ceil(windows / 2**left)
        if upto > seen:  # with very few windows, some stages have none
            yield num_masks, upto - seen
        num_masks, seen = max(2, math.ceil(num_masks / 2)), upto


def heat_sequences(num_masks: int, windows: int) -> int:
    """Windows run forward in a heat."""
    return sum(masks * fresh for masks, fresh in stages(num_masks, windows))


def race(
    masks_NU: torch.Tensor, windows: int, evaluate: Callable[[torch.Tensor, int], torch.Tensor], *, margin: float = 0.0
) -> Heat:
    """Successive halving (Karnin et al., 2013): the worse half leaves after each stage, mask 0 stays to the end.

    Args:
        windows: how many the last two have seen in the end.
        evaluate: masks ``[N, U]`` and a number to losses ``[N, W]`` on so many windows that nobody has seen yet; a
            loss may be infinite, and a mask with one loses.
        margin: standard errors by which a challenger must beat mask 0.
    """
    assert len(masks_NU) > 1 and windows > 0, "nobody to race against"
    running, losses_NW = torch.arange(len(masks_NU)), torch.empty(len(masks_NU), 0, dtype=torch.float64)
    for num_masks, fresh in stages(len(masks_NU), windows):
        ranked = losses_NW[1:].sum(1).argsort(stable=True) + 1  # without losses yet, as they came
        stay = torch.cat([torch.zeros(1, dtype=torch.int64), ranked[: num_masks - 1]])
        running = running[stay]
        losses_NW = torch.cat([losses_NW[stay], evaluate(masks_NU[running], fresh)], dim=1)
    sums_N = losses_NW.sum(1)
    best = 1 + int(sums_N[1:].argmin())
    if not sums_N[[0, best]].isfinite().all():
        return Heat(int(running[best]) if sums_N[best] < sums_N[0] else 0, None, None)
    gains_W = losses_NW[best] - losses_NW[0]
    difference = gains_W.mean().item()
    error = gains_W.std().item() / math.sqrt(windows) if windows > 1 else 0.0
    return Heat(int(running[best]) if difference < -margin * error else 0, difference, error)


def challengers(
    search: MaskSearch, mask_U: torch.Tensor, limits: Limits, random: torch.Generator, count: int
) -> torch.Tensor:
    """Masks on the budget that differ from ``mask_U`` in what is least certain, bool ``[N, U]`` with N <= ``count``.

    In turn: some units are decided again by a draw from what is believed of them; a whole group, all units of one kind
    in one layer, is taken to be better or worse than believed; a whole group goes or comes back. The budget that this
    frees or takes is settled by the next best units of the whole model.
    """
    budget, base_U = search.budget, consistent_with_mask(search.priorities_U, mask_U, search.budget, limits)
    # Few units at a time, whatever the model's size, or what they change cannot be told from noise.
    moves = [_redecide(8), _lean, _redecide(32), _lean, _redecide(128), _lean, _turn]
    found: list[torch.Tensor] = []
    for number in range(count):
        changed_U = moves[number % len(moves)](search, base_U.clone(), random)
        challenger_U = select(changed_U, budget, limits=limits, tie_break_U=mask_U.double())
        if not any(challenger_U.equal(known_U) for known_U in (mask_U, *found)):
            found.append(challenger_U)
    return torch.stack(found) if found else mask_U.new_empty(0, len(mask_U))


def consistent_with_mask(
    priorities_U: torch.Tensor, mask_U: torch.Tensor, budget: Budget, limits: Limits
) -> torch.Tensor:
    """Priorities clamped at the level of each pool at which they would fill its budget themselves, so that of the pool
    all that is kept comes before all that is not; ``[U]``."""
    agreeing_U, own_U = priorities_U.clone(), select(priorities_U, budget, limits=limits)
    for pool in budget.pools:
        at = pool.members_U
        level = _level(priorities_U[at], own_U[at])
        below = math.nextafter(level, -math.inf)  # of equals, what contains others would come first, kept or not
        agreeing_U[at] = torch.where(mask_U[at], priorities_U[at].clamp(min=level), priorities_U[at].clamp(max=below))
    return agreeing_U


def _level(priorities_N: torch.Tensor, mask_N: torch.Tensor) -> float:
    """What best parts the priorities of what is kept from the others, with the fewest units on the wrong side."""
    falling_N, order = priorities_N.sort(descending=True, stable=True)
    kept_before_N, cut_before_N = mask_N[order].cumsum(0), (~mask_N[order]).cumsum(0)
    last = int((cut_before_N - kept_before_N).argmin())
    return falling_N[last : last + 2].mean().item()


def _redecide(num_units: int) -> Callable[[MaskSearch, torch.Tensor, torch.Generator], torch.Tensor]:
    def move(search: MaskSearch, base_U: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        chosen = torch.randperm(len(base_U), generator=random)[:num_units]
        base_U[chosen] = search.draw(random)[chosen]
        return base_U

    return move


def _lean(search: MaskSearch, base_U: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    span = _group(search, random)
    doubt = (search.draw(random) - search.priorities_U)[span].square().mean().sqrt()
    base_U[span] += doubt * torch.randn((), generator=random, dtype=base_U.dtype)
    return base_U


def _turn(search: MaskSearch, base_U: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    span, beyond = _group(search, random), base_U.max() - base_U.min() + 1
    base_U[span] += beyond if torch.rand((), generator=random) < 0.5 else -beyond
    return base_U


def _group(search: MaskSearch, random: torch.Generator) -> slice:
    spans = search.budget.space.spans
    return spans[int(torch.randint(len(spans), (), generator=random))]
