"""Caps on other costs beside the budget: a policy holds them on average, a selection exactly."""

from dataclasses import replace

import pytest
import torch
from spaces import FLAT_KINDS, NESTED, make_space
from tiny_models import tiny_model
from tiny_run import Place, read_json, run, succeed

from bernprune.config import make_config
from bernprune.errors import BudgetError, ConfigError
from bernprune.models.view import describe
from bernprune.names import CapName, Kind
from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits, select
from bernprune.units import UnitSpace

SPACE = describe(tiny_model("llama")).space
BOUNDS = {"floor": 0.02, "ceiling": 0.98}


def numbers(seed: int, size: int = SPACE.size) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def removed(space: UnitSpace, values_U: torch.Tensor, name: CapName) -> float:
    costs_U = space.costs_U(name)
    return 1 - (torch.dot(costs_U, values_U.double()) / costs_U.sum()).item()


def policies(budget: Budget, seed: int) -> list[torch.Tensor]:
    values_U = numbers(seed, budget.space.size)
    worth_U = values_U * budget.costs_U
    return [
        budget.project(values_U, **BOUNDS),
        budget.at_price(worth_U, 0.3 * budget.costs_U, budget.costs_U, **BOUNDS),
    ]


@pytest.mark.parametrize("also", [{"kv_cache": 0.35}, {"flops": 0.32}, {"kv_cache": 0.35, "flops": 0.31}])
@pytest.mark.parametrize("seed", range(3))
def test_policies_and_selections_are_on_the_budget_and_within_the_caps(also: dict[CapName, float], seed: int) -> None:
    budget = Budget(SPACE, 0.3, also=also)
    for probs_U in policies(budget, seed):
        assert budget.removed_share(probs_U) == pytest.approx(0.3, abs=1e-9)
        for name, share in also.items():
            assert removed(SPACE, probs_U, name) >= share - 2e-6
    mask_U = select(numbers(seed), budget)
    assert 0.3 - 1e-12 <= budget.removed_share(mask_U) < 0.3 + 2 * (budget.costs_U.max() / budget.total).item()
    for name, share in also.items():
        assert removed(SPACE, mask_U, name) >= share - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_a_cap_that_holds_anyway_changes_nothing(seed: int) -> None:
    """Not a bit of a policy, and no unit of a selection."""
    free, capped = Budget(SPACE, 0.3), Budget(SPACE, 0.3, also={"kv_cache": 0.01, "flops": 0.01})
    for one_U, other_U in zip(policies(free, seed), policies(capped, seed), strict=True):
        assert torch.equal(one_U, other_U)
    assert torch.equal(select(numbers(seed), free), select(numbers(seed), capped))


@pytest.mark.parametrize("seed", range(3))
def test_a_cap_that_is_missed_by_little_binds(seed: int) -> None:
    for index, free_U in enumerate(policies(Budget(SPACE, 0.3), seed)):
        share = removed(SPACE, free_U, "kv_cache") + 1e-4
        capped_U = policies(Budget(SPACE, 0.3, also={"kv_cache": share}), seed)[index]
        assert removed(SPACE, capped_U, "kv_cache") >= share - 2e-6


@pytest.mark.parametrize("seed", range(3))
def test_no_more_goes_of_a_capped_cost_than_must(seed: int) -> None:
    """The price is the lowest: a policy meets the cap, a selection within a unit."""
    budget = Budget(SPACE, 0.3, also={"kv_cache": 0.38})
    for probs_U in policies(budget, seed):
        assert removed(SPACE, probs_U, "kv_cache") == pytest.approx(0.38, abs=2e-6)
    costs_U = SPACE.costs_U("kv_cache")
    assert removed(SPACE, select(numbers(seed), budget), "kv_cache") < 0.38 + (costs_U.max() / costs_U.sum()).item()


def bound(worth_U: torch.Tensor, budget: Budget) -> float:
    """What no selection within budget and cap is worth more than: the least, over prices of both, of their dual."""
    cap, prices = budget.caps[0], torch.linspace(0, 1.2, 121, dtype=torch.float64)
    charge_PU = prices[:, None] * cap.costs_U * (budget.total / cap.total)
    spent_P = prices * cap.limit * (budget.total / cap.total)
    duals = [
        (price * budget.most + spent_P + (worth_U - price * budget.costs_U - charge_PU).clamp(min=0).sum(1))
        .min()
        .item()
        for price in prices.tolist()
    ]
    return min(duals)


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_selections_are_the_best_within_a_unit(seed: int, share: float) -> None:
    """Where all units have a part in what is capped, of which some kind takes five times as much as another."""
    space = make_space(FLAT_KINDS, [(5, 20)] * 3, {"kv_group": (11, 60.0), "channel": (3, 3.0)})
    budget, priorities_U = Budget(space, 0.3, also={"flops": share}), numbers(seed, space.size)
    mask_U = select(priorities_U, budget, limits=Limits(min_kv_groups=0, min_channels=0))
    worth_U = priorities_U * budget.costs_U
    assert budget.caps[0].allows(mask_U)
    assert bound(worth_U, budget) - worth_U.max() <= worth_U[mask_U].sum() <= bound(worth_U, budget) + 1e-9


def test_prices_know_of_what_the_limits_keep() -> None:
    """Kv groups that nobody wants stay, one a layer; the budget is filled with channels all the same."""
    space = make_space(FLAT_KINDS, [(4, 40)] * 5, {"kv_group": (11, 60.0), "channel": (3, 3.0)})
    priorities_U = numbers(0, space.size)
    unwanted_U = space.of_kind("kv_group") & (space.layer_U < 3)
    priorities_U[unwanted_U] *= 0.01
    budget = Budget(space, 0.3, also={"flops": 0.5})
    mask_U = select(priorities_U, budget)
    assert budget.caps[0].allows(mask_U) and (mask_U & unwanted_U).sum() == 3
    assert budget.removed_share(mask_U) < 0.3 + (budget.costs_U.max() / budget.total).item()


@pytest.mark.parametrize("names", [("kv_cache", "flops"), ("flops", "kv_cache")])
def test_two_caps_hold_at_once(names: tuple[CapName, ...]) -> None:
    """Each of which breaks where only the other is there, as later layers have more FLOPs."""
    alike = make_space(FLAT_KINDS, [(5, 20)] * 3)
    groups = [replace(group, flops=group.flops * (1 + 4 * group.layer)) for group in alike.groups]
    space = UnitSpace(alike.architecture, groups)
    for alone, other in (names, names[::-1]):
        for probs_U in policies(Budget(space, 0.3, also={alone: 0.4}), 0):
            assert removed(space, probs_U, alone) == pytest.approx(0.4, abs=2e-6)
            assert removed(space, probs_U, other) < 0.39
    for probs_U in policies(Budget(space, 0.3, also=dict.fromkeys(names, 0.4)), 0):
        assert min(removed(space, probs_U, name) for name in names) >= 0.4 - 2e-6


@pytest.mark.parametrize("seed", range(3))
def test_nested_selections_keep_within_their_caps(seed: int) -> None:
    """What a smaller one keeps stays, and a cap that is full does not end what else fits."""
    tight_U, scores_U = select(numbers(seed), Budget(SPACE, 0.5, also={"kv_cache": 0.5})), numbers(seed)
    loose = Budget(SPACE, 0.32, also={"kv_cache": 0.35})
    mask_U = select(scores_U, loose, core_U=tight_U)
    assert (mask_U >= tight_U).all() and loose.caps[0].allows(mask_U)
    assert loose.removed_share(mask_U) < 0.36


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [
        (("kv_group", "channel"), 4),
        (("attention", "kv_group", "ffn"), 4),
        (("attention", "channel"), 3),  # the attention of the first layer always stays
        (("layer",), 3),
    ],
)
def test_keys_and_values_belong_to_the_finest_level_that_holds_them(kinds: tuple[Kind, ...], layers: int) -> None:
    """Whatever the granularity, all that can go of them are counted once."""
    space = describe(tiny_model("llama"), granularity=kinds).space
    assert space.costs_U("kv_cache").sum().item() == layers * 3 * 2 * 8  # groups, keys and values, head size


def test_caps_that_cannot_be_are_refused() -> None:
    with pytest.raises(BudgetError, match="joint pools"):
        Budget(SPACE, 0.3, pools="separate", also={"kv_cache": 0.5})
    with pytest.raises(BudgetError, match="do not lie in one another"):
        Budget(NESTED, 0.3, also={"kv_cache": 0.5})
    with pytest.raises(BudgetError, match="strictly between 0 and 1"):
        Budget(SPACE, 0.3, also={"kv_cache": 1.0})
    with pytest.raises(BudgetError, match="has a part in kv_cache"):
        Budget(describe(tiny_model("llama"), granularity=("channel",)).space, 0.3, also={"kv_cache": 0.5})
    with pytest.raises(BudgetError, match=r"leave at least .* of kv_cache, but only 0.01 may stay; remove more"):
        policies(Budget(SPACE, 0.3, also={"kv_cache": 0.99}), 0)
    with pytest.raises(BudgetError, match=r"minimums per layer keep 66\.7% of kv_cache, more than the 30\.0%"):
        select(numbers(0), Budget(SPACE, 0.3, also={"kv_cache": 0.7}), limits=Limits(min_kv_groups=2))


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"also_parameters": 0.2}, "budget.also_parameters has no meaning for budget.measure 'parameters'"),
        ({"also_kv_cache": 0.5, "pools": "separate"}, "budget.also_kv_cache needs budget.pools 'joint'"),
        ({"also_kv_cache": 0.99}, "leaves 0.01, which must be above policy.floor 0.02"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(budget: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_config({"budget": budget})


@pytest.mark.parametrize(
    ("granularity", "says"),
    [
        ("attention,kv_group", "needs a granularity of units that do not lie in one another"),
        ("channel", "budget.also_kv_cache needs kv_group, attention or layer in the granularity"),
    ],
)
def test_units_that_a_cap_does_not_suit_are_refused(granularity: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_config({"budget": {"also_kv_cache": 0.4}, "granularity": granularity})


def test_a_plan_that_a_cap_would_make_another_is_refused(place: Place) -> None:
    """Before the work, and of a finished run."""
    capped = ("budget.also_kv_cache=0.5", "budget.sparsity=0.4")
    refused = run(*place.prune(*capped, "plans.sparsities=[0.3]"))
    assert refused.code == 2 and "of kv_cache, but only 0.5 may stay" in refused.err
    succeed(*place.prune(*capped))
    refused = run("select", str(place.out), "--sparsity", "0.3")
    assert refused.code == 2 and "of kv_cache, but only 0.5 may stay" in refused.err


@pytest.mark.parametrize("method", ["posterior", "reinforce"])
def test_a_run_keeps_within_its_cap(place: Place, method: str) -> None:
    """What it cuts, and what it selects for other sparsities."""
    capped = ("budget.also_kv_cache=0.5", "budget.sparsity=0.4", "plans.sparsities=[0.45]")
    done = succeed(*place.prune(*capped, f"search.method={method}"))
    sparsity = read_json(place.out / "report.json")["sparsity"]
    assert sparsity["also"]["kv_cache"]["target"] == 0.5
    assert sparsity["achieved"] >= 0.4 and sparsity["also"]["kv_cache"]["achieved"] >= 0.5
    assert f"{sparsity['also']['kv_cache']['achieved']:.2%} of the prunable kv_cache" in done.out
    for name in ("plan.json", "plans/0.45.json"):
        layers = read_json(place.out / name)["layers"]
        kept = sum(len(layer["kv_groups"]) for layer in layers)
        assert kept <= 0.5 * len(layers) * 3
