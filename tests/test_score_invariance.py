"""What holds for every metric that is listed: what must not change its scores, what it costs, what it leaves behind."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, Variant, random_tokens, tiny_model
from tolerances import assert_close

from bernprune.models.view import ModelView, describe
from bernprune.scores import SCORES, Options, initial_scores
from bernprune.scores.base import Metric

WINDOWS_WT = random_tokens(6, 9)
EIGHT_WT = random_tokens(8, 9)  # of which a fusion tries its mixtures on every fourth
OPTIONS = Options(pairs=2)
# That look at text through random numbers of each window.
DRAWING = {"random", "mini-llm", "mini-llm-weights"}
TRIED = {
    "mistral-grouped": torch.float64,
    "qwen2-sliding": torch.bfloat16,
    "qwen3-sliding_biases": torch.float64,
    "llama-multi_query": torch.bfloat16,
}
SOME_VARIANTS = [variant for variant in VARIANTS if variant.name in TRIED]
all_metrics = pytest.mark.parametrize("metric", SCORES.values(), ids=SCORES)


def biased() -> Any:
    """Grouped-query attention, with a bias in every projection."""
    return tiny_model("llama", attention_bias=True, mlp_bias=True)


def view_for(model: Any, metric: Metric) -> ModelView:
    return describe(model, metric.kinds)


def scores_by(model: Any, metric: Metric, windows_WT: torch.Tensor = WINDOWS_WT) -> torch.Tensor:
    return initial_scores(view_for(model, metric), windows_WT, metric, rows_per_forward=3, options=OPTIONS)


def with_permuted_channels(model: Any, order: torch.Tensor) -> Any:
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.data = projection.weight.data[order]
            projection.bias.data = projection.bias.data[order]
        layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data[:, order]
    return model


@all_metrics
def test_permuted_channels_have_permuted_scores(metric: Metric) -> None:
    """And nothing else changes; but for those that draw numbers for each."""
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    plain, permuted = scores_by(biased(), metric), scores_by(with_permuted_channels(biased(), order), metric)
    space = view_for(biased(), metric).space
    expected = plain.clone()
    for layer in range(4):
        span = space.span("channel", layer)
        if span is not None:
            expected[span] = plain[span][order]
    assert torch.allclose(permuted, expected, rtol=1e-4, atol=1e-9) == (metric.name not in DRAWING)


@all_metrics
def test_text_twice_over_says_the_same(metric: Metric) -> None:
    """Scores do not grow with the amount of text."""
    windows_WT = EIGHT_WT if metric.name == "fused" else WINDOWS_WT
    once, twice = (scores_by(biased(), metric, windows_WT.repeat(times, 1)) for times in (1, 2))
    if metric.name in DRAWING - {"random"}:
        assert 0.2 < twice.abs().mean() / once.abs().mean() < 2
    else:
        assert_close(twice, once, 1e-5)


@all_metrics
def test_metrics_leave_the_model_as_it_was_and_repeat_themselves(metric: Metric) -> None:
    """Same logits, same hooks, same gradients asked for, and the same scores again."""
    model = tiny_model("qwen2")
    view = view_for(model, metric)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    before, implementation = model(input_ids=WINDOWS_WT).logits, model.config._attn_implementation
    first, second = (initial_scores(view, WINDOWS_WT, metric, rows_per_forward=3, options=OPTIONS) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float64 and first.isfinite().all()
    assert len(set(first.tolist())) > len(first) // 2
    assert torch.equal(model(input_ids=WINDOWS_WT).logits, before)
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())


@all_metrics
def test_a_metric_costs_what_it_says(metric: Metric) -> None:
    """Windows through a layer's attention; of gradients half is not in forward passes, masks share early layers, and
    some do without it."""
    kinds = tuple(kind for kind in metric.kinds if kind != "layer")  # if one went whole, two would be tried no more
    view, options, rows = describe(tiny_model("llama"), kinds), replace(OPTIONS, kinds=kinds), list[int]()
    view.layers[1].attention.register_forward_pre_hook(
        lambda module, inputs, given: rows.append(len(given["hidden_states"])), with_kwargs=True
    )
    initial_scores(view, EIGHT_WT, metric, rows_per_forward=3, options=options)
    stated = metric.forwards(len(view.layers), options) * len(EIGHT_WT)
    assert stated / 3 <= sum(rows) <= stated


@pytest.mark.parametrize("variant", SOME_VARIANTS, ids=str)
@all_metrics
def test_every_family_can_be_scored(metric: Metric, variant: Variant) -> None:
    """With whatever heads, biases and windows of attention, in bfloat16 too but where that is refused."""
    dtype = torch.float32 if metric.name == "ifso" else TRIED[variant.name]
    view = view_for(variant.model(dtype), metric)
    scores_U = initial_scores(view, WINDOWS_WT, metric, rows_per_forward=4, options=OPTIONS)
    assert scores_U.shape == (view.space.size,) and scores_U.isfinite().all() and len(set(scores_U.tolist())) > 2


@all_metrics
def test_how_many_windows_run_at_once_does_not_matter(metric: Metric) -> None:
    """But for noise that each batch has of its own."""
    model = biased()
    one, other = (
        initial_scores(view_for(model, metric), WINDOWS_WT, metric, rows_per_forward=rows, options=OPTIONS)
        for rows in (1, 4)
    )
    if metric.name in DRAWING - {"random"}:
        assert not torch.allclose(one, other)
    else:
        assert_close(one, other, 1e-5)
