"""Quantised models are scored and masked as they are, as if their weights were plain; and they are not sliced.

Letters: R rows, U units, B windows, K masks, C chunks, T tokens, D, E output and input width of a projection.
"""

import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from quantised import DTYPES, Packed, all_ways, each_projection, needs_torchao, quantise
from searches import activities
from test_masking import GRANULARITIES, OPS, Stop, emptying_masks, logits_of, masked_logits, random_masks
from tiny_models import VARIANTS, Variant, random_plan, random_tokens, tiny_model
from tolerances import CHAIN, LOGITS, assert_close
from torch import nn

from bernprune import backends
from bernprune.costs import NEVER, Costs, Planner, measure
from bernprune.errors import ModelError
from bernprune.models.linear import weight_of
from bernprune.models.masking import masked
from bernprune.models.shortening import shorten, stored_bytes
from bernprune.models.slicing import slice_model
from bernprune.models.view import ModelView, describe
from bernprune.names import Kind
from bernprune.objective import MaskedObjective, masked_objective
from bernprune.scores import SCORES, Options, initial_scores
from bernprune.scores.base import PARTS
from bernprune.units import KINDS

BIASED = {"attention_bias": True, "mlp_bias": True}
GATHERING = Costs(passing=0.0, copying=1.0, blocks=1.0)  # by which gathering would always pay


def quantised_view(variant: Variant, way: str, granularity: tuple[Kind, ...] = ("kv_group", "channel")) -> ModelView:
    return describe(quantise(variant.model(), way), granularity)


def plain_twin(view: ModelView) -> ModelView:
    """The same model with the weights that its own stand for in plain linear layers."""
    model = copy.deepcopy(view.model)
    for block, name in each_projection(model):
        own = getattr(block, name)
        plain = nn.Linear(own.in_features, own.out_features, bias=own.bias is not None, dtype=model.dtype)
        plain.weight.data = dequantised(own)
        if own.bias is not None:
            plain.bias.data = own.bias.data.clone()
        setattr(block, name, plain.requires_grad_(False))
    return describe(model, view.space.kinds)


def dequantised(linear: Any) -> torch.Tensor:
    if isinstance(linear, Packed):
        weight_DE: torch.Tensor = linear.weight.data.view(linear.out_features, -1) * linear.scale_D1
        return weight_DE
    found: torch.Tensor = linear.weight.dequantize()
    return found


@contextmanager
def masked_by_hand(view: ModelView, mask_U: torch.Tensor) -> Iterator[None]:
    """One mask for the whole batch, by hooks on the last projections; one without a unit puts nothing out."""
    alive_U, space = view.space.alive(mask_U), view.space

    def cut(kept_E: torch.Tensor, module: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return args[0] * kept_E.to(args[0].dtype)

    def close(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output)

    with ExitStack() as hooks:
        for index, layer in enumerate(view.layers):
            for module, kinds in (
                (layer.output, ("kv_group", "attention", "layer")),
                (layer.down, ("channel", "ffn", "layer")),
            ):
                found = next((span for kind in kinds if (span := space.span(kind, index)) is not None), None)
                if found is None:
                    continue
                kept_N = alive_U[found]
                kept_E = kept_N.repeat_interleave(module.in_features // len(kept_N))
                hooks.callback(module.register_forward_pre_hook(partial(cut, kept_E)).remove)
                if not kept_N.any():
                    hooks.callback(module.register_forward_hook(close).remove)
        yield


# Masks


@all_ways
@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_masks_are_those_by_hand(variant: Variant, granularity: tuple[Kind, ...], way: str) -> None:
    """Every row of a batch under its own mask, also where blocks and layers lose all their units."""
    view = quantised_view(variant, way, granularity)
    masks_RU = emptying_masks(view.space)
    tokens_RT = random_tokens(len(masks_RU))
    found, dense = masked_logits(view, masks_RU, tokens_RT), logits_of(view.model, tokens_RT)
    for row, mask_U in enumerate(masks_RU):
        with masked_by_hand(view, mask_U):
            assert_close(found[row], logits_of(view.model, tokens_RT[row : row + 1])[0], LOGITS[DTYPES[way]])
        assert not torch.equal(found[row], dense[row])


@all_ways
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_losses_are_those_of_plain_weights(family: str, way: str) -> None:
    """Of masks of windows, together and apart, of chunks, and of gates; and so are the activities of channels."""
    changes = BIASED if family == "llama" else {}
    view = quantised_view(Variant("", family, changes), way)
    plain, tokens_BT = plain_twin(view), random_tokens(2, 12)
    masks_KU = random_masks(view.space, 6)
    masks_KU[1] = masks_KU[0]
    masks_KU[1, -1] ^= True  # so that the two agree on all but the last layer
    calls: list[tuple[Callable[..., torch.Tensor], torch.Tensor]] = [
        (MaskedObjective.window_losses, masks_KU),
        (MaskedObjective.window_losses, masks_KU[:1]),
        (MaskedObjective.window_losses, torch.rand(2, view.space.size, generator=torch.Generator().manual_seed(0))),
        (MaskedObjective.token_losses, random_masks(view.space, 12).view(2, 2, 3, -1)),
        (activities, masks_KU[0]),
    ]
    for (call, masks), costs in itertools.product(calls, (GATHERING, Costs(1e9, 0.0, 0.5), None)):
        found = []
        for each in (view, plain):
            with masked_objective(each, OPS, costs=costs, rows_per_forward=5) as objective:
                found.append(call(objective, masks, tokens_BT))
        assert_close(*found, LOGITS[DTYPES[way]])


@all_ways
@pytest.mark.parametrize("leave", ["normally", "by an error"])
def test_the_model_is_restored(leave: str, way: str) -> None:
    """The same objects under the same names, without a hook, and the same logits."""
    view, tokens = quantised_view(Variant("", "llama", BIASED), way), random_tokens(3)
    before = trace(view.model, tokens)

    def leave_it() -> None:
        with masked(view, OPS) as live, masked(view, OPS, layers=[1]):
            live.set(random_masks(view.space, 3))
            assert trace(view.model, tokens) != before
            if leave != "normally":
                raise Stop

    if leave == "normally":
        leave_it()
    else:
        with pytest.raises(Stop):
            leave_it()
    assert trace(view.model, tokens) == before


def trace(model: nn.Module, tokens: torch.Tensor) -> list[Any]:
    modules = [(name, id(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    return [modules, [(name, id(each)) for name, each in model.named_parameters()], logits_of(model, tokens).tolist()]


@all_ways
def test_nothing_is_gathered(way: str) -> None:
    """Whatever it is said to cost: no more and no fewer units go through the projections; and measuring finds so."""
    view, tokens = quantised_view(Variant("", "llama"), way), random_tokens(2)
    mask_1U = random_masks(view.space, 1, keep=0.3)
    widths: list[int] = []
    handle = (
        view.layers[0]
        .ffn.get_submodule("up_proj")
        .register_forward_hook(lambda module, args, output: widths.append(output.shape[-1]))
    )
    with masked(view, OPS) as live:
        live.set(mask_1U, working_U=mask_1U[0])
        found = logits_of(view.model, tokens)
    handle.remove()
    assert widths == [19]
    assert torch.equal(found, masked_logits(view, mask_1U, tokens))
    assert measure(view, OPS, 4).copying == NEVER
    with masked_objective(view, OPS, costs=GATHERING) as objective:
        assert objective._planner.working(mask_1U[0], 10**9) is None
    assert Planner(view.space, GATHERING).working(mask_1U[0], 10**9) is not None


# Scores and sizes


NEEDS_PLAIN = {name for name, metric in SCORES.items() if metric.plain or metric.gradients}


INPUTS = [
    pytest.param(name, pruned, id=f"{name}-{'pruned' if pruned else 'dense'}")
    for name in sorted(SCORES.keys() - NEEDS_PLAIN)
    for pruned in (False, True)
    if SCORES[name].layerwise or not pruned
]


@all_ways
@pytest.mark.parametrize(("name", "pruned"), INPUTS)
def test_scores_are_those_of_plain_weights(name: str, pruned: bool, way: str) -> None:
    """By every metric, from the text as the dense model, or the already pruned one, hands it on."""
    metric = SCORES[name]
    blocks = "channel" not in metric.kinds
    view = quantised_view(Variant("", "llama", BIASED), way, ("attention", "ffn") if blocks else PARTS)
    found, expected = (
        initial_scores(each, random_tokens(5), metric, options=Options(0.4, pruned))
        for each in (view, plain_twin(view))
    )
    # Differences of losses along random directions keep few of their digits.
    assert_close(found, expected, 1e-2 if "pairs" in metric.reads else CHAIN[torch.float32])


@all_ways
@pytest.mark.parametrize("name", sorted(NEEDS_PLAIN))
def test_metrics_that_move_weights_refuse_quantised_ones(name: str, way: str) -> None:
    view = quantised_view(Variant("", "llama"), way)
    with pytest.raises(ModelError, match=rf"score '{name}' needs plain weights, but the query projection of layer 0"):
        initial_scores(view, random_tokens(3), SCORES[name])


@all_ways
def test_a_weight_is_what_comes_out_for_unit_vectors(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Without the bias, a few at a time; that of a plain layer is its own."""
    monkeypatch.setattr("bernprune.models.linear._AT_ONCE", 5)
    model = tiny_model("llama", **BIASED)
    plain = model.model.layers[0].mlp.down_proj
    assert weight_of(plain, torch.float64).data_ptr() == plain.weight.data_ptr()
    model = quantise(model, way)
    for block, name in each_projection(model):
        linear = getattr(block, name)
        assert_close(weight_of(linear, DTYPES[way]), dequantised(linear), LOGITS[DTYPES[way]])


@all_ways
def test_units_cost_what_they_would_in_plain_layers(way: str) -> None:
    """However few numbers hold a weight."""
    view = quantised_view(Variant("", "qwen2"), way, KINDS)
    plain = plain_twin(view)
    assert view.num_parameters == plain.num_parameters == sum(each.numel() for each in plain.model.parameters())
    assert view.space.costs_U().equal(plain.space.costs_U())
    assert plain.opaque is None and view.opaque is not None and "query projection of layer 0" in view.opaque


# Refusals


@all_ways
def test_a_quantised_model_is_not_sliced(way: str) -> None:
    """It is told what to do instead, and is left as it was."""
    view, tokens = quantised_view(Variant("", "llama"), way), random_tokens()
    before = trace(view.model, tokens)
    with pytest.raises(ModelError, match=r"query projection of layer 0 is a .*applying its plan to the original"):
        slice_model(view.model, random_plan(view.architecture))
    assert trace(view.model, tokens) == before


def test_what_is_no_linear_layer_is_refused() -> None:
    """Such as those of quantisers that put modules of their own in the place of linear layers."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = nn.Bilinear(3, 3, 3)
    with pytest.raises(ModelError, match="up projection of layer 1 is a Bilinear, not a linear layer; prune"):
        describe(model)


# Shorter number formats


@needs_torchao
def test_int8_is_for_projections_alone() -> None:
    """They take a quarter of the room or little more; embeddings, norms, biases and the head stay what they were."""
    model = tiny_model("llama", torch.float32, hidden_size=96, intermediate_size=256, **BIASED)
    others = {name: value.clone() for name, value in model.named_parameters() if "proj.weight" not in name}
    before = {name: value.numel() for name, value in model.named_parameters() if "proj.weight" in name}
    rest = sum(4 * value.numel() for value in others.values())
    shorten(model, "int8")
    assert all(value.equal(others[name]) for name, value in model.named_parameters() if name in others)
    assert sum(before.values()) < stored_bytes(model) - rest < 1.5 * sum(before.values())
    assert model.dtype == torch.float32


def test_bfloat16_is_for_all_weights_and_no_buffer() -> None:
    """Rotary frequencies keep their precision, as in a model that is loaded in bfloat16; tied weights stay tied."""
    model = tiny_model("llama", torch.float32, tie_word_embeddings=True)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    expected = {name: value.bfloat16() for name, value in model.state_dict().items()}
    shorten(model, "bfloat16")
    assert all(value.equal(expected[name]) for name, value in model.state_dict().items())
    assert buffers and all(value.equal(buffers[name]) for name, value in model.named_buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight and describe(model).opaque is None


@needs_torchao
def test_what_torchao_cannot_quantise_is_an_error() -> None:
    """In our words."""
    with pytest.raises(ModelError, match=r"torchao cannot quantise a model in torch\.float64 to int8: .*float64"):
        shorten(tiny_model("llama"), "int8")


def test_without_torchao_there_is_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is said how to get it."""
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModelError, match=r'int8 weights need torchao.*pip install ".\[quantised\]"'):
        shorten(tiny_model("llama", torch.float32), "int8")


@pytest.mark.parametrize("told", [True, False, None])
def test_units_for_bfloat16_are_asked_for(monkeypatch: pytest.MonkeyPatch, told: bool | None) -> None:
    """Of torch, whose older versions do not tell."""
    if told is None:
        monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    else:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: told)
    assert backends.has_bfloat16_units() == bool(told)
