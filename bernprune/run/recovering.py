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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from bernprune.backends import TORCH, find_device
from bernprune.config import RunConfig, make_config
from bernprune.data import TokenWindows, evaluation_windows, fingerprint
from bernprune.errors import DataError, LossError, RunError
from bernprune.evaluation.latency import machine
from bernprune.evaluation.perplexity import Protocol, check_window, mean_loss, perplexity
from bernprune.models.adapters import Adapters, adapted_view, check_adaptable
from bernprune.models.families import family_of
from bernprune.models.loading import load_config, load_model, load_tokenizer
from bernprune.models.masking import masked
from bernprune.models.slicing import slice_model
from bernprune.models.view import ModelView, count_parameters, describe
from bernprune.models.view import fingerprint as weights_fingerprint
from bernprune.policy.allocation import shares_by_importance
from bernprune.progress import bar, bars
from bernprune.recovery import SampledMasks, Training, whole_ranks
from bernprune.run.checkpoint import read_latest, write_checkpoint
from bernprune.run.folder import RECOVERY_CONFIG, RunFolder, open_run, versions
from bernprune.run.opening import open_model
from bernprune.run.plans import read_plan
from bernprune.run.signals import signals
from bernprune.run.stage import evaluation_text, learning_text, naming, read_texts
from bernprune.run.verification import reason, save_and_verify
from bernprune.scores.base import Context, Options
from bernprune.scores.block_influence import layer_influence
from bernprune.settings import absolute, check_only, merge
from bernprune.storage import sync_stream, write_json
from bernprune.units import KeepPlan

logger = logging.getLogger(__name__)

_STATE = {"seconds", "text_sha256", "ranks", "training"}  # of a checkpoint

RECOVERY_SETTINGS = ("recover", "data", "model.device", "model.dtype", "initial.influence", "seed")

_INFLUENCE_WINDOWS = 32


class RecoveryFolder(RunFolder):
    """The folder of a recovery."""

    CONFIG, WORK, OTHER = RECOVERY_CONFIG, "recovery", "give another folder"
    FREE = ("recover.rows", "recover.recompute", "recover.checkpoint_seconds")


@dataclass(frozen=True)
class _Source:
    """What a run left, and the text to train and judge on."""

    config: RunConfig
    folder: RunFolder
    plan: KeepPlan
    tokenizer: Any
    train: TokenWindows
    held_out_WT: torch.Tensor
    eval_windows_WT: torch.Tensor
    protocol: Protocol
    text_sha256: str


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
    finished, folder = _finished_run(run), RecoveryFolder(Path(out))
    of_run = finished.read_config()
    # The search is over, and what divided its windows need not divide others.
    given = merge(merge(of_run.to_dict(), {"search": {"chunk": None}}), absolute(dict(changes or {})))
    config = make_config(given)
    check_adaptable()
    folder.look(config, overwrite=overwrite)
    if finish and (overwrite or not folder.unfinished):
        raise RunError(f"there is no interrupted recovery in {out} to finish")
    source = _open_source(finished, config, of_run)
    with folder.locked(), bars(progress):
        continued = folder.check(config, overwrite=overwrite)
        try:
            return _recover(source, folder, continued=continued, finish=finish)
        except torch.OutOfMemoryError as error:
            raise RunError(
                "the GPU's memory is full; the same command, without --overwrite, goes on with less: --set "
                "recover.rows=1 or recover.recompute=true"
            ) from error
        except (OSError, SafetensorError) as error:
            raise RunError(f"{out} cannot be written: {reason(error)}") from error


def _finished_run(run: str | Path) -> RunFolder:
    """Raises ``RunError`` unless the folder holds a finished run."""
    folder = open_run(Path(run))
    if not folder.finished:
        raise RunError(f"the run in {run} is not finished: there is nothing to recover yet")
    return folder


def _open_source(folder: RunFolder, config: RunConfig, of_run: RunConfig) -> _Source:
    """Raises ``DataError`` for text that is missing or too short, and ``ModelError`` for windows that are too long."""
    model_config, window = load_config(str(folder.model)), config.data.window
    check_window(model_config, window)
    tokenizer, vocabulary = load_tokenizer(str(folder.model)), model_config.vocab_size
    if config.data.eval_text is None and config.data.text != of_run.data.text:  # the run's, so that figures compare
        own = evaluation_text(of_run, tokenizer, vocabulary)
        held_out_N, eval_name = own or read_texts(of_run, tokenizer, vocabulary)[1:]
        stream_N = learning_text(config, tokenizer, vocabulary)
    else:
        stream_N, held_out_N, eval_name = read_texts(config, tokenizer, vocabulary)
    cut = len(stream_N) - config.recover.held_out * window
    if cut < config.recover.batch * window:
        raise DataError(
            f"{config.data.text}: recovery needs at least recover.batch + recover.held_out = {config.recover.batch} + "
            f"{config.recover.held_out} windows of {window} tokens, but there are {len(stream_N) // window}"
        )
    with naming(eval_name):
        eval_WT = evaluation_windows(held_out_N, window, max_windows=config.data.eval_tokens // window)
    return _Source(
        config,
        folder,
        read_plan(folder.plan),
        tokenizer,
        TokenWindows(stream_N[:cut], window=window, seed=config.seed),
        evaluation_windows(stream_N[cut:], window),
        eval_WT,
        Protocol.of(eval_name, eval_WT),
        fingerprint(stream_N),
    )


def _recover(source: _Source, folder: RecoveryFolder, *, continued: bool, finish: bool) -> dict[str, Any]:
    state = _stored(source, folder) if continued else None
    with _prepared(source, None if state is None else state["ranks"]) as prepared:
        if continued:  # what can fail on its input has not
            folder.go_on(source.config, {"weights": prepared.weights})
        else:
            folder.start(source.config, {"weights": prepared.weights})
        write_json(folder.plan, source.plan.to_dict())
        seconds = _train(prepared, source, folder, state, finish=finish)
        report = _report(source, prepared, seconds)
    model = prepared.training.finish()
    if source.config.recover.masks == "policy":
        model = slice_model(model, source.plan)
    (before, parameters), after = prepared.before, mean_loss(model, source.eval_windows_WT)
    if not after < before:
        logger.warning("nothing was recovered: the loss on the evaluation text is %.4f, and was %.4f", after, before)
    report["loss"] = {"before": before, "after": after}
    report["perplexity"] = {name: perplexity(loss) for name, loss in report["loss"].items()}
    folder.remove_model()
    try:
        report |= {"parameters": count_parameters(model), "parameters_before": parameters, "versions": versions()}
        report["verified"] = save_and_verify(model, source.tokenizer, folder.model, source.plan, source.eval_windows_WT)
        write_json(folder.report, report)
    except BaseException:
        folder.report.unlink(missing_ok=True)
        folder.remove_model()
        raise
    return report


def _stored(source: _Source, folder: RecoveryFolder) -> dict[str, Any] | None:
    """The newest checkpoint; None if there is none. Raises ``RunError`` if it belongs to something else."""
    if folder.plan.is_file() and read_plan(folder.plan) != source.plan:
        raise RunError(f"{folder.path} holds an unfinished recovery of another run; give another folder")
    state = read_latest(folder.checkpoints)
    if state is not None and state.keys() != _STATE:
        raise RunError(
            f"the checkpoints in {folder.checkpoints} are of another version; delete that folder to start over"
        )
    if state is not None and state["text_sha256"] != source.text_sha256:
        raise RunError(f"the text is not the one that the checkpoints in {folder.path} were made with")
    return state


class _Before(NamedTuple):
    """What the run kept: its loss on the evaluation text, and its parameters."""

    loss: float
    parameters: int

    @classmethod
    def of(cls, model: Any, source: _Source) -> "_Before":
        return cls(mean_loss(model, source.eval_windows_WT), count_parameters(model))


@dataclass(frozen=True)
class _Prepared:
    """A training, the fingerprint of the weights that it begins with, ranks of layers, and what the run kept."""

    training: Training
    weights: str
    ranks: list[int]
    before: _Before


@contextmanager
def _prepared(source: _Source, ranks: list[int] | None) -> Iterator[_Prepared]:
    """What is trained: the run's model or, before the cut, the dense one under masks. Ranks are computed if unknown."""
    config, settings, device = source.config, source.config.recover, find_device(source.config.model.device)
    whole, family = settings.masks == "policy", family_of(source.plan.architecture.model_type)
    before = _Before.of(_pruned(source, device), source) if whole else None
    view = None  # of the dense model, which is not held beside the pruned one unless it teaches
    if whole or settings.distill > 0 or (ranks is None and settings.ranks == "influence"):
        view = describe(open_model(config, device), config.granularity)
    ranks = ranks or _ranks(source, view, whole=whole)
    teacher, masks = None if view is None or settings.distill == 0 else view.model, None
    with ExitStack() as stack:
        if whole and view is not None:
            trained, teacher = view.model, teacher and open_model(config, device)
        else:
            view = None  # before the other is loaded
            trained = _pruned(source, device)
            before = _Before.of(trained, source)
        weights = weights_fingerprint(trained)
        adapters = Adapters(trained, family, ranks, scale=settings.scale, seed=config.seed)
        if view is not None:
            live = stack.enter_context(masked(adapted_view(view), TORCH))
            masks = SampledMasks(live, _policy(source), view.space.mask(source.plan), seed=config.seed)
        training = Training(trained, adapters, source.train, source.held_out_WT, settings, teacher=teacher, masks=masks)
        assert before is not None, "what the run kept was evaluated"
        yield _Prepared(training, weights, ranks, before)


def _pruned(source: _Source, device: torch.device) -> Any:
    return load_model(str(source.folder.model), dtype=source.config.model.dtype, device=device)


def _ranks(source: _Source, view: ModelView | None, *, whole: bool) -> list[int]:
    """Ranks of the layers of the dense model, if that is trained as a ``whole``, or of those that remain of it."""
    settings, layers = source.config.recover, source.plan.layers
    kept = [index for index, layer in enumerate(layers) if whole or not layer.is_empty]
    if view is None or settings.ranks == "uniform" or len(kept) == 1:
        return [settings.rank] * len(kept)
    return whole_ranks(shares_by_importance(_influence(source, view)[kept], 1 / len(kept)), settings.rank)


def _influence(source: _Source, view: ModelView) -> torch.Tensor:
    """Influence of each layer of the dense model, on the first windows that are trained on."""
    windows_WT = source.train.windows(0, min(_INFLUENCE_WINDOWS, source.train.num_windows))
    context = Context(view, windows_WT, source.config.seed, TORCH, source.config.recover.rows, Options())
    return layer_influence(context, source.config.initial.influence)


def _policy(source: _Source) -> torch.Tensor:
    """Keep probabilities that the run ended with."""
    try:
        state = read_latest(source.folder.checkpoints)
        if state is None:
            raise RunError(f"{source.folder.checkpoints} holds no checkpoint")
    except RunError as error:
        raise RunError(
            f"the policy that the run has learned cannot be read, which recover.masks 'policy' needs: {error}"
        ) from None
    found: torch.Tensor = state["search"]["probs_U"]
    return found


def _train(
    prepared: _Prepared,
    source: _Source,
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
            if training.steps not in training.held_out:
                training.evaluate()
            training.stop("it was told to finish")
        while training.ended is None and not stopping.is_set():
            record = _step(training)
            if record is None:
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


def _step(training: Training) -> dict[str, Any] | None:
    """Take a step; None if it failed and what was best before is kept. Raises ``LossError`` if nothing was yet."""
    step = training.steps
    try:
        return {"step": step, **training.step()}
    except LossError as error:
        if training.best_step == 0:
            raise
        logger.warning("%s; the state after %d steps is kept", error, training.best_step)
        training.stop(str(error))
        return None


def _report(source: _Source, prepared: _Prepared, seconds: float) -> dict[str, Any]:
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
