"""Caps on other costs beside the budget: a policy holds them on average, a selection exactly."""

import itertools

import pytest
import torch
from spaces import FLAT_KINDS, NESTED, make_space
from tiny_models import tiny_model
from tiny_run import Place, read_json, succeed

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
    worth_U = numbers(seed) * budget.costs_U
    return [
        budget.project(numbers(seed), **BOUNDS),
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
    assert budget.removed_share(mask_U) >= 0.3 - 1e-12
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
def test_no_more_goes_of_a_capped_cost_than_must(seed: int) -> None:
    """The price is the lowest: a policy meets the cap, a selection within a unit."""
    budget = Budget(SPACE, 0.3, also={"kv_cache": 0.38})
    for probs_U in policies(budget, seed):
        assert removed(SPACE, probs_U, "kv_cache") == pytest.approx(0.38, abs=2e-6)
    costs_U = SPACE.costs_U("kv_cache")
    assert removed(SPACE, select(numbers(seed), budget), "kv_cache") < 0.38 + (costs_U.max() / costs_U.sum()).item()


@pytest.mark.parametrize("seed", range(6))
def test_selections_are_the_best_within_a_unit_a_limit(seed: int) -> None:
    """Of all masks of a dozen units none within the limits is worth more by more than two units."""
    space = make_space(FLAT_KINDS, [(3, 2), (2, 5)])
    priorities_U = numbers(seed, space.size)
    budget = Budget(space, 0.3, also={"kv_cache": 0.6})
    mask_U = select(priorities_U, budget, limits=Limits(min_kv_groups=0, min_channels=0))
    worth_U = priorities_U * budget.costs_U
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=space.size)), dtype=torch.float64)
    fits = (masks @ budget.costs_U <= budget.most) & (masks @ budget.caps[0].costs_U <= budget.caps[0].most)
    best = (masks @ worth_U)[fits].max()
    assert worth_U[mask_U].sum() >= best - 2 * worth_U.max()


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
    with pytest.raises(BudgetError, match="no probabilities between the floor and the ceiling"):
        policies(Budget(SPACE, 0.3, also={"kv_cache": 0.99}), 0)
    with pytest.raises(BudgetError, match=r"minimums per layer keep .* of kv_cache, more than the 30.0%"):
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


@pytest.mark.parametrize("method", ["posterior", "reinforce"])
def test_a_run_keeps_within_its_cap(place: Place, method: str) -> None:
    """What it cuts, and what it selects for other sparsities."""
    capped = ("budget.also_kv_cache=0.5", "budget.sparsity=0.4", "plans.sparsities=[0.3]")
    done = succeed(*place.prune(*capped, f"search.method={method}"))
    sparsity = read_json(place.out / "report.json")["sparsity"]
    assert sparsity["also"]["kv_cache"]["target"] == 0.5
    assert sparsity["achieved"] >= 0.4 and sparsity["also"]["kv_cache"]["achieved"] >= 0.5
    assert f"{sparsity['also']['kv_cache']['achieved']:.2%} of the prunable kv_cache" in done.out
    for name in ("plan.json", "plans/0.3.json"):
        layers = read_json(place.out / name)["layers"]
        kept = sum(len(layer["kv_groups"]) for layer in layers)
        assert kept <= 0.5 * len(layers) * 3
