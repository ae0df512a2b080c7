"""What the report of a run says, but for what ``make_pruned`` measures; and plans for other sparsities, evaluated."""

import logging
import math
from typing import Any, get_args

import torch

from bernprune.evaluation.latency import machine
from bernprune.evaluation.perplexity import mean_loss, perplexity
from bernprune.names import CapName
from bernprune.run.effort import windows_run
from bernprune.run.finals import Finals
from bernprune.run.folder import RunFolder
from bernprune.run.origin import versions
from bernprune.run.plans import Learned, plans_table, removed_share, write_plan
from bernprune.run.repairs import policy_windows
from bernprune.run.stage import Stage
from bernprune.run.workload import Work
from bernprune.settings import merge
from bernprune.storage import write_bytes

logger = logging.getLogger(__name__)


def search_figures(stage: Stage, dense_loss: float, work: Work, finals: Finals) -> dict[str, Any]:
    """Of the search and the final choice, while its model is still there."""
    model, sequences = stage.view.model, work.sequences + finals.sequences
    return {
        "dtype": stage.dtype if stage.dtype != "same" else str(model.dtype).removeprefix("torch."),
        "dense_loss": dense_loss,
        "sequences": sequences,
        "given": stage.workload.sequences,
        "forward_tokens": sequences * stage.config.data.window,
        "seconds": round(work.seconds + finals.seconds, 2),
        "steps": work.step,
        "ended": stage.workload.why_over(work),
        "finals": {"sequences": finals.sequences, "ended": finals.ended, "heats": finals.heats},
        "machine": machine(model.device),
    }


def facts(full: Stage, mask_U: torch.Tensor) -> dict[str, Any]:
    """What was pruned, with what, and how much of it."""
    config, budget, model, space = full.config, full.budget, full.view.model, full.view.space
    mask_U = space.mask(space.plan(mask_U))  # of a block with nothing in it, all goes
    prunable = int(space.costs_U("parameters").sum().item())
    costs = {name: space.costs_U(name).sum().item() for name in get_args(CapName)}
    return {
        "seed": config.seed,
        "model": {"path": config.model.path, "type": model.config.model_type, "dtype": str(model.dtype)},
        "text": {"path": config.data.text, "sha256": full.text_sha256},
        "sparsity": {
            "target": config.budget.sparsity,
            "measure": config.budget.measure,
            "achieved": budget.removed_share(mask_U),
            "block_parameters": removed_share(space, mask_U),
            "removed": {name: removed_share(space, mask_U, name) for name, cost in costs.items() if cost},
            "also": {cap.name: {"target": cap.share, "achieved": cap.removed_share(mask_U)} for cap in budget.caps},
        },
        "parameters": {"prunable": prunable, "dense": full.view.num_parameters},
        "protocol": full.protocol.to_dict(),
        "machine": machine(model.device),
        "versions": versions(),
    }


def losses_by_metric(full: Stage, dense_loss: float | None, masks: dict[str, torch.Tensor]) -> dict[str, float | None]:
    """Losses of the model itself, dense and under what the metric would keep."""
    return {
        "dense": mean_loss(full.view.model, full.eval_windows_WT) if dense_loss is None else dense_loss,
        "uniform": mask_loss(full, masks["uniform"], "of the metric's uniform selection"),
        "initial": mask_loss(full, masks["initial"], "of the initial selection"),
    }


def mask_loss(stage: Stage, mask_U: torch.Tensor, which: str) -> float | None:
    """Mean loss of one mask on the evaluation text, nats per token; None if that is not finite, which is logged.

    That is the fault of this selection alone: the run may keep another.
    """
    with stage.objective() as objective:
        loss = objective.losses(mask_U[None], stage.eval_windows_WT).item()
    if not math.isfinite(loss):
        logger.warning("the loss %s on the evaluation text is %s", which, loss)
        return None
    return loss


def write_plans(stage: Stage, folder: RunFolder, learned: Learned) -> list[dict[str, Any]]:
    """Write and evaluate the plans for other sparsities; a loss that is not finite gives no figure."""
    found, config = [], stage.config
    nested = config.plans.nested
    for sparsity in sorted(config.plans.sparsities):
        mask_U = learned.select(config, sparsity, nested=nested)
        plan = learned.space.plan(mask_U)
        path = write_plan(folder, sparsity, plan, nested=nested)
        loss = mask_loss(stage, mask_U, f"at sparsity {sparsity:g}")
        figure = None if loss is None else perplexity(loss)
        removed = removed_share(learned.space, learned.space.mask(plan))
        found.append({"sparsity": sparsity, "removed": removed, "loss": loss, "perplexity": figure, "plan": path.name})
    if found:
        write_bytes(folder.plans / "table.md", plans_table(found, stage.protocol).encode())
    return found


def last_round(folder: RunFolder) -> dict[str, Any]:
    """What was known at the end of the last round of the search; empty without any."""
    rounds = [record["round"] for record in folder.read_metrics() if "round" in record]
    return rounds[-1] if rounds else {}


def windows_of_run(stage: Stage, report: dict[str, Any], *, again: bool) -> dict[str, int]:
    """See ``windows_run``; ``again`` if the dense model was evaluated in two number formats."""
    evaluations = len(report["loss"]) + len(report["plans"]) + again
    return windows_run(
        stage.config,
        stage.view.architecture,
        scored=len(stage.initial_windows_WT),
        fitted=policy_windows(stage),
        search=report["search"],
        repair=report["repair"],
        evaluated=evaluations * len(stage.eval_windows_WT),
    )


def with_ratios(report: dict[str, Any]) -> dict[str, Any]:
    """A report with what follows from its figures."""
    losses, parameters = report["loss"], report["parameters"]
    perplexities = {name: None if loss is None else perplexity(loss) for name, loss in losses.items()}
    total = 1 - parameters["pruned"] / parameters["dense"]
    return merge(report, {"perplexity": perplexities, "sparsity": {"total_parameters": total}})
