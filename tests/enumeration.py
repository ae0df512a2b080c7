"""All that a step may draw, with its probability, for searches small enough to be told every bit of it.

Independent masks are enumerated as such. The K antithetic masks of a window and chunk depend on one uniform number for
each unit, and that only on where it lies between the points at which one of them changes its mind; so all that they may
be together is a finite list, too.

Letters: T all that may be drawn, R rows, B windows, K masks, C chunks, U units, P pieces of the unit interval.
"""

import itertools
from collections.abc import Callable

import torch
from spaces import all_masks, normal_numbers
from tolerances import EXACT, assert_close

from bernprune.names import Sampling
from bernprune.policy.masks import orders
from bernprune.policy.search import MaskSearch

PROBS_U = torch.tensor([0.13, 0.5, 0.72, 0.96], dtype=torch.float64)
RATE = 0.0003  # at which nothing is projected, if the limit is far

Draws = tuple[torch.Tensor, torch.Tensor]  # what one window may draw, bool ``[T, K, C, U]``, and its probabilities


def every_draw(num_units: int, size: int) -> torch.Tensor:
    """All that ``size`` masks can be together, bool ``[T, size, U]``."""
    masks = all_masks(num_units)
    return masks[torch.cartesian_prod(*[torch.arange(len(masks))] * size).reshape(-1, size)]


def chances(masks_RCU: torch.Tensor, probs_U: torch.Tensor) -> torch.Tensor:
    """Of independent masks, ``[R]``."""
    return torch.where(masks_RCU, probs_U, 1 - probs_U).flatten(1).prod(1)


def pieces(probability: float | torch.Tensor, order_K: torch.Tensor) -> Draws:
    """What K antithetic masks do with one unit, bool ``[P, K]``, and how long the pieces of its uniform number are.

    ``probability`` is that of all masks, or each has its own, ``[K]``.
    """
    shifts = order_K.double() / len(order_K)
    breaks = torch.cat([-shifts % 1, (probability - shifts) % 1, torch.ones(1)]).sort().values
    middles_P, lengths_P = (breaks[1:] + breaks[:-1]) / 2, breaks.diff()
    kept_PK, present_P = (middles_P[:, None] + shifts) % 1 < probability, lengths_P > 1e-12
    return kept_PK[present_P], lengths_P[present_P]


def antithetic_draws(
    probs_U: torch.Tensor, num_masks: int, num_chunks: int, order_UK: torch.Tensor | None = None
) -> Draws:
    order_UK = orders(num_masks)[: len(probs_U)] if order_UK is None else order_UK
    units = zip(probs_U.tolist(), order_UK, strict=True)
    by_unit = [pieces(probability, order_K) for probability, order_K in units] * num_chunks
    chosen = torch.cartesian_prod(*[torch.arange(len(lengths)) for _, lengths in by_unit]).view(-1, len(by_unit))
    kept = torch.stack([kept[chosen[:, i]] for i, (kept, _) in enumerate(by_unit)], dim=-1)
    weights_T = torch.stack([lengths[chosen[:, i]] for i, (_, lengths) in enumerate(by_unit)]).prod(0)
    assert_close(weights_T.sum(), 1.0, EXACT)
    return kept.unflatten(-1, (num_chunks, -1)), weights_T


def independent_draws(probs_U: torch.Tensor, num_masks: int, num_chunks: int) -> Draws:
    draws_TNU = every_draw(len(probs_U), num_masks * num_chunks)
    return draws_TNU.unflatten(1, (num_masks, num_chunks)), chances(draws_TNU, probs_U)


DRAWS: dict[Sampling, Callable[[torch.Tensor, int, int], Draws]] = {
    "antithetic": antithetic_draws,
    "independent": independent_draws,
}


def table_losses(masks_RCU: torch.Tensor) -> torch.Tensor:
    """Arbitrary losses ``[R, C]``: a chunk's depends on its own mask and on all before it."""
    num_masks, codes_R, losses = 2 ** masks_RCU.shape[-1], 0, []
    for chunk in range(masks_RCU.shape[1]):
        codes_R = num_masks * codes_R + masks_RCU[:, chunk].long() @ 2 ** torch.arange(masks_RCU.shape[-1])
        losses.append(2 + normal_numbers(num_masks ** (chunk + 1), seed=chunk)[codes_R])
    return torch.stack(losses, dim=1)


def losses_of(draws_TKCU: torch.Tensor) -> torch.Tensor:
    """``[T, K, C]``."""
    return table_losses(draws_TKCU.flatten(0, 1)).unflatten(0, draws_TKCU.shape[:2])


def exact_effects(probs_U: torch.Tensor, num_chunks: int, discount: float) -> torch.Tensor:
    """Keeping a unit against cutting it in one chunk: that chunk's loss and, at a discount, later ones; all summed.

    At a discount of 1 that is the gradient of the expected loss in the probabilities.
    """
    draws_RCU = every_draw(len(probs_U), num_chunks)
    losses_RC, chances_R = table_losses(draws_RCU), chances(draws_RCU, probs_U)
    effects_U = torch.zeros_like(probs_U)
    for chunk, unit in itertools.product(range(num_chunks), range(len(probs_U))):
        answers_R = sum(discount ** (later - chunk) * losses_RC[:, later] for later in range(chunk, num_chunks))
        kept = draws_RCU[:, chunk, unit]
        for rows, sign in ((kept, 1), (~kept, -1)):
            effects_U[unit] += sign * (chances_R * answers_R)[rows].sum() / chances_R[rows].sum()
    return effects_U


def expected_move(
    search: MaskSearch,
    draws_TBKCU: torch.Tensor,
    losses_TBKC: torch.Tensor,
    weights_T: torch.Tensor,
    reference_TBC: torch.Tensor | None = None,
) -> torch.Tensor:
    """By how much a step of the search from where it stands moves the policy on average, over its rate: ``[U]``."""
    state, moved_U = search.state_dict(), torch.zeros_like(search.probs_U)
    for index, weight in enumerate(weights_T.tolist()):
        reference_BC = None if reference_TBC is None else reference_TBC[index]
        search.tell(draws_TBKCU[index], losses_TBKC[index], learning_rate=RATE, reference_BC=reference_BC)
        moved_U += weight * (search.probs_U - state["probs_U"])
        search.load_state_dict(state)
    return moved_U / RATE
