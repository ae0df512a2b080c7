"""A model's units own every parameter and FLOP that can be removed, and none of them twice."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from spaces import of_kind
from tiny_models import VARIANTS, Variant, random_plan, tiny_model
from tolerances import EXACT, assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForSequenceClassification

from bernprune.errors import ConfigError, ModelError
from bernprune.models.slicing import slice_model
from bernprune.models.view import ModelView, describe, weights_fingerprint
from bernprune.names import Kind
from bernprune.scores import SCORES, initial_scores
from bernprune.units import KINDS, UnitSpace

Granularity = tuple[Kind, ...]
SUBSETS: list[Granularity] = [
    subset for size in range(1, len(KINDS) + 1) for subset in itertools.combinations(KINDS, size)
]
SLICED: list[Granularity] = [  # every way in which levels can own what a coarser or finer one leaves to them
    ("kv_group", "channel"),
    ("attention", "ffn"),
    ("layer",),
    ("layer", "kv_group", "channel"),
    ("layer", "attention", "channel"),
    ("layer", "kv_group", "ffn"),
    KINDS,
]
WINDOW = 10
ATTENTION, FFN = ("self_attn.", "input_layernorm."), ("mlp.", "post_attention_layernorm.")
# Beside these, a block holds its norm, the bias of its last projection and perhaps norms of queries and keys.
KV_GROUPS = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.", "self_attn.o_proj.weight")
CHANNELS = ("mlp.gate_proj.", "mlp.up_proj.", "mlp.down_proj.weight")

all_variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """One model a variant, for tests that leave it as it is."""
    return {variant.name: variant.model(torch.float32) for variant in VARIANTS}


def count(layer: nn.Module, prefixes: tuple[str, ...]) -> int:
    """Parameters of a layer whose names begin so."""
    return sum(parameter.numel() for name, parameter in layer.named_parameters() if name.startswith(prefixes))


def removable(granularity: Granularity, index: int) -> Iterator[tuple[str, ...]]:
    """Prefixes of the parameters of one layer that go if all of its units go; the first attention block stays."""
    attention = index > 0 and not {"attention", "layer"}.isdisjoint(granularity)
    ffn = "ffn" in granularity or (index > 0 and "layer" in granularity)
    if attention or "kv_group" in granularity:
        yield ATTENTION if attention else KV_GROUPS
    if ffn or "channel" in granularity:
        yield FFN if ffn else CHANNELS


def random_mask(space: UnitSpace, seed: int) -> torch.Tensor:
    """Keeps two thirds, and of the first layer at least a kv group, without which nothing can be sliced."""
    mask_U = torch.rand(space.size, generator=torch.Generator().manual_seed(seed)) < 0.67
    span = space.span("kv_group", 0)
    if span is not None:
        mask_U[span.start] = True
    return mask_U


# Parameters


@all_variants
def test_costs_add_up_to_all_that_can_be_removed(models: dict[str, Any], variant: Variant) -> None:
    """For every granularity the sum over units is the number of parameters of what they cover together."""
    model = models[variant.name]
    expected = {
        granularity: sum(
            count(layer, prefixes)
            for index, layer in enumerate(model.model.layers)
            for prefixes in removable(granularity, index)
        )
        for granularity in SUBSETS
    }
    assert expected == {granularity: describe(model, granularity).space.costs_U().sum() for granularity in SUBSETS}


def emptied(view: ModelView, mask_U: torch.Tensor) -> int:
    """What goes beyond the cost of dead units: slicing removes a block that has no unit left with its norm and last
    bias, which belong to no dead unit if it is the finer units alone that died, one by one."""
    parameters, alive = 0, view.space.alive(mask_U)
    for index, (module, kept) in enumerate(zip(view.model.model.layers, view.space.plan(mask_U).layers, strict=True)):
        for kind, block, units, left in (
            ("attention", ATTENTION, KV_GROUPS, kept.kv_groups),
            ("ffn", FFN, CHANNELS, kept.channels),
        ):
            spans = (view.space.span(owner, index) for owner in (kind, "layer"))
            owner = next((span for span in spans if span is not None), None)
            if not left and (owner is None or alive[owner].item()):
                parameters += count(module, block) - count(module, units)
    return parameters


@all_variants
@pytest.mark.parametrize("granularity", SLICED, ids="+".join)
def test_the_cost_of_dead_units_is_what_slicing_removes(
    models: dict[str, Any], variant: Variant, granularity: Granularity
) -> None:
    """Nothing is counted twice, under masks that kill units by themselves, by their block, their layer or all three."""
    view = describe(models[variant.name], granularity)
    mask_U = random_mask(view.space, seed=len(granularity))
    dead_U = ~view.space.alive(mask_U)
    expected = view.num_parameters - view.space.costs_U()[dead_U].sum() - emptied(view, mask_U)
    sliced = slice_model(copy.deepcopy(view.model), view.space.plan(mask_U))
    assert sum(parameter.numel() for parameter in sliced.parameters()) == expected


def test_a_block_emptied_unit_by_unit_goes_whole() -> None:
    """The one case where slicing removes more than the dead units cost: the norm and the last bias of the block."""
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    view = describe(model, ("kv_group", "channel"))
    mask_U = torch.ones(view.space.size, dtype=torch.bool)
    mask_U[view.space.span("channel", 1)] = False
    before, cost = view.num_parameters, int(view.space.costs_U()[~mask_U].sum())
    sliced = slice_model(model, view.space.plan(mask_U))
    hidden_size = 36
    assert sum(parameter.numel() for parameter in sliced.parameters()) == before - cost - 2 * hidden_size


@pytest.mark.parametrize("name", ["llama-biases", "mistral-multi_head", "qwen2-grouped", "qwen3-sliding_biases"])
def test_a_unit_costs_what_slicing_it_alone_removes(models: dict[str, Any], name: str) -> None:
    """Every kind in every layer, one unit at a time, from a model whose other units all stay."""
    view = describe(models[name], KINDS)
    for group, start in zip(view.space.groups, view.space.starts, strict=False):
        mask_U = torch.ones(view.space.size, dtype=torch.bool)
        mask_U[start + group.count - 1] = False
        cost = int(view.space.costs_U()[~view.space.alive(mask_U)].sum())
        sliced = slice_model(copy.deepcopy(view.model), view.space.plan(mask_U))
        assert view.num_parameters - sum(p.numel() for p in sliced.parameters()) == cost, group.name


def test_tied_parameters_count_once() -> None:
    """The size of a model is that of its distinct parameters."""
    tied, untied = (describe(tiny_model("llama", tie_word_embeddings=tied)) for tied in (True, False))
    assert untied.num_parameters - tied.num_parameters == 53 * 36


# FLOPs


def layer_flops(model: Any) -> list[tuple[float, float]]:
    """FLOPs per token of each layer's attention and FFN, as torch counts them in a pass over one window.

    Eager attention computes the scores of all pairs of tokens, of which causality throws away half, and a window that
    slides all that lie further back: those have no weight.
    """
    with FlopCounterMode(display=False) as counter:
        result = model(input_ids=torch.zeros(1, WINDOW, dtype=torch.int64), use_cache=False, output_attentions=True)
    counted = []
    for index in range(len(model.model.layers)):
        attention, ffn = (
            {str(operation): flops for operation, flops in counter.get_flop_counts()[name].items()}
            for name in (f"{type(model).__name__}.model.layers.{index}.{block}" for block in ("self_attn", "mlp"))
        )
        weights_TT = result.attentions[index][0, 0]
        # Of a token itself half counts, as long as the window leaves out nothing.
        attended = weights_TT.count_nonzero() - weights_TT[:, 0].count_nonzero() / 2
        scores_and_values = attention.pop("aten.bmm") * float(attended) / WINDOW**2
        counted.append(((sum(attention.values()) + scores_and_values) / WINDOW, sum(ffn.values()) / WINDOW))
    return counted


UNHEEDED = [  # fields of a config that say nothing to the attention of the family
    Variant("llama-window", "llama", {"sliding_window": 7}),
    Variant("mistral-types", "mistral", {"layer_types": ["full_attention"] * 4}),
]


@pytest.mark.parametrize("variant", [*VARIANTS, *UNHEEDED], ids=str)
def test_flops_are_those_that_torch_counts(variant: Variant) -> None:
    """For every granularity the sum over units is what the blocks that can go, whole or in parts, compute."""
    model = variant.model(torch.float32)
    model.set_attn_implementation("eager")
    counted = layer_flops(model)
    for granularity in SUBSETS:
        expected = 0.0
        for index, (attention, ffn) in enumerate(counted):
            names = {prefixes[0].partition(".")[0] for prefixes in removable(granularity, index)}
            expected += attention * ("self_attn" in names) + ffn * ("mlp" in names)
        space = describe(model, granularity, sequence_length=WINDOW).space
        assert_close(space.costs_U("flops").sum(), expected, EXACT)


def test_only_attention_depends_on_the_sequence_length() -> None:
    """Twice the tokens: twice the scores and values of a kv group, the same projections, the same channels."""
    model = tiny_model("qwen3")
    short, middle, long = (describe(model, sequence_length=length).space for length in (128, 256, 384))
    channels = of_kind(short, "channel")
    costs = [space.costs_U("flops") for space in (short, middle, long)]
    assert torch.equal(costs[0][channels], costs[2][channels])
    assert torch.equal(costs[2] - costs[1], costs[1] - costs[0])
    # A kv group has 2 query heads of 8; scores and values take 2 FLOPs each for half of 128 more tokens.
    assert set((costs[1] - costs[0])[~channels].tolist()) == {2 * 8 * (2 + 2) * 128 / 2}


# Units


@all_variants
def test_units_are_the_parts_of_the_model(models: dict[str, Any], variant: Variant) -> None:
    """As many as the config says, of the kinds asked for; the first layer has no attention or layer unit."""
    model = models[variant.name]
    counts = {"kv_group": model.config.num_key_value_heads, "channel": model.config.intermediate_size}
    for granularity in SUBSETS:
        expected = [
            (kind, layer, counts.get(kind, 1))
            for layer in range(model.config.num_hidden_layers)
            for kind in KINDS
            if kind in granularity and not (layer == 0 and kind in ("attention", "layer"))
        ]
        assert [
            (group.kind, group.layer, group.count) for group in describe(model, granularity).space.groups
        ] == expected


def test_order_and_repetition_of_the_granularity_mean_nothing() -> None:
    """Only which kinds are named matters."""
    model = tiny_model("mistral")
    repeated = describe(model, ("channel", "kv_group", "ffn", "channel")).space
    assert repeated.fingerprint == describe(model, ("ffn", "kv_group", "channel")).space.fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_is_of_every_weight(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    found = {weights_fingerprint(model), weights_fingerprint(tiny_model("llama", dtype))}
    assert len(found) == 1
    weight = model.model.layers[1].mlp.down_proj.weight.data.flatten()
    for index in (0, 1, len(weight) - 2):  # between those of which the numbers themselves are taken
        weight[index] *= 1.01
        found.add(weights_fingerprint(model))
    assert len(found) == 4


def test_the_view_holds_the_live_modules() -> None:
    """What is masked is the model itself, not a copy."""
    model = tiny_model("qwen2")
    view = describe(model)
    assert view.decoder is model.model
    for found, layer in zip(view.layers, model.model.layers, strict=True):
        assert (found.layer, found.attention, found.ffn) == (layer, layer.self_attn, layer.mlp)
        assert (found.output, found.down) == (layer.self_attn.o_proj, layer.mlp.down_proj)


# Refusals


@pytest.mark.parametrize("granularity", [(), ("head",), ("channel", "Channel"), "channel"], ids=repr)
def test_an_unknown_granularity_is_refused(granularity: Any) -> None:
    """Nothing, a typing error, or a word instead of a list of words; the error lists what there is."""
    model = tiny_model("llama")
    assert describe(model, ("channel",)).space.size == 4 * 19
    with pytest.raises(ConfigError, match="layer, attention, kv_group, ffn, channel"):
        describe(model, granularity)


@pytest.mark.parametrize("granularity", [("layer",), ("attention",), ("layer", "attention")], ids="+".join)
def test_a_granularity_without_units_is_refused(granularity: Granularity) -> None:
    """Of a model of one layer, its attention, and so the layer, always stay."""
    assert describe(tiny_model("llama", num_hidden_layers=2), granularity).space.size == len(granularity)
    with pytest.raises(ConfigError, match="finds no unit"):
        describe(tiny_model("llama", num_hidden_layers=1), granularity)


def _another_type(model: Any) -> None:
    model.config.model_type = "gpt2"


def _narrow_ffn(model: Any) -> None:
    model.model.layers[2].mlp.down_proj = nn.Linear(18, 36, bias=False)


def _wide_attention(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj = nn.Linear(36, 48, bias=False)


def _lost_layer(model: Any) -> None:
    del model.model.layers[3]


def _lost_module(model: Any) -> None:
    del model.model.layers[0].mlp.up_proj


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_another_type, "model type 'gpt2' is not supported; known are llama, mistral, qwen2, qwen3"),
        (_narrow_ffn, r"the down projection of layer 2 maps \(18, 36\), but the config says \(19, 36\)"),
        (_wide_attention, r"the key projection of layer 1 maps \(36, 48\), but the config says \(36, 24\)"),
        (_lost_layer, "the model has 3 layers, but its config says 4"),
        (_lost_module, "has no module mlp.up_proj"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_model_that_does_not_fit_is_refused(spoil: Any, message: str) -> None:
    """An unknown family, or modules that contradict the config; the untouched model is taken."""
    model = tiny_model("llama")
    assert len(describe(model).layers) == 4
    spoil(model)
    with pytest.raises(ModelError, match=message):
        describe(model)


def test_a_model_that_slicing_has_used_up_is_refused() -> None:
    view = describe(tiny_model("llama"))
    slice_model(view.model, random_plan(view.architecture))
    with pytest.raises(ModelError, match="was used up when it was sliced; load it again"):
        initial_scores(view, torch.ones(2, 8, dtype=torch.int64), SCORES["wanda-sp"])


def test_a_model_on_several_devices_is_refused() -> None:
    """The sentence names them, whether it is to be masked or sliced."""
    model = tiny_model("llama")
    plan = random_plan(describe(model).architecture)
    model.model.layers[2].mlp.to("meta")
    for use in (describe, lambda model: slice_model(model, plan)):
        with pytest.raises(ModelError, match="is spread over cpu, meta; load it on one device"):
            use(model)


def test_what_is_no_dense_language_model_is_refused() -> None:
    """A bare decoder has no output embedding; a pruned model is no start."""
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="is it a causal language model"):
        describe(model.model)
    pruned = slice_model(model, random_plan(describe(model).architecture))
    with pytest.raises(ModelError, match="already pruned"):
        describe(pruned)


def test_a_model_without_an_output_embedding_is_refused() -> None:
    model = LlamaForSequenceClassification(tiny_model("llama").config)
    with pytest.raises(ModelError, match="has no output embedding; give a causal language model"):
        describe(model)
