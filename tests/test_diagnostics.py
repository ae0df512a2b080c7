"""What a search says of itself, against slow and obvious twins.

Letters: U units, B observations.
"""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from spaces import FLAT, NESTED, SPACES, make_space, normal_numbers, of_kind, random_numbers
from tolerances import EXACT, GUARDED, assert_close

from bernprune.errors import ConfigError
from bernprune.policy.baselines import make_baseline
from bernprune.policy.bernoulli import initial_probs
from bernprune.policy.budget import Budget
from bernprune.policy.diagnostics import (
    correlation,
    correlation_by_kind,
    entropy_by_layer,
    expected_regret,
    rank_correlation,
    signal_to_noise,
)
from bernprune.policy.masks import Design
from bernprune.policy.posterior import PosteriorSearch, RoundSums
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.run.checkpoint import read_state, write_state
from bernprune.units import UnitSpace

spaces = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """0 where it is not defined."""
    try:
        return statistics.correlation(first, second)
    except statistics.StatisticsError:
        return 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """Of each value; equal ones share the mean of theirs."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


# One figure at a time


@pytest.mark.parametrize("count", [2, 3, 17])
def test_correlation(count: int) -> None:
    """Pearson's; of what does not vary, and of a single value, none."""
    first_N, second_N = normal_numbers(2, count, seed=count)
    assert_close(correlation(first_N, second_N), pearson(first_N.tolist(), second_N.tolist()), EXACT)
    assert_close(correlation(first_N, 3 - 2 * first_N), -1.0, EXACT)
    flat_N = torch.full((count,), 0.25, dtype=torch.float64)
    assert correlation(first_N, flat_N) == correlation(flat_N, first_N) == correlation(first_N[:1], second_N[:1]) == 0


@spaces
@pytest.mark.parametrize("levels", [2, 4, 10**6], ids=["many_ties", "ties", "no_ties"])
def test_rank_correlation(space: UnitSpace, levels: int) -> None:
    """Of each kind, within layers of several units and averaged; of blocks, one a layer, over all layers."""
    values_U, scores_U = ((random_numbers(space.size, seed) * levels).floor() for seed in (1, 2))
    found = rank_correlation(space, values_U, scores_U)
    assert tuple(found) == space.kinds
    for kind, value in found.items():
        layers = []
        for layer in range(len(space.architecture.layers)):
            at = [u for u in range(space.size) if space.groups[space.group_U[u]].kind == kind]
            layers.append([u for u in at if space.groups[space.group_U[u]].layer == layer])
        several = [at for at in layers if len(at) > 1] or [list(itertools.chain(*layers))]
        each = [pearson(ranks(values_U[at].tolist()), ranks(scores_U[at].tolist())) for at in several]
        assert_close(value, statistics.mean(each), EXACT)


def test_rank_correlation_is_of_the_order_alone() -> None:
    """1 for the scores themselves however bent, -1 for them upside down, 0 for a kind of a single unit."""
    scores_U = random_numbers(FLAT.size, 3)
    same, turned = rank_correlation(FLAT, scores_U.exp(), scores_U), rank_correlation(FLAT, -scores_U, scores_U)
    for kind in FLAT.kinds:
        assert_close([same[kind], turned[kind]], [1.0, -1.0], EXACT)
    one = make_space(["kv_group", "channel"], [(1, 5)])
    assert rank_correlation(one, random_numbers(6, 0), random_numbers(6, 1))["kv_group"] == 0


@spaces
def test_entropy_by_layer(space: UnitSpace) -> None:
    """Mean bits of a layer's units, by loops."""
    probs_U = random_numbers(space.size, 4)
    probs_U[0], probs_U[-1] = 0.0, 1.0
    for layer, found in enumerate(entropy_by_layer(space, probs_U)):
        chances = [p for u, p in enumerate(probs_U.tolist()) if space.groups[space.group_U[u]].layer == layer]
        bits = [-sum(q * math.log2(q) for q in (p, 1 - p) if q > 0) for p in chances]
        assert found is not None
        assert_close(found, statistics.mean(bits), EXACT)


def test_a_layer_without_units_has_no_entropy() -> None:
    """The first layer's attention is no unit."""
    space = make_space(["attention"], [(2, 5), (3, 7), (2, 4)])
    found = entropy_by_layer(space, torch.full((2,), 0.5, dtype=torch.float64))
    assert found[0] is None and found[1:] == [1.0, 1.0]


@spaces
def test_agreement_and_signal_of_each_kind(space: UnitSpace) -> None:
    """Over all layers, by loops; what does not exceed its noise has no signal."""
    first_U, second_U, noise_U = *normal_numbers(2, space.size, seed=5), 0.1 + random_numbers(space.size, 6)
    agreement, signal = correlation_by_kind(space, first_U, second_U), signal_to_noise(space, 3 * first_U, noise_U)
    assert tuple(agreement) == tuple(signal) == space.kinds
    for kind in space.kinds:
        at = of_kind(space, kind).nonzero().flatten().tolist()
        assert_close(agreement[kind], pearson(first_U[at].tolist(), second_U[at].tolist()), EXACT)
        power = statistics.mean(9 * first_U[u].item() ** 2 for u in at) / statistics.mean(noise_U[at].tolist())
        assert_close(signal[kind], max(0.0, power - 1), EXACT)
    assert set(signal_to_noise(space, noise_U.sqrt() / 2, noise_U).values()) == {0.0}
    assert set(signal_to_noise(space, first_U, torch.zeros_like(noise_U)).values()) == {0.0}


def regret_by_integration(prob: float, deviation: float) -> float:
    """E[max(w, 0)] - max(E[w], 0) of a normal w that is positive with this probability, by the trapezoid rule."""
    mean = deviation * statistics.NormalDist().inv_cdf(prob)
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return torch.trapezoid((mean + deviation * x).clamp(min=0) * density, x).item() - max(mean, 0.0)


def test_expected_regret() -> None:
    """What deciding by the mean loses against deciding by the truth, of all units together; none of what is certain."""
    probs = [1e-4, 0.02, 0.3, 0.5, 0.77, 0.999]
    deviations = [3.0, 0.1, 2.0, 0.7, 1.3, 5.0]
    each = [regret_by_integration(*pair) for pair in zip(probs, deviations, strict=True)]
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (probs, deviations)]
    for index, expected in enumerate(each):
        assert_close(expected_regret(*(values[index : index + 1] for values in tensors)), expected, GUARDED)
    assert_close(expected_regret(*tensors), sum(each), GUARDED)
    certain_U = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert expected_regret(certain_U, torch.ones(3, dtype=torch.float64)) == 0
    with_certain = expected_regret(torch.cat([certain_U, tensors[0]]), torch.cat([torch.ones(3), tensors[1]]))
    assert_close(with_certain, sum(each), GUARDED)


# Halves


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (3, 1, 1, 4), (1,) * 7], ids=str)
def test_halves_are_of_every_second_estimate(sizes: tuple[int, ...]) -> None:
    """However they come in, with mean and variance by lists."""
    effects_BU, sums, first = normal_numbers(sum(sizes), 3, seed=sum(sizes)), RoundSums.empty(3), 0
    for size in sizes:
        sums.add(effects_BU[first : first + size])
        first += size
    halves = sums.halves()
    for unit in range(3):
        values = effects_BU[:, unit].tolist()
        for half, parity in zip(halves, (0, 1), strict=True):
            assert_close(half[unit], statistics.mean(values[parity::2]), EXACT)
        assert_close(sums.mean_U()[unit], statistics.mean(values), EXACT)
        assert_close(sums.variance_U()[unit], statistics.variance(values) / len(values), EXACT)


# Of a search


def curved(masks_BKCU: torch.Tensor, step: int) -> torch.Tensor:
    """A loss with interactions and noise."""
    lost_BKC = (1 - masks_BKCU.double()) @ random_numbers(masks_BKCU.shape[-1], 5)
    return 0.1 * lost_BKC.square() + 0.3 * normal_numbers(*lost_BKC.shape, seed=step)


def make_search(space: UnitSpace, design: Design) -> PosteriorSearch:
    scores_U = random_numbers(space.size, 1)
    probs_U = initial_probs(space, scores_U, keep=0.6, map_name="const")
    return PosteriorSearch(Budget(space, 0.4), probs_U, scores_U, seed=3, design=design, round_steps=3)


DESIGNS = {"chunk": Design(3, 4, 2), "batch": Design(1, 4)}


@pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
@pytest.mark.parametrize("space", [FLAT, NESTED], ids=["flat", "nested"])
def test_what_a_round_leaves(space: UnitSpace, design: Design, monkeypatch: pytest.MonkeyPatch) -> None:
    """Agreement, signal and regret of the last whole round, from its observations and what was concluded from them."""
    told: list[torch.Tensor] = []
    add = RoundSums.add
    monkeypatch.setattr(RoundSums, "add", lambda self, effects_BU: (told.append(effects_BU), add(self, effects_BU)))
    search, scores_U = make_search(space, design), random_numbers(space.size, 1)
    last: dict[str, Any] = {}
    for step in range(8):
        before_U, found = search.probs_U, search.diagnose(scores_U)
        assert {name: found[name] for name in found.keys() - {"entropy_by_layer", "rank_correlation"}} == last
        masks_BKCU = search.ask(step)[:]
        search.tell(masks_BKCU, curved(masks_BKCU, step), learning_rate=0.0)
        if step % 3 == 2:
            effects_BU = torch.cat(told)
            found, by_hand = search.diagnose(scores_U), round_by_hand(search, effects_BU, before_U)
            for name, value in by_hand["agreement"].items():
                assert_close(found["agreement"][name], value, EXACT)
            assert_close(list(found["signal_to_noise"].values()), list(by_hand["signal_to_noise"].values()), EXACT)
            assert_close(found["regret"], by_hand["regret"], GUARDED)
            last = {name: found[name] for name in ("agreement", "signal_to_noise", "regret")}
            told.clear()
    assert found["entropy_by_layer"] == entropy_by_layer(space, search.probs_U)
    assert found["rank_correlation"] == rank_correlation(space, search.priorities_U, scores_U)
    json.dumps(found, allow_nan=False)


def round_by_hand(search: PosteriorSearch, effects_BU: torch.Tensor, before_U: torch.Tensor) -> dict[str, Any]:
    """Agreement of the estimates of even and of odd number, but of kinds of which too few units ever changed; signal
    over a noise that units of a pool share; regret were there neither floor nor ceiling."""
    space, halves = search.budget.space, [effects_BU[parity::2].sum(0) for parity in (0, 1)]
    agreement = {}
    for kind in space.kinds:
        pair = [half[of_kind(space, kind)].tolist() for half in halves]
        if min(map(statistics.pstdev, pair)) > 1e-9:
            agreement[kind] = pearson(*pair)
    assert "channel" in agreement
    costs_U = search.budget.marginal_cost(before_U)
    free_U = search.budget.at_price(search.worth_U, search.deviation_U, costs_U, floor=0.0, ceiling=1.0)
    sure_U = (free_U < 1e-12) | (free_U > 1 - 1e-12)
    pairs = zip(free_U[~sure_U].tolist(), search.deviation_U[~sure_U].tolist(), strict=True)
    chances_U = before_U * (1 - before_U)
    levels_U = effects_BU.var(0) / len(effects_BU) * chances_U
    everywhere = levels_U.mean()
    for members_N in search.beliefs.groups:
        levels_U[members_N] = levels_U[members_N].mean() or everywhere
    signal = signal_to_noise(space, effects_BU.mean(0), levels_U / chances_U)
    return {
        "agreement": agreement,
        "signal_to_noise": signal,
        "regret": sum(regret_by_integration(*pair) for pair in pairs),
    }


def test_signal_is_seen_where_there_is_some() -> None:
    """Much agreement and signal, and little left to gain, where the loss says much; next to none where it is noise."""
    space, found = make_space(["channel"], [(1, 61), (1, 40)]), {}
    for name, scale in (("noise", 0.0), ("signal", 3.0)):
        search = make_search(space, Design(8, 4))
        values_U = scale * normal_numbers(space.size, seed=0)
        rounds = []
        for step in range(60):
            masks_BKCU = search.ask(step)[:]
            losses_BKC = -(masks_BKCU.double() @ values_U) + normal_numbers(*masks_BKCU.shape[:3], seed=step)
            search.tell(masks_BKCU, losses_BKC, learning_rate=0.0)
            if step % 3 == 2:
                rounds.append(search.diagnose(values_U))
        for said in ("agreement", "signal_to_noise", "rank_correlation"):
            found[name, said] = statistics.median(diagnosed[said]["channel"] for diagnosed in rounds[10:])
    assert found["signal", "agreement"] > 0.6 > 0.3 > abs(found["noise", "agreement"])
    assert found["signal", "signal_to_noise"] > 4 > 1 > found["noise", "signal_to_noise"]
    assert found["signal", "rank_correlation"] > 0.9


def test_what_is_known_survives_a_checkpoint(tmp_path: Any) -> None:
    """In the middle of a round: the same diagnostics then and after the next, and the same draws."""
    search, scores_U = make_search(FLAT, Design(3, 4, 2)), random_numbers(FLAT.size, 1)

    def go(search: PosteriorSearch, steps: range) -> None:
        for step in steps:
            masks_BKCU = search.ask(step)[:]
            search.tell(masks_BKCU, curved(masks_BKCU, step), learning_rate=0.0)

    go(search, range(4))
    write_state(tmp_path / "state", search.state_dict())
    other = make_search(FLAT, Design(3, 4, 2))
    other.load_state_dict(read_state(tmp_path / "state"))
    for steps in (range(4, 4), range(4, 6)):
        go(search, steps)
        go(other, steps)
        assert other.diagnose(scores_U) == search.diagnose(scores_U)
        assert torch.equal(other.draw(torch.Generator().manual_seed(1)), search.draw(torch.Generator().manual_seed(1)))


def follow_gradients(space: UnitSpace, values_U: torch.Tensor, steps: range, search: ReinforceSearch) -> None:
    """Steps of no length, on losses that lack the values of what is removed, and noise."""
    for step in steps:
        masks_BKCU = search.ask(step)[:]
        losses_BKC = -(masks_BKCU.double() @ values_U) + normal_numbers(*masks_BKCU.shape[:3], seed=step)
        search.tell(masks_BKCU, losses_BKC, learning_rate=0.0)


def gradient_search(space: UnitSpace) -> ReinforceSearch:
    baseline = make_baseline("leave-one-out", window=5, num_masks=4)
    start_U = torch.full((space.size,), 0.6, dtype=torch.float64)
    return ReinforceSearch(Budget(space, 0.4), start_U, baseline=baseline, seed=3, design=Design(2, 4))


def test_gradients_say_how_much_they_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the steps since they were last asked: agreement of every other one with the rest, and signal over noise."""
    told: list[torch.Tensor] = []
    add = RoundSums.add
    monkeypatch.setattr(RoundSums, "add", lambda self, effects_BU: (told.append(effects_BU), add(self, effects_BU)))
    search, scores_U = gradient_search(FLAT), random_numbers(FLAT.size, 1)
    follow_gradients(FLAT, scores_U, range(3), search)
    assert "agreement" not in search.diagnose(scores_U)  # too few to tell
    told.clear()
    follow_gradients(FLAT, scores_U, range(3, 12), search)
    found, gradients_NU = search.diagnose(scores_U), torch.cat(told)
    halves = [gradients_NU[parity::2].mean(0) for parity in (0, 1)]
    assert_close(list(found["agreement"].values()), list(correlation_by_kind(FLAT, *halves).values()), EXACT)
    noise_U = gradients_NU.var(0) / len(gradients_NU)
    by_hand = signal_to_noise(FLAT, gradients_NU.mean(0), noise_U)
    assert_close(list(found["signal_to_noise"].values()), list(by_hand.values()), EXACT)
    json.dumps(found, allow_nan=False)


def test_gradients_tell_more_where_there_is_more() -> None:
    """Agreement and signal are near zero where losses are noise."""
    space, found = make_space(["channel"], [(1, 61), (1, 40)]), {}
    for name, scale in (("noise", 0.0), ("signal", 3.0)):
        search, values_U = gradient_search(space), scale * normal_numbers(space.size, seed=0)
        follow_gradients(space, values_U, range(200), search)
        found[name] = search.diagnose(values_U)
    assert found["signal"]["agreement"]["channel"] > 0.6 > 0.3 > abs(found["noise"]["agreement"]["channel"])
    assert found["signal"]["signal_to_noise"]["channel"] > 1 > 0.3 > found["noise"]["signal_to_noise"]["channel"]


def test_what_gradients_told_survives_a_checkpoint(tmp_path: Any) -> None:
    """In the middle of a round."""
    search, other, scores_U = gradient_search(FLAT), gradient_search(FLAT), random_numbers(FLAT.size, 1)
    follow_gradients(FLAT, scores_U, range(5), search)
    write_state(tmp_path / "state", search.state_dict())
    follow_gradients(FLAT, scores_U, range(20, 23), other)
    other.load_state_dict(read_state(tmp_path / "state"))
    for each in (search, other):
        follow_gradients(FLAT, scores_U, range(5, 8), each)
    assert other.diagnose(scores_U) == search.diagnose(scores_U)


def test_a_policy_says_where_it_stands() -> None:
    """Before any step, what every search says."""
    budget, scores_U = Budget(FLAT, 0.4), random_numbers(FLAT.size, 1)
    baseline = make_baseline("none", window=5, num_masks=4)
    search = ReinforceSearch(budget, random_numbers(FLAT.size, 2), baseline=baseline, seed=3, design=Design(1, 4))
    assert search.diagnose(scores_U) == {
        "entropy_by_layer": entropy_by_layer(FLAT, search.probs_U),
        "rank_correlation": rank_correlation(FLAT, search.probs_U, scores_U),
    }


def test_what_a_search_cannot_learn_from_is_refused() -> None:
    """Scores that are not finite, and losses of a reference that are not one a window and chunk."""
    budget, start_U = Budget(FLAT, 0.4), torch.full((FLAT.size,), 0.6, dtype=torch.float64)
    scores_U = start_U.index_fill(0, torch.tensor([3]), torch.nan)
    with pytest.raises(ConfigError, match="1 of them not finite"):
        PosteriorSearch(budget, start_U, scores_U, seed=3, design=Design(2, 4), round_steps=3)
    baseline = make_baseline("matched", window=5, num_masks=4)
    search = ReinforceSearch(budget, start_U, baseline=baseline, seed=3, design=Design(2, 4))
    with pytest.raises(ConfigError, match=r"losses of a reference must be \[2, 1\], but are \[3, 1\]"):
        search.tell(search.ask(0), torch.ones(2, 4, 1), learning_rate=0.1, reference_BC=torch.ones(3, 1))
