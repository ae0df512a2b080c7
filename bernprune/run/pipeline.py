"""The whole road: load, score, search, select, slice, save, verify, report."""

import gc
import json
import logging
import math
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bernprune.backends import find_device
from bernprune.config import RunConfig, make_config
from bernprune.costs import Costs
from bernprune.errors import BernpruneError, ModelError, RunError
from bernprune.evaluation.latency import Latency, latency, machine
from bernprune.evaluation.perplexity import mean_loss, perplexity
from bernprune.models.slicing import slice_model
from bernprune.models.view import count_parameters
from bernprune.names import ScoreName
from bernprune.picture import draw
from bernprune.policy.bernoulli import even_probs, graded, reordered
from bernprune.policy.search import MaskSearch
from bernprune.policy.selection import select
from bernprune.run.checkpoint import read_state, write_state
from bernprune.run.finals import Finals, run_finals
from bernprune.run.folder import RunFolder, check_writable, open_run, versions, whole_or_gone
from bernprune.run.loop import current_selection, run_search
from bernprune.run.plans import Learned, describe_plan, plans_table, removed_parameter_share, write_plan
from bernprune.run.repairs import Workshop
from bernprune.run.stage import Stage, check_family, open_model, open_tokenizer, set_stage
from bernprune.run.verification import reason, save_and_verify
from bernprune.run.workload import Work, make_search, scope_of, start_probs
from bernprune.scores import SCORES, initial_scores
from bernprune.settings import merge
from bernprune.storage import write_bytes, write_json
from bernprune.units import KeepPlan

logger = logging.getLogger(__name__)

_VERIFIED_WINDOWS = 2
_SCORED_TOKENS = 2048  # of one forward pass for the metric, which keeps float32 copies of activations


def prune(
    config: RunConfig, out: str | Path, *, overwrite: bool = False, progress: bool | None = None
) -> dict[str, Any]:
    """Prune a model as configured, in the run folder ``out``, and return the report.

    An unfinished run of the same configuration is continued.

    Raises:
        BernpruneError: anything that the caller can mend; before the run starts, nothing is left behind.
    """
    folder = RunFolder(Path(out))
    folder.check(config, overwrite=overwrite)  # before the work of loading
    stage = set_stage(config)
    with folder.locked():
        continued = folder.check(config, overwrite=overwrite)  # another process may have been here meanwhile
        try:
            return _run(stage, folder, continued=continued, progress=progress)
        except torch.OutOfMemoryError as error:
            raise RunError(f"the GPU's memory is full; {_how_to_need_less(folder, config)}") from error
        except (OSError, SafetensorError) as error:  # full disks reach us as either
            raise RunError(f"{out} cannot be written: {reason(error)}{_how_to_continue(folder)}") from error


def _how_to_continue(folder: RunFolder) -> str:
    if not folder.unfinished:
        return ""
    return f"; when that is mended, continue with: bernprune resume {shlex.quote(str(folder.path))}"


def _how_to_need_less(folder: RunFolder, config: RunConfig) -> str:
    if not folder.unfinished:
        return "lower search.rows_per_forward and report.latency_rows"
    at_once = 64 if config.search.rows_per_forward == "auto" else config.search.rows_per_forward
    rows, latency_rows = max(1, at_once // 2), max(1, config.report.latency_rows // 2)
    return (
        f"continue with less at once: bernprune resume {shlex.quote(str(folder.path))} "
        f"--set search.rows_per_forward={rows} --set report.latency_rows={latency_rows}"
    )


def resume(
    out: str | Path, *, changes: Mapping[str, Any] | None = None, progress: bool | None = None
) -> dict[str, Any]:
    """Continue the unfinished run in ``out``, with ``changes`` to settings of ``FREE_SETTINGS``, as nested plain data.

    Raises:
        RunError: there is none, or another setting was changed.
        ConfigError: a setting that is unknown, or out of range.
    """
    folder = open_run(Path(out))
    if folder.finished:
        raise RunError(f"the run in {out} is finished; its result lies in {folder.model}")
    config = folder.read_config()
    return prune(make_config(merge(config.to_dict(), changes)) if changes else config, out, progress=progress)


def _run(stage: Stage, folder: RunFolder, *, continued: bool, progress: bool | None) -> dict[str, Any]:
    """All that can fail on its input, a model that gives NaN for one, fails before the run is started in its folder."""
    workshop = Workshop.of_stage(stage)
    losses: dict[str, float | None] = {"dense": mean_loss(stage.view.model, stage.eval_windows_WT)}
    known = _known_stage(stage, folder) if continued else None
    stage = known or replace(stage, costs=stage.measured_costs())
    stored = _stored_start(folder) if continued else None
    start = stored or _start(stage)
    scores_U, search = start["scores_US"][:, 0], make_search(stage.config, stage.budget, start)
    start_U = search.probs_U
    initial_U = select(start_U, stage.budget, limits=stage.limits, tie_break_U=scores_U)
    even_U = even_probs(stage.view.space, scores_U, keep=1 - stage.config.budget.sparsity)
    uniform_U = select(even_U, stage.budget, limits=stage.limits, tie_break_U=scores_U)
    losses["uniform"] = mask_loss(stage, uniform_U, "of the metric's uniform selection")
    losses["initial"] = mask_loss(stage, initial_U, "of the initial selection")
    if continued:
        folder.write_config(stage.config)  # some settings may change
        if changed := folder.changed_versions():
            logger.warning("the run began with %s: it may not go on to the bit", changed)
    else:
        folder.start(stage.config)
    if known is None:
        write_json(folder.costs, {"rows": stage.rows, **stage.costs.to_dict()})
    if stored is None:
        write_state(folder.initial, start)
    work = run_search(stage, folder, search, scores_U, initial_U, progress=progress)
    learned_U = current_selection(search, scores_U, stage.limits)
    widths_U = select(
        reordered(stage.view.space, search.priorities_U, scores_U),
        stage.budget,
        limits=stage.limits,
        tie_break_U=scores_U,
    )
    finalists = {"learned": learned_U}
    for name, mask_U in (("widths", widths_U), ("initial", initial_U), ("uniform", uniform_U)):
        if not any(mask_U.equal(other_U) for other_U in finalists.values()):
            finalists[name] = mask_U
    finals = run_finals(stage, folder, search, finalists, scores_U, work, progress=progress)
    judged = _judge_repaired(stage, workshop, finals, finalists)
    report = _report_head(stage, work, finals, initial_U) | {"repair": judged}
    report["diagnostics"] = _last_round(folder)
    priorities_U = finals.priorities_U
    if priorities_U is None:
        priorities_U = _followed(stage, search, start_U, scores_U)[finals.kept]
    learned = Learned(stage.view.space, priorities_U, scores_U, finals.mask_U)
    learned.write(folder.learned)
    plan = stage.view.space.plan(finals.mask_U)
    write_json(folder.plan, plan.to_dict())
    report["plans"] = _plans(stage, folder, learned)
    if workshop is not None:
        losses["unrepaired"] = mask_loss(stage, finals.mask_U, "before its repair")
    try:
        _finish(stage, folder, plan, stage.view.space.plan(initial_U), workshop, report, losses)
        _draw(folder, report)
        write_json(folder.report, report)
    except BaseException:
        folder.report.unlink(missing_ok=True)  # the run is not finished,
        folder.remove_model()  # and nobody must take this for a verified model; the plan is kept
        raise
    return report


def _judge_repaired(
    stage: Stage, workshop: Workshop | None, finals: Finals, finalists: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Keep what is best after repair, if that is asked for; what was kept so far must be beaten beyond the error."""
    if workshop is None or not stage.config.repair.judge_finalists:
        return {}
    others = {name: mask_U for name, mask_U in finalists.items() if not mask_U.equal(finals.mask_U)}
    plans = {name: stage.view.space.plan(mask_U) for name, mask_U in {"kept": finals.mask_U, **others}.items()}
    best, losses = workshop.prefer(plans)
    if best in others:
        finals.kept, finals.mask_U, finals.priorities_U = best, others[best], None
    return {"finalists": losses}


def _draw(folder: RunFolder, report: dict[str, Any]) -> None:
    """The picture; whatever is wrong with it, the model is good."""
    try:
        write_bytes(folder.picture, draw(report, folder.read_metrics()))
    except Exception as error:  # matplotlib and what it calls raise nearly every kind
        logger.warning("%s could not be drawn: %s", folder.picture, error)


def _followed(
    stage: Stage, search: MaskSearch, start_U: torch.Tensor, scores_U: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The priorities that each finalist goes by at other sparsities."""
    space, initial_U = stage.view.space, start_U
    if stage.config.initial.map == "const":  # which knows two levels only
        initial_U = graded(space, scores_U, scope_of(stage.config))
    learned_U = initial_U if torch.equal(search.priorities_U, start_U) else search.priorities_U
    widths_U = reordered(space, learned_U, scores_U)
    return {"learned": learned_U, "widths": widths_U, "initial": initial_U, "uniform": graded(space, scores_U)}


def _known_stage(stage: Stage, folder: RunFolder) -> Stage | None:
    """With the costs and rows that the run began with; None if it was killed before it knew them."""
    try:
        stored = json.loads(folder.costs.read_text(encoding="utf-8"))
        costs, rows = Costs(*(float(stored[field.name]) for field in fields(Costs))), int(stored["rows"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    given = stage.config.search.rows_per_forward
    return replace(stage, costs=costs, rows=rows if given == "auto" else given)


def _stored_start(folder: RunFolder) -> dict[str, torch.Tensor] | None:
    """The start of the run that is continued; None if it was killed before it had one."""
    if not folder.initial.is_file():
        return None
    try:
        start = read_state(folder.initial)
    except RunError as error:
        logger.warning("%s; computing the start again", error)
        return None
    return start if start.keys() == {"scores_US", "probs_U"} else None  # or it is another version's


def _start(stage: Stage) -> dict[str, torch.Tensor]:
    """Initial scores and probabilities; kept, so that a resumed run starts from the very same."""
    initial = stage.config.initial
    scores_US = torch.stack([_scores(stage, name) for name in (initial.score, *initial.also)], dim=1)
    return {"scores_US": scores_US, "probs_U": start_probs(stage.config, stage.view.space, scores_US[:, 0])}


def _scores(stage: Stage, name: ScoreName) -> torch.Tensor:
    config = stage.config
    return initial_scores(
        stage.view,
        stage.initial_windows_WT,
        SCORES[name],
        seed=config.seed,
        pruned_inputs=(stage.ops, config.budget.sparsity) if config.initial.inputs == "pruned" else None,
        rows_per_forward=max(1, _SCORED_TOKENS // stage.initial_windows_WT.shape[1]),
    )


def _plans(stage: Stage, folder: RunFolder, learned: Learned) -> list[dict[str, Any]]:
    """Write and evaluate the plans for other sparsities; of a loss that is not finite, there is no figure."""
    found, config = [], stage.config
    nested = config.plans.nested
    for sparsity in sorted(config.plans.sparsities):
        mask_U = learned.select(config, sparsity, nested=nested)
        path = write_plan(folder, sparsity, learned.space.plan(mask_U), nested=nested)
        loss = mask_loss(stage, mask_U, f"at sparsity {sparsity:g}")
        figure = None if loss is None else perplexity(loss)
        removed = removed_parameter_share(learned.space, mask_U)
        found.append({"sparsity": sparsity, "removed": removed, "loss": loss, "perplexity": figure, "plan": path.name})
    if found:
        write_bytes(folder.plans / "table.md", plans_table(found, stage.protocol).encode())
    return found


def _last_round(folder: RunFolder) -> dict[str, Any]:
    """What was known at the end of the last round of the search; empty without any."""
    rounds = [record["round"] for record in folder.read_metrics() if "round" in record]
    return rounds[-1] if rounds else {}


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


def _report_head(stage: Stage, work: Work, finals: Finals, initial_U: torch.Tensor) -> dict[str, Any]:
    config, budget, model = stage.config, stage.budget, stage.view.model
    prunable = int(stage.view.space.costs_U("parameters").sum().item())
    device = next(model.parameters()).device
    return {
        "model": {"path": config.model.path, "type": model.config.model_type, "dtype": str(model.dtype)},
        "sparsity": {
            "target": config.budget.sparsity,
            "measure": config.budget.measure,
            "achieved": budget.removed_share(finals.mask_U),
            "block_parameters": removed_parameter_share(stage.view.space, finals.mask_U),
        },
        "parameters": {"prunable": prunable, "dense": stage.view.num_parameters},
        "protocol": stage.protocol.to_dict(),
        "search": {
            "sequences": work.sequences + finals.sequences,
            "forward_tokens": (work.sequences + finals.sequences) * config.data.window,
            "seconds": round(work.seconds + finals.seconds, 2),
            "steps": work.step,
            "ended": stage.workload.why_over(work),
            "kept": finals.kept,
            "changed_units": int((initial_U != finals.mask_U).sum()),
            "finals": {"sequences": finals.sequences, "ended": finals.ended, "heats": finals.heats},
        },
        "machine": machine(device),
        "versions": versions(),
    }


def _finish(
    stage: Stage,
    folder: RunFolder,
    plan: KeepPlan,
    initial_plan: KeepPlan,
    workshop: Workshop | None,
    report: dict[str, Any],
    losses: dict[str, float | None],
) -> None:
    """Repair, slice, evaluate, save and verify; adds what it finds to the report. The dense model is used up."""
    settings = stage.config.report
    rows = stage.eval_windows_WT[: settings.latency_rows]
    device = next(stage.view.model.parameters()).device
    times = {"dense": latency(stage.view.model, rows, repeats=settings.latency_repeats)}
    report["repair"] |= {"method": "none"} if workshop is None else workshop.repair(plan)
    sliced = slice_model(stage.view.model, plan)
    losses["pruned"] = mean_loss(sliced, stage.eval_windows_WT)
    times["pruned"] = latency(sliced, rows, repeats=settings.latency_repeats)
    report["parameters"]["pruned"] = count_parameters(sliced)
    folder.remove_model()  # of an earlier try that did not reach its report
    verified = save_and_verify(sliced, stage.tokenizer, folder.model, plan, rows[:_VERIFIED_WINDOWS])
    del sliced
    gc.collect()
    if settings.initial_latency:
        _time_initial(stage, initial_plan, device, times, report)
    dense = report["parameters"]["dense"]
    report["sparsity"]["total_parameters"] = 1 - report["parameters"]["pruned"] / dense
    report["perplexity"] = {name: None if loss is None else perplexity(loss) for name, loss in losses.items()}
    report["loss"] = losses
    report["latency"] = {name: figure.to_dict() for name, figure in times.items()}
    report["verified"] = verified
    report["layers"] = describe_plan(plan)


def _time_initial(
    stage: Stage, plan: KeepPlan, device: torch.device, times: dict[str, Latency], report: dict[str, Any]
) -> None:
    """Latency and size of what the metric alone would give; the result of the run must not hang on them."""
    settings = stage.config.report
    try:
        initial = slice_model(open_model(stage.config, device), plan)
        rows = stage.eval_windows_WT[: settings.latency_rows]
        times["initial"] = latency(initial, rows, repeats=settings.latency_repeats)
        report["parameters"]["initial"] = count_parameters(initial)
    except (BernpruneError, OSError, RuntimeError) as error:
        logger.warning("the initial metric's model could not be timed: %s", error)


def read_plan(path: str | Path) -> KeepPlan:
    """A plan from its JSON file. Raises ``ModelError`` if there is none or it is not one."""
    try:
        return KeepPlan.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ModelError(f"plan {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"plan {path} cannot be read: {error}") from None


def apply_plan(config: RunConfig, plan: KeepPlan, out: str | Path, *, repair: bool = False) -> dict[str, Any]:
    """Slice any copy of a model by a plan, save it in the new folder ``out`` and verify it there.

    Args:
        repair: whether the model is repaired before that, as ``config.repair`` says, on ``config.data.text``.

    Raises:
        ModelError: a plan of another architecture.
        RunError: ``out`` exists or cannot be written.
        DataError: text that is missing, or too short for the repair.
    """
    out = Path(out)
    check_writable(out)
    if out.exists():
        raise RunError(f"output {out} exists already; give a folder that does not")
    check_family(config)
    model = open_model(config, find_device(config.model.device))
    tokenizer = open_tokenizer(config)
    dense = count_parameters(model)
    workshop = Workshop.of_model(config, model, tokenizer) if repair else None
    record = {"method": "none"} if workshop is None else workshop.repair(plan)
    sliced = slice_model(model, plan)
    tokens_BT = torch.arange(min(64, sliced.config.max_position_embeddings))[None] % sliced.config.vocab_size
    try:
        with whole_or_gone(out):
            verified = save_and_verify(sliced, tokenizer, out, plan, tokens_BT)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} cannot be written: {reason(error)}") from error
    counts = {"dense_parameters": dense, "pruned_parameters": count_parameters(sliced)}
    return {**counts, "repair": record, **verified}
