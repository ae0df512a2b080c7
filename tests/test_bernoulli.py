"""The policy's start keeps what it should on average, in the order of the scores."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from spaces import BLOCKS, FLAT, LAYERED_BLOCKS, NESTED, SPACES, make_space, of_kind, random_numbers
from tolerances import EXACT, assert_close

from bernprune.errors import ConfigError
from bernprune.names import Kind, MapName, Scope
from bernprune.policy.bernoulli import const, entropy, graded, initial_probs, norm, reordered, sigmap
from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits, select
from bernprune.units import UnitSpace

Map = Callable[[torch.Tensor, float], torch.Tensor]
SMOOTH: dict[str, Map] = {"sigmap": sigmap, "norm": norm}
SCORES: dict[str, torch.Tensor] = {
    "random": random_numbers(13, 0),
    "heavy_tailed": random_numbers(13, 1).pow(-3),
    "ties": (3 * random_numbers(13, 2)).round(),
    "constant": torch.full((13,), 0.1, dtype=torch.float64),
    "zeros": torch.zeros(13, dtype=torch.float64),
    "single": torch.tensor([4.2], dtype=torch.float64),
    "pair": torch.tensor([1.0, 2.0], dtype=torch.float64),
}
MAPS: tuple[MapName, ...] = ("sigmap", "norm", "const", "hybrid", "uniform")

smooth_maps = pytest.mark.parametrize("mapped", SMOOTH.values(), ids=SMOOTH)
all_scores = pytest.mark.parametrize("scores_N", SCORES.values(), ids=SCORES)
all_maps = pytest.mark.parametrize("map_name", MAPS)


def published(name: str, scores_N: torch.Tensor, keep: float) -> torch.Tensor:
    """methods.md 1.2 item 3, before clamping; a single score has no deviation."""
    x = scores_N.tolist()
    mean = sum(x) / len(x)
    if name == "sigmap":
        std = math.sqrt(sum((v - mean) ** 2 for v in x) / (len(x) - 1)) if len(x) > 1 else 0.0
        raw = [1 / (1 + math.exp(-(v - mean) / (std + 1e-8))) for v in x]
    else:
        raw = [(v - min(x)) / (max(x) - min(x) + 1e-8) for v in x]
    return torch.tensor([keep + v - sum(raw) / len(raw) for v in raw], dtype=torch.float64)


# Maps


@pytest.mark.parametrize("name", SMOOTH)
@all_scores
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8])
def test_maps_have_the_wanted_mean_before_clamping(name: str, scores_N: torch.Tensor, keep: float) -> None:
    """They are the published formulas, whose mean is the wanted one, clamped to probabilities."""
    expected = published(name, scores_N, keep)
    assert_close(expected.mean(), keep, EXACT)
    assert (SMOOTH[name](scores_N, keep) - expected.clamp(0, 1)).abs().max() <= 1e-7  # a constant's mean may round


@smooth_maps
def test_the_mean_is_exact_where_nothing_is_clamped(mapped: Map) -> None:
    """The map itself, not a transcription of it."""
    for seed in range(10):
        half = random_numbers(7, seed)
        probs_N = mapped(torch.cat([half, -half]), 0.5)  # symmetric about its mean, so within [0, 1]
        assert_close(probs_N.mean(), 0.5, EXACT)
        assert ((probs_N > 0) & (probs_N < 1)).all()


@smooth_maps
@all_scores
def test_better_scores_never_get_less(mapped: Map, scores_N: torch.Tensor) -> None:
    """Increasing in the score, whatever is clamped; equal scores get equal probabilities."""
    probs_N = mapped(scores_N, 0.7)
    order = scores_N.argsort()
    assert (probs_N[order].diff() >= 0).all()
    for score in scores_N.unique():
        assert probs_N[scores_N == score].unique().numel() == 1


@smooth_maps
@pytest.mark.parametrize("name", ["constant", "zeros", "single"])
def test_scores_that_say_nothing_give_the_mean(mapped: Map, name: str) -> None:
    """No division by zero."""
    probs_N = mapped(SCORES[name], 0.3)
    assert (probs_N - 0.3).abs().max() <= 1e-7


@all_scores
@pytest.mark.parametrize("keep", [0.0, 0.31, 0.5, 1.0])
@pytest.mark.parametrize("sharpness", [0.95, 1.0])
def test_const_keeps_a_count_of_the_best(scores_N: torch.Tensor, keep: float, sharpness: float) -> None:
    """round(keep * N) are likely, none of them worse than one that is not, earlier ones first."""
    probs_N = const(scores_N, keep, sharpness=sharpness)
    likely = probs_N == sharpness
    assert int(likely.sum()) == round(keep * len(scores_N))
    assert_close(probs_N[~likely], torch.full_like(probs_N[~likely], 1 - sharpness), EXACT)
    best = sorted(range(len(scores_N)), key=lambda i: (-scores_N[i].item(), i))[: int(likely.sum())]
    assert likely.nonzero().flatten().tolist() == sorted(best)


# Starts


@all_maps
@pytest.mark.parametrize("scope", ["layer", "global", "pooled"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_starts_are_probabilities(space: UnitSpace, scope: Scope, map_name: MapName) -> None:
    """Of every kind of space, also from constant scores and float32."""
    for scores_U in (random_numbers(space.size, 0).float(), torch.ones(space.size)):
        probs_U = initial_probs(space, scores_U, keep=0.6, map_name=map_name, scope=scope)
        assert probs_U.dtype == torch.float64
        assert probs_U.shape == (space.size,)
        assert ((probs_U >= 0) & (probs_U <= 1)).all()


def of_size_one(scores_N: torch.Tensor) -> torch.Tensor:
    """Scores divided by the size of the largest."""
    return scores_N / scores_N.abs().max()


@pytest.mark.parametrize("map_name", MAPS)
def test_scores_may_have_any_scale(map_name: MapName) -> None:
    """Gradients of a mean loss of a large model are as small as the constant that keeps maps from dividing by zero."""
    scores_U = random_numbers(FLAT.size, 0)
    expected = initial_probs(FLAT, scores_U, keep=0.6, map_name=map_name)
    for scale in (1e-12, 1e12):
        assert_close(initial_probs(FLAT, scale * scores_U, keep=0.6, map_name=map_name), expected, EXACT)


@pytest.mark.parametrize("map_name", ["sigmap", "norm"])
def test_scope_decides_what_is_mapped_together(map_name: MapName) -> None:
    """A kind in a layer by itself, or a kind over all layers."""
    scores_U, mapped = 3 * random_numbers(FLAT.size, 0), SMOOTH[map_name]
    by_layer = initial_probs(FLAT, scores_U, keep=0.6, map_name=map_name, scope="layer")
    by_kind = initial_probs(FLAT, scores_U, keep=0.6, map_name=map_name, scope="global")
    for kind in FLAT.kinds:
        members = of_kind(FLAT, kind)
        assert torch.equal(by_kind[members], mapped(of_size_one(scores_U[members]), 0.6))
        for layer in range(3):
            span = FLAT.span(kind, layer)
            assert torch.equal(by_layer[span], mapped(of_size_one(scores_U[span]), 0.6))
    assert not torch.equal(by_layer, by_kind)


def test_hybrid_is_norm_for_channels_and_sigmap_for_the_rest() -> None:
    """Each where the published method uses it."""
    scores_U, channels = random_numbers(FLAT.size, 0), of_kind(FLAT, "channel")
    starts = {name: initial_probs(FLAT, scores_U, keep=0.6, map_name=name) for name in ("hybrid", "sigmap", "norm")}
    assert torch.equal(starts["hybrid"], torch.where(channels, starts["norm"], starts["sigmap"]))


def test_const_uses_its_sharpness_and_uniform_no_score() -> None:
    """Per layer: 7 of 11, 4 of 7, 3 of 5 channels at 0.6."""
    scores_U, channels = random_numbers(FLAT.size, 0), of_kind(FLAT, "channel")
    probs_U = initial_probs(FLAT, scores_U, keep=0.6, map_name="const", sharpness=0.8)
    assert [int((probs_U[FLAT.span("channel", layer)] == 0.8).sum()) for layer in range(3)] == [7, 4, 3]
    assert_close(probs_U[channels].unique(), [0.2, 0.8], EXACT)
    assert initial_probs(FLAT, scores_U, keep=0.6, map_name="uniform").eq(0.6).all()


@pytest.mark.parametrize(
    ("spoil", "keep", "said"),
    [
        (lambda scores_U: scores_U[1:], 0.6, "finite numbers, one a unit, but are"),
        (lambda scores_U: scores_U.index_fill(0, torch.tensor([2, 4]), math.nan), 0.6, "2 of them not finite"),
        (lambda scores_U: scores_U, 7, "above 0 and below 1, but is 7"),
    ],
    ids=["fewer", "nan", "share"],
)
def test_scores_that_tell_nothing_are_refused(
    spoil: Callable[[torch.Tensor], torch.Tensor], keep: float, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        initial_probs(FLAT, spoil(torch.ones(FLAT.size, dtype=torch.float64)), keep=keep)


@all_maps
@pytest.mark.parametrize("space", [NESTED, LAYERED_BLOCKS], ids=["nested", "layered_blocks"])
def test_units_that_contain_others_start_at_the_ceiling(space: UnitSpace, map_name: MapName) -> None:
    """Whatever their scores; the finest units are mapped as if there were no others."""
    parents = torch.zeros(space.size, dtype=torch.bool)
    parents[space.parents_U[space.parents_U >= 0]] = True
    for ceiling in (0.97, 1.0):
        probs_U = initial_probs(
            space, random_numbers(space.size, 0), keep=0.6, map_name=map_name, sharpness=0.98, ceiling=ceiling
        )
        assert probs_U[parents].eq(ceiling).all()
        assert not probs_U[~parents].eq(ceiling).all()


def test_one_unit_a_layer_is_mapped_over_all_layers() -> None:
    """A set of one would ignore its score: blocks, and the kv group of multi-query attention."""
    multi_query = make_space(("kv_group", "channel"), [(1, 5)] * 4)
    for space, kind in ((BLOCKS, "ffn"), (BLOCKS, "attention"), (multi_query, "kv_group")):
        scores_U, members = random_numbers(space.size, 3), of_kind(space, kind)
        probs_U = initial_probs(space, scores_U, keep=0.6, scope="layer")
        assert torch.equal(probs_U[members], sigmap(of_size_one(scores_U[members]), 0.6))
        assert probs_U[members].unique().numel() == int(members.sum())


# Entropy


def test_entropy_is_in_bits_per_unit() -> None:
    """One for fair coins, none for settled units, and the formula in between."""
    assert_close(entropy(torch.full((7,), 0.5, dtype=torch.float64)), 1.0, EXACT)
    assert entropy(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)) == 0
    p = 0.11
    expected = -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert_close(entropy(torch.tensor([p, 1 - p, 0.0, 0.5], dtype=torch.float64)), (2 * expected + 1) / 4, EXACT)


@pytest.mark.parametrize("map_name", ["sigmap", "norm"])
def test_pooled_maps_keep_the_order_of_all_scores(map_name: MapName) -> None:
    """Across layers and kinds; so does no other scope."""
    scores_U = random_numbers(FLAT.size, 5)

    def ordered(scope: Scope) -> bool:
        probs_U = initial_probs(FLAT, scores_U, keep=0.5, map_name=map_name, scope=scope)
        return bool((probs_U[scores_U.argsort()].diff() >= 0).all())

    assert [ordered(scope) for scope in ("layer", "global", "pooled")] == [False, False, True]


# Priorities


@pytest.mark.parametrize("scope", ["layer", "global", "pooled"])
def test_graded_priorities_take_the_same_share_everywhere(scope: Scope) -> None:
    """Of every set that is mapped together the best, at any sparsity: as ``const`` would keep them there."""
    scores_U = random_numbers(FLAT.size, 3)
    priorities_U = graded(FLAT, scores_U, scope)
    sets = {
        "layer": [FLAT.group_U == group for group in range(len(FLAT.groups))],
        "global": [of_kind(FLAT, kind) for kind in FLAT.kinds],
        "pooled": [torch.ones(FLAT.size, dtype=torch.bool)],
    }[scope]
    for keep in (0.15, 0.4, 0.6, 0.85):
        kept_U = initial_probs(FLAT, scores_U, keep=keep, map_name="const", scope=scope, sharpness=1.0) > 0.5
        for units in sets:
            best, others = priorities_U[units & kept_U], priorities_U[units & ~kept_U]
            assert not len(best) or not len(others) or best.min() > others.max()
            assert_close(priorities_U[units].mean(), 0.5, EXACT)


def test_an_even_selection_is_even() -> None:
    """However scores of layers compare, each loses as many of its units as another, within one."""
    space = make_space(["kv_group", "channel"], [(8, 100)] * 6)
    levels_U = torch.tensor([10.0**layer for layer in range(6)], dtype=torch.float64)[space.layer_U]
    for seed, sparsity in itertools.product(range(4), (0.2, 0.3, 0.5)):
        scores_U = levels_U * random_numbers(space.size, seed)
        mask_U = select(graded(space, scores_U), Budget(space, sparsity), limits=Limits(), tie_break_U=scores_U)
        for kind in space.kinds:
            kept = [int(mask_U[units].sum()) for units in space.by_layer(kind)]
            assert max(kept) - min(kept) <= 1
            assert max(kept) / len(space.by_layer(kind)[0]) == pytest.approx(1 - sparsity, abs=1 / 8)


@pytest.mark.parametrize("space", [FLAT, NESTED, LAYERED_BLOCKS], ids=["flat", "nested", "layered_blocks"])
@pytest.mark.parametrize("kinds", [("channel",), ("channel", "kv_group"), ()], ids=str)
def test_reordered_units_keep_their_numbers(space: UnitSpace, kinds: tuple[Kind, ...]) -> None:
    """Each layer has the same priorities as before, the best scores the largest; other kinds are left alone."""
    priorities_U, scores_U = random_numbers(space.size, 3), random_numbers(space.size, 4)
    before_U, found_U = priorities_U.clone(), reordered(space, priorities_U, scores_U, kinds)
    chosen_U = torch.zeros(space.size, dtype=torch.bool)
    for kind in kinds:
        chosen_U |= of_kind(space, kind)
    assert torch.equal(priorities_U, before_U)
    assert torch.equal(found_U[~chosen_U], priorities_U[~chosen_U])
    for group in space.group_U[chosen_U].unique():
        units = space.group_U == group
        assert torch.equal(found_U[units].sort().values, priorities_U[units].sort().values)
        assert torch.equal(found_U[units].argsort(), scores_U[units].argsort())


@pytest.mark.parametrize("space", [NESTED, LAYERED_BLOCKS], ids=["nested", "layered_blocks"])
def test_what_contains_others_is_graded_last(space: UnitSpace) -> None:
    """So that a selection takes finer units first."""
    priorities_U = graded(space, random_numbers(space.size, 3))
    parents = space.parents_U[space.parents_U >= 0].unique()
    inner = torch.ones(space.size, dtype=torch.bool)
    inner[parents] = False
    assert (priorities_U[parents] == 1).all() and priorities_U[inner].max() < 1
