"""The whole road: load, score, search, select, slice, save, verify, report."""

import json
import logging
import math
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError

from bernprune.config import RunConfig, make_config
from bernprune.costs import NEVER, Costs
from bernprune.errors import BernpruneError, RunError
from bernprune.evaluation.latency import machine
from bernprune.evaluation.perplexity import mean_loss, perplexity
from bernprune.models.view import fingerprint
from bernprune.names import CapName, SearchDtype
from bernprune.own import blaming, unchanging
from bernprune.picture import draw
from bernprune.policy.bernoulli import reordered
from bernprune.policy.search import MaskSearch
from bernprune.policy.selection import select
from bernprune.progress import bars
from bernprune.run.checkpoint import read_state, write_state
from bernprune.run.effort import windows_run
from bernprune.run.finals import Finals, run_finals
from bernprune.run.finishing import check_room, make_pruned, timed_initial
from bernprune.run.folder import RunFolder, open_run, versions
from bernprune.run.loop import current_selection, run_search
from bernprune.run.methods import places_of_ones_own
from bernprune.run.plans import Learned, plans_table, removed_share, write_plan
from bernprune.run.repairs import Workshop, expected_weights
from bernprune.run.scoring import ByMetric, Start, take_start
from bernprune.run.searches import make_search
from bernprune.run.stage import Stage, set_stage
from bernprune.run.verification import reason
from bernprune.run.workload import Work
from bernprune.settings import absolute, merge
from bernprune.storage import write_bytes, write_json

logger = logging.getLogger(__name__)


def prune(
    config: RunConfig, out: str | Path, *, overwrite: bool = False, progress: bool | None = None
) -> dict[str, Any]:
    """Prune a model as configured, in the run folder ``out``, and return the report.

    An unfinished run of the same configuration is continued. With ``progress`` bars are shown; None: on a terminal.

    Raises:
        BernpruneError: anything that the caller can mend; before the run starts, nothing is left behind.
    """
    with bars(progress):
        return _prune(config, RunFolder(Path(out)), overwrite=overwrite)


def _prune(config: RunConfig, folder: RunFolder, *, overwrite: bool = False, finish: bool = False) -> dict[str, Any]:
    folder.look(config, overwrite=overwrite)
    with unchanging():
        return _in_folder(set_stage(config), folder, overwrite=overwrite, finish=finish)


def _in_folder(stage: Stage, folder: RunFolder, *, overwrite: bool, finish: bool) -> dict[str, Any]:
    config = stage.config
    with folder.locked():
        continued = folder.check(config, overwrite=overwrite)  # another process may have been here meanwhile
        try:
            with blaming(places_of_ones_own(config)):  # before the disk is blamed
                return _run(stage, folder, continued=continued, finish=finish)
        except torch.OutOfMemoryError as error:
            raise RunError(f"the GPU's memory is full; {_how_to_need_less(folder, stage)}") from error
        except (OSError, SafetensorError) as error:  # full disks reach us as either
            raise RunError(f"{folder.path} cannot be written: {reason(error)}{_how_to_continue(folder)}") from error
        except BernpruneError as error:
            raise type(error)(f"{error}{_how_to_continue(folder)}") from error


def _how_to_continue(folder: RunFolder) -> str:
    if not folder.unfinished:
        return ""
    return f"; when that is mended, continue with: bernprune resume {shlex.quote(str(folder.path))}"


def _how_to_need_less(folder: RunFolder, stage: Stage) -> str:
    if not folder.unfinished:
        return "lower search.rows_per_forward and report.latency_rows"
    rows, latency_rows = max(1, stage.rows // 2), max(1, stage.config.report.latency_rows // 2)
    return (
        "if a repair filled it, --set repair.method=none does without; "
        f"continue with less at once: bernprune resume {shlex.quote(str(folder.path))} "
        f"--set search.rows_per_forward={rows} --set report.latency_rows={latency_rows}"
    )


def resume(
    out: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    finish: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Continue the unfinished run in ``out``, with ``changes`` to settings of ``FREE_SETTINGS``, as nested plain data.

    Args:
        finish: end the search where it stands or, if it is over, the final choice, and go on with what comes after.

    Raises:
        RunError: there is none, or another setting was changed.
        ConfigError: a setting that is unknown, or out of range.
    """
    folder = open_run(Path(out))
    if folder.finished:
        raise RunError(f"the run in {out} is finished; its result lies in {folder.model}")
    config = folder.read_config()
    changed = make_config(merge(config.to_dict(), absolute(dict(changes)))) if changes else config
    with bars(progress):
        return _prune(changed, folder, finish=finish)


def _run(stage: Stage, folder: RunFolder, *, continued: bool, finish: bool) -> dict[str, Any]:
    """All that can fail on its input, a model that gives NaN, say, fails before the run is started in its folder."""
    Workshop.of_stage(stage)  # whether there is text enough
    check_room(stage, folder)
    known = _known_stage(stage, folder) if continued else None
    stage = known or replace(stage, costs=stage.measured_costs())
    dense_loss = mean_loss(stage.view.model, stage.eval_windows_WT)
    stored = _stored_start(folder) if continued else None
    start = stored or take_start(stage)
    search = make_search(stage.config, stage.budget, start.probs_U, start.scores_US, stage.ops.sums)
    start_U, metric = search.probs_U, ByMetric.of(stage, start, search.probs_U)
    by_metric, graded_U = metric.masks(stage), metric.graded_U
    with expected_weights(stage) as weights:  # before the start, as it may fail on its input
        inputs = {"text": stage.text_sha256, "evaluation": stage.protocol.text_sha256}
        if known is not None or not continued:  # else it is not known in which number format the run began
            inputs["weights"] = fingerprint(stage.view.model)
        if continued:
            folder.go_on(stage.config, inputs)
        else:
            folder.start(stage.config, inputs)
        if known is None:
            write_json(folder.costs, {"rows": stage.rows, "dtype": stage.dtype, **stage.costs.to_dict()})
        if stored is None:
            write_state(folder.initial, vars(start))
        work = run_search(stage, folder, search, graded_U, by_metric["initial"], weights, finish=finish)
        finalists = _finalists(stage, search, graded_U, by_metric)
        finals = run_finals(stage, folder, search, finalists, graded_U, work, finish=finish)
    learned_U = metric.initial_U if torch.equal(search.priorities_U, start_U) else search.priorities_U
    followed = metric.followed(stage.view.space, learned_U)
    learned = _write_kept(stage, folder, finals, followed, graded_U)
    folder.remove_model()  # of an earlier try that did not reach its report
    search_report = _search_report(stage, dense_loss, work, finals)
    full = stage.with_weights("same")
    workshop = Workshop.of_stage(full, work.step)
    judged = _judge_repaired(full, workshop, finals, finalists)
    if judged:
        learned = _write_kept(full, folder, finals, followed, graded_U)  # which may be another now
    losses = _masked_losses(full, dense_loss if full is stage else None, by_metric)
    if workshop is not None:
        losses["unrepaired"] = mask_loss(full, finals.mask_U, "before its repair")
    report = {
        "search": search_report
        | {"kept": finals.kept, "changed_units": int((by_metric["initial"] != finals.mask_U).sum())},
        "diagnostics": _last_round(folder),
        "repair": judged,
        **_report_head(full, finals.mask_U),
        "loss": losses,
        "plans": _plans(full, folder, learned),
    }
    device = full.view.device  # of a model that is used up below
    try:
        report = merge(report, make_pruned(full, folder, finals.mask_U, workshop))
        report = _with_ratios(report | {"windows_run": _windows_run(full, report, again=full is not stage)})
        write_json(folder.report, report)
    except BaseException:
        folder.report.unlink(missing_ok=True)  # the run is not finished,
        folder.remove_model()  # and nobody must take this for a verified model; the plan is kept
        raise
    return _with_extras(full, folder, report, by_metric["initial"], device)


def _finalists(
    stage: Stage, search: MaskSearch, graded_U: torch.Tensor, metric: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What may be kept, by name: what was learned, its widths in the metric's order, and the metric's own."""
    learned: dict[str, torch.Tensor] = {}
    if stage.config.searches:
        widths_U = reordered(stage.view.space, search.priorities_U, graded_U)
        learned = {
            "learned": current_selection(search, graded_U, stage.limits),
            "widths": select(widths_U, stage.budget, limits=stage.limits, tie_break_U=graded_U),
        }
    finalists: dict[str, torch.Tensor] = {}
    for name, mask_U in (learned | metric).items():
        if not any(mask_U.equal(other_U) for other_U in finalists.values()):
            finalists[name] = mask_U
    return finalists


def _write_kept(
    stage: Stage, folder: RunFolder, finals: Finals, followed: dict[str, torch.Tensor], graded_U: torch.Tensor
) -> Learned:
    """Write the plan, and what decides at other sparsities; returns the latter."""
    priorities_U = followed[finals.kept] if finals.priorities_U is None else finals.priorities_U
    learned = Learned(stage.view.space, priorities_U, graded_U, finals.mask_U)
    learned.write(folder.learned)
    write_json(folder.plan, stage.view.space.plan(finals.mask_U).to_dict())
    return learned


def _judge_repaired(
    stage: Stage, workshop: Workshop | None, finals: Finals, finalists: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Keep what is best after repair, if that is asked for."""
    if workshop is None or not stage.config.judges_finalists:
        return {}
    rivals = {name: mask_U for name, mask_U in finalists.items() if name != finals.kept}
    others = {name: mask_U for name, mask_U in rivals.items() if not mask_U.equal(finals.mask_U)}
    masks = {finals.kept: finals.mask_U, **others}
    best, losses = workshop.prefer({name: stage.view.space.plan(mask_U) for name, mask_U in masks.items()})
    if best in others:
        finals.kept, finals.mask_U, finals.priorities_U = best, others[best], None
    return {"finalists": losses}


def _with_extras(
    stage: Stage, folder: RunFolder, report: dict[str, Any], initial_U: torch.Tensor, device: torch.device
) -> dict[str, Any]:
    """What a finished run is none the worse without: the time of what the metric alone would give, and the picture."""
    try:
        if stage.config.report.initial_latency:
            report = merge(report, timed_initial(stage, stage.view.space.plan(initial_U), device))
            write_json(folder.report, report)
    except Exception as error:  # no room for the dense model once more, say
        logger.warning("the initial metric's model could not be timed: %s", str(error) or type(error).__name__)
    try:
        write_bytes(folder.picture, draw(report, folder.read_metrics()))
    except Exception as error:  # matplotlib and what it calls raise nearly every kind
        logger.warning("%s could not be drawn: %s", folder.picture, error)
    return report


def _known_stage(stage: Stage, folder: RunFolder) -> Stage | None:
    """The stage with the costs and rows that the run began with; None if it was killed before it knew them."""
    try:
        stored = json.loads(folder.costs.read_text(encoding="utf-8"))
        known = {"listing": NEVER} | stored  # unless said: no lists, and the model's own dtype
        costs, rows = Costs(*(float(known[field.name]) for field in fields(Costs))), int(stored["rows"])
        dtype = stored.get("dtype", "same")
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if dtype not in get_args(SearchDtype):
        return None
    stage, given = stage.with_weights(dtype), stage.config.search.rows_per_forward
    return replace(stage, costs=costs, rows=rows if given == "auto" else given)


def _stored_start(folder: RunFolder) -> Start | None:
    """The start of the run that is continued; None if it was killed before it had one."""
    if not folder.initial.is_file():
        return None
    try:
        state = read_state(folder.initial)
    except RunError as error:
        logger.warning("%s; computing the start again", error)
        return None
    return Start(**state) if state.keys() == Start.__dataclass_fields__.keys() else None  # not in this form


def _plans(stage: Stage, folder: RunFolder, learned: Learned) -> list[dict[str, Any]]:
    """Write and evaluate the plans for other sparsities; a loss that is not finite gives no figure."""
    found, config = [], stage.config
    nested = config.plans.nested
    for sparsity in sorted(config.plans.sparsities):
        mask_U = learned.select(config, sparsity, nested=nested)
        path = write_plan(folder, sparsity, learned.space.plan(mask_U), nested=nested)
        loss = mask_loss(stage, mask_U, f"at sparsity {sparsity:g}")
        figure = None if loss is None else perplexity(loss)
        removed = removed_share(learned.space, mask_U)
        found.append({"sparsity": sparsity, "removed": removed, "loss": loss, "perplexity": figure, "plan": path.name})
    if found:
        write_bytes(folder.plans / "table.md", plans_table(found, stage.protocol).encode())
    return found


def _last_round(folder: RunFolder) -> dict[str, Any]:
    """What was known at the end of the last round of the search; empty without any."""
    rounds = [record["round"] for record in folder.read_metrics() if "round" in record]
    return rounds[-1] if rounds else {}


def _masked_losses(
    full: Stage, dense_loss: float | None, by_metric: dict[str, torch.Tensor]
) -> dict[str, float | None]:
    """Losses of the model itself, dense and under what the metric would keep."""
    return {
        "dense": mean_loss(full.view.model, full.eval_windows_WT) if dense_loss is None else dense_loss,
        "uniform": mask_loss(full, by_metric["uniform"], "of the metric's uniform selection"),
        "initial": mask_loss(full, by_metric["initial"], "of the initial selection"),
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


def _search_report(stage: Stage, dense_loss: float, work: Work, finals: Finals) -> dict[str, Any]:
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


def _windows_run(stage: Stage, report: dict[str, Any], *, again: bool) -> dict[str, int]:
    """See ``windows_run``; ``again`` if the dense model was evaluated in two number formats."""
    evaluations = len(report["loss"]) + len(report["plans"]) + again
    return windows_run(
        stage.config,
        stage.view.architecture,
        search=report["search"],
        repair=report["repair"],
        evaluated=evaluations * len(stage.eval_windows_WT),
    )


def _report_head(full: Stage, mask_U: torch.Tensor) -> dict[str, Any]:
    config, budget, model, space = full.config, full.budget, full.view.model, full.view.space
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


def _with_ratios(report: dict[str, Any]) -> dict[str, Any]:
    """A report with what follows from its figures."""
    losses, parameters = report["loss"], report["parameters"]
    perplexities = {name: None if loss is None else perplexity(loss) for name, loss in losses.items()}
    total = 1 - parameters["pruned"] / parameters["dense"]
    return merge(report, {"perplexity": perplexities, "sparsity": {"total_parameters": total}})
