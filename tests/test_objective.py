"""The losses of masks are those of the sliced models, in nats per token, however the batch is cut up."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from searches import activities
from tiny_models import VARIANTS, Variant, random_tokens, tiny_model
from tolerances import EXACT, LOGITS, assert_close
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bernprune import losses as module
from bernprune.backends import load_backend
from bernprune.costs import Costs
from bernprune.errors import ConfigError
from bernprune.losses import token_divergences, token_losses
from bernprune.models import masking
from bernprune.models.masking import LiveMasks
from bernprune.models.slicing import slice_model
from bernprune.models.view import ModelView, describe
from bernprune.names import ObjectiveName
from bernprune.objective import masked_objective

OPS = load_backend("torch", torch.device("cpu"))
OBJECTIVES: tuple[ObjectiveName, ...] = ("cross-entropy", "kl")
FREE = Costs(passing=0.0, copying=0.0, blocks=1.0)  # to gather weights
NEVER = Costs(passing=1e9, copying=math.inf, blocks=0.5)
LARGE_VOCABULARY = 50_021
FLOAT32_BYTES, CHUNK_BYTES = 4, 8 * 2**20

all_objectives = pytest.mark.parametrize("kind", OBJECTIVES)


def losses_of(
    view: ModelView, masks_KU: torch.Tensor, tokens_BT: torch.Tensor, kind: ObjectiveName, **options: int
) -> torch.Tensor:
    with masked_objective(view, OPS, kind=kind, **options) as objective:
        return objective.losses(masks_KU, tokens_BT)


def random_masks(view: ModelView, num_masks: int, seed: int = 0) -> torch.Tensor:
    """Masks ``[K, U]`` under which the model can be sliced."""
    random = torch.Generator().manual_seed(seed)
    masks_KU = torch.rand(num_masks, view.space.size, generator=random) < 0.6
    masks_KU[:, 0] = True
    return masks_KU


@torch.no_grad()
def log_probs(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Log probabilities from logits of the whole batch, float64 ``[B, T, V]``."""
    logits = model(input_ids=tokens_BT, use_cache=False).logits.double()
    return logits - logits.exp().sum(-1, keepdim=True).log()


def expected_loss(dense: Any, sliced: Any, tokens_BT: torch.Tensor, kind: ObjectiveName) -> float:
    """By the textbook, from full logits: mean over tokens of -log q(next token), or of sum p (log p - log q)."""
    theirs = log_probs(sliced, tokens_BT)
    if kind == "kl":
        ours = log_probs(dense, tokens_BT)
        return (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    picked = [-theirs[b, t, tokens_BT[b, t + 1]] for b in range(len(tokens_BT)) for t in range(tokens_BT.shape[1] - 1)]
    return (sum(picked) / len(picked)).item()


def test_plain_torch_gathers_whatever_lists_would_cost() -> None:
    """By costs that a run measured with kernels: what they would not compute is not computed here either."""
    view, tokens_BT, found = describe(tiny_model("llama")), random_tokens(2, 64), []
    masks_KU = random_masks(view, 2)
    for costs in (FREE, replace(FREE, listing=0.1)):
        with FlopCounterMode(display=False) as counter, masked_objective(view, OPS, costs=costs) as objective:
            objective.losses(masks_KU, tokens_BT)
        found.append(counter.get_total_flops())
    assert found[0] == found[1]


@pytest.mark.parametrize("multiple", [3, 16])
def test_working_sets_that_are_whole_rows_change_nothing(multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed beside what masks keep, for the width's sake, is cut; a layer without channels stays empty."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(2, 11)
    masks_KU = random_masks(view, 3)
    masks_KU[:, view.space.span("channel", 1)] = False
    expected = losses_of(view, masks_KU, tokens_BT, "cross-entropy", costs=NEVER)
    monkeypatch.setitem(masking._ALIGNED, "cpu", multiple)
    with masked_objective(view, OPS, costs=FREE) as objective:
        assert_close(objective.losses(masks_KU, tokens_BT), expected, EXACT)
        working_U = objective._live._aligned(masks_KU[0])
    assert (working_U | ~masks_KU[0]).all() and not working_U.equal(masks_KU[0])
    for layer, shape in enumerate(view.architecture.layers):
        count = int(working_U[view.space.span("channel", layer)].sum())
        assert count in (0, shape.channels) or count % multiple == 0
        assert (count == 0) == (layer == 1)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@all_objectives
def test_losses_are_those_of_sliced_models(variant: Variant, kind: ObjectiveName) -> None:
    """One loss a mask, in the order of the masks, each a mean over all windows."""
    view, tokens_BT = describe(variant.model()), random_tokens(2, 11)
    masks_KU = random_masks(view, 3)
    sliced = [slice_model(copy.deepcopy(view.model), view.space.plan(mask_U)) for mask_U in masks_KU]
    expected = [expected_loss(view.model, pruned, tokens_BT, kind) for pruned in sliced]
    assert_close(losses_of(view, masks_KU, tokens_BT, kind), expected, LOGITS[torch.float64])


@all_objectives
@pytest.mark.parametrize("rows", [1, 2, 5, 11, 14, 15, 64])
def test_rows_per_forward_changes_nothing(kind: ObjectiveName, rows: int) -> None:
    """Chunks of rows may cut a mask's windows and join several masks; 15 rows in all."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(3, 9)
    masks_KU = random_masks(view, 5)
    expected = torch.cat([losses_of(view, mask_1U, tokens_BT, kind) for mask_1U in masks_KU.split(1)])
    assert_close(losses_of(view, masks_KU, tokens_BT, kind, rows_per_forward=rows), expected, EXACT)


@all_objectives
@pytest.mark.parametrize("rows", [2, 5, 64])
def test_gathering_changes_nothing(monkeypatch: pytest.MonkeyPatch, kind: ObjectiveName, rows: int) -> None:
    """Masks that go through together, or one after the other with what they keep: the same losses of every window."""
    view, tokens_BT = describe(tiny_model("qwen3")), random_tokens(3, 9)
    masks_KU, set_masks, asked, found = random_masks(view, 4), LiveMasks.set, list[int](), []

    def watched(self: LiveMasks, masks: torch.Tensor, **given: Any) -> None:
        asked.append(len(masks))
        set_masks(self, masks, **given)

    monkeypatch.setattr(LiveMasks, "set", watched)
    for costs in (FREE, NEVER):
        asked.clear()
        with masked_objective(view, OPS, kind=kind, rows_per_forward=rows, costs=costs) as objective:
            found.append(objective.window_losses(masks_KU, tokens_BT))
            assert torch.equal(objective.losses(masks_KU, tokens_BT), found[-1].mean(1))
        assert (max(asked) == 1) == (costs == FREE)
    assert_close(found[0], found[1], EXACT)


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_what_one_mask_removes_is_not_computed(density: float) -> None:
    """The matrix products of its blocks take as much as their kept parameters; those of the output head stay."""
    view, tokens_BT = describe(tiny_model("llama"), ("kv_group", "channel")), random_tokens(2, 12)
    mask_U = torch.zeros(view.space.size, dtype=torch.bool)
    for group, start in zip(view.space.groups, view.space.starts, strict=False):
        mask_U[start : start + math.ceil(density * group.count)] = True
    with FlopCounterMode(display=False) as counter, masked_objective(view, OPS, costs=FREE) as objective:
        objective.losses(mask_U[None], tokens_BT)
    counts = counter.get_flop_counts()["Global"]
    kept = int(view.space.costs_U()[mask_U].sum())
    head = 2 * 11 * view.model.lm_head.weight.numel()  # of the last token nothing is predicted
    assert sum(counts[name] for name in counts if name.__name__ in ("mm", "addmm")) == 2 * (2 * 12 * kept + head)


def test_what_lies_in_a_layer_that_goes_is_not_computed() -> None:
    """Whatever masks say of it: those of chunks cost as much as if they removed it, too."""
    view, tokens_BT = describe(tiny_model("llama"), ("layer", "kv_group", "channel")), random_tokens(3, 8)
    masks_BKCU = random_masks(view, 12).view(3, 2, 2, -1)
    masks_BKCU[..., view.space.of_kind("layer")] = torch.tensor([True, False, True])
    found = []
    for masks in (masks_BKCU, view.space.alive(masks_BKCU)):
        with FlopCounterMode(display=False) as counter, masked_objective(view, OPS, costs=FREE) as objective:
            losses = objective.token_losses(masks, tokens_BT)
        found.append((counter.get_total_flops(), losses))
    assert found[0][0] == found[1][0]
    assert_close(found[0][1], found[1][1], EXACT)


@pytest.mark.parametrize("given", ["chunks", "gates"])
def test_what_cannot_be_gathered_goes_together(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """Masks of chunks, and gates, however long the text: in as few passes as rows allow."""
    view, tokens_BT = describe(tiny_model("qwen3")), random_tokens(3, 8)
    masks_KU, set_masks, asked = random_masks(view, 12), LiveMasks.set, list[int]()

    def watched(self: LiveMasks, masks: torch.Tensor, **given: Any) -> None:
        asked.append(len(masks))
        set_masks(self, masks, **given)

    monkeypatch.setattr(LiveMasks, "set", watched)
    with masked_objective(view, OPS, rows_per_forward=4, costs=FREE) as objective:
        if given == "chunks":
            objective.chunk_shares(masks_KU.view(3, 2, 2, -1), tokens_BT)
        else:
            objective.losses(0.5 * masks_KU[:2].double(), tokens_BT)
    assert asked == [4, 2]


@all_objectives
@pytest.mark.parametrize("tokens_a_chunk", [1, 4, 7, 1000])
def test_the_size_of_a_chunk_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: ObjectiveName, tokens_a_chunk: int
) -> None:
    """Cutting the logits anywhere gives the same losses; a chunk holds at least one token."""
    view, tokens_BT = describe(tiny_model("qwen2")), random_tokens(2, 13)
    masks_KU = random_masks(view, 2)
    expected = losses_of(view, masks_KU, tokens_BT, kind)
    monkeypatch.setitem(module.LOGIT_BYTES, "cpu", FLOAT32_BYTES * 53 * tokens_a_chunk + 3)
    assert_close(losses_of(view, masks_KU, tokens_BT, kind), expected, EXACT)
    monkeypatch.setitem(module.LOGIT_BYTES, "cpu", 1)
    assert_close(losses_of(view, masks_KU, tokens_BT, kind), expected, EXACT)


@pytest.mark.parametrize(("windows", "length"), [(1, 2), (3, 7), (2, 30)])
def test_losses_are_nats_per_token(windows: int, length: int) -> None:
    """A model that knows nothing loses the logarithm of the vocabulary, for any number of windows and tokens."""
    model = tiny_model("llama")
    model.lm_head.weight.data.zero_()
    view = describe(model)
    masks_KU, tokens_BT = random_masks(view, 2), random_tokens(windows, length)
    assert_close(losses_of(view, masks_KU, tokens_BT, "cross-entropy"), [math.log(53)] * 2, EXACT)
    assert losses_of(view, masks_KU, tokens_BT, "kl").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@all_objectives
def test_losses_are_float64_on_the_cpu(dtype: torch.dtype, kind: ObjectiveName) -> None:
    """One number a mask, whatever the model computes in, and without a graph."""
    view = describe(tiny_model("mistral", dtype))
    losses_K = losses_of(view, random_masks(view, 3), random_tokens(2), kind)
    assert (losses_K.dtype, losses_K.device.type, losses_K.shape) == (torch.float64, "cpu", (3,))
    assert not losses_K.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_are_computed_in_float32_or_better(dtype: torch.dtype) -> None:
    """Beyond the logits nothing is rounded to the model's dtype; bfloat16 losses would be off by 1 %."""
    view, tokens_BT = describe(tiny_model("llama", dtype)), random_tokens(1, 40)
    ones_1U = torch.ones(1, view.space.size)
    expected = expected_loss(view.model, view.model, tokens_BT, "cross-entropy")
    assert_close(losses_of(view, ones_1U, tokens_BT, "cross-entropy"), [expected], 1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_divergence_is_zero_for_the_dense_model_alone(variant: Variant) -> None:
    """KL to the dense model is that of a distribution to another: never negative, zero where nothing is masked."""
    view, tokens_BT = describe(variant.model()), random_tokens(2)
    masks_KU = torch.cat([torch.ones(1, view.space.size, dtype=torch.bool), random_masks(view, 4)])
    losses_K = losses_of(view, masks_KU, tokens_BT, "kl")
    assert abs(losses_K[0].item()) < EXACT
    assert (losses_K[1:] > 1e-3).all()


@all_objectives
def test_losses_can_be_taken_again(kind: ObjectiveName) -> None:
    """No call depends on an earlier one, and the model is dense again when the block is left."""
    view, tokens_BT = describe(tiny_model("qwen3")), random_tokens(2)
    masks_KU, before = random_masks(view, 4), log_probs(view.model, tokens_BT)
    with masked_objective(view, OPS, kind=kind) as objective:
        first = objective.losses(masks_KU, tokens_BT)
        objective.losses(~masks_KU, random_tokens(3, 5, seed=1))
        assert torch.equal(objective.losses(masks_KU, tokens_BT), first)
    assert torch.equal(log_probs(view.model, tokens_BT), before)


@all_objectives
def test_gates_are_taken_like_masks(kind: ObjectiveName) -> None:
    """Of 0 and 1 they are masks; between, the loss is another, and that of each window by itself."""
    view, tokens_BT = describe(tiny_model("qwen2")), random_tokens(2)
    masks_KU = random_masks(view, 3)
    assert torch.equal(losses_of(view, masks_KU.double(), tokens_BT, kind), losses_of(view, masks_KU, tokens_BT, kind))
    gates_KU = 0.7 * masks_KU.double()
    found = losses_of(view, gates_KU, tokens_BT, kind)
    assert ((found - losses_of(view, masks_KU, tokens_BT, kind)).abs() > 1e-3).all()
    alone = torch.stack([losses_of(view, gates_KU, tokens_1T, kind) for tokens_1T in tokens_BT.split(1)])
    assert_close(found, alone.mean(0), EXACT)


@all_objectives
def test_passes_are_announced(kind: ObjectiveName) -> None:
    """Each with its rows, those of the dense model too; what is raised then ends the call and restores the model."""
    view, tokens_BT, announced = describe(tiny_model("llama")), random_tokens(3, 9), list[int]()
    masks_KU, before = random_masks(view, 5), log_probs(view.model, tokens_BT)

    def note(rows: int) -> None:
        announced.append(rows)
        if len(announced) > 7:
            raise KeyboardInterrupt

    with masked_objective(view, OPS, kind=kind, rows_per_forward=4, before_pass=note) as objective:
        objective.losses(masks_KU, tokens_BT)
        assert announced == ([3] if kind == "kl" else []) + [4, 4, 4, 3]
        activities(objective, masks_KU[0], tokens_BT)
        assert announced[-1] == 3
        with pytest.raises(KeyboardInterrupt):
            objective.losses(masks_KU, tokens_BT)
    assert len(announced) == 8 and torch.equal(log_probs(view.model, tokens_BT), before)


# Memory


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes that were live at once, of all that was allocated meanwhile, counted by the allocator itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results = profiler.profiler.kineto_results.events()
    changes = sorted((event for event in results if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


@all_objectives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_the_whole_batch_never_exist(
    monkeypatch: pytest.MonkeyPatch, kind: ObjectiveName, dtype: torch.dtype
) -> None:
    """All that is live at once fits in two and a half chunks of ``LOGIT_BYTES``; uncut, it would be two batches."""
    monkeypatch.setitem(module.LOGIT_BYTES, "cpu", CHUNK_BYTES)
    view = describe(tiny_model("llama", dtype, vocab_size=LARGE_VOCABULARY, num_hidden_layers=1, hidden_size=24))
    tokens_BT = random_tokens(4, 33, vocabulary=LARGE_VOCABULARY)
    whole_batch = 2 * 4 * 32 * LARGE_VOCABULARY * FLOAT32_BYTES
    assert whole_batch > 6 * CHUNK_BYTES
    masks_KU = random_masks(view, 2)
    assert 1.5 * CHUNK_BYTES < peak_bytes(lambda: losses_of(view, masks_KU, tokens_BT, kind)) < 2.5 * CHUNK_BYTES
    monkeypatch.setitem(module.LOGIT_BYTES, "cpu", 2 * whole_batch + CHUNK_BYTES)
    assert peak_bytes(lambda: losses_of(view, masks_KU, tokens_BT, kind)) >= 1.5 * whole_batch


@pytest.mark.parametrize("rows", [64, 2])
def test_activities_of_one_layer_exist_at_once(rows: int) -> None:
    """Of one forward pass, a few times."""
    view, tokens_BT = describe(tiny_model("llama", torch.float32, intermediate_size=3000)), random_tokens(8, 64)
    mask_U, size = random_masks(view, 1)[0], FLOAT32_BYTES * tokens_BT[:rows].numel() * 3000
    with masked_objective(view, OPS, rows_per_forward=rows) as objective:
        peak = peak_bytes(lambda: objective.look(mask_U, tokens_BT, lambda *_: None))
    assert size < peak < 3.5 * size


@pytest.mark.parametrize("spoil", ["narrow", "wide", "flat", "none", "one_token"])
def test_masks_and_windows_that_do_not_fit_are_refused(spoil: str) -> None:
    """With what is needed and what was given."""
    view = describe(tiny_model("llama"))
    masks_KU, tokens_BT = random_masks(view, 2), random_tokens(2, 5)
    bad = {
        "narrow": (masks_KU[:, 1:], tokens_BT),
        "wide": (torch.cat([masks_KU, masks_KU], dim=1), tokens_BT),
        "flat": (masks_KU[0], tokens_BT),
        "none": (masks_KU[:0], tokens_BT),
        "one_token": (masks_KU, tokens_BT[:, :1]),
    }
    assert losses_of(view, masks_KU, tokens_BT, "cross-entropy").isfinite().all()
    with pytest.raises(ConfigError, match="must be"):
        losses_of(view, *bad[spoil], "cross-entropy")


def test_logits_come_in_parts_of_a_few_megabytes() -> None:
    """As shipped, whatever the vocabulary: here of 32 positions at once."""
    head = torch.nn.Linear(1, 2**16, bias=False)
    sizes: list[int] = []
    head.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    token_losses(head, torch.ones(3, 23, 1), torch.zeros(3, 23, dtype=torch.int64))
    assert sizes == [32, 32, 2]


@pytest.mark.parametrize("kind", ["cross-entropy", "kl"])
def test_gradients_go_back_in_parts_too(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of all logits at once, of which none is kept on the way."""
    monkeypatch.setitem(module.LOGIT_BYTES, "cpu", 4 * 53 * 10)
    random = torch.Generator().manual_seed(0)
    hidden_RTD, dense_RTD = (torch.randn(3, 7, 5, generator=random, dtype=torch.float64) for _ in range(2))
    head, dense_head = (torch.nn.Linear(5, 53, dtype=torch.float64) for _ in range(2))
    tokens_RT, kept = random_tokens(3, 7), []
    found, expected = (hidden_RTD.clone().requires_grad_() for _ in range(2))
    ours, theirs = head(expected).log_softmax(-1), dense_head(dense_RTD).log_softmax(-1)
    if kind == "kl":
        all_at_once = (theirs.exp() * (theirs - ours)).sum(-1)
    else:
        all_at_once = -ours[:, :-1].gather(2, tokens_RT[:, 1:, None])[..., 0]
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.numel()) or saved, lambda kept: kept):
        if kind == "kl":
            in_parts = token_divergences(head, found, dense_RTD, dense_head=dense_head)
        else:
            in_parts = token_losses(head, found, tokens_RT)
    assert_close(in_parts, all_at_once, EXACT)
    assert max(kept) < 53 * 5, "as much as the hidden states of a few tokens"
    in_parts.mean().backward()
    all_at_once.mean().backward()
    assert_close(found.grad, expected.grad, EXACT)


def test_masks_hold_within_their_block_alone() -> None:
    """Behind it, and while another one masks the same layers, they would change nothing, which is said."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(2, 5)
    masks_KU = random_masks(view, 2)
    with masked_objective(view, OPS) as outer:
        expected_K = outer.losses(masks_KU, tokens_BT)
        with masked_objective(view, OPS) as inner:
            assert torch.equal(inner.losses(masks_KU, tokens_BT), expected_K)
            with pytest.raises(ConfigError, match="masks are set where they do not hold"):
                outer.losses(masks_KU, tokens_BT)
        assert torch.equal(outer.losses(masks_KU, tokens_BT), expected_K)
    for objective in (outer, inner):
        with pytest.raises(ConfigError, match="masks are set where they do not hold"):
            objective.losses(masks_KU, tokens_BT)


def test_nothing_is_dropped_out() -> None:
    """Of a model in training mode, which it is in again afterwards; a module that was not stays so."""
    model, tokens_BT = tiny_model("llama", attention_dropout=0.5), random_tokens(3, 7)
    masks_KU = random_masks(describe(model), 2)
    expected_K = losses_of(describe(model.eval()), masks_KU, tokens_BT, "cross-entropy")
    model.train().model.norm.eval()
    assert torch.equal(losses_of(describe(model), masks_KU, tokens_BT, "cross-entropy"), expected_K)
    assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]


@pytest.mark.parametrize("spoil", ["number", "size", "id"])
def test_windows_of_something_else_are_refused(spoil: str) -> None:
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(2, 5)
    bad = {"number": tokens_BT.float(), "size": tokens_BT.int(), "id": tokens_BT + 10**6}
    with pytest.raises(ConfigError, match="windows of text"):
        losses_of(view, random_masks(view, 2), bad[spoil], "cross-entropy")


def test_a_pass_has_rows() -> None:
    view = describe(tiny_model("llama"))
    with pytest.raises(ConfigError, match="rows_per_forward must be 1 or more, but is 0"):
        losses_of(view, random_masks(view, 2), random_tokens(2, 5), "cross-entropy", rows_per_forward=0)
