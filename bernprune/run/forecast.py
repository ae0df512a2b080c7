"""What a run would work on and what it would take, told before it starts."""

import statistics
from typing import Any

import torch

from bernprune.backends import find_device
from bernprune.config import RunConfig
from bernprune.costs import timed
from bernprune.custom import blaming, unchanging
from bernprune.evaluation.perplexity import check_window
from bernprune.losses import LOGIT_BYTES
from bernprune.models.masking import choose_ops
from bernprune.models.products import quick_products
from bernprune.models.shortening import stored_bytes
from bernprune.models.view import ModelView
from bernprune.objective import masked_objective
from bernprune.run.effort import (
    Effort,
    kept_bytes,
    policy_bytes,
    policy_weights,
    repair_bytes,
    repairs_of,
    states_bytes,
)
from bernprune.run.initial import check_scores, scoring_sequences
from bernprune.run.loop import evaluate_step
from bernprune.run.methods import check_methods, custom_places, loss_of, reads_activity
from bernprune.run.opening import Opened, check_family, open_view
from bernprune.run.searches import make_search
from bernprune.run.stage import row_bytes, rows_per_forward, try_budget
from bernprune.run.workload import make_budget, make_limits, plan_work
from bernprune.units import KINDS, UnitGroup

_TIMED_STEPS = 3  # after one that warms up
_TIMED_SECONDS = 10.0  # after which no other step is timed


def forecast(config: RunConfig) -> str:
    """Units per layer, cost per unit, what is left out, expected memory and time, as text.

    The time comes from a few steps on random tokens, here and now; from one, where steps take long.
    """
    with unchanging(), blaming(custom_places(config)):
        return _forecast(config)


def _forecast(config: RunConfig) -> str:
    check_scores(config)
    check_methods(config)
    device = find_device(config.model.device)
    check_window(check_family(config), config.longest_window)
    opened = open_view(config, device, config.search.dtype)
    view = opened.view
    try_budget(config, make_budget(config, view.space), make_limits(config))
    return "\n".join([*_units(view), "", *_left_out(view, config), "", *_work(opened, config, device)])


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
    sparsity = config.budget.sparsity
    removes = f"removes {sparsity * prunable / total:.1%} of all"
    if config.budget.measure != "parameters":
        removes = "is of their FLOPs"
    return [
        f"prunable     {prunable:,} of {total:,} parameters ({prunable / total:.1%}); sparsity {sparsity:g} {removes}",
        "left out     embeddings, output embedding, final norm, and what no chosen level removes; "
        f"{kept} is never removed whole",
    ]


def _work(opened: Opened, config: RunConfig, device: torch.device) -> list[str]:
    view, search, data = opened.view, config.search, config.data
    work = plan_work(config, view.space)
    with quick_products(device, view.model.dtype):
        seconds_each = _time_sequences(view, config)
    evaluated = ["dense", "uniform", "initial", "pruned", *config.plans.sparsities]
    if config.repair.method != "none":
        evaluated.append("unrepaired")
    if opened.dtype != "same":
        evaluated.append("dense, as it is searched on")
    evaluations = len(evaluated)
    others = scoring_sequences(config, len(view.layers)) + evaluations * (data.eval_tokens // data.window)
    weights, full = stored_bytes(view.model), view.num_parameters * opened.full.itemsize
    searching = weights + _activations(view, config) + int(2.5 * LOGIT_BYTES[device.type])
    repairing = full + repair_bytes(config, view.architecture)
    for_policy = policy_bytes(config, view.space, opened.full.itemsize)
    for_repair = sum(count(config, view.architecture, opened.full.itemsize) for count in (kept_bytes, states_bytes))
    if device.type == "cpu":
        searching, repairing = searching + for_policy, repairing + for_repair
    memory, held = max(searching, repairing, _to_verify(device, full)), f"weights {weights / 2**30:.2f} GiB"
    if opened.dtype != "same":
        held += f" in {opened.dtype} while it is searched, {full / 2**30:.2f} GiB when it is sliced"
    kept_aside = 0 if device.type == "cpu" else max(for_policy, for_repair)
    aside = f", and {kept_aside / 2**30:.2f} GiB on the CPU" if kept_aside else ""
    speed = f"{1 / seconds_each:,.0f} a second" if seconds_each < 0.5 else f"{seconds_each:,.1f} s each"
    if work.sequences is None:
        assert search.seconds is not None, "nothing limits the search"
        seconds, limit = search.seconds, ", as search.seconds says"
    else:
        seconds = work.sequences * seconds_each
        limit = f", but no more than search.seconds {search.seconds:g}" if work.sequences and search.seconds else ""
    most = "about" if work.regret is None else "at most about"
    return [
        f"memory       about {memory / 2**30:.2f} GiB on {device} ({held}){aside}",
        f"time         {most} {seconds:,.0f} s of search for {seconds / seconds_each:,.0f} sequences of {data.window} "
        f"tokens{limit} ({speed}, measured now on {device}), and "
        f"{others * seconds_each:,.0f} s or less of scoring and evaluation",
        *_closed_forms(view, config, device, seconds_each),
    ]


def _closed_forms(view: ModelView, config: RunConfig, device: torch.device, seconds_each: float) -> list[str]:
    """Time of what is solved in closed form, by counting, at the speed of matrices here and now."""
    repairs = repairs_of(config, view.architecture)
    fitting = policy_weights(config, view.space)
    told = []
    if repairs:
        seconds = sum((effort for _, effort in repairs), Effort()).seconds(device, seconds_each)
        told.append(f"{seconds:,.0f} s for {len(repairs)} repairs ({', '.join(name for name, _ in repairs)})")
    if fitting != Effort():
        told.append(f"{fitting.seconds(device, seconds_each):,.0f} s to fit weights to the policy")
    return [f"             about {' and '.join(told)}, by counting operations"] if told else []


def _activations(view: ModelView, config: RunConfig) -> int:
    """Bytes of what rows that go together hold; and of what a step sums over the tokens of its windows, in float64."""
    search, widths = config.search, [layer.channels for layer in view.architecture.layers]
    rows = min(rows_per_forward(config, view), search.masks * search.windows)
    read = 3 * search.windows * sum(widths) if reads_activity(config) else 0
    return rows * row_bytes(config, view) + 8 * read


def _to_verify(device: torch.device, full: int) -> int:
    """Bytes of the model itself and of what the clean process loads to verify the result; a GPU gives up one first,
    and what does not fit is not put on it."""
    return 2 * full if device.type == "cpu" else 0


def _time_sequences(view: ModelView, config: RunConfig) -> float:
    """Seconds a sequence of whole steps: sampling, forward passes, and the update of the policy."""
    settings, ops = config.search, choose_ops(config.backend, view)
    budget = make_budget(config, view.space)
    keep_U = torch.full((view.space.size,), 1 - config.budget.sparsity, dtype=torch.float64)
    search = make_search(config, budget, keep_U, keep_U[:, None], ops.sums)
    vocab: Any = view.model.config.vocab_size
    tokens_BT = torch.randint(vocab, (settings.windows, config.data.window), generator=torch.Generator().manual_seed(0))
    rows = rows_per_forward(config, view)
    with masked_objective(view, ops, kind=loss_of(settings), rows_per_forward=rows) as objective:

        def run(step: int) -> None:
            masks_BKCU = search.ask(step).to(objective.device)
            losses_BKC, reference_BC, reading = evaluate_step(objective, search, masks_BKCU, tokens_BT, keep_U > 0)
            search.tell(
                masks_BKCU,
                losses_BKC,
                learning_rate=settings.learning_rate,
                reference_BC=reference_BC,
                reading=reading,
            )

        times = timed(run, _TIMED_STEPS, _TIMED_SECONDS)
    return statistics.fmean(times) / plan_work(config, view.space).step_sequences
