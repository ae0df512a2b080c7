"""A row of a batch under its own mask computes what the model sliced by that mask computes, and no trace stays."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, Variant, random_tokens, tiny_model
from tolerances import EXACT, LOGITS, assert_close
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bernprune.backends import load_backend
from bernprune.models import masking
from bernprune.models.branches import Branch
from bernprune.models.masking import masked
from bernprune.models.slicing import slice_model
from bernprune.models.view import ModelView, describe
from bernprune.names import Kind
from bernprune.units import KINDS, UnitSpace

OPS = load_backend("torch", torch.device("cpu"))
GRANULARITIES: dict[str, tuple[Kind, ...]] = {
    "parts": ("kv_group", "channel"),
    "all_levels": KINDS,
    "blocks": ("attention", "ffn"),
    "layers": ("layer",),
}
# What each mask removes entirely, where the space has such units; the rest of it is random.
EMPTIED: list[list[tuple[Kind, int]]] = [
    [("channel", 1), ("ffn", 3), ("kv_group", 2)],
    [("attention", 1), ("channel", 0), ("layer", 3), ("ffn", 2)],
    [("kv_group", 0), ("channel", 0)],  # the whole first layer, which alone allows it to lose its attention
]
EXACT_FLOAT64 = LOGITS[torch.float64]

all_variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
all_granularities = pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)


def random_masks(space: UnitSpace, num_masks: int, *, seed: int = 0, keep: float = 0.6) -> torch.Tensor:
    """Masks ``[K, U]`` that all keep a kv group of the first layer, and its successor's attention."""
    random = torch.Generator().manual_seed(seed)
    masks_KU = torch.rand(num_masks, space.size, generator=random) < keep
    for kind, layer in (("kv_group", 0), ("kv_group", 1), ("attention", 1), ("layer", 1)):
        span = space.span(kind, layer)
        if span is not None:
            masks_KU[:, span.start] = True
    return masks_KU


def emptying_masks(space: UnitSpace) -> torch.Tensor:
    """One random mask for each entry of ``EMPTIED``, with what it lists removed."""
    masks_KU = random_masks(space, len(EMPTIED))
    for mask_U, emptied in zip(masks_KU, EMPTIED, strict=True):
        for kind, layer in emptied:
            span = space.span(kind, layer)
            if span is not None:
                mask_U[span] = False
    return masks_KU


@torch.no_grad()
def logits_of(model: Any, tokens_RT: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens_RT, use_cache=False).logits
    return logits


def sliced_logits(view: ModelView, masks_KU: torch.Tensor, tokens_KT: torch.Tensor) -> list[torch.Tensor]:
    """Logits of each row by a copy of the model sliced by that row's mask."""
    plans = [view.space.plan(mask_U) for mask_U in masks_KU]
    pairs = zip(plans, tokens_KT.split(1), strict=True)
    return [logits_of(slice_model(copy.deepcopy(view.model), plan), tokens)[0] for plan, tokens in pairs]


def masked_logits(view: ModelView, masks_RU: torch.Tensor, tokens_RT: torch.Tensor) -> torch.Tensor:
    with masked(view, OPS) as live:
        live.set(masks_RU)
        return logits_of(view.model, tokens_RT)


# Masking equals slicing


@all_variants
@all_granularities
def test_masked_equals_sliced(variant: Variant, granularity: tuple[Kind, ...]) -> None:
    """Every row of a batch, its own text under its own mask, also where blocks and layers lose all their units."""
    view = describe(variant.model(), granularity)
    masks_KU, tokens_KT = emptying_masks(view.space), random_tokens(len(EMPTIED))
    found, dense = masked_logits(view, masks_KU, tokens_KT), logits_of(view.model, tokens_KT)
    for row, expected in enumerate(sliced_logits(view, masks_KU, tokens_KT)):
        assert_close(found[row], expected, EXACT_FLOAT64)
    changed = [not torch.equal(found[row], dense[row]) for row in range(len(EMPTIED))]
    assert changed == [not view.space.alive(mask_U).all() for mask_U in masks_KU]


@all_variants
@all_granularities
def test_gathered_equals_sliced(variant: Variant, granularity: tuple[Kind, ...]) -> None:
    """One mask for all rows, of which only what it keeps is computed, also where blocks and layers lose all units."""
    view, tokens = describe(variant.model(), granularity), random_tokens(3)
    for mask_1U in emptying_masks(view.space).split(1):
        expected = logits_of(slice_model(copy.deepcopy(view.model), view.space.plan(mask_1U[0])), tokens)
        with masked(view, OPS) as live:
            live.set(mask_1U, working_U=mask_1U[0])
            assert_close(logits_of(view.model, tokens), expected, EXACT_FLOAT64)
            live.set(torch.ones_like(mask_1U), working_U=torch.ones_like(mask_1U[0]))
            assert torch.equal(logits_of(view.model, tokens), logits_of(copy.deepcopy(view.model), tokens))


@all_granularities
@pytest.mark.parametrize("masks", ["several", "gates", "chunks"])
def test_what_no_mask_keeps_need_not_be_computed(granularity: tuple[Kind, ...], masks: str) -> None:
    """Of several masks, masks of chunks and gates: with what any of them keeps at work, or more, the same logits."""
    view, tokens = describe(tiny_model("llama", attention_bias=True), granularity), random_tokens(3, 8)
    kept = emptying_masks(view.space) & (torch.arange(view.space.size) % 3 > 0)
    given = {"several": kept, "gates": 0.5 * kept.double(), "chunks": kept[:, None].expand(-1, 2, -1)}[masks]
    expected, any_U = masked_logits(view, given, tokens), kept.any(0)
    more_U = any_U | (torch.arange(view.space.size) % 6 == 0)
    assert (any_U < more_U).any()
    with masked(view, OPS) as live:
        for working_U in (any_U, more_U):
            live.set(given, working_U=working_U)
            assert_close(logits_of(view.model, tokens), expected, EXACT_FLOAT64)


def flops_of(model: Any, tokens: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        logits_of(model, tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_is_gathered_away_is_not_computed(family: str) -> None:
    """As many operations as of the sliced model; masked alone, as many as of the dense one."""
    view, tokens = describe(tiny_model(family)), random_tokens(2)
    mask_1U = random_masks(view.space, 1, keep=0.4)
    for layer in range(len(view.layers)):
        mask_1U[:, view.space.span("kv_group", layer).start] = True
    dense = flops_of(view.model, tokens)
    sliced = flops_of(slice_model(copy.deepcopy(view.model), view.space.plan(mask_1U[0])), tokens)
    with masked(view, OPS) as live:
        for working_U, expected in ((mask_1U[0], sliced), (None, dense)):
            live.set(mask_1U, working_U=working_U)
            assert flops_of(view.model, tokens) == expected
    assert sliced < 0.8 * dense


@all_granularities
def test_of_a_branch_that_is_gathered_away_little_is_computed(granularity: tuple[Kind, ...]) -> None:
    """A unit of each, which modules need to run; and the logits are those of the masked model."""
    view, tokens = describe(tiny_model("llama"), granularity), random_tokens(2)
    mask_1U = torch.zeros(1, view.space.size, dtype=torch.bool)
    dense, expected = flops_of(view.model, tokens), masked_logits(view, mask_1U, tokens)
    with masked(view, OPS) as live:
        live.set(mask_1U, working_U=mask_1U[0])
        assert torch.equal(logits_of(view.model, tokens), expected)
        assert flops_of(view.model, tokens) < 0.7 * dense


@pytest.mark.parametrize("granularity", [("kv_group", "channel"), KINDS, ("ffn",), ("channel",)], ids="+".join)
def test_the_first_layer_may_be_emptied(granularity: tuple[Kind, ...]) -> None:
    """Slicing drops it if no unit is left, bias and all; masking switches both of its branches off."""
    view = describe(tiny_model("llama", attention_bias=True, mlp_bias=True), granularity)
    first_U = torch.tensor([group.layer == 0 for group in view.space.groups])[view.space.group_U]
    masks_KU, tokens = ~first_U[None], random_tokens(1)
    assert_close(masked_logits(view, masks_KU, tokens)[0], sliced_logits(view, masks_KU, tokens)[0], EXACT_FLOAT64)


@all_granularities
def test_a_mask_of_ones_changes_nothing(granularity: tuple[Kind, ...]) -> None:
    """Not one bit of the logits, before a mask is set and after."""
    view, tokens = describe(tiny_model("qwen2"), granularity), random_tokens()
    expected = logits_of(view.model, tokens)
    with masked(view, OPS) as live:
        assert torch.equal(logits_of(view.model, tokens), expected)
        live.set(torch.ones(1, view.space.size))
        assert torch.equal(logits_of(view.model, tokens), expected)


@pytest.mark.parametrize("kind", ["layer", "attention", "ffn"])
def test_a_unit_dies_with_what_it_lies_in(kind: Kind) -> None:
    """What the mask says within a removed block does not matter."""
    view, tokens = describe(tiny_model("llama"), KINDS), random_tokens(2)
    mask_U = torch.ones(view.space.size, dtype=torch.bool)
    mask_U[view.space.span(kind, 2)] = False
    inside_U = ~view.space.alive(mask_U) & mask_U
    assert inside_U.any()
    found = masked_logits(view, (mask_U & ~inside_U)[None], tokens)
    assert torch.equal(found, masked_logits(view, mask_U[None], tokens))


# Rows


@all_variants
def test_masks_at_once_equal_one_at_a_time(variant: Variant) -> None:
    """No row depends on another's mask or text."""
    view = describe(variant.model(), KINDS)
    masks_KU, tokens_KT = random_masks(view.space, 5, seed=1), random_tokens(5)
    at_once = masked_logits(view, masks_KU, tokens_KT)
    for row in range(5):
        alone = masked_logits(view, masks_KU[row : row + 1], tokens_KT[row : row + 1])
        assert_close(at_once[row], alone[0], EXACT)


@all_granularities
def test_rows_follow_their_masks(granularity: tuple[Kind, ...]) -> None:
    """Masks in another order: the same logits in that order."""
    view, order = describe(tiny_model("qwen3"), granularity), [3, 0, 4, 1, 2]
    masks_KU, tokens_KT = random_masks(view.space, 5, seed=2, keep=0.5), random_tokens(5)
    expected = masked_logits(view, masks_KU, tokens_KT)
    assert_close(masked_logits(view, masks_KU[order], tokens_KT[order]), expected[order], EXACT)
    with pytest.raises(AssertionError, match="relative RMS error"):  # the masks do differ
        assert_close(masked_logits(view, masks_KU[order], tokens_KT), expected, EXACT)


@all_granularities
def test_one_mask_serves_all_rows(granularity: tuple[Kind, ...]) -> None:
    """``[1, U]`` is the same mask for batches of any number of rows, without being set again."""
    view = describe(tiny_model("mistral"), granularity)
    mask_1U, tokens = random_masks(view.space, 1, seed=3), random_tokens(4)
    expected = masked_logits(view, mask_1U.expand(4, -1), tokens)
    with masked(view, OPS) as live:
        live.set(mask_1U)
        for rows in (4, 1, 3):
            assert_close(logits_of(view.model, tokens[:rows]), expected[:rows], EXACT)


@all_granularities
def test_masks_set_later_replace_the_earlier(granularity: tuple[Kind, ...]) -> None:
    """Nothing of an earlier mask is left over."""
    view, tokens = describe(tiny_model("llama"), granularity), random_tokens(3)
    masks_KU = random_masks(view.space, 6, seed=4, keep=0.4)
    expected = masked_logits(view, masks_KU[3:], tokens)
    with masked(view, OPS) as live:
        for chosen in (masks_KU[:3], torch.zeros_like(masks_KU[:1]), masks_KU[3:].double()):  # numbers will do
            live.set(chosen)
            found = logits_of(view.model, tokens)
    assert torch.equal(found, expected)


def test_other_row_counts_are_refused() -> None:
    """A batch of another size than the masks is an error, not a guess."""
    view = describe(tiny_model("llama"))
    with masked(view, OPS) as live:
        live.set(random_masks(view.space, 3))
        assert logits_of(view.model, random_tokens(3)).shape[0] == 3
        with pytest.raises(ValueError, match="do not fit"):
            logits_of(view.model, random_tokens(4))


# Gates


def gated_by_hand(view: ModelView, gates_U: torch.Tensor) -> Any:
    """A copy of the model whose weights do what the gates say, unit after unit."""
    model, space = copy.deepcopy(view.model), view.space
    copied = describe(model, space.kinds)
    for index, layer in enumerate(copied.layers):
        blocks: list[tuple[Any, list[Kind], int]] = [
            (layer.output, ["kv_group", "attention", "layer"], layer.shape.kv_groups),
            (layer.down, ["channel", "ffn", "layer"], layer.shape.channels),
        ]
        for linear, kinds, count in blocks:
            spans = [span for kind in kinds if (span := space.span(kind, index))]
            factors = torch.ones(count, dtype=torch.float64)
            for span in spans:
                factors = factors * gates_U[span]
            width = linear.in_features // count
            for unit in range(count):
                linear.weight.data[:, unit * width : (unit + 1) * width] *= factors[unit]
            if linear.bias is not None:  # only gates finer than the block leave its bias alone, unless all are closed
                linear.bias.data *= (factors > 0).any() if space.span(kinds[0], index) else factors[0]
    return model


@all_granularities
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_gates_scale_what_their_units_contribute(granularity: tuple[Kind, ...], biased: bool) -> None:
    """Row by row, those of nested levels multiplied; a branch is closed where all of its gates are, and only there."""
    view = describe(tiny_model("llama", attention_bias=biased, mlp_bias=biased), granularity)
    gates_RU = torch.rand(3, view.space.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gates_RU[0, : view.space.size // 3] = 0.0
    gates_RU[1, ::2] = 1.0
    gates_RU *= emptying_masks(view.space)
    tokens_RT = random_tokens(3)
    found = masked_logits(view, gates_RU, tokens_RT)
    for row, gates_U in enumerate(gates_RU):
        expected = logits_of(gated_by_hand(view, gates_U), tokens_RT[row : row + 1])[0]
        assert_close(found[row], expected, EXACT_FLOAT64)


def test_gates_of_chunks_are_gates_of_their_tokens() -> None:
    """Equal ones make one, and a chunk's own do not reach back."""
    view, tokens_RT = describe(tiny_model("qwen3")), random_tokens(2, 8)
    gates_RCU = torch.rand(2, 2, view.space.size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found, first = (masked_logits(view, gates, tokens_RT) for gates in (gates_RCU, gates_RCU[:, 0]))
    assert_close(found[:, :4], first[:, :4], EXACT_FLOAT64)
    assert (found[:, 4:] - first[:, 4:]).abs().min() > 0
    assert_close(masked_logits(view, gates_RCU[:, :1].expand(-1, 2, -1), tokens_RT), first, EXACT_FLOAT64)


# Leaving no trace


def trace(model: nn.Module, tokens: torch.Tensor) -> list[Any]:
    """Everything that masking might leave changed: modules, parameters and their names in order, hooks, logits."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    state = [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [modules, parameters, state, hooks, model.training, logits_of(model, tokens).tolist()]


class Stop(Exception):
    """Raised on purpose."""


def leave_normally(view: ModelView) -> None:
    masked_logits(view, random_masks(view.space, 3), random_tokens(3))


def leave_by_an_error(view: ModelView) -> None:
    with pytest.raises(Stop):
        _run_and_stop(view)


def _run_and_stop(view: ModelView) -> None:
    with masked(view, OPS) as live:
        live.set(random_masks(view.space, 3))
        raise Stop


def leave_by_an_error_of_the_model(view: ModelView) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        masked_logits(view, random_masks(view.space, 3), random_tokens(2))


def fail_on_entry(view: ModelView) -> None:
    with pytest.raises(IndexError), masked(view, OPS, layers=[2, 0, 99]):
        raise AssertionError("the block was entered")


def fail_half_way(view: ModelView) -> None:
    """The third FFN cannot be swapped: two layers and one attention output already are."""
    made: list[int] = []

    class Failing(masking._MaskedFFN):
        def __init__(self, *args: Any) -> None:
            made.append(len(made))
            if len(made) == 3:
                raise Stop
            super().__init__(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_MaskedFFN", Failing)
        with pytest.raises(Stop), masked(view, OPS):
            raise AssertionError("the block was entered")
    assert len(made) == 3


LEAVING = [leave_normally, leave_by_an_error, leave_by_an_error_of_the_model, fail_on_entry, fail_half_way]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("leave", LEAVING, ids=lambda function: function.__name__)
def test_the_model_is_restored(family: str, leave: Any) -> None:
    """However the block is left: the same objects in the same order under the same names, and the same logits."""
    model, tokens = tiny_model(family), random_tokens()
    view = describe(model)
    before = trace(model, tokens)
    leave(view)
    assert trace(model, tokens) == before


def test_what_is_gathered_meanwhile_changes_no_bit() -> None:
    """A run that goes on has not done all that one did which was not interrupted: products must not depend on it, nor
    the way that weights lie, by which large ones are rounded."""
    view, tokens = describe(tiny_model("llama", torch.bfloat16)), random_tokens(3)
    masks_KU, kept_1U = random_masks(view.space, 3), random_masks(view.space, 1, seed=1, keep=0.3)
    weights = list(view.model.parameters())
    before = [(weight.data_ptr(), weight.stride()) for weight in weights]
    with masked(view, OPS) as live:
        found = []
        for _ in range(2):
            live.set(masks_KU)
            found.append(logits_of(view.model, tokens))
            live.set(kept_1U, working_U=kept_1U[0])
            found.append(logits_of(view.model, tokens))
        assert before == [(weight.data_ptr(), weight.stride()) for weight in weights]
    assert found[0].equal(found[2]) and found[1].equal(found[3]) and not found[0].equal(found[1])


@pytest.mark.parametrize("outer", [False, True], ids=["alone", "within inference mode"])
@pytest.mark.parametrize("lying", ["by rows", "by columns", "with gaps"])
def test_weights_lie_as_they_did(outer: bool, lying: str) -> None:
    """Also where kernels want columns together; and the model can still be trained."""
    view, tokens = describe(tiny_model("llama")), random_tokens(2)
    mask_1U = random_masks(view.space, 1)
    for layer in view.layers:
        for weight in (layer.output.weight, layer.down.weight):
            gaps = torch.zeros(len(weight), 2 * weight.shape[1], dtype=weight.dtype)[:, ::2].copy_(weight.data)
            weight.data = {"by rows": weight.data, "by columns": weight.data.T.contiguous().T, "with gaps": gaps}[lying]
    weights = list(view.model.parameters())
    before = [(weight.stride(), weight.data.clone()) for weight in weights]
    with torch.inference_mode(outer), masked(view, replace(OPS, packs=True)) as live:
        live.set(mask_1U, working_U=mask_1U[0])
        logits_of(view.model, tokens)
        assert view.layers[0].down.weight.stride(0) == 1
    for weight, (strides, values) in zip(weights, before, strict=True):
        assert weight.stride() == strides and weight.equal(values)
    view.model.requires_grad_(True)
    view.model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(weight.grad.isfinite().all() for weight in weights)


# Some layers, and blocks within blocks


def test_only_the_chosen_layers_are_masked() -> None:
    """The others stay dense, as if the mask kept all their units."""
    view, tokens = describe(tiny_model("llama"), KINDS), random_tokens(3)
    masks_KU = random_masks(view.space, 3, seed=5)
    layer_U = view.space.layer_U
    expected = masked_logits(view, masks_KU | (layer_U != 1) & (layer_U != 3), tokens)
    with masked(view, OPS, layers=[3, 1]) as live:
        live.set(masks_KU)
        found = logits_of(view.model, tokens)
    assert torch.equal(found, expected)
    assert not torch.equal(found, masked_logits(view, masks_KU, tokens))


def test_an_inner_block_gives_back_the_outer() -> None:
    """Inside, the inner masks alone hold; afterwards the outer ones are there again, and can be set."""
    view, tokens = describe(tiny_model("qwen2")), random_tokens(3)
    outer_KU, inner_KU = random_masks(view.space, 6, seed=6).split(3)
    with masked(view, OPS) as live:
        live.set(outer_KU)
        under_outer = logits_of(view.model, tokens)
        under_inner = masked_logits(view, inner_KU, tokens)
        assert not torch.equal(under_inner, under_outer)
        assert torch.equal(logits_of(view.model, tokens), under_outer)
        live.set(inner_KU)
        assert torch.equal(logits_of(view.model, tokens), under_inner)


def test_a_weight_that_found_no_room_to_be_laid_anew_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laying it back would ask for as much memory once more."""
    view, laid = describe(tiny_model("llama")), list[tuple[int, ...]]()

    def full(self: Branch, strides: tuple[int, ...]) -> None:
        laid.append(strides)
        raise torch.OutOfMemoryError("the memory is full")

    monkeypatch.setattr(Branch, "_lay", full)
    with pytest.raises(torch.OutOfMemoryError), masked(view, replace(OPS, packs=True)):
        raise AssertionError("the block was entered")
    assert len(laid) == 1
