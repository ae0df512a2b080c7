"""Metrics that ask what the loss does once a unit is gone: by second derivatives, after a repair, or by trying it."""

import itertools
from typing import Any

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from tolerances import assert_close

from bernprune.backends import load_backend
from bernprune.errors import ConfigError, ModelError
from bernprune.models.hooks import hooked
from bernprune.models.view import describe
from bernprune.names import Kind
from bernprune.objective import masked_objective
from bernprune.scores import SCORES, Options, initial_scores
from bernprune.scores.base import Context
from bernprune.scores.block_influence import layer_influence
from bernprune.scores.fusion import ranks_of_members
from bernprune.scores.ifso_repaired import errors
from bernprune.scores.stream import without_worst

CPU = torch.device("cpu")
WINDOWS_WT = random_tokens(6, 9)
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 5}


def test_ifso_is_a_product_of_second_derivatives() -> None:
    """|H_mw H_wm 1| by double back-propagation through the whole model, over the root of what a unit costs."""
    model = tiny_model("qwen3", torch.float64, **SMALL)
    view = describe(model)
    gates = torch.ones(view.space.size, dtype=torch.float64, requires_grad=True)
    handles, weights = [], []
    for index, layer in enumerate(view.layers):
        kinds: tuple[tuple[Kind, Any, int], ...] = (("kv_group", layer.output, 16), ("channel", layer.down, 1))
        for kind, projection, width in kinds:
            gates_E = gates[view.space.span(kind, index)].repeat_interleave(width)
            hook = lambda module, args, gates_E=gates_E: (args[0] * gates_E,)  # noqa: E731
            handles.append(projection.register_forward_pre_hook(hook))
            weights.append(projection.weight)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits = model(input_ids=WINDOWS_WT, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS_WT[:, 1:].flatten())
    (by_gates,) = torch.autograd.grad(loss, gates, create_graph=True)
    toward = torch.autograd.grad(by_gates.sum(), weights, retain_graph=True)
    by_weights = torch.autograd.grad(loss, weights, create_graph=True)
    inner = sum((grad * one).sum() for grad, one in zip(by_weights, toward, strict=True))
    assert isinstance(inner, torch.Tensor)
    (expected,) = torch.autograd.grad(inner, gates)
    for handle in handles:
        handle.remove()
    found_U = initial_scores(view, WINDOWS_WT, SCORES["ifso"], rows_per_forward=4)
    assert_close(found_U, expected.abs() / view.space.within_U.sqrt(), 1e-3)  # of differences


def test_ifso_needs_precision() -> None:
    """In bfloat16 the differences of gradients are lost."""
    with pytest.raises(ModelError, match=r"which torch\.bfloat16 cannot hold"):
        initial_scores(describe(tiny_model("llama", torch.bfloat16)), WINDOWS_WT, SCORES["ifso"])


@pytest.mark.parametrize("width", [1, 2])
def test_repaired_errors_are_those_of_least_squares(width: int) -> None:
    """Each unit's columns cut, those of the others solved for anew, and the error measured."""
    generator = torch.Generator().manual_seed(0)
    x_NE = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    x_NE[:, 3] = x_NE[:, 1] + 0.1 * x_NE[:, 2]  # whose loss the others make up for
    weight_DE = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    moments_EE = x_NE.T @ x_NE / 50
    damping = 0.01 * moments_EE.diagonal().mean()
    # The damping is that of rows more, each of which sees one input alone.
    rows_NE = torch.cat([x_NE / 50**0.5, damping.sqrt() * torch.eye(6, dtype=torch.float64)])
    expected, unrepaired = [], []
    for unit in range(6 // width):
        kept = [e for e in range(6) if e // width != unit]
        gone = [e for e in range(6) if e // width == unit]
        target = rows_NE @ weight_DE.T
        solved = torch.linalg.lstsq(rows_NE[:, kept], target).solution
        expected.append((rows_NE[:, kept] @ solved - target).square().sum().item())
        unrepaired.append((rows_NE[:, gone] @ weight_DE[:, gone].T).square().sum().item())
    plain_N, repaired_N = errors(weight_DE, moments_EE, 6 // width)
    assert_close(repaired_N, torch.tensor(expected, dtype=torch.float64), 1e-9)
    assert_close(plain_N, torch.tensor(unrepaired, dtype=torch.float64), 1e-9)


def test_a_unit_that_others_can_stand_in_for_scores_low() -> None:
    """Two channels alike: each alone is nearly free to cut, which no metric of single units sees."""
    model = tiny_model("llama")
    ffn = model.model.layers[1].mlp
    for projection in (ffn.gate_proj, ffn.up_proj):
        projection.weight.data[7] = projection.weight.data[4]
    view = describe(model)
    scores_U = initial_scores(view, WINDOWS_WT, SCORES["ifso-repaired"])[view.space.span("channel", 1)]
    assert set(scores_U.argsort()[:2].tolist()) == {4, 7}


def test_too_few_tokens_say_how_many_are_needed() -> None:
    """A Gram matrix of 48 inputs from 45 tokens has no inverse of its own."""
    view = describe(tiny_model("llama"))
    said = r"45 tokens .* Gram matrix of 48 inputs: at least 48 are needed, which are 6 windows of 9"
    with pytest.raises(ConfigError, match=said):
        initial_scores(view, WINDOWS_WT[:5], SCORES["ifso-repaired"])


def test_a_fusion_is_the_best_that_was_tried() -> None:
    """Of masks that it leaves none of its members', nor that of all alike, has a lower loss; on every fourth window."""
    view = describe(tiny_model("llama", seed=4))
    options, windows_WT = Options(sparsity=0.5), random_tokens(8, 9)
    context = Context(view, windows_WT, 0, load_backend("torch", CPU), 4, options)
    members_MU = ranks_of_members(context)
    candidates = {"all": members_MU.mean(0), **dict(zip("abcd", members_MU, strict=True))}
    candidates["fused"] = initial_scores(view, windows_WT, SCORES["fused"], rows_per_forward=4, options=options)
    masks_KU = torch.stack([without_worst(view.space, scores_U, 0.5) for scores_U in candidates.values()])
    with masked_objective(view) as objective:
        *losses, least = objective.losses(masks_KU, windows_WT[::4]).tolist()
    assert least <= min(losses) + 1e-9 < max(losses)


def test_a_layers_influence_is_what_it_does_to_the_stream() -> None:
    """From what transformers says enters each layer; of a layer whose FFN does nothing, all its attention does."""
    model = tiny_model("llama", torch.float64)
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    view = describe(model)
    context = Context(view, WINDOWS_WT, 0, load_backend("torch", CPU), 4, Options())
    found_L = layer_influence(context, "cosine")
    states = model(WINDOWS_WT, output_hidden_states=True, use_cache=False).hidden_states
    expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(states[:-1])]
    assert_close(found_L[: len(expected)], torch.stack(expected), 1e-9)
    assert found_L.min() > 1e-4


def test_halfway_lies_between() -> None:
    """Its square is the product of what a unit gives and of what is left of it once the others make up for it."""
    view = describe(tiny_model("llama", torch.float64))
    repaired_U, halfway_U = (
        initial_scores(view, WINDOWS_WT, SCORES[name], rows_per_forward=4) for name in ("ifso-repaired", "ifso-halfway")
    )
    plain_U = halfway_U.square() / repaired_U
    assert (plain_U > halfway_U).all() and (halfway_U > repaired_U).all()


@pytest.mark.parametrize("granularity", [("layer",), ("attention", "ffn"), ("layer", "attention", "ffn")], ids="+".join)
def test_blocks_go_one_by_one(granularity: tuple[Kind, ...]) -> None:
    """By trying: each round takes the block with the least loss; those that are left follow by their losses. What that
    costs is no more than what is said before."""
    view = describe(tiny_model("llama", seed=5), granularity)
    space = view.space
    options, tried = Options(sparsity=0.4, kinds=granularity), 0
    found_U = initial_scores(view, WINDOWS_WT, SCORES["block-perplexity"], options=options)
    alive = torch.ones(space.size, dtype=torch.bool)
    expected = torch.zeros(space.size, dtype=torch.float64)
    with masked_objective(view) as objective:
        for rounds in itertools.count():
            losses = {}
            for unit in alive.nonzero()[:, 0].tolist():
                mask = alive.clone()
                mask[unit] = False
                losses[unit] = objective.losses(mask[None], WINDOWS_WT).item()
            gone, tried = min(losses, key=lambda unit: losses[unit]), tried + len(losses)
            mask = alive.clone()
            mask[gone] = False
            mask = space.alive(mask)
            expected[alive & ~mask] = rounds
            alive = mask
            if 1 - (space.costs_U() * alive).sum() / space.costs_U().sum() >= 0.4:
                break
    for place, unit in enumerate(sorted(losses, key=lambda unit: losses[unit])):
        if alive[unit]:
            expected[unit] = rounds + 1 + place / len(losses)
    assert_close(found_U, expected, 1e-9)
    assert rounds >= 1
    stated = SCORES["block-perplexity"].forwards(len(view.layers), options)
    assert stated / 3 < tried <= stated  # it is no more than half where layers go whole


def test_errors_compare_between_layers() -> None:
    """They are shares of what the layer hands on, token by token on average."""
    model = tiny_model("llama")
    view = describe(model)
    found_U = initial_scores(view, WINDOWS_WT, SCORES["ifso-repaired"])
    for index, layer in enumerate(view.layers):
        seen: dict[str, torch.Tensor] = {}
        inputs = (layer.down, lambda _, given, output, seen=seen: seen.__setitem__("x", given[0].flatten(0, 1)))
        stream = (layer.layer, lambda _, given, output, seen=seen: seen.__setitem__("y", output.flatten(0, 1)))
        with torch.no_grad(), hooked(inputs, stream):
            model(input_ids=WINDOWS_WT, use_cache=False)
        x_NF, y_ND = seen["x"], seen["y"]
        _, repaired_F = errors(layer.down.weight.detach(), x_NF.T @ x_NF / len(x_NF), 19)
        expected_F = repaired_F / y_ND.square().sum(1).mean()
        assert_close(found_U[view.space.span("channel", index)], expected_F, 1e-9)
