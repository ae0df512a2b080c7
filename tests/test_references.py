"""What the baseline ``matched`` compares with: each follows from the past alone, so the gradient stays unbiased.

Letters: T all that may be drawn, B windows, K masks, C chunks, U units.
"""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from enumeration import PROBS_U, exact_effects, expected_move, independent_draws, losses_of, table_losses
from spaces import FLAT, all_masks, make_space, random_numbers
from tiny_models import random_tokens, tiny_model
from tolerances import LOGITS, STEP, assert_close

from bernprune.errors import ConfigError
from bernprune.models.view import describe
from bernprune.names import ReferenceName
from bernprune.objective import masked_objective
from bernprune.policy.baselines import make_baseline
from bernprune.policy.budget import Budget
from bernprune.policy.masks import Design
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.selection import Limits, select
from bernprune.run.loop import evaluate_step, reference
from bernprune.units import UnitSpace

MASKS = all_masks(4)
LOSSES = table_losses(MASKS[:, None])[:, 0]
REFERENCES: tuple[ReferenceName, ...] = get_args(ReferenceName)
every_reference = pytest.mark.parametrize("name", REFERENCES)


def make_search(space: UnitSpace, probs_U: torch.Tensor, design: Design, sparsity: float = 0.4) -> ReinforceSearch:
    baseline = make_baseline("matched", window=4, num_masks=design.masks)
    settings: dict[str, Any] = {"projection": "published", "scaling": "raw", "floor": 0.0, "ceiling": 1.0}
    return ReinforceSearch(Budget(space, sparsity), probs_U, baseline=baseline, seed=3, design=design, **settings)


def loss_of_gates(gates_U: torch.Tensor) -> float:
    """Of a network that is linear in each gate: for masks the table itself, between them its interpolation."""
    gates_U = gates_U.double()
    return (torch.where(MASKS, gates_U, 1 - gates_U).prod(-1) @ LOSSES).item()


def moved(search: ReinforceSearch, reference_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """By how much a step moves the policy on average, over its rate; the limit is so far that nothing is projected.

    ``reference_of`` makes the losses of the reference, ``[T]``, from those of the masks, ``[T, K]``.
    """
    draws_TKCU, weights_T = independent_draws(PROBS_U, 2, 1)
    losses_TKC = losses_of(draws_TKCU)
    reference_TBC = reference_of(losses_TKC[..., 0])[:, None, None]
    return expected_move(search, draws_TKCU[:, None], losses_TKC[:, None], weights_T, reference_TBC)


def test_references_are_what_they_are_called() -> None:
    """At a policy that has left its start."""
    search, limits = make_search(FLAT, random_numbers(FLAT.size, 0), Design(1, 2)), Limits(min_channels=2)
    scores_U = random_numbers(FLAT.size, 8)
    initial_U = select(search.probs_U, search.budget, limits=limits)
    search.probs_U = search.budget.project(random_numbers(FLAT.size, 5), floor=0.05, ceiling=0.95)
    found = {name: reference(name, search, initial_U, scores_U, limits) for name in REFERENCES}
    assert torch.equal(found["initial"], initial_U)
    assert found["dense"].dtype == torch.bool and found["dense"].all()
    current_U = select(search.probs_U, search.budget, limits=limits, tie_break_U=scores_U)
    assert torch.equal(found["current"], current_U)
    assert torch.equal(found["mean-field"], search.probs_U.float())
    assert len({str(gates_U.tolist()) for gates_U in found.values()}) == len(REFERENCES)


@every_reference
@pytest.mark.parametrize("past", [None, 0.3], ids=["first_step", "later_step"])
def test_every_reference_is_unbiased(name: ReferenceName, past: float | None) -> None:
    """Over every pair of masks that a step of the real search may draw."""
    search = make_search(make_space(["channel"], [(1, 4)]), PROBS_U, Design(1, 2), sparsity=0.01)
    search.baseline.load_state_dict({"average": None if past is None else [past]})
    loss = loss_of_gates(reference(name, search, MASKS[6], PROBS_U, Limits(min_channels=0)))
    assert_close(
        -moved(search, lambda losses_TK: torch.full_like(losses_TK[:, 0], loss)), exact_effects(PROBS_U, 1, 1.0), STEP
    )


@every_reference
@pytest.mark.parametrize("design", [Design(1, 3), Design(2, 3), Design(2, 3, 4)], ids=str)
def test_a_reference_is_evaluated_beside_the_masks(name: ReferenceName, design: Design) -> None:
    """On the same text, as if it were alone; and what the masks lose does not change by it."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(2, 8)
    probs_U = 0.3 + 0.6 * random_numbers(view.space.size, 0)
    search = make_search(view.space, probs_U, design)
    initial_U = select(search.probs_U, search.budget)
    gates_U, masks_BKCU = reference(name, search, initial_U, initial_U, Limits()), search.ask(0)
    with masked_objective(view, rows_per_forward=4) as objective:
        losses_BKC, reference_BC, _ = evaluate_step(objective, search, masks_BKCU, tokens_BT, gates_U)
        search.needs_reference = False
        expected_BKC, nothing, _ = evaluate_step(objective, search, masks_BKCU, tokens_BT, gates_U)
        wanted = gates_U.expand(2, 1, design.chunks, -1)
        alone_BC = objective.chunk_shares(wanted, tokens_BT)[:, 0]
    assert nothing is None and reference_BC is not None
    assert_close(losses_BKC, expected_BKC, LOGITS[torch.float64])
    assert_close(reference_BC, alone_BC if design.groups > 1 else alone_BC.mean(0, keepdim=True), LOGITS[torch.float64])


def test_a_reference_that_is_missing_is_an_error() -> None:
    """Of a baseline that needs one."""
    search = make_search(make_space(["channel"], [(1, 4)]), PROBS_U, Design(1, 2), sparsity=0.01)
    masks_BKCU = search.ask(0)
    with pytest.raises(ConfigError, match="Matched needs reference_BC"):
        search.tell(masks_BKCU, torch.zeros(masks_BKCU.shape[:-1]), learning_rate=0.1)


def test_a_reference_that_looks_at_the_masks_is_noticed() -> None:
    """Negative control: the best of the step's own losses as a reference is no baseline."""
    search = make_search(make_space(["channel"], [(1, 4)]), PROBS_U, Design(1, 2), sparsity=0.01)
    search.baseline.load_state_dict({"average": [0.3]})
    misled_U = -moved(search, lambda losses_TK: losses_TK.amin(1))
    assert (misled_U - exact_effects(PROBS_U, 1, 1.0)).abs().max() > 0.01


def test_all_masks_are_in_the_table() -> None:
    """The interpolation at a mask is that mask's loss."""
    for code, mask_U in enumerate(all_masks(4)):
        assert loss_of_gates(mask_U) == pytest.approx(LOSSES[code].item(), abs=0)
