"""Metrics of gradients, by back-propagation and by forward passes, against plain autograd through the whole model."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import random_tokens, tiny_model
from tolerances import CHAIN, EXACT, LOGITS, assert_close

from bernprune.backends import load_backend
from bernprune.errors import ConfigError, ModelError
from bernprune.models.hooks import hooked
from bernprune.models.view import ModelView, describe
from bernprune.names import Kind
from bernprune.objective import masked_objective
from bernprune.scores import SCORES, Context, Options, initial_scores
from bernprune.scores.fusion import MEMBERS, group_ranks, without_worst
from bernprune.scores.hywia import fused
from bernprune.scores.mini_llm import _slopes, gate_gradients

WINDOWS_WT = random_tokens(4, 9)
FLOAT32 = LOGITS[torch.float32]  # gradients are summed in it
GROUPS, HEAD_DIM, PER_GROUP, CHANNELS = 3, 8, 2, 19
ROWS = {
    "kv_group": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "channel": ("mlp.gate_proj", "mlp.up_proj"),
}
COLUMNS = {"kv_group": "self_attn.o_proj", "channel": "mlp.down_proj"}


def biased() -> Any:
    return tiny_model("llama", attention_bias=True, mlp_bias=True)


def mean_loss(model: Any, windows_WT: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=windows_WT, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows_WT[:, 1:].flatten())


def gradients(model: Any, windows_WT: torch.Tensor) -> dict[str, np.ndarray]:
    """Of every weight, by its name."""
    model.zero_grad()
    mean_loss(model, windows_WT).backward()
    return {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}


def weights_of_units(model: Any, values: dict[str, np.ndarray], layer: int, kind: Kind) -> list[list[np.ndarray]]:
    """Of each unit of a layer its rows and columns, out of an array for each weight."""
    units: list[list[np.ndarray]] = []
    for unit in range(GROUPS if kind == "kv_group" else CHANNELS):
        parts = []
        for name in (*ROWS[kind], COLUMNS[kind]):
            array = values[f"model.layers.{layer}.{name}.weight"]
            array = array.T if name == COLUMNS[kind] else array
            per = len(array) // (GROUPS if kind == "kv_group" else CHANNELS)
            parts += list(array[unit * per : (unit + 1) * per])
        units.append(parts)
    return units


@pytest.mark.parametrize("kind", ["kv_group", "channel"])
@pytest.mark.parametrize("name", ["taylor-vector", "taylor-element", "taylor-second", "hywia"])
def test_taylor_estimates(name: str, kind: Kind) -> None:
    """By loops over the rows and columns of each unit; per parameter, as they compare over the whole model."""
    model = biased()
    mean, single = gradients(model, WINDOWS_WT), [gradients(model, window[None]) for window in WINDOWS_WT]
    w = {key: parameter.detach().numpy() for key, parameter in model.named_parameters()}
    squares = {key: np.mean([grads[key] ** 2 for grads in single], axis=0) for key in w}
    view = describe(model)
    found_U = initial_scores(view, WINDOWS_WT, SCORES[name], rows_per_forward=3)
    for layer in (0, 3):
        fine, coarse, expected = [], [], []
        values = [weights_of_units(model, each, layer, kind) for each in (w, mean, squares)]
        for unit_w, unit_g, unit_f in zip(*values, strict=True):
            vector = element = second = total = fine_sum = 0.0
            for row_w, row_g, row_f in zip(unit_w, unit_g, unit_f, strict=True):
                vector += abs(np.sum(row_w * row_g))
                element += np.sum(np.abs(row_w * row_g))
                second += np.sum(np.abs(row_w * row_g - 0.5 * row_w**2 * row_f))
                fine_sum += np.sum(np.abs(row_w * row_g - 0.5 * row_w**2 * row_g**2))
                total += np.sum(row_w * row_g)
            fine.append(fine_sum)
            coarse.append(abs(total))
            expected.append(
                {"taylor-vector": vector, "taylor-element": element, "taylor-second": second}.get(name, 0.0)
            )
        if name == "hywia":
            for f, c in zip(fine, coarse, strict=True):
                f, c = f / np.mean(fine), c / np.mean(coarse)
                expected.append(np.mean(fine) * (f * np.exp(f) + c * np.exp(c)) / (np.exp(f) + np.exp(c)))
            expected = expected[len(fine) :]
        span = view.space.span(kind, layer)
        costs = view.space.within_U[span]
        assert_close(found_U[span] * costs, torch.tensor(expected, dtype=torch.float64), FLOAT32)


def test_fused_listens_to_what_stands_out() -> None:
    """By hand: a unit that only one estimate finds important goes mostly by that one, whatever the scale of either."""
    fine_N, coarse_N = torch.tensor([1.0, 1.0, 4.0]), torch.tensor([0.1, 0.7, 0.1])
    found = fused(fine_N, coarse_N)
    assert found[2].item() == pytest.approx(2 * (2 - (2 - 1 / 3) / (1 + np.exp(2 - 1 / 3))), rel=1e-5)
    assert found[1].item() == pytest.approx(2 * (7 / 3 - (7 / 3 - 0.5) / (1 + np.exp(7 / 3 - 0.5))), rel=1e-5)
    assert_close(fused(fine_N, 50 * coarse_N), found, FLOAT32)
    assert_close(fused(50 * fine_N, coarse_N), 50 * found, FLOAT32)
    alike_N, told_N = torch.full((4,), 100.0), torch.tensor([1.0, 1.0, 3.0, 0.2])
    assert fused(fine_N, torch.zeros(3)).isfinite().all(), "where nothing is coarse"
    for pair in ((alike_N, told_N), (told_N, alike_N)):
        assert fused(*pair).argmax() == 2


def test_gradients_of_what_is_not_in_floating_point_are_refused() -> None:
    """Such as weights that were quantised."""
    model = tiny_model("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"gradients need weights in floating point, but .* some in torch.int8"):
        initial_scores(describe(model), WINDOWS_WT, SCORES["taylor-element"])


def test_gradients_are_given_back_when_the_model_fails() -> None:
    """What asked for gradients before does so again, and what was gathered is kept."""
    model = tiny_model("llama")
    model.model.norm.weight.grad = torch.ones(36, dtype=torch.float64)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    model.model.layers[3].mlp.up_proj.weight.data[3, 4] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        initial_scores(describe(model), WINDOWS_WT, SCORES["taylor-element"])
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert model.model.norm.weight.grad.sum() == 36


# By forward passes


def context_of(view: ModelView, windows_WT: torch.Tensor = WINDOWS_WT, **options: Any) -> Context:
    return Context(view, windows_WT, 0, load_backend("torch", torch.device("cpu")), 3, Options(**options))


def gate_gradients_by_autograd(view: ModelView) -> torch.Tensor:
    """By gates on the inputs of the attention output and FFN down projections."""
    gates_U = torch.ones(view.space.size, dtype=torch.float64, requires_grad=True)
    handles = []
    for index, layer in enumerate(view.layers):
        kinds: tuple[tuple[Kind, Any, int], ...] = (
            ("kv_group", layer.output, PER_GROUP * HEAD_DIM),
            ("channel", layer.down, 1),
        )
        for kind, projection, width in kinds:
            span = view.space.span(kind, index)
            if span is not None:
                gates_E = gates_U[span].repeat_interleave(width)
                hook = lambda module, args, gates_E=gates_E: (args[0] * gates_E,)  # noqa: E731
                handles.append(projection.register_forward_pre_hook(hook))
    mean_loss(view.model, WINDOWS_WT).backward()
    for handle in handles:
        handle.remove()
    assert gates_U.grad is not None
    return gates_U.grad


@pytest.mark.parametrize("name", ["taylor-vector", "taylor-element"])
def test_more_text_is_no_less_exact_in_16_bits(name: str) -> None:
    """The same windows again and again say the same; gradients of a mean over all of them would vanish."""
    view = describe(tiny_model("llama", torch.float16))
    once, often = (
        initial_scores(view, WINDOWS_WT.repeat(times, 1), SCORES[name], rows_per_forward=4) for times in (1, 64)
    )
    assert_close(often, once, FLOAT32)


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("large", ["stream", "gradient"])
def test_float16_is_exact_enough(large: str, rows: int) -> None:
    """Gradients by a stream are the smaller, the larger it is, and float16 has none below some size, nor above another,
    which sums over tokens may reach."""
    model = tiny_model("llama", torch.float32)
    if large == "stream":
        model.get_input_embeddings().weight.data *= 1e4 / model.get_input_embeddings().weight.std()
    else:
        model.get_output_embeddings().weight.data *= 30
    expected, found = (
        initial_scores(describe(each), WINDOWS_WT.repeat(8, 1), SCORES["taylor-vector"], rows_per_forward=rows)
        for each in (model, copy.deepcopy(model).half())
    )
    assert_close(found, expected, CHAIN[torch.bfloat16])  # many products, there and back


@pytest.mark.parametrize("step", [None, 2**-7])
def test_gradients_of_gates_by_differences(step: float | None) -> None:
    """Unbiased, and as far from the true ones as their variance says."""
    view = describe(tiny_model("qwen2", torch.float64), ("kv_group",))
    grad_U, variance_U = gate_gradients(context_of(view, pairs=200, step=step))
    errors = (grad_U - gate_gradients_by_autograd(view)) / variance_U.sqrt()
    assert 0.5 < errors.square().mean().sqrt() < 1.5
    assert errors.abs().max() < 4


def test_gates_move_as_far_as_their_number_format_lets_them() -> None:
    """By what they are rounded to; a step that is rounded away is refused."""
    view = describe(tiny_model("llama", torch.bfloat16))
    exact, rounded = (gate_gradients(context_of(view, step=step))[0] for step in (2**-6, 0.0141))
    assert_close(rounded, exact, EXACT)  # 1.0141 and 0.9859 are rounded to those
    with pytest.raises(ConfigError, match=r"initial\.step must change 1 in torch\.bfloat16, but is 0\.001"):
        gate_gradients(context_of(view, step=0.001))


def test_the_variance_falls_with_the_number_of_pairs() -> None:
    """And is reported with the scores."""
    view, notes = describe(tiny_model("llama")), [dict[str, float]() for _ in range(2)]
    for pairs, noted in zip((2, 32), notes, strict=True):
        initial_scores(view, WINDOWS_WT, SCORES["mini-llm"], options=Options(pairs=pairs), notes=noted)
    few, many = (noted["standard error of a gradient"] for noted in notes)
    assert few / many == pytest.approx(4, rel=0.4)


def test_mini_llm_is_a_product() -> None:
    """Magnitude and activation are Wanda-sp's."""
    view = describe(tiny_model("llama"))
    grad_U, _ = gate_gradients(context_of(view))
    expected = initial_scores(view, WINDOWS_WT, SCORES["wanda-sp"]) * grad_U.abs()
    assert_close(initial_scores(view, WINDOWS_WT, SCORES["mini-llm"], rows_per_forward=3), expected, 1e-6)


PATHS = dict(zip(("query", "key", "value", "output"), (*ROWS["kv_group"], COLUMNS["kv_group"]), strict=True)) | dict(
    zip(("gate", "up", "down"), (*ROWS["channel"], COLUMNS["channel"]), strict=True)
)


def test_slopes_along_random_directions_of_weights() -> None:
    """Each is the derivative along its noise, which is the same again whenever it is made."""
    model = biased()
    view = describe(model)
    slopes = _slopes(context_of(view, pairs=2, step=1e-4))
    batches = WINDOWS_WT.split(3)
    assert len(slopes) == 4
    for number, (direction, slope) in enumerate(slopes):
        windows_WT = batches[number % 2]
        grads, along = gradients(model, windows_WT), 0.0
        for layer, (name, path) in itertools.product(range(4), PATHS.items()):
            weight = model.model.layers[layer].get_submodule(path).weight
            noise = direction.of(layer, name, weight).double()
            along += (noise * torch.from_numpy(grads[f"model.layers.{layer}.{path}.weight"])).sum().item()
        assert slope == pytest.approx(along * len(windows_WT) / 8, rel=1e-3)


def test_mini_llm_of_weights_sums_products() -> None:
    """|w| |g| times the norm of what the weight reads, over all weights of a unit."""
    model = biased()
    view = describe(model)
    context = context_of(view, pairs=2)
    slopes = _slopes(context)
    caught: dict[str, list[torch.Tensor]] = {}
    layer = model.model.layers[2]
    for name in ("gate_proj", "down_proj"):
        hook = lambda module, args, name=name: caught.setdefault(name, []).append(args[0])  # noqa: E731
        getattr(layer.mlp, name).register_forward_pre_hook(hook)
    model(input_ids=WINDOWS_WT)
    moments = {name: torch.cat(x).flatten(0, 1).square().mean(0).sqrt() for name, x in caught.items()}
    expected = torch.zeros(CHANNELS, dtype=torch.float64)
    for name, read in (("gate", "gate_proj"), ("up", "gate_proj"), ("down", "down_proj")):
        weight = getattr(layer.mlp, f"{name}_proj").weight.detach()
        grad = sum(slope * direction.of(2, name, weight).double() for direction, slope in slopes)
        product = weight.abs() * grad.abs() * moments[read]
        expected += product.sum(0) if name == "down" else product.sum(1)
    for name in ("gate_proj", "down_proj"):
        getattr(layer.mlp, name)._forward_pre_hooks.clear()
    found = SCORES["mini-llm-weights"].run(context)[view.space.span("channel", 2)]
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("name", ["mini-llm", "mini-llm-weights"])
def test_one_estimate_tells_no_error(name: str) -> None:
    view, notes = describe(tiny_model("llama")), dict[str, float]()
    initial_scores(view, WINDOWS_WT[:1], SCORES[name], options=Options(pairs=1), notes=notes)
    assert not notes


def test_the_error_of_gradients_by_weights_is_told() -> None:
    """As large as it is, against the true gradients of all weights that belong to units."""
    model, notes = biased(), dict[str, float]()
    view, pairs = describe(model), 8
    initial_scores(
        view, WINDOWS_WT, SCORES["mini-llm-weights"], options=Options(pairs=pairs), rows_per_forward=3, notes=notes
    )
    slopes, true, errors = _slopes(context_of(view, pairs=pairs)), gradients(model, WINDOWS_WT), []
    for layer, (name, path) in itertools.product(range(4), PATHS.items()):
        weight = model.model.layers[layer].get_submodule(path).weight
        found = sum(slope * direction.of(layer, name, weight).double() for direction, slope in slopes)
        errors.append((found - torch.from_numpy(true[f"model.layers.{layer}.{path}.weight"])).flatten())
    error = torch.cat(errors).square().mean().sqrt().item()
    assert notes["standard error of a gradient"] == pytest.approx(error, rel=0.1)


# Fusions


def test_rank_averages() -> None:
    """Of each unit among those of its layer and kind."""
    view = describe(tiny_model("llama"))
    expected = torch.zeros(view.space.size, dtype=torch.float64)
    for metric in MEMBERS:
        scores_U = initial_scores(view, WINDOWS_WT, metric)
        for group in view.space.groups:
            span = view.space.span(group.kind, group.layer)
            values = scores_U[span].tolist()
            ranked = [(sorted(values).index(value) + 0.5) / len(values) for value in values]
            expected[span] += torch.tensor(ranked) / len(MEMBERS)
    assert_close(initial_scores(view, WINDOWS_WT, SCORES["rank-average"]), expected, 1e-6)


def test_learned_weights_lose_least() -> None:
    """Of the metrics alone and of their average, none leaves less loss when its worst units are masked."""
    view, notes = describe(tiny_model("llama", seed=3)), dict[str, float]()
    fused_U = initial_scores(view, WINDOWS_WT, SCORES["fused"], notes=notes)
    assert sum(notes.values()) == pytest.approx(1) and min(notes.values()) >= 0
    others = [group_ranks(view.space, initial_scores(view, WINDOWS_WT, metric)) for metric in MEMBERS]
    masks = torch.stack([without_worst(view.space, each, 0.3) for each in (fused_U, *others, sum(others))])
    with masked_objective(view) as objective:
        losses = objective.losses(masks, WINDOWS_WT[::4])
    assert losses[0] <= losses.min() + 1e-12


@pytest.mark.parametrize("name", ["taylor-vector", "taylor-element", "taylor-second", "hywia", "ifso"])
def test_gradients_do_not_depend_on_the_mode_of_the_caller(name: str) -> None:
    view = describe(tiny_model("llama", torch.float32))
    expected_U = initial_scores(view, WINDOWS_WT, SCORES[name])
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            assert torch.equal(initial_scores(view, WINDOWS_WT.clone(), SCORES[name]), expected_U)


@pytest.mark.parametrize("name", ["wanda-sp", "taylor-vector", "mini-llm", "block-influence"])
def test_scores_know_no_dropout(name: str) -> None:
    """Of a model in training mode, which it is in again afterwards."""
    model = tiny_model("llama", torch.float32, attention_dropout=0.5)
    kinds = ("attention", "ffn") if name == "block-influence" else ("kv_group", "channel")
    expected_U = initial_scores(describe(model.eval(), kinds), WINDOWS_WT, SCORES[name])
    assert torch.equal(initial_scores(describe(model.train(), kinds), WINDOWS_WT, SCORES[name]), expected_U)
    assert all(module.training for module in model.modules())


def test_a_metric_runs_rows() -> None:
    view = describe(tiny_model("llama", torch.float32))
    with pytest.raises(ConfigError, match="rows_per_forward must be 1 or more, but is -1"):
        initial_scores(view, WINDOWS_WT, SCORES["flap"], rows_per_forward=-1)


def test_ifso_of_a_model_whose_units_give_nothing() -> None:
    """No weight re-adjusts to a gate of theirs; they are worth 0."""
    model = biased().float()
    for layer in model.model.layers:
        for projection in (layer.self_attn.v_proj, layer.mlp.up_proj):
            for parameter in projection.parameters():
                parameter.data.zero_()
    assert initial_scores(describe(model), WINDOWS_WT, SCORES["ifso"]).eq(0).all()


def test_weights_of_kv_groups_count_by_what_enters_them() -> None:
    """Queries, keys and values by the layer's inputs, the output projection by its own."""
    model = biased()
    view = describe(model)
    context = context_of(view, pairs=2)
    slopes, caught = _slopes(context), dict[str, torch.Tensor]()
    layer = model.model.layers[2]

    def noting(name: str) -> Any:
        return lambda module, inputs, output: caught.__setitem__(name, inputs[0])

    with torch.no_grad(), hooked(*((getattr(layer.self_attn, name), noting(name)) for name in ("q_proj", "o_proj"))):
        model(input_ids=WINDOWS_WT)
    norms = {name: x.flatten(0, 1).square().mean(0).sqrt() for name, x in caught.items()}
    expected = torch.zeros(GROUPS, dtype=torch.float64)
    for name in ("query", "key", "value", "output"):
        weight_DE = layer.get_submodule(PATHS[name]).weight.detach()
        gradient_DE = sum(slope * drawn.of(2, name, weight_DE).double() for drawn, slope in slopes)
        parts_DE = weight_DE.abs() * gradient_DE.abs() * norms["o_proj" if name == "output" else "q_proj"]
        expected += parts_DE.sum(0 if name == "output" else 1).view(GROUPS, -1).sum(1)
    found_U = SCORES["mini-llm-weights"].run(context)
    assert_close(found_U[view.space.span("kv_group", 2)], expected, 1e-5)
