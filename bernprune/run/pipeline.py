"""The whole road: load, score, search, select, slice, save, verify, report."""

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from bernprune.config import RunConfig, changed_config, make_config
from bernprune.costs import NEVER, Costs
from bernprune.custom import blaming, unchanging
from bernprune.errors import BernpruneError, RunError
from bernprune.evaluation.perplexity import mean_loss
from bernprune.models.products import quick_products
from bernprune.names import SearchDtype
from bernprune.picture import draw
from bernprune.policy.bernoulli import reordered
from bernprune.policy.search import MaskSearch
from bernprune.policy.selection import select
from bernprune.progress import bars
from bernprune.run.checkpoint import read_state, write_state
from bernprune.run.finals import Finals, run_finals
from bernprune.run.finishing import check_room, make_pruned, timed_initial
from bernprune.run.folder import RunFolder, open_run
from bernprune.run.initial import score_names, scores_fingerprint
from bernprune.run.loop import current_selection, run_search
from bernprune.run.methods import custom_places
from bernprune.run.plans import Learned
from bernprune.run.repairs import Workshop, expected_weights
from bernprune.run.reporting import (
    facts,
    last_round,
    losses_by_metric,
    mask_loss,
    search_figures,
    windows_of_run,
    with_ratios,
    write_plans,
)
from bernprune.run.scoring import ByMetric, Start, take_start
from bernprune.run.searches import make_search
from bernprune.run.stage import Stage, set_stage
from bernprune.run.workload import Work
from bernprune.settings import absolute, merge
from bernprune.storage import write_bytes, write_json, writing

logger = logging.getLogger(__name__)

_NO_ROOM = "Triton Error [CUDA]: out of memory"  # to load a kernel, after which it cannot run in the same process


def prune(
    config: RunConfig, out: str | Path, *, overwrite: bool = False, progress: bool | None = None
) -> dict[str, Any]:
    """Prune a model as configured, in the run folder ``out``, and return the report.

    An unfinished run of the same configuration is continued, wherever that is given: local paths are made absolute.
    With ``progress`` bars are shown; None: on a terminal.

    Raises:
        BernpruneError: anything that the caller can mend; before the run starts, nothing is left behind.
    """
    config = make_config(absolute(config.to_dict(given_only=True)))
    with bars(progress):
        return _prune(config, RunFolder(Path(out), overwrite=overwrite))


def _prune(config: RunConfig, folder: RunFolder, *, finish: bool = False) -> dict[str, Any]:
    folder.look(config)
    with unchanging():
        with blaming(custom_places(config)):
            stage = set_stage(config)
        return _in_folder(stage, folder, finish=finish)


def _in_folder(stage: Stage, folder: RunFolder, *, finish: bool) -> dict[str, Any]:
    config = stage.config
    with folder.locked():
        continued = folder.check(config)  # another process may have been here meanwhile
        try:
            with writing(folder.path), blaming(custom_places(config)):  # before the disk is blamed
                began = _Began.read(folder) if continued else None
                with quick_products(stage.view.device, *_formats(stage, began)):
                    if stage.config.repair.method != "none":
                        Workshop.of_stage(stage)  # whether there is text enough
                    check_room(stage, folder)
                    stage = stage if began is None else began.stage(stage)
                    return _run(stage, folder, known=began is not None, continued=continued, finish=finish)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and _NO_ROOM not in str(error):
                raise
            raise RunError(f"the GPU's memory is full; {_how_to_need_less(folder, stage)}") from error
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

    Returns its report; of a run that is finished already, the one that lies there.

    Args:
        finish: end the search after one more step or, if it is over, the final choice, and go on with what comes after.

    Raises:
        RunError: there is none, another setting was changed, or the run is finished and something is to change.
        ConfigError: a setting that is unknown, or out of range.
    """
    folder = open_run(Path(out))
    if folder.finished:
        if changes or finish:
            raise RunError(f"the run in {out} is finished; its result lies in {folder.model}")
        report = folder.read_report()
        if not folder.picture.exists():  # it was stopped before it was drawn
            _draw(folder, report)
        return report
    config = folder.read_config()
    if changes:
        config = changed_config(config, absolute(dict(changes)))
    with bars(progress):
        return _prune(config, folder, finish=finish)


def _run(stage: Stage, folder: RunFolder, *, known: bool, continued: bool, finish: bool) -> dict[str, Any]:
    """All that can fail on its input, a model that gives NaN, say, fails before the run is started in its folder.

    Args:
        known: whether the stage is as a run that is continued began with it.
    """
    inputs = _fingerprints(stage)
    if continued:
        folder.check_inputs(inputs)
    if not known:
        stage.costs = stage.measured_costs()
    dense_loss = mean_loss(stage.view.model, stage.eval_windows_WT)
    stored = _stored_start(folder) if continued else None
    start = stored or take_start(stage)
    search = make_search(stage.config, stage.budget, start.probs_U, start.scores_US, stage.ops.sums)
    metric = ByMetric.of(stage, start, search.probs_U)
    with expected_weights(stage) as weights:  # before the start, as it may fail on its input
        if continued:
            folder.go_on(stage.config, inputs)
        else:
            folder.start(stage.config, inputs)
        if not known:
            rows = stage.rows if stage.config.search.rows_per_forward == "auto" else None
            write_json(folder.costs, {"rows": rows, "dtype": stage.dtype, **stage.costs.to_dict()})
        if stored is None:
            write_state(folder.initial, vars(start))
        work, finished_here = run_search(
            stage, folder, search, metric.graded_U, metric.masks["initial"], weights, finish=finish
        )
        finalists = _finalists(stage, search, metric)
        finals = run_finals(
            stage, folder, search, finalists, metric.graded_U, work, finish=finish and not finished_here
        )
    return _deliver(stage, folder, _Searched(search, metric, start.notes, work, finalists, finals, dense_loss))


def _fingerprints(stage: Stage) -> dict[str, str]:
    """Of what a run reads; weights first, as another model may have other tokens."""
    found = {"weights": stage.weights, "text": stage.text_sha256, "evaluation": stage.protocol.text_sha256}
    if scores := scores_fingerprint(stage.config):
        found["scores"] = scores
    return found


@dataclass
class _Searched:
    """What the search came to; ``finals`` may still change once finalists are judged after their repair."""

    search: MaskSearch
    metric: ByMetric
    notes: dict[str, dict[str, float]]  # of the initial metrics
    work: Work
    finalists: dict[str, torch.Tensor]
    finals: Finals
    dense_loss: float


def _finalists(stage: Stage, search: MaskSearch, metric: ByMetric) -> dict[str, torch.Tensor]:
    """What may be kept, by name: what was learned, its widths in the metric's order, and the metric's own."""
    learned: dict[str, torch.Tensor] = {}
    if stage.config.searches:
        widths_U = reordered(stage.view.space, search.priorities_U, metric.graded_U)
        learned = {
            "learned": current_selection(search, metric.graded_U, stage.limits),
            "widths": select(widths_U, stage.budget, limits=stage.limits, tie_break_U=metric.graded_U),
        }
    finalists: dict[str, torch.Tensor] = {}
    for name, mask_U in (learned | metric.masks).items():
        if not any(mask_U.equal(other_U) for other_U in finalists.values()):
            finalists[name] = mask_U
    return finalists


def _deliver(stage: Stage, folder: RunFolder, searched: _Searched) -> dict[str, Any]:
    """From what the search came to, to a verified model and its report."""
    metric, finals = searched.metric, searched.finals
    folder.remove_model()  # of an earlier try that did not reach its report
    figures = search_figures(stage, searched.dense_loss, searched.work, finals)
    full = stage.with_weights("same")
    judged, workshop = dict[str, Any](), None
    repairs, judges = stage.config.repair.method != "none", stage.config.judges_finalists
    if repairs or judges:
        workshop = Workshop.of_stage(full, searched.work.step)
        judged = _judge(full, folder, workshop, finals, searched.finalists) if judges else {}
    learned = _write_kept(full, folder, searched)
    changed = int((metric.masks["initial"] != finals.mask_U).sum())
    losses = losses_by_metric(full, searched.dense_loss if full is stage else None, metric.masks)
    if repairs:
        losses["unrepaired"] = mask_loss(full, finals.mask_U, "before its repair")
    report = {
        "scores": {name: dict(sorted(searched.notes[name].items())) for name in score_names(stage.config)},
        "search": figures | {"kept": finals.kept, "changed_units": changed},
        "diagnostics": last_round(folder),
        "repair": judged,
        **facts(full, finals.mask_U),
        "loss": losses,
        "plans": write_plans(full, folder, learned),
    }
    device = full.view.device  # of a model that is used up below
    with folder.delivering():
        report = merge(report, make_pruned(full, folder, finals.mask_U, workshop if repairs else None))
        report = with_ratios(report | {"windows_run": windows_of_run(full, report, again=full is not stage)})
        write_json(folder.report, report)
    return _with_extras(full, folder, report, metric.masks["initial"], device)


def _write_kept(stage: Stage, folder: RunFolder, searched: _Searched) -> Learned:
    """Write the plan, and what decides at other sparsities; returns the latter."""
    space, finals = stage.view.space, searched.finals
    priorities_U = finals.priorities_U
    if priorities_U is None:
        priorities_U = searched.metric.followed(space, searched.search.priorities_U)[finals.kept]
    learned = Learned(space, priorities_U, searched.metric.graded_U, finals.mask_U)
    learned.write(folder.learned)
    write_json(folder.plan, space.plan(finals.mask_U).to_dict())
    return learned


def _judge(
    stage: Stage, folder: RunFolder, workshop: Workshop, finals: Finals, finalists: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Keep the finalist that is best, after a repair of each if there is one; returns its part of the report."""
    rivals = {name: mask_U for name, mask_U in finalists.items() if name != finals.kept}
    others = {name: mask_U for name, mask_U in rivals.items() if not mask_U.equal(finals.mask_U)}
    masks = {finals.kept: finals.mask_U, **others}
    plans = {name: stage.view.space.plan(mask_U) for name, mask_U in masks.items()}
    best, losses = workshop.prefer(plans, folder.judged)
    if best in others:
        finals.kept = best
        finals.mask_U = others[best]
        finals.priorities_U = None
    return {"finalists": losses, "judging_windows": len(workshop.judging_WT)}


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
    _draw(folder, report)
    return report


def _draw(folder: RunFolder, report: dict[str, Any]) -> None:
    try:
        write_bytes(folder.picture, draw(report, folder.read_metrics()))
    except Exception as error:  # matplotlib and what it calls raise nearly every kind
        logger.warning("%s could not be drawn: %s", folder.picture, error)


class _Began(NamedTuple):
    """How the run that is continued began to run masks."""

    costs: Costs
    rows: int | None  # if they were found by themselves
    dtype: SearchDtype

    @classmethod
    def read(cls, folder: RunFolder) -> "_Began | None":
        """None if it was killed before it knew."""
        try:
            stored = json.loads(folder.costs.read_text(encoding="utf-8"))
            known = {"listing": NEVER} | stored  # unless said: no lists, and the model's own dtype
            costs = Costs(*(float(known[field.name]) for field in fields(Costs)))
            rows = None if stored["rows"] is None else int(stored["rows"])
            dtype = stored.get("dtype", "same")
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return cls(costs, rows, dtype) if dtype in get_args(SearchDtype) else None

    def stage(self, opened: Stage) -> Stage:
        """The stage as the run began with it; if that is in another format, ``opened`` is given up."""
        stage = opened.with_weights(self.dtype)
        stage.costs = self.costs
        if self.rows is not None and stage.config.search.rows_per_forward == "auto":
            stage.rows = self.rows
        return stage


def _formats(stage: Stage, began: _Began | None) -> set[torch.dtype]:
    """Number formats in which a run takes products: the model's own, and that of its search, now or as it began."""
    of_search = set() if began is None or began.dtype in ("auto", "same") else {getattr(torch, began.dtype)}
    return {stage.full_dtype, stage.view.model.dtype} | of_search


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
