"""What a run would work on and what it would take, told before it starts."""

import time
from typing import Any

import torch

from bernprune.backends import find_device, load_backend
from bernprune.config import RunConfig
from bernprune.evaluation.perplexity import check_window
from bernprune.models.view import ModelView, describe
from bernprune.objective import LOGIT_BYTES, masked_objective
from bernprune.run.loop import default_sequences
from bernprune.run.stage import check_family, open_model
from bernprune.units import KINDS, UnitGroup


def forecast(config: RunConfig) -> str:
    """Units per layer, cost per unit, what is left out, expected memory and time, as text.

    The time comes from one step's forward passes on random tokens, here and now.
    """
    device = find_device(config.model.device)
    check_window(check_family(config), config.data.window)
    view = describe(open_model(config, device), config.granularity, sequence_length=config.budget.flops_window)
    return "\n".join([*_units(view), "", *_left_out(view, config), "", *_work(view, config, device)])


def _units(view: ModelView) -> list[str]:
    shape = view.architecture.layers[0]
    head = (
        f"{view.architecture.model_type}, {len(view.architecture.layers)} layers, hidden size "
        f"{view.architecture.hidden_size}, {shape.query_heads} query heads in {shape.kv_groups} kv groups of head size "
        f"{view.architecture.head_dim}, {shape.channels} FFN channels"
    )
    lines = [head, "", f"{'unit':<12}{'per layer':>12}{'in all':>10}{'parameters each':>18}{'share':>9}"]
    total = view.space.costs_U("parameters").sum().item()
    for kind in KINDS:
        groups = [group for group in view.space.groups if group.kind == kind]
        if groups:
            lines.append(_unit_line(kind, groups, total))
    return lines


def _unit_line(kind: str, groups: list[UnitGroup], total: float) -> str:
    count = sum(group.count for group in groups)
    costs = sorted({group.parameters for group in groups})
    each = f"{costs[0]:,}" if len(costs) == 1 else f"{costs[0]:,}-{costs[-1]:,}"
    share = sum(group.count * group.parameters for group in groups) / total
    return f"{kind:<12}{max(group.count for group in groups):>12,}{count:>10,}{each:>18}{share:>9.1%}"


def _left_out(view: ModelView, config: RunConfig) -> list[str]:
    prunable, total = int(view.space.costs_U("parameters").sum().item()), view.num_parameters
    kept = "attention of layer 0 (caches take their length from it)"
    return [
        f"prunable     {prunable:,} of {total:,} parameters ({prunable / total:.1%}); sparsity "
        f"{config.budget.sparsity:g} removes {config.budget.sparsity * prunable / total:.1%} of all",
        "left out     embeddings, output embedding, final norm, and what no chosen level removes; "
        f"{kept} is never removed whole",
    ]


def _work(view: ModelView, config: RunConfig, device: torch.device) -> list[str]:
    search = config.search
    sequences = search.sequences if search.sequences is not None else default_sequences(view.space.size)
    seconds_each = _time_sequences(view, config)
    weights = sum(p.numel() * p.element_size() for p in view.model.parameters())
    rows = min(search.rows_per_forward, search.masks * search.windows)
    width = max(layer.channels for layer in view.architecture.layers)
    # Gate, up and their product, and the residual stream a few times over, of the one layer at work.
    activations = (
        rows * config.data.window * (3 * width + 6 * view.architecture.hidden_size) * view.model.dtype.itemsize
    )
    memory = weights + activations + 3 * LOGIT_BYTES
    return [
        f"memory       about {memory / 2**30:.2f} GiB on {device} (weights {weights / 2**30:.2f} GiB)",
        f"time         about {sequences * seconds_each:,.0f} s of search for {sequences:,} sequences of "
        f"{config.data.window} tokens ({1 / seconds_each:,.0f} a second, measured now on {device})",
    ]


def _time_sequences(view: ModelView, config: RunConfig) -> float:
    """Seconds a sequence."""
    search, ops = config.search, load_backend(config.backend, next(view.model.parameters()).device)
    masks_KU = torch.ones(search.masks, view.space.size, dtype=torch.bool)
    vocab: Any = view.model.config.vocab_size
    tokens_BT = torch.randint(vocab, (search.windows, config.data.window), generator=torch.Generator().manual_seed(0))
    with masked_objective(view, ops, kind=search.objective, rows_per_forward=search.rows_per_forward) as objective:
        objective.losses(masks_KU, tokens_BT)
        started = time.perf_counter()
        objective.losses(masks_KU, tokens_BT)
    return (time.perf_counter() - started) / (search.masks * search.windows)
