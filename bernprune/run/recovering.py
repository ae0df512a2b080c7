"""A little training of what a run kept, in a folder of its own: load, train, merge, save, verify, report.

recover.yaml           the resolved configuration
versions.json          versions of the libraries that it began with
plan.json              what the run keeps
metrics.jsonl          one line a step
checkpoints/           the newest two states
model/                 the recovered model
report.json            written last: its presence means that it is finished
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bernprune.backends import find_device
from bernprune.config import RunConfig, changed_config
from bernprune.errors import LossError, RunError
from bernprune.evaluation.latency import machine
from bernprune.evaluation.perplexity import mean_loss, perplexity
from bernprune.models.adapters import check_adaptable
from bernprune.models.products import quick_products
from bernprune.models.slicing import slice_model
from bernprune.models.view import count_parameters
from bernprune.progress import bar, bars
from bernprune.recovery import Training
from bernprune.run.checkpoint import read_checkpoint, write_checkpoint
from bernprune.run.folder import RECOVERY_CONFIG, RunFolder, open_run
from bernprune.run.origin import surroundings, versions
from bernprune.run.plans import read_plan
from bernprune.run.recovery_setup import Prepared, Source, kept_model, open_source, set_up
from bernprune.run.signals import signals
from bernprune.run.verification import save_and_verify
from bernprune.settings import absolute, check_only, merge
from bernprune.storage import sync_stream, write_json, writing

logger = logging.getLogger(__name__)

_STATE = {"seconds", "text_sha256", "ranks", "training"}  # of a checkpoint

RECOVERY_SETTINGS = ("recover", "data", "model.path", "model.device", "model.dtype", "initial.influence", "seed")


class RecoveryFolder(RunFolder):
    """The folder of a recovery."""

    CONFIG, WORK, OTHER = RECOVERY_CONFIG, "recovery", "give another folder"
    FREE = (
        "model.path",
        "model.device",
        "data.text",
        "data.eval_text",
        "recover.rows",
        "recover.recompute",
        "recover.checkpoint_seconds",
    )

    def _versions(self, config: RunConfig) -> dict[str, str]:
        """Without files that the search took something from: they are not read again."""
        return surroundings(config)


def recover(
    run: str | Path,
    out: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    finish: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Train what a finished run kept, as its settings ``recover`` say, in the folder ``out``; returns the report.

    An unfinished recovery of the same configuration is continued. It needs the extra ``recover``.

    Args:
        changes: settings that differ from the run's, as nested plain data; of those in ``RECOVERY_SETTINGS``.
        finish: end one that was interrupted, with the best state so far.
        progress: whether bars are shown; None shows them on a terminal only.

    Raises:
        BernpruneError: anything that the caller can mend; before the training starts, nothing is left behind.
    """
    check_only(changes or {}, RECOVERY_SETTINGS)
    finished, folder = _finished_run(run), RecoveryFolder(Path(out), overwrite=overwrite)
    of_run = finished.read_config()
    # The search is over, and what divided its windows need not divide others.
    config = changed_config(of_run, merge({"search": {"chunk": None}}, absolute(dict(changes or {}))))
    check_adaptable()
    folder.look(config)
    if finish and not folder.unfinished:
        raise RunError(f"there is no interrupted recovery in {out} to finish")
    source = open_source(finished, config, of_run)
    with folder.locked(), bars(progress), quick_products(find_device(config.model.device), source.dtype):
        continued = folder.check(config)
        try:
            with writing(folder.path):
                return _recover(source, folder, continued=continued, finish=finish)
        except LossError as error:
            anew = "; begin anew with --overwrite" if folder.unfinished else ""
            raise LossError(f"{error}{anew}") from error
        except torch.OutOfMemoryError as error:
            way = "the same command, without --overwrite, goes on with less" if folder.unfinished else "less is needed"
            raise RunError(
                f"the GPU's memory is full; {way} by --set recover.rows=1 or recover.recompute=true"
            ) from error


def _finished_run(run: str | Path) -> RunFolder:
    """Raises ``RunError`` unless the folder holds a finished run."""
    folder = open_run(Path(run))
    if not folder.finished:
        raise RunError(f"the run in {run} is not finished: there is nothing to recover yet")
    return folder


def _recover(source: Source, folder: RecoveryFolder, *, continued: bool, finish: bool) -> dict[str, Any]:
    state = _stored(source, folder) if continued else None
    with set_up(source, None if state is None else state["ranks"], teach=not finish) as prepared:
        inputs = {"evaluation": source.protocol.text_sha256, **prepared.weights}
        if continued:  # what can fail on its input has not
            folder.check_inputs(inputs)
            folder.go_on(source.config, inputs)
        else:
            folder.start(source.config, inputs)
        write_json(folder.plan, source.plan.to_dict())
        seconds = _train(prepared, source, folder, state, finish=finish)
        report = _report(source, prepared, seconds)
    before, model = prepared.before, prepared.training.finish()  # merged: rounded, in 16 bits
    del prepared  # a teacher and the optimizer's state, for which there may be no room beside the other process
    if source.config.recover.masks == "policy":
        model = slice_model(model, source.plan)
    report["merged"] = mean_loss(model, source.held_out_WT)
    report["kept"] = "recovered" if report["merged"] < before.held_out else "pruned"
    if report["kept"] == "pruned":
        model = None  # before the other is loaded
        model = kept_model(source)
    after = mean_loss(model, source.eval_windows_WT)
    if not after < before.loss:
        logger.warning(
            "nothing was recovered: the loss on the evaluation text is %.4f, and was %.4f", after, before.loss
        )
    report["loss"] = {"before": before.loss, "after": after}
    report["perplexity"] = {name: perplexity(loss) for name, loss in report["loss"].items()}
    folder.remove_model()
    with folder.delivering():
        report |= {"parameters": count_parameters(model), "parameters_before": before.parameters}
        report["versions"] = versions()
        report["verified"] = save_and_verify(model, source.tokenizer, folder.model, source.plan, source.eval_windows_WT)
        write_json(folder.report, report)
    return report


def _stored(source: Source, folder: RecoveryFolder) -> dict[str, Any] | None:
    """The newest checkpoint; None if there is none. Raises ``RunError`` if it belongs to something else."""
    if folder.plan.is_file() and read_plan(folder.plan) != source.plan:
        raise RunError(f"{folder.path} holds an unfinished recovery of another run; give another folder")
    return read_checkpoint(folder.checkpoints, _STATE, source.text_sha256)


def _train(
    prepared: Prepared,
    source: Source,
    folder: RecoveryFolder,
    state: dict[str, Any] | None,
    *,
    finish: bool,
) -> float:
    """Train from the start, or from where it was interrupted; returns the seconds that it took in all."""
    training, seconds = prepared.training, 0.0
    if state is not None:
        training.load_state_dict(state["training"])
        seconds = float(state["seconds"])
        logger.info("continuing at step %d", training.steps)
    started = saved = time.monotonic()

    def save(metrics: Any) -> None:
        sync_stream(metrics)
        state = {
            "seconds": seconds + time.monotonic() - started,
            "text_sha256": source.text_sha256,
            "ranks": prepared.ranks,
            "training": training.state_dict(),
        }
        write_checkpoint(folder.checkpoints, training.steps, state)

    with (
        bar("recover", total=training.total, unit="step", done=training.steps) as shown,
        folder.open_metrics(training.steps) as metrics,
        signals() as stopping,
    ):
        if not training.held_out:
            training.evaluate()
        if finish and training.ended is None:
            with _best_kept(training):
                if training.steps not in training.held_out:
                    training.evaluate()
                training.stop("it was told to finish")
        while training.ended is None and not stopping.is_set():
            record: dict[str, Any] = {"step": training.steps}
            with _best_kept(training):
                record |= training.step()
            if "loss" not in record:
                break
            metrics.write(json.dumps(record) + "\n")
            shown.update()
            best = min(training.held_out.values())
            shown.set_postfix(loss=f"{record['loss']:.4f}", held_out=f"{best:.4f}", refresh=False)
            if time.monotonic() - saved >= source.config.recover.checkpoint_seconds:
                save(metrics)
                saved = time.monotonic()
        save(metrics)
    return seconds + time.monotonic() - started


@contextmanager
def _best_kept(training: Training) -> Iterator[None]:
    """End a training that fails within the block with its best state; an error only if nothing was gained yet."""
    try:
        yield
    except LossError as error:
        if training.best_step == 0:
            raise
        logger.warning("%s; the state after %d steps is kept", error, training.best_step)
        training.stop(str(error))


def _report(source: Source, prepared: Prepared, seconds: float) -> dict[str, Any]:
    settings, training = source.config.recover, prepared.training
    return {
        "run": str(source.folder.path),
        "tokens": training.tokens,
        "steps": training.steps,
        "best_step": training.best_step,
        "ended": training.ended,
        "seconds": round(seconds, 2),
        "ranks": prepared.ranks,
        "distill": settings.distill,
        "masks": settings.masks,
        "held_out": {str(step): loss for step, loss in training.held_out.items()},
        "protocol": source.protocol.to_dict(),
        "machine": machine(find_device(source.config.model.device)),
    }
