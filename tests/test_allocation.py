"""Shares of layers from an evolution, and selections under several budgets at once against all there are."""

import itertools

import pytest
import torch
from tiny_models import tiny_model

from bernprune.errors import BudgetError
from bernprune.models.view import describe
from bernprune.policy.allocation import Evolution, search_shares, shares_by_importance
from bernprune.policy.prices import at_best_prices


def losses_of(shares_KG: torch.Tensor) -> torch.Tensor:
    """Least at 0.2, 0.4, 0.6, 0.8."""
    return (shares_KG - torch.tensor([0.2, 0.4, 0.6, 0.8])).square().sum(1)


def test_an_evolution_finds_shares() -> None:
    """Near those that lose least, always better than equal ones, the nearer the longer; and the same ones again."""
    even = losses_of(torch.full((1, 4), 0.7)).item()
    found = [
        losses_of(search_shares(4, 0.7, losses_of, seed=0, evolution=Evolution(generations=count))[None]).item()
        for count in (1, 8, 60)
    ]
    assert even > found[0] > found[1] > found[2]
    assert found[2] < 0.003
    again = [search_shares(4, 0.7, losses_of, seed=seed, evolution=Evolution()) for seed in (0, 0, 1)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_what_cannot_be_bettered_is_kept() -> None:
    """Equal shares are among the candidates from the start."""
    found = search_shares(3, 0.6, lambda shares: (shares - 0.6).abs().sum(1), seed=0, evolution=Evolution())
    assert torch.allclose(found, torch.full((3,), 0.6, dtype=torch.float64))


def test_an_evolution_tries_as_many_as_it_says() -> None:
    """Parents are not tried again."""
    asked: list[int] = []

    def counted(shares_KG: torch.Tensor) -> torch.Tensor:
        asked.append(len(shares_KG))
        return losses_of(shares_KG)

    evolution = Evolution(population=7, parents=2, generations=3)
    search_shares(4, 0.7, counted, seed=0, evolution=evolution)
    assert asked == [7, 5, 5, 5] and sum(asked) == evolution.tried


def test_importances_must_be_finite() -> None:
    with pytest.raises(BudgetError, match="must be finite"):
        shares_by_importance(torch.tensor([0.1, float("nan")]), 0.5)


# Several budgets


def kept_within(worth_U: torch.Tensor, costs_MU: torch.Tensor, limits: list[float]) -> torch.Tensor:
    """What fits, the units that are worth most at the best prices first."""
    totals_M, limits_M = costs_MU.sum(1).clamp(min=1e-9), torch.tensor(limits, dtype=torch.float64)
    reduced_U = at_best_prices(worth_U, costs_MU / totals_M[:, None], limits_M / totals_M)
    assert (costs_MU @ (reduced_U > 0).double() <= limits_M * (1 + 1e-12)).all()
    mask_U = torch.zeros_like(worth_U, dtype=torch.bool)
    for unit in reduced_U.argsort(descending=True, stable=True).tolist():
        with_U = mask_U | (torch.arange(len(mask_U)) == unit)
        if worth_U[unit] > 0 and (costs_MU @ with_U.double() <= limits_M * (1 + 1e-12)).all():
            mask_U = with_U
    return mask_U


def best_of_all(worth_U: torch.Tensor, costs_MU: torch.Tensor, limits: list[float]) -> float:
    """By trying every mask."""
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(worth_U))), dtype=torch.float64)
    fits = ((masks @ costs_MU.T) <= torch.tensor(limits, dtype=torch.float64) * (1 + 1e-9)).all(1)
    return (masks @ worth_U)[fits].max().item()


@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize("kind", ["any", "alike", "conflicting"])
def test_selections_are_exact_within_a_unit_a_budget(budgets: int, kind: str) -> None:
    """Of every mask of twelve units none within the budgets is worth more by more than that; ours is within them."""
    gaps = []
    for seed in range(12):
        source = torch.Generator().manual_seed(seed)
        worth_U = torch.rand(12, generator=source, dtype=torch.float64) - 0.1
        costs_MU = torch.rand(budgets, 12, generator=source, dtype=torch.float64) + 0.1
        if kind == "alike":
            worth_U, costs_MU = worth_U[torch.arange(12) // 4], costs_MU[:, torch.arange(12) // 4]
        if kind == "conflicting" and budgets > 1:
            costs_MU[1] = 1.3 - costs_MU[0]
        limits = [(0.3 + 0.5 * torch.rand(1, generator=source).item()) * total for total in costs_MU.sum(1).tolist()]
        mask_U = kept_within(worth_U, costs_MU, limits)
        assert all(spent <= limit * (1 + 1e-9) for spent, limit in zip(costs_MU @ mask_U.double(), limits, strict=True))
        best, found = best_of_all(worth_U, costs_MU, limits), worth_U[mask_U].sum().item()
        assert best - budgets * worth_U.max() <= found <= best + 1e-9
        assert not (mask_U & (worth_U <= 0)).any()
        gaps.append((best - found) / best)
    assert sum(gaps) / len(gaps) < 0.08 and min(gaps) < 1e-9  # and on average much nearer


def test_one_dear_unit_does_not_blur_the_others_price() -> None:
    """The bound holds of what fits, too: with two budgets, two units short of the best of the cheap ones at most."""
    for seed in range(12):
        source = torch.Generator().manual_seed(seed)
        worth_U, costs_MU = (torch.rand(size, generator=source, dtype=torch.float64) for size in ((81,), (2, 81)))
        costs_MU[:, 80], worth_U[80] = 500.0, 1.0
        limits = (0.4 * costs_MU[:, :80].sum(1)).tolist()
        found = worth_U[kept_within(worth_U, costs_MU, limits)].sum()
        without = worth_U[:80][kept_within(worth_U[:80], costs_MU[:, :80], limits)].sum()
        assert found >= without - 2 * worth_U[:80].max()


def test_a_budget_that_leaves_room_does_not_matter() -> None:
    """Nor do units that cost nothing of it."""
    source = torch.Generator().manual_seed(0)
    worth_U, costs_U = (torch.rand(200, generator=source, dtype=torch.float64) for _ in range(2))
    alone = kept_within(worth_U, costs_U[None], [20.0])
    free = torch.zeros(200, dtype=torch.float64)
    for other, limit in ((free, 0.0), (torch.ones(200, dtype=torch.float64), 200.0)):
        assert torch.equal(kept_within(worth_U, torch.stack([costs_U, other]), [20.0, limit]), alone)
        assert torch.equal(kept_within(worth_U, torch.stack([other, costs_U]), [limit, 20.0]), alone)
    assert kept_within(worth_U, costs_U[None], [1e9]).all()


def test_parameters_flops_and_cache_together() -> None:
    """Of a model: half the cache goes, though parameters alone would take channels."""
    space = describe(tiny_model("llama")).space
    costs_MU = torch.stack([space.costs_U(), space.costs_U("flops"), space.costs_U("kv_cache")])
    assert costs_MU[2].sum().item() == 4 * 3 * 2 * 8  # layers, groups, keys and values, head size
    worth_U = torch.rand(space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    worth_U[space.of_kind("kv_group")] += 10
    limits = (costs_MU.sum(1) * torch.tensor([0.8, 0.8, 0.5])).tolist()
    mask_U = kept_within(worth_U, costs_MU, limits)
    assert mask_U[space.of_kind("kv_group")].double().mean() == 0.5
    assert (costs_MU @ mask_U.double() <= torch.tensor(limits, dtype=torch.float64) * (1 + 1e-9)).all()
