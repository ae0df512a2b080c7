"""From a selection to a model on disk, and its figures."""

import gc
import shutil
from typing import Any

import torch

from bernprune.errors import RunError
from bernprune.evaluation.latency import latency
from bernprune.evaluation.perplexity import mean_loss
from bernprune.models.slicing import slice_model
from bernprune.models.view import count_parameters
from bernprune.run.folder import RunFolder
from bernprune.run.opening import open_model
from bernprune.run.plans import describe_plan
from bernprune.run.repairs import Workshop
from bernprune.run.stage import Stage
from bernprune.run.verification import save_and_verify
from bernprune.units import KeepPlan


def check_room(stage: Stage, folder: RunFolder) -> None:
    """Raises ``RunError`` if the disk has no room for what will be kept, in the place of what an earlier run kept."""
    view = stage.view
    prunable = view.space.costs_U("parameters").sum().item()
    removed = stage.budget.sparsity * prunable if stage.budget.measure == "parameters" else 0  # or nobody knows yet
    needed = (view.num_parameters - removed) * stage.full_dtype.itemsize
    free = shutil.disk_usage(folder.path).free + folder.model_bytes()
    if free < needed:
        raise RunError(
            f"the pruned model may take {needed / 2**30:.3g} GiB in {folder.path}, where there is room for "
            f"{free / 2**30:.3g}"
        )


def make_pruned(stage: Stage, folder: RunFolder, mask_U: torch.Tensor, workshop: Workshop | None) -> dict[str, Any]:
    """Repair, slice, evaluate, save and verify; returns its part of the report. The dense model is used up."""
    settings = stage.config.report
    rows = stage.eval_windows_WT[: settings.latency_rows]
    plan = stage.view.space.plan(mask_U)
    times = {"dense": latency(stage.view.model, rows, repeats=settings.latency_repeats)}
    repaired = {"method": "none"} if workshop is None else workshop.repair(plan)
    sliced = slice_model(stage.view.model, plan)
    loss = mean_loss(sliced, stage.eval_windows_WT)
    times["pruned"] = latency(sliced, rows, repeats=settings.latency_repeats)
    parameters = count_parameters(sliced)
    verified = save_and_verify(sliced, stage.tokenizer, folder.model, plan, rows)
    return {
        "repair": repaired,
        "loss": {"pruned": loss},
        "parameters": {"pruned": parameters},
        "latency": {name: figure.to_dict() for name, figure in times.items()},
        "verified": verified,
        "layers": describe_plan(plan),
    }


def timed_initial(stage: Stage, plan: KeepPlan, device: torch.device) -> dict[str, Any]:
    """Latency and size of what the metric alone would give, as part of the report; the dense model is loaded again."""
    gc.collect()  # the model that was saved
    settings = stage.config.report
    initial = slice_model(open_model(stage.config, device), plan)
    timed = latency(initial, stage.eval_windows_WT[: settings.latency_rows], repeats=settings.latency_repeats)
    return {"latency": {"initial": timed.to_dict()}, "parameters": {"initial": count_parameters(initial)}}
