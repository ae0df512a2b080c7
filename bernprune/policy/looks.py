"""What single changes do to a selection, and a step that follows from all of them.

What is believed of a unit is its effect on average over sampled masks. To the selection itself it may be worth
something else: in half of the embedded model, a kv group of the first layer that is worth nothing while the channels
beside it are sampled is worth 0.05 nats once they are selected. So what is selected is looked at directly. Each kv
group or block is turned by itself, and of the channels of each layer a few that are kept and a few that are not: on the
same text, all else being equal, few windows tell what one change does.

Letters: N changes, U units, W windows.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bernprune.names import Kind
from bernprune.policy.budget import Budget
from bernprune.policy.race import heat_sequences
from bernprune.policy.selection import Limits
from bernprune.units import UnitSpace

STEPS = (1.0, 0.5, 0.25)  # how far to follow a look: what it says of single changes does not simply add up
_RACED = 4  # times as many windows as a look has, to race the steps on
_PARTS = 16  # of a layer's channels, of which one is turned at a time
_MEDIAN = torch.special.ndtri(torch.tensor(0.75, dtype=torch.float64)).item()  # of a standard normal's size
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Change:
    """Units of one group that are turned together, and what that adds to the cost alive: negative if they go."""

    units: torch.Tensor
    kind: Kind
    group: int
    cost: float


def changes(mask_U: torch.Tensor, priorities_U: torch.Tensor, budget: Budget, limits: Limits) -> list[Change]:
    """The changes to look at: each alters what is computed, and leaves what limits ask for, and at least one channel,
    in every layer that has as much: what no selection can do tells nothing."""
    found, space = [], budget.space
    finest_U = ~torch.isin(torch.arange(space.size), space.parents_U)
    computed_U = space.marginal(finest_U.double(), mask_U.double())  # 0 of a block that would come back empty
    cost_U = budget.marginal_cost(mask_U.double())
    for number, (group, span) in enumerate(zip(space.groups, space.spans, strict=True)):
        kind, members, least = group.kind, torch.arange(span.start, span.stop), limits.minimum(group)
        if kind == "channel":
            turned = _border(members, mask_U, priorities_U, max(1, least))
        else:
            spare = kind != "kv_group" or int(mask_U[members].sum()) > least
            turned = [unit for unit in members.split(1) if spare or not mask_U[unit]]
        for units in turned:
            if computed_U[units].any():
                cost = cost_U[units].sum().item()
                found.append(Change(units, kind, number, -cost if mask_U[units[0]] else cost))
    return found


def most_changes(space: UnitSpace) -> int:
    """How many changes a look has at most."""
    return sum(2 if group.kind == "channel" else group.count for group in space.groups)


def look_windows(looked_at: int, most: int) -> tuple[int, int]:
    """Windows of a look and of the heat that follows, of which neither has more than ``most``."""
    return min(looked_at, most), min(_RACED * looked_at, most)


def look_sequences(num_changes: int, looked_at: int, raced: int) -> int:
    """Windows run forward in a look, in which every mask sees every window, and in its heat."""
    return (1 + num_changes) * looked_at + heat_sequences(1 + len(STEPS), raced)


def changed_masks(mask_U: torch.Tensor, changed: Sequence[Change]) -> torch.Tensor:
    """The mask and, for each change, what that makes of it: bool ``[1 + N, U]``."""
    masks_NU = mask_U.repeat(1 + len(changed), 1)
    for row_U, change in zip(masks_NU[1:], changed, strict=True):
        row_U[change.units] = ~row_U[change.units]
    return masks_NU


def moves(
    priorities_U: torch.Tensor, changed: Sequence[Change], losses_NW: torch.Tensor, space: UnitSpace
) -> torch.Tensor:
    """What is to be added to the priorities after a look, ``[U]``.

    The surprise x of a change is what it was seen to save for its cost, less the priorities of what it turned. Those
    move by f x, where f is the larger of 1 - v / m^2, with v the mean variance of such x of their kind and m their
    median size (as a standard deviation), and of 1 - v / x^2 (the non-negative garrote; Breiman, 1995): typical
    surprises are believed as far as they exceed their noise, one far from the others nearly whole. A layer's channels
    move together, by the mean over the changes of that layer.

    Args:
        priorities_U: what units save for their cost, nats per token.
        losses_NW: losses of ``changed_masks`` on the same windows, ``[1 + N, W]``; a change with one that is not finite
            tells nothing.
    """
    told_N = (losses_NW[:1] + losses_NW[1:]).isfinite().all(1)
    changed = list(itertools.compress(changed, told_N.tolist()))
    if not changed:
        return torch.zeros_like(priorities_U)
    losses_NW = losses_NW[torch.cat([torch.tensor([True]), told_N])]
    gains_NW = losses_NW[:1] - losses_NW[1:]
    costs_N = torch.tensor([change.cost for change in changed], dtype=torch.float64)
    believed_N = torch.stack([priorities_U[change.units].mean() for change in changed])
    surprise_N = gains_NW.mean(1) / costs_N - believed_N
    noise_N = gains_NW.var(1) / gains_NW.shape[1] / costs_N.square()
    shares_N = torch.zeros_like(noise_N)
    for kind in {change.kind for change in changed}:
        at_N = torch.tensor([change.kind == kind for change in changed])
        noise = noise_N[at_N].mean()  # with few windows, the variance of one change alone says little
        middle = (surprise_N[at_N].abs().median() / _MEDIAN).square()
        typical = (1 - noise / middle.clamp(min=_TINY)).clamp(min=0)
        shares_N[at_N] = (1 - noise / surprise_N[at_N].square().clamp(min=_TINY)).clamp(min=typical)
    moves_U, looks = torch.zeros_like(priorities_U), Counter(change.group for change in changed)
    for change, move in zip(changed, (shares_N * surprise_N).tolist(), strict=True):
        if change.kind == "channel":
            moves_U[space.spans[change.group]] += move / looks[change.group]
        else:
            moves_U[change.units] += move
    return moves_U


def _border(members: torch.Tensor, mask_U: torch.Tensor, priorities_U: torch.Tensor, least: int) -> list[torch.Tensor]:
    """A layer's channels at the border: the least wanted that are kept, beside so many, the most wanted that are
    not."""
    count = max(1, round(len(members) / _PARTS))
    kept, gone = members[mask_U[members]], members[~mask_U[members]]
    kept = kept[priorities_U[kept].argsort(stable=True)][: max(0, min(count, len(kept) - least))]
    gone = gone[priorities_U[gone].argsort(descending=True, stable=True)][:count]
    return [units for units in (kept, gone) if len(units)]
