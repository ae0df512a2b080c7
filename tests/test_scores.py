"""The metrics are the published formulas of activations that the model really has, gathered without a trace."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny_models import VARIANTS, Variant, random_tokens, tiny_model
from tolerances import EXACT, LOGITS, assert_close
from whole_passes import input_statistics, run_windows, watching

from bernprune import scores
from bernprune.backends import load_backend
from bernprune.errors import ConfigError, ModelError
from bernprune.models.masking import masked
from bernprune.models.slicing import slice_model
from bernprune.models.view import ModelView, describe
from bernprune.names import InfluenceName, Kind, ScoreName
from bernprune.repair import Repairer
from bernprune.scores import SCORES, Context, Metric, Options, Projection, initial_scores
from bernprune.scores.distances import distance_of
from bernprune.units import KINDS

OPS = load_backend("torch", torch.device("cpu"))
PARTS: tuple[Kind, ...] = ("kv_group", "channel")
WINDOWS_WT = random_tokens(5, 11)
FLOAT32_WEIGHTS = LOGITS[torch.float32]  # metrics see weights in float32
Columns = dict[tuple[int, Kind], np.ndarray]  # by layer and kind, something of each input entry of the projection


def hooked(model: Any, windows_WT: torch.Tensor) -> Columns:
    """What enters o_proj and down_proj of every layer, ``[N, E]`` with the tokens of all windows together."""
    caught: dict[tuple[int, Kind], list[torch.Tensor]] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        pairs: tuple[tuple[Kind, Any], ...] = (("kv_group", layer.self_attn), ("channel", layer.mlp))
        for kind, block in pairs:
            projection = getattr(block, "o_proj" if kind == "kv_group" else "down_proj", None)
            if projection is not None:
                seen = caught.setdefault((index, kind), [])
                handles.append(projection.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])))
    with torch.no_grad():
        model(input_ids=windows_WT, use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: torch.cat([x.flatten(0, 1) for x in seen]).numpy() for key, seen in caught.items()}


def weight(model: Any, layer: int, kind: Kind) -> np.ndarray:
    block = model.model.layers[layer]
    projection = block.self_attn.o_proj if kind == "kv_group" else block.mlp.down_proj
    return projection.weight.detach().numpy()


def columns(weight_DE: np.ndarray, x_NE: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The weights that read one input entry, and what that entry was, token by token."""
    return zip(weight_DE.T, x_NE.T, strict=True)


def wanda_sp(weight_DE: np.ndarray, x_NE: np.ndarray, kind: Kind) -> np.ndarray:
    """mean_i |W_ij| sqrt(mean_n x_nj^2)."""
    return np.array([np.abs(w_D).mean() * np.sqrt((x_N**2).mean()) for w_D, x_N in columns(weight_DE, x_NE)])


def flap(weight_DE: np.ndarray, x_NE: np.ndarray, kind: Kind) -> np.ndarray:
    """Var[x_j] |W_j|^2, squared once more for attention, in standard deviations from the projection's mean."""
    fluctuation_E = np.array([x_N.var() * (w_D**2).sum() for w_D, x_N in columns(weight_DE, x_NE)])
    fluctuation_E = fluctuation_E ** (2 if kind == "kv_group" else 1)
    return (fluctuation_E - fluctuation_E.mean()) / fluctuation_E.std(ddof=1)


def magnitude(weight_DE: np.ndarray, x_NE: np.ndarray, kind: Kind) -> np.ndarray:
    """sqrt(sum_i W_ij^2)."""
    return np.array([np.sqrt((w_D**2).sum()) for w_D in weight_DE.T])


FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray, Kind], np.ndarray]] = {
    "wanda-sp": wanda_sp,
    "flap": flap,
    "magnitude": magnitude,
}


def units_of(view: ModelView, scored: Columns) -> torch.Tensor:
    """Unit scores by hand: the mean over a kv group's columns, the sum over a block's, the sum of both blocks'.

    Layers that are not scored have zeros.
    """
    found: list[float] = []
    for group in view.space.groups:
        if (group.layer, "channel") not in scored:
            found += [0.0] * group.count
            continue
        heads, channels = scored[group.layer, "kv_group"], scored[group.layer, "channel"]
        width = len(heads) // view.layers[group.layer].shape.kv_groups
        found += {
            "kv_group": [heads[start : start + width].mean() for start in range(0, len(heads), width)],
            "channel": list(channels),
            "attention": [heads.sum()],
            "ffn": [channels.sum()],
            "layer": [heads.sum() + channels.sum()],
        }[group.kind]
    return torch.tensor(found, dtype=torch.float64)


def expected_scores(view: ModelView, name: str) -> torch.Tensor:
    inputs = hooked(view.model, WINDOWS_WT)
    formula = FORMULAS[name]
    return units_of(view, {key: formula(weight(view.model, *key), x_NE, key[1]) for key, x_NE in inputs.items()})


# Formulas


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_scores_are_the_published_formulas(variant: Variant, name: str) -> None:
    """Of kv groups and channels, from inputs that hooks of our own have caught."""
    view = describe(variant.model())
    found = initial_scores(view, WINDOWS_WT, SCORES[name], rows_per_forward=2)
    assert_close(found, expected_scores(view, name), FLOAT32_WEIGHTS)


@pytest.mark.parametrize("name", ["wanda-sp", "magnitude"])
@pytest.mark.parametrize("granularity", [KINDS, ("attention", "channel"), ("layer",)], ids="+".join)
def test_blocks_and_layers_sum_their_columns(name: str, granularity: tuple[Kind, ...]) -> None:
    """Coarse units score as much as all that they remove."""
    view = describe(tiny_model("qwen2"), granularity)
    found = initial_scores(view, WINDOWS_WT, SCORES[name])
    assert_close(found, expected_scores(view, name), FLOAT32_WEIGHTS)


def test_a_function_of_custom_is_a_score() -> None:
    """It sees each projection once, with its kind, layer and seed; its columns become units."""
    view, seen = describe(tiny_model("llama"), KINDS), []

    def column_numbers(projection: Projection) -> torch.Tensor:
        seen.append((projection.layer, projection.kind, tuple(projection.weight_DE.shape), projection.seed))
        return torch.arange(projection.weight_DE.shape[1])

    found = initial_scores(view, WINDOWS_WT, column_numbers, seed=5)
    sizes: dict[Kind, int] = {"kv_group": 6 * 8, "channel": 19}
    assert seen == [(layer, kind, (36, size), 5) for layer in range(4) for kind, size in sizes.items()]
    scored: Columns = {(layer, kind): np.arange(float(size)) for layer in range(4) for kind, size in sizes.items()}
    assert_close(found, units_of(view, scored), EXACT)


def test_equal_columns_have_equal_flap_scores() -> None:
    """Without any spread in a projection its standard scores are zero, not NaN."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    view = describe(model, ("channel",))
    assert not initial_scores(view, WINDOWS_WT, SCORES["flap"]).any()


def test_every_name_has_a_score() -> None:
    """What the configuration allows is what there is."""
    assert list(SCORES) == list(get_args(ScoreName))
    assert all(metric.about and metric.source for metric in SCORES.values())
    assert all(hasattr(scores, name) for name in scores.__all__)


# Random scores


def random_scores(model: Any, windows_WT: torch.Tensor, seed: int, granularity: tuple[Kind, ...]) -> torch.Tensor:
    return initial_scores(describe(model, granularity), windows_WT, SCORES["random"], seed=seed)


def test_random_scores_are_a_function_of_seed_layer_and_kind() -> None:
    """Not of the weights, the text, the other kinds or what was drawn before."""
    first = random_scores(tiny_model("llama"), WINDOWS_WT, 3, PARTS)
    torch.manual_seed(17)
    assert torch.equal(random_scores(tiny_model("llama", seed=1), WINDOWS_WT[:2], 3, PARTS), first)
    space = describe(tiny_model("llama"), PARTS).space
    channels = torch.cat([first[space.span("channel", layer)] for layer in range(4)])
    assert torch.equal(random_scores(tiny_model("llama"), WINDOWS_WT, 3, ("channel",)), channels)
    every = random_scores(tiny_model("llama"), WINDOWS_WT, 3, KINDS).tolist()
    assert len(set(every)) == len(every)
    assert set(first.tolist()).isdisjoint(random_scores(tiny_model("llama"), WINDOWS_WT, 4, PARTS).tolist())


def test_random_scores_are_standard_normal() -> None:
    """Over enough channels the mean is 0 and the spread 1; over kv groups, and blocks, too."""
    wide = tiny_model("llama", torch.float32, intermediate_size=5003, num_hidden_layers=2)
    found = random_scores(wide, WINDOWS_WT[:1], 0, ("channel",))
    assert abs(found.mean().item()) < 0.05
    assert abs(found.std().item() - 1) < 0.05
    for kind in ("kv_group", "attention"):
        drawn = [random_scores(tiny_model("llama"), WINDOWS_WT[:1], seed, (kind,)) for seed in range(300)]
        assert abs(torch.cat(drawn).std().item() - 1) < 0.1


# Inputs of pruned layers


def simulated(view: ModelView, name: str, sparsity: float) -> torch.Tensor:
    """Layer after layer, the inputs are taken from a model whose earlier layers really were sliced."""
    mask_U = torch.ones(view.space.size, dtype=torch.bool)
    scored: Columns = {}
    for layer in range(len(view.layers)):
        inputs = hooked(slice_model(copy.deepcopy(view.model), view.space.plan(mask_U)), WINDOWS_WT)
        for kind in PARTS:
            scored[layer, kind] = FORMULAS[name](weight(view.model, layer, kind), inputs[layer, kind], kind)
        scores_U = units_of(view, scored).tolist()
        for span in filter(None, (view.space.span(kind, layer) for kind in PARTS)):
            units = sorted(range(span.start, span.stop), key=scores_U.__getitem__)
            mask_U[units[: len(units) - max(1, round((1 - sparsity) * len(units)))]] = False
    return units_of(view, scored)


def pruned(sparsity: float) -> Options:
    return Options(sparsity=sparsity, pruned_inputs=True)


# FLAP has no column sums worth comparing: those of standard scores are zero but for rounding.
PRUNED: list[tuple[tuple[Kind, ...], str, float]] = [
    (PARTS, "wanda-sp", 0.4),
    (PARTS, "flap", 0.7),
    (KINDS, "wanda-sp", 0.7),
    (("channel",), "wanda-sp", 0.5),
    (("kv_group",), "flap", 0.5),
]
some_variants = [
    variant for variant in VARIANTS if variant.name in ("llama-biases", "mistral-multi_head", "qwen2-sliding")
]


@pytest.mark.parametrize("variant", some_variants, ids=str)
@pytest.mark.parametrize(("granularity", "name", "sparsity"), PRUNED)
def test_pruned_inputs_are_those_of_sliced_layers(
    variant: Variant, granularity: tuple[Kind, ...], name: str, sparsity: float
) -> None:
    """Each layer is scored on what the sliced earlier layers hand on; these scores differ from the dense ones."""
    view = describe(variant.model(), granularity)
    found = initial_scores(view, WINDOWS_WT, SCORES[name], options=pruned(sparsity), rows_per_forward=3)
    assert_close(found, simulated(view, name, sparsity), FLOAT32_WEIGHTS)
    dense = initial_scores(view, WINDOWS_WT, SCORES[name])
    first_U = torch.tensor([group.layer == 0 for group in view.space.groups])[view.space.group_U]
    assert_close(found[first_U], dense[first_U], EXACT)
    assert ((found - dense).abs()[~first_U] > 1e-3).any()


def test_pruning_nothing_gives_the_dense_scores() -> None:
    """At a sparsity of zero both ways of gathering inputs agree."""
    view = describe(tiny_model("qwen3"))
    found = initial_scores(view, WINDOWS_WT, SCORES["wanda-sp"], options=pruned(0.0))
    assert_close(found, initial_scores(view, WINDOWS_WT, SCORES["wanda-sp"]), EXACT)


# Statistics


def test_moments_are_those_of_all_inputs() -> None:
    """Mean, second moment and variance over all tokens, of every layer and both projections."""
    view = describe(tiny_model("qwen2"))
    gathered = input_statistics(view, WINDOWS_WT)
    for (layer, kind), x_NE in hooked(view.model, WINDOWS_WT).items():
        found = gathered[layer]["output" if kind == "kv_group" else "down"]
        assert found.count == 5 * 11
        assert_close(found.mean_E, torch.from_numpy(x_NE.mean(0)), EXACT)
        assert_close(found.second_moment_E, torch.from_numpy((x_NE**2).mean(0)), EXACT)
        assert_close(found.variance_E, torch.from_numpy(x_NE.var(0)), 1e-10)  # a difference of the two


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_moments_over_batches_equal_those_over_one(rows: int) -> None:
    """How many windows run at once does not matter, also if the last batch is smaller."""
    view = describe(tiny_model("llama"))
    whole, parts = (input_statistics(view, WINDOWS_WT, rows_per_forward=count) for count in (5, rows))
    for expected, found in zip(whole, parts, strict=True):
        for point in ("output", "down"):
            assert found[point].count == expected[point].count
            assert_close(found[point].mean_E, expected[point].mean_E, EXACT)
            assert_close(found[point].second_moment_E, expected[point].second_moment_E, EXACT)


def test_moments_of_bfloat16_are_not_rounded_to_it() -> None:
    """Sums over tokens would lose what is small beside them."""
    view = describe(tiny_model("llama", torch.bfloat16))
    gathered = input_statistics(view, WINDOWS_WT)
    with watching(list(view.layers)) as one_by_one:
        for tokens in WINDOWS_WT.split(1):
            run_windows(view, tokens, rows_per_forward=1)
    found, expected = gathered[0]["output"].second_moment_E, one_by_one[0]["output"].second_moment_E
    assert found.dtype == torch.float64
    assert_close(found, expected, LOGITS[torch.float32])


# Leaving no trace


def num_hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def failing(projection: Projection) -> torch.Tensor:
    if projection.layer == 2:
        raise ArithmeticError("on purpose")
    return projection.weight_DE.sum(0)


@pytest.mark.parametrize("options", [Options(), pruned(0.5)], ids=["dense", "pruned"])
def test_the_model_is_left_as_it_was(options: Options) -> None:
    """After scores were taken, and after a metric failed: no hook, no masked module, the same logits."""
    view = describe(tiny_model("llama"))
    modules = [id(module) for module in view.model.modules()]
    before = view.model(input_ids=WINDOWS_WT).logits
    initial_scores(view, WINDOWS_WT, SCORES["flap"], options=options)
    assert num_hooks(view.model) == 0
    with pytest.raises(ArithmeticError, match="on purpose"):
        initial_scores(view, WINDOWS_WT, failing, options=options)
    assert num_hooks(view.model) == 0
    assert [id(module) for module in view.model.modules()] == modules
    assert torch.equal(view.model(input_ids=WINDOWS_WT).logits, before)


@pytest.mark.parametrize("spoil", ["masked", "no_windows"])
def test_scores_without_activations_are_refused(spoil: str) -> None:
    """A model under masks does not show them: not a number would be scored."""
    view, windows_WT = describe(tiny_model("llama")), random_tokens(2)
    if spoil == "no_windows":
        with pytest.raises(ConfigError, match=r"must be int64 \[W, T\]"):
            initial_scores(view, windows_WT[:0], SCORES["wanda-sp"])
        return
    with masked(view, OPS), pytest.raises(ConfigError, match="under masks"):
        initial_scores(view, windows_WT, SCORES["wanda-sp"])


@pytest.mark.parametrize(
    ("windows_WT", "said"),
    [
        (WINDOWS_WT.float(), r"must be int64 \[W, T\] .* but are float32 \[5, 11\]"),
        (WINDOWS_WT[0], r"but are int64 \[11\]"),
        (WINDOWS_WT + 53, "token id 105, but the model knows 0 to 52"),
        (WINDOWS_WT - 53, "token id -49, but the model knows 0 to 52"),
    ],
    ids=["float", "one", "above", "below"],
)
def test_windows_that_the_model_cannot_read_are_refused(windows_WT: torch.Tensor, said: str) -> None:
    view = describe(tiny_model("llama"))
    with pytest.raises(ConfigError, match=said):
        initial_scores(view, windows_WT, SCORES["wanda-sp"])
    plan = view.space.plan(torch.ones(view.space.size, dtype=torch.bool))
    with pytest.raises(ConfigError, match=said):
        Repairer(view, windows_WT).repair(plan, "ridge")


@pytest.mark.parametrize("name", ["wanda-sp", "flap", "goa", "cfsp", "taylor-vector", "taylor-second", "hywia", "ifso"])
def test_activations_that_are_not_finite_name_their_layer(name: str) -> None:
    """Whatever the metric would make of them."""
    view = describe(tiny_model("llama"))
    view.layers[2].ffn.up_proj.weight.data[3, 4] = float("inf")
    with pytest.raises(ModelError, match="activations of layer 2 are not finite"):
        initial_scores(view, WINDOWS_WT, SCORES[name])


def test_scores_that_do_not_fit_are_refused() -> None:
    """A metric of one's own that counts wrong, or divides by zero, says so by its name."""
    view = describe(tiny_model("llama"))

    def metric(score: Callable[[Context], torch.Tensor]) -> Metric:
        return Metric("mine", "made up", "", score)

    with pytest.raises(ConfigError, match=r"'mine' must give 88 numbers, one a unit, but gave \[3\]"):
        initial_scores(view, WINDOWS_WT, metric(lambda context: torch.ones(3)))
    scores_U = torch.ones(view.space.size)
    scores_U[view.space.span("channel", 2)] = float("nan")
    with pytest.raises(ModelError, match="score 'mine' is not finite in layer 2"):
        initial_scores(view, WINDOWS_WT, metric(lambda context: scores_U))


def test_units_that_a_metric_cannot_rank_are_refused() -> None:
    """And inputs of pruned layers for one that does not go layer by layer."""
    with pytest.raises(ConfigError, match="'flap' cannot rank units of kind attention, ffn, only kv_group, channel"):
        initial_scores(describe(tiny_model("llama"), ("attention", "ffn")), WINDOWS_WT, SCORES["flap"])
    with pytest.raises(ConfigError, match="'block-influence' cannot rank units of kind channel"):
        initial_scores(describe(tiny_model("llama"), ("attention", "channel")), WINDOWS_WT, SCORES["block-influence"])
    whole = Metric("whole", "made up", "", lambda context: torch.ones(context.view.space.size))
    with pytest.raises(ConfigError, match="'whole' does not go layer by layer"):
        initial_scores(describe(tiny_model("llama")), WINDOWS_WT, whole, options=pruned(0.5))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_scores_for_what_a_unit_costs(power: float) -> None:
    """Divided by a power of its parameters and of those in it."""
    view = describe(tiny_model("llama"), KINDS)
    plain, costly = (
        initial_scores(view, WINDOWS_WT, SCORES["wanda-sp"], options=Options(cost_power=given))
        for given in (None, power)
    )
    span = view.space.span("attention", 1)
    assert span is not None
    within = view.space.within_U
    assert within[span].item() == sum(p.numel() for p in view.layers[1].attention.parameters()) + 36  # the norm's
    assert_close(costly, plain / within**power, EXACT)


@pytest.mark.parametrize("score", ["flap", "flap-wifn", "flap-ifv", "random"])
def test_standardised_scores_have_no_costs(score: str) -> None:
    """Divided by them, penalties would turn into bonuses."""
    with pytest.raises(ConfigError, match=f"score '{score}' is standardised"):
        initial_scores(describe(tiny_model("llama")), WINDOWS_WT, SCORES[score], options=Options(cost_power=0.5))


@pytest.mark.parametrize("score", ["flap", "flap-wifn", "flap-ifv"])
def test_a_single_unit_is_not_told_from_others(score: str) -> None:
    view = describe(tiny_model("llama", intermediate_size=1))
    assert initial_scores(view, WINDOWS_WT, SCORES[score])[view.space.of_kind("channel")].eq(0).all()


@pytest.mark.parametrize("score", ["flap", "flap-wifn", "flap-ifv"])
def test_of_what_a_metric_does_not_know_it_says_nothing(score: str) -> None:
    """The sums of standardised scores are rounding."""
    view = describe(tiny_model("llama"), ("attention", "kv_group", "ffn", "channel"))
    scores_U = initial_scores(view, WINDOWS_WT, SCORES[score])
    for kind in view.space.kinds:
        assert scores_U[view.space.of_kind(kind)].any() == (kind in PARTS)


def test_hooks_go_when_the_model_fails() -> None:
    """Also in the middle of a forward pass, and if they could not all be set."""
    view = describe(tiny_model("llama"))
    with pytest.raises(IndexError):
        input_statistics(view, WINDOWS_WT + 53)  # no such token
    assert num_hooks(view.model) == 0
    with pytest.raises(AttributeError), watching([view.layers[0], None]):  # type: ignore[list-item]
        raise AssertionError("the block was entered")
    assert num_hooks(view.model) == 0


@pytest.mark.parametrize(("options", "expected"), [(Options(), 1), (pruned(0.5), 2)], ids=["dense", "pruned"])
def test_passes_are_those_that_are_stated(options: Options, expected: int) -> None:
    """Each layer runs once over the text, and once more where it is pruned meanwhile; none for the weights alone."""
    view, ran = describe(tiny_model("llama")), []
    for index, layer in enumerate(view.layers):
        layer.attention.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    for name, passes in (("wanda-sp", expected), *([] if options.pruned_inputs else [("magnitude", 0)])):
        ran.clear()
        initial_scores(view, WINDOWS_WT, SCORES[name], rows_per_forward=5, options=options)
        assert sorted(ran) == sorted(list(range(4)) * passes)
        assert SCORES[name].forwards(4, options) == passes


@pytest.mark.parametrize("name", get_args(InfluenceName))
def test_distances_of_short_numbers_are_summed_in_long_ones(name: InfluenceName) -> None:
    x_ND = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y_ND = (x_ND + 0.05 * torch.randn(20, 64, generator=torch.Generator().manual_seed(1))).bfloat16()
    assert_close(distance_of(name)(x_ND, y_ND), distance_of(name)(x_ND.double(), y_ND.double()), 1e-3)
