"""The Triton backend computes on a live model what plain torch does, whatever masks it is given.

Letters: B windows, K masks, C chunks, U units.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quantised import all_ways, quantise
from searches import activities
from spaces import random_numbers
from test_masking import random_masks, trace
from test_masks import make_masks
from test_sharing import neighbours
from tiny_models import random_tokens, tiny_model
from tolerances import CHAIN, GUARDED, assert_close
from torch import nn

from bernprune import costs
from bernprune.backends import TORCH, load_backend
from bernprune.costs import NEVER, Costs
from bernprune.errors import BackendError
from bernprune.kernels import fused, reference
from bernprune.models import masking
from bernprune.models.fusing import _is_rms_norm, fusing
from bernprune.models.masking import LiveMasks, masked
from bernprune.models.streaming import LayerStream
from bernprune.models.view import ModelView, describe
from bernprune.names import Kind
from bernprune.objective import MaskedObjective, masked_objective
from bernprune.policy.masks import Design, with_reference
from bernprune.scores import SCORES, fusion, initial_scores
from bernprune.scores.base import Options

pytestmark = pytest.mark.gpu
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {},
    "qwen3": {},
}
GRANULARITIES: dict[str, tuple[Kind, ...]] = {
    "parts": ("kv_group", "channel"),
    "nested": ("kv_group", "channel", "ffn"),
}
CALLS: dict[str, Callable[[MaskedObjective, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "shared": lambda objective, masks_KU, tokens_BT: objective.window_losses(masks_KU, tokens_BT[:2]),
    "single": lambda objective, masks_KU, tokens_BT: objective.window_losses(masks_KU[:1], tokens_BT),
    "sequences": lambda objective, masks_KU, tokens_BT: objective.token_losses(masks_KU.view(3, 2, 1, -1), tokens_BT),
    "chunks": lambda objective, masks_KU, tokens_BT: objective.token_losses(masks_KU.view(3, 1, 2, -1), tokens_BT),
    "gates": lambda objective, masks_KU, tokens_BT: objective.losses(0.7 * masks_KU.float(), tokens_BT[:2]),
    "activities": lambda objective, masks_KU, tokens_BT: activities(objective, masks_KU[0], tokens_BT),
}


@pytest.fixture
def every_kernel(device: torch.device) -> Any:
    return load_backend("triton", device)


@pytest.fixture
def ops(every_kernel: Any, device: torch.device) -> Any:
    """All but one where kernels are interpreted: rotary embeddings, which masks leave alone, would take the most."""
    return every_kernel if device.type == "cuda" else replace(every_kernel, rotary=reference.rotary)


def a_view(family: str, granularity: tuple[Kind, ...], device: torch.device, *, layers: int = 2) -> ModelView:
    model = tiny_model(family, num_hidden_layers=layers, **FAMILIES[family])
    return describe(model.float().to(device), granularity)


@pytest.mark.parametrize(
    ("family", "way", "listing"),
    [
        *(("llama", way, NEVER) for way in CALLS),
        *(("llama", way, 0.0) for way in ("shared", "single", "sequences")),  # of whole rows alone
        *((family, "sequences", listing) for family in list(FAMILIES)[1:] for listing in (NEVER, 0.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "dense" if value else "listed",
)
def test_the_losses_are_those_of_plain_torch(
    monkeypatch: pytest.MonkeyPatch, family: str, way: str, listing: float, every_kernel: Any, device: torch.device
) -> None:
    """For all ways in which masks can lie over text, by lists of what they keep and by bits."""
    monkeypatch.setattr(costs, "_LISTED_TOKENS", 1)
    sharing = way in ("shared", "gates")
    view = a_view(family, GRANULARITIES["parts"], device, layers=4 if sharing else 2)
    masks_KU = neighbours(view.space)[:6] if sharing else random_masks(view.space, 6)
    found, tokens_BT = [], random_tokens(3, 8)
    for each in (load_backend("torch", device), every_kernel):
        with masked_objective(view, each, rows_per_forward=5, costs=Costs(listing=listing)) as objective:
            found.append(CALLS[way](objective, masks_KU, tokens_BT))
    assert_close(found[1], found[0], CHAIN[torch.float32])


def test_a_mask_may_keep_nothing(ops: Any, device: torch.device) -> None:
    """Where what it keeps is gathered there is not even a word of bits."""
    view, tokens_BT = a_view("llama", GRANULARITIES["parts"], device), random_tokens(3, 32)
    found = []
    for each in (load_backend("torch", device), ops):
        with masked_objective(view, each) as objective:
            found.append(objective.losses(torch.zeros(1, view.space.size, dtype=torch.bool), tokens_BT))
    assert_close(found[1], found[0], CHAIN[torch.float32])


@all_ways
def test_layers_that_multiply_by_themselves(way: str, ops: Any, device: torch.device) -> None:
    """Only what enters them is masked, by bits too; an activation without a kernel is theirs to compute."""
    view = describe(quantise(tiny_model("llama", **FAMILIES["llama"]).float().to(device), way))
    for layer in view.layers:
        layer.ffn.act_fn = nn.Tanh()
    tokens_BT, strides = random_tokens(3, 8), [layer.down.weight.stride() for layer in view.layers]
    masks_BKCU = make_masks(random_numbers(view.space.size, 1), Design(3, 2), space=view.space).to(device)
    calls = [
        *((CALLS[name], neighbours(view.space)[:6]) for name in ("shared", "chunks", "activities")),
        (MaskedObjective.token_losses, masks_BKCU),
    ]
    for call, masks in calls:
        found = []
        for each in (load_backend("torch", device), ops):
            with masked_objective(view, each, rows_per_forward=4, costs=Costs(1.0, 0.0, 1.0, 0.0)) as objective:
                found.append(call(objective, masks, tokens_BT))
                assert [layer.down.weight.stride() for layer in view.layers] == strides
        assert_close(found[1], found[0], CHAIN[torch.float32])


@pytest.mark.parametrize(
    ("way", "listing", "listed"),
    [("sequences", 1.0, True), ("shared", 1.0, True), ("sequences", NEVER, False), ("chunks", 1.0, False)],
)
def test_kernels_go_by_lists_where_that_pays(
    way: str, listing: float, listed: bool, monkeypatch: pytest.MonkeyPatch, ops: Any, device: torch.device
) -> None:
    """Of whole rows alone."""
    made, make = [], fused.list_kept
    monkeypatch.setattr(costs, "_LISTED_TOKENS", 1)
    monkeypatch.setattr(fused, "list_kept", lambda masks: made.append(masks) or make(masks))
    view = a_view("llama", GRANULARITIES["parts"], device)
    with masked_objective(view, ops, costs=Costs(passing=1e9, copying=NEVER, listing=listing)) as objective:
        CALLS[way](objective, random_masks(view.space, 6), random_tokens(3, 8))
    assert bool(made) == listed


@pytest.mark.parametrize("trained", ["q_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("listed", [False, True])
def test_no_gradient_is_lost(trained: str, listed: bool, ops: Any, device: torch.device) -> None:
    """Kernels take none, and say so; gates have one."""
    view, tokens_BT = a_view("llama", GRANULARITIES["parts"], device), random_tokens(2, 8).to(device)
    masks_RU = random_masks(view.space, 2)
    for name, parameter in view.model.named_parameters():
        parameter.requires_grad_(trained in name)
    with masked(view, ops) as live:
        live.set(masks_RU, listed_U=torch.full((view.space.size,), listed))
        with torch.no_grad():
            expected = view.model(tokens_BT).logits
        with pytest.raises(ValueError, match="kernels take no gradients"):
            view.model(tokens_BT)
        live.set(masks_RU.float())
        found = view.model(tokens_BT).logits
    assert_close(found, expected, CHAIN[torch.float32])
    found.sum().backward()
    assert all(parameter.grad.any() for parameter in view.model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("other", ["qwen2", "llama"])
def test_blocks_may_end_in_any_order(other: str, ops: Any, device: torch.device) -> None:
    """Those of two models: what one leaves out of attention goes on after the other's end; then all is as before."""
    views = [a_view(family, GRANULARITIES["parts"], device) for family in (other, "llama")]
    module = sys.modules[type(views[1].layers[0].attention).__module__]
    rotates = module.apply_rotary_pos_emb  # type: ignore[attr-defined]
    tokens_BT, calls, losses = random_tokens(2, 8).to(device), list[int](), list[torch.Tensor]()

    def counted(*given: Any, **named: Any) -> torch.Tensor:
        calls.append(len(losses))
        return ops.attention_of_kept(*given, **named)

    first, second = (masked(view, replace(ops, attention_of_kept=counted)) for view in views)
    first.__enter__()
    live = second.__enter__()
    live.set(random_masks(views[1].space, 2))
    with torch.no_grad():
        losses.append(views[1].model(tokens_BT).logits)
        first.__exit__(None, None, None)
        losses.append(views[1].model(tokens_BT).logits)
    second.__exit__(None, None, None)
    assert torch.equal(*losses) and calls == [0, 0, 1, 1]
    assert module.apply_rotary_pos_emb is rotates  # type: ignore[attr-defined]


def test_a_stream_of_layers_attends_within_windows(ops: Any, device: torch.device) -> None:
    """As flash attention is told of them: without a mask, by their size alone."""
    model, tokens_BT = tiny_model("mistral", torch.float32, sliding_window=5).to(device), random_tokens(2, 12)
    view, found = describe(model), []
    for stated in (False, True):
        stream = LayerStream(view, tokens_BT, rows_per_forward=2)
        for index in range(len(view.layers)):
            given = stream.layer_arguments(index, 2)
            assert given["attention_mask"] is not None
            if stated:
                given["attention_mask"] = None
            with masked(view, ops, layers=[index]) as live:
                live.set(torch.ones(1, view.space.size, dtype=torch.bool))
                stream.advance()
        found.append(torch.cat(stream.hidden_RTD))
    assert_close(found[1], found[0], CHAIN[torch.float32])


@pytest.mark.parametrize("settled", [False, True], ids=["all_possible", "some_settled"])
@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
@pytest.mark.parametrize("design", [Design(3, 2, 4, "antithetic", 0.5), Design(3, 2)], ids=["chunks", "sequences"])
def test_masks_that_are_drawn_by_a_kernel(
    design: Design, granularity: tuple[Kind, ...], settled: bool, ops: Any, device: torch.device
) -> None:
    """They are those that plain torch makes, in every pass of a few rows; so are those that leave some units out."""
    view, tokens_BT = a_view("qwen2", granularity, device), random_tokens(3, 8)
    probs_U = random_numbers(view.space.size, 1)
    if settled:
        probs_U[::3] = 0.0
    masks_BKCU = make_masks(probs_U, design, space=view.space).to(device)
    with masked_objective(view, load_backend("torch", device)) as objective:
        expected = objective.token_losses(masks_BKCU[:], tokens_BT)
    cheap = Costs(passing=1.0, copying=0.0, blocks=1.0)
    with masked_objective(view, ops, rows_per_forward=4, costs=cheap) as objective:
        assert_close(objective.token_losses(masks_BKCU, tokens_BT), expected, CHAIN[torch.float32])
        gathered = [branch.kept_N for of_layer in objective._live._branches.values() for branch in of_layer.values()]
    assert any(kept_N is not None for kept_N in gathered) == settled


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_fused_is_given_back(family: str, device: torch.device) -> None:
    """Norms and rotary embeddings of every family are known; of the module that defines the models, too."""
    view = a_view(family, GRANULARITIES["parts"], device)
    tokens, module = random_tokens(2, 8).to(device), sys.modules[type(view.layers[0].attention).__module__]
    before, rotates, calls = trace(view.model, tokens), module.apply_rotary_pos_emb, []

    def rotary(*given: torch.Tensor) -> torch.Tensor:
        calls.append(given)
        return reference.rotary(*given)

    with fusing(view, rotary, [layer.layer for layer in view.layers]):
        calls.clear()
        view.model(input_ids=tokens, use_cache=False).logits.sum().backward()
        assert not calls, "what is asked for gradients is left alone"
        view.model.zero_grad()
        with torch.no_grad():
            tiny_model(family, **FAMILIES[family]).to(device)(input_ids=tokens, use_cache=False)
        assert not calls, "so is a model of the family in another format"
        with torch.no_grad():
            found = view.model(input_ids=tokens, use_cache=False).logits
        assert len(calls) == 2 * len(view.layers), "queries and keys of every layer"
        norms = [m for name, m in view.model.named_modules() if "layernorm" in name or name.endswith("model.norm")]
        assert {type(norm).__name__ for norm in norms} == {"_Norm"}
        assert len(norms) == 2 * len(view.layers) + 1
    assert_close(found, torch.tensor(before[-1]), CHAIN[torch.float32])
    assert module.apply_rotary_pos_emb is rotates
    assert trace(view.model, tokens) == before


def test_what_keys_alone_are_asked_for_is_not_lost(device: torch.device) -> None:
    """A gradient, where queries have none."""
    view, calls = a_view("llama", GRANULARITIES["parts"], device, layers=1), list[torch.Tensor]()
    view.model.requires_grad_(False)
    keys = view.layers[0].attention.k_proj.weight.requires_grad_()

    def rotary(*given: torch.Tensor) -> torch.Tensor:
        calls.append(given[0])
        return reference.rotary(*given)

    with fusing(view, rotary, [view.layers[0].layer]):
        calls.clear()
        view.model(input_ids=random_tokens(2, 8).to(device), use_cache=False).logits.sum().backward()
    assert not calls and keys.grad is not None and keys.grad.any()


def test_what_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Norms that subtract a mean, or scale by one more than their weight, and rotations of other pairs."""

    class Gemma(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(size)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)

    view = a_view("llama", GRANULARITIES["parts"], device)
    size, module = view.architecture.hidden_size, sys.modules[type(view.layers[0].attention).__module__]
    strange = view.layers[0].layer
    strange.input_layernorm, strange.post_attention_layernorm = nn.LayerNorm(size).to(device), Gemma(size).to(device)
    own = module.apply_rotary_pos_emb

    def turned(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.roll(1, -1) for part in own(*given))

    monkeypatch.setattr(module, "apply_rotary_pos_emb", turned)
    with fusing(view, reference.rotary, [layer.layer for layer in view.layers]):
        assert type(strange.input_layernorm) is nn.LayerNorm
        assert type(strange.post_attention_layernorm) is Gemma
        assert type(view.layers[1].layer.input_layernorm) is not type(strange.input_layernorm)
        assert type(view.layers[1].layer.input_layernorm).__name__ == "_Norm"
        assert module.apply_rotary_pos_emb is turned


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_plain_torch(
    name: str, monkeypatch: pytest.MonkeyPatch, ops: Any, device: torch.device
) -> None:
    """Of all metrics, whether they look at activations, try masks or take gradients."""
    monkeypatch.setattr(fusion, "_TRIED", 8)
    blocks: tuple[Kind, ...] = ("attention", "ffn")
    view = a_view("llama", blocks if name.startswith("block") else GRANULARITIES["parts"], device)
    windows_WT = random_tokens(8, 8)
    expected, found = (
        initial_scores(view, windows_WT, SCORES[name], ops=each, rows_per_forward=2, options=Options(pairs=2))
        for each in (load_backend("torch", device), ops)
    )
    assert_close(found, expected, GUARDED)


class Hidden(nn.Module):
    """An RMS norm that calls its epsilon by another name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.small = nn.Parameter(torch.ones(size)), 1e-5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.small)


@pytest.mark.parametrize(
    ("norm", "known"),
    [(nn.RMSNorm(4096, eps=1e-5), True), (nn.LayerNorm(4096, bias=False), False), (Hidden(4096), False)],
    ids=["rms", "layer", "other_epsilon"],
)
def test_norms_are_known_by_what_they_compute(norm: nn.Module, known: bool) -> None:
    """Also of wide hidden states, whose mean is near zero anyway, and of small ones, where epsilon counts."""
    assert _is_rms_norm(norm) == known


def test_divergences_and_nested_units(ops: Any, device: torch.device) -> None:
    """The losses of the other objective, of units that lie in one another."""
    view, tokens_BT = a_view("qwen3", GRANULARITIES["nested"], device, layers=4), random_tokens(1, 8)
    masks_KU = neighbours(view.space)
    found = []
    for each in (load_backend("torch", device), ops):
        with masked_objective(view, each, kind="kl") as objective:
            found.append(objective.window_losses(masks_KU, tokens_BT))
    assert_close(found[1], found[0], CHAIN[torch.float32])


def test_the_model_is_restored(ops: Any, device: torch.device) -> None:
    """Attention and strides too; and blocks within blocks give back each other's masks."""
    view, tokens = a_view("llama", GRANULARITIES["parts"], device), random_tokens(3, 8).to(device)
    outer_KU, inner_KU = random_masks(view.space, 6).split(3)
    before, implementation = trace(view.model, tokens), view.model.config._attn_implementation

    def logits() -> torch.Tensor:
        return view.model(input_ids=tokens, use_cache=False).logits

    with torch.no_grad(), masked(view, ops) as live:
        live.set(outer_KU)
        under_outer = logits()
        with masked(view, ops) as inner:
            inner.set(inner_KU)
            assert not torch.equal(logits(), under_outer)
        assert torch.equal(logits(), under_outer)
    assert view.model.config._attn_implementation == implementation
    modules, parameters, _, *rest = trace(view.model, tokens)  # weights of down projections were laid out anew
    assert [modules, parameters, *rest] == [*before[:2], *before[3:]]
    assert all(parameter.is_contiguous() for parameter in view.model.parameters())


def test_a_model_that_kernels_cannot_run_is_refused(ops: Any, device: torch.device) -> None:
    """By its dtype or its activation, in one sentence; plain torch takes it."""
    double = describe(tiny_model("llama").to(device))
    strange = a_view("llama", GRANULARITIES["parts"], device)
    for layer in strange.layers:
        layer.ffn.act_fn = nn.Tanh()
    for view, reason in ((double, "the model is in torch.float64"), (strange, r"activation Tanh\(\) has no kernel")):
        with pytest.raises(BackendError, match=reason), masked(view, ops):
            raise AssertionError("the block was entered")
        with masked(view, load_backend("torch", device)) as live:
            assert live.ops.name == "torch"


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_costs_are_measured_in_passes_that_a_run_may_have(
    rows: int, monkeypatch: pytest.MonkeyPatch, ops: Any, device: torch.device
) -> None:
    """Of lists by masks that leave half of the units alive, whatever these lie in. No time decides which are made."""

    def every_way(seconds: Callable[[int, str], float], few: int, many: int, ways: Sequence[str]) -> None:
        for way in ("dense", *ways):
            assert seconds(few, way) > 0 and seconds(many, way) > 0

    monkeypatch.setattr(Costs, "measured", every_way)
    monkeypatch.setattr(costs, "_MEASURED_PASSES", 1)
    monkeypatch.setattr(costs, "_MEASURED_ROWS", {"cpu": (2, 4), "cuda": (2, 4)})
    view, listed, passes = a_view("llama", ("layer", "attention", "kv_group", "channel"), device), [], []
    was_set = LiveMasks.set

    def watched(live: LiveMasks, masks: Any, **given: Any) -> None:
        listed.extend([masks] if given.get("listed_U") is not None else [])
        was_set(live, masks, **given)

    monkeypatch.setattr(LiveMasks, "set", watched)
    view.decoder.register_forward_pre_hook(
        lambda _, __, given: passes.append(len(given["input_ids"])), with_kwargs=True
    )
    costs.measure(view, ops, 5, rows)
    assert max(passes) == min(4, max(2, rows)) and min(passes) < max(passes)
    for kind in view.space.finest:
        assert 0.35 < view.space.alive(listed[-1])[:, view.space.of_kind(kind)].float().mean() < 0.65


@pytest.mark.parametrize(("seconds", "each"), [(1e9, 6), (1e-9, 2)])
def test_each_way_is_timed_by_fewer_passes_where_they_take_long(
    seconds: float, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But by one after that which warms up. Plain torch has two ways, each timed on few windows and on many."""
    monkeypatch.setattr(costs, "_MEASURED_SECONDS", seconds)
    view, passes = a_view("llama", ("kv_group", "channel"), torch.device("cpu")), []
    view.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    costs.measure(view, TORCH, 8, 2)
    assert len(passes) == 2 * 2 * each


SHARES = {
    "tensor": (lambda masks: masks[:], True),
    "yet_to_be_made": (lambda masks: masks, True),
    "gates": (lambda masks: masks[:].float(), False),
    "gates_among_them": (lambda masks: with_reference(masks, torch.full(masks.shape[-1:], 0.5)), False),
}


@pytest.mark.parametrize(("make", "known"), SHARES.values(), ids=SHARES)
def test_shares_that_masks_keep_are_of_what_is_alive(
    make: Callable[[Any], Any], known: bool, ops: Any, device: torch.device
) -> None:
    """Of nested units; gates keep all, and have none."""
    view, design = a_view("llama", GRANULARITIES["nested"], device), Design(40, 4)
    masks_BKCU = make_masks(random_numbers(view.space.size, 1), design, space=view.space).to(device)
    expected_U = view.space.alive(masks_BKCU[:].flatten(0, 2)).double().mean(0).cpu()
    with masked_objective(view, ops) as objective:
        found_U = objective._kept_shares(make(masks_BKCU))
    assert (found_U is not None) == known
    if found_U is not None:
        assert_close(found_U, expected_U, 0.15)


KERNELS = replace(
    load_backend("torch", torch.device("cpu")),
    name="triton",
    packs=True,
    dtypes=fused.DTYPES,
    activation=fused.activation_of,
)
CHOICES = {
    "plain": ({}, "triton"),
    "on_a_processor": ({"device": "cpu"}, "torch"),
    "wide": ({"dtype": torch.float64}, "torch"),
    "quantised": ({"opaque": "a layer is quantised"}, "triton"),
    "quantised_and_strange": ({"opaque": "a layer is quantised", "activation": nn.Tanh()}, "triton"),
    "strange": ({"activation": nn.Tanh()}, "torch"),
    "without_triton": ({"missing": True}, "torch"),
    "old_card": ({"capability": (7, 5)}, "torch"),
    "by_name": ({"asked": "torch"}, "torch"),
}


@pytest.mark.parametrize(("given", "expected"), CHOICES.values(), ids=CHOICES)
def test_kernels_are_chosen_where_they_can_run(
    given: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU and for such a model, unless another backend is asked for."""

    def load(name: str, device: torch.device) -> Any:
        if name == "triton" and given.get("missing"):
            raise BackendError("Triton cannot be imported")
        return KERNELS if name == "triton" and "capability" not in given else load_backend(name, device)

    monkeypatch.setattr(masking, "load_backend", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: given.get("capability", (9, 0)))
    view: Any = SimpleNamespace(
        device=torch.device(given.get("device", "cuda")),
        model=SimpleNamespace(dtype=given.get("dtype", torch.bfloat16)),
        layers=[SimpleNamespace(ffn=SimpleNamespace(act_fn=given.get("activation", nn.SiLU())))],
        family=SimpleNamespace(activation="act_fn"),
        opaque=given.get("opaque"),
    )
    assert masking.choose_ops(given.get("asked", "auto"), view).name == expected


@pytest.mark.parametrize(
    ("module", "name"),
    [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (nn.ReLU(), "relu")],
)
def test_activations_are_known_by_what_they_compute(module: nn.Module, name: str) -> None:
    """And not by their class; what is only near is another one."""
    assert fused.activation_of(module) == name
    with pytest.raises(ValueError, match="has no kernel"):
        fused.activation_of(lambda x: 1.01 * module(x))
