"""What a recovery trains and on which text: the model that a run kept, or the dense one before the cut."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bernprune.backends import TORCH, find_device
from bernprune.config import RunConfig
from bernprune.data import TokenWindows, evaluation_windows, repeated, text_fingerprint
from bernprune.errors import DataError, ModelError, RunError, prefixed
from bernprune.evaluation.perplexity import Protocol, check_window, mean_loss
from bernprune.models.adapters import Adapters, adapted_view
from bernprune.models.families import family_of
from bernprune.models.loading import load_config, load_model, load_tokenizer
from bernprune.models.masking import masked
from bernprune.models.view import ModelView, count_parameters, describe, weights_fingerprint
from bernprune.policy.allocation import shares_by_importance
from bernprune.recovery import SampledMasks, Training, whole_ranks
from bernprune.run.checkpoint import checkpoint_at, read_state
from bernprune.run.folder import RunFolder
from bernprune.run.opening import open_model
from bernprune.run.plans import read_plan
from bernprune.run.stage import cut_for_evaluation, evaluation_text, learning_text, read_texts, warn_of_known
from bernprune.scores.base import Context, Options
from bernprune.scores.block_influence import layer_influence
from bernprune.units import KeepPlan

logger = logging.getLogger(__name__)

_INFLUENCE_WINDOWS = 32


@dataclass(frozen=True)
class Source:
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
    dtype: torch.dtype  # of the model


def open_source(folder: RunFolder, config: RunConfig, of_run: RunConfig) -> Source:
    """Raises ``DataError`` for text that is missing or too short, and ``ModelError`` for windows that are too long."""
    model_config, window = load_config(str(folder.model)), config.data.window
    check_window(model_config, window)
    trusted = of_run.model.trust_remote_code
    tokenizer, vocabulary = load_tokenizer(str(folder.model), trust_remote_code=trusted), model_config.vocab_size
    stream_N, held_out_N, eval_name = _texts(config, of_run, folder, tokenizer, vocabulary)
    cut = len(stream_N) - config.recover.held_out * window
    if cut < config.recover.batch * window:
        raise DataError(
            f"{config.data.text}: recovery needs at least recover.batch + recover.held_out = {config.recover.batch} + "
            f"{config.recover.held_out} windows of {window} tokens, but there are {len(stream_N) // window}"
        )
    with prefixed(eval_name, DataError):
        eval_WT = evaluation_windows(held_out_N, window, max_windows=config.data.eval_tokens // window)
    return Source(
        config,
        folder,
        read_plan(folder.plan),
        tokenizer,
        TokenWindows(stream_N[:cut], window=window, seed=config.seed),
        evaluation_windows(stream_N[cut:], window),
        eval_WT,
        Protocol.of(eval_name, eval_WT),
        text_fingerprint(stream_N),
        model_config.dtype if config.model.dtype == "auto" else getattr(torch, config.model.dtype),
    )


def _texts(
    config: RunConfig, of_run: RunConfig, folder: RunFolder, tokenizer: Any, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """As ``read_texts``, but what is evaluated on is the run's unless another is given, so that figures compare.

    If that is the last tenth of the run's text, passages of it in other text are not learned from; the same text in
    another place is told by its fingerprints.
    """
    learns_alike = all(getattr(config.data, name) == getattr(of_run.data, name) for name in ("text", "max_characters"))
    judged = config if config.data.eval_text is not None or learns_alike else of_run
    with _where_it_lies():
        separate = evaluation_text(judged, tokenizer, vocabulary)
    stream = learning_text(config, tokenizer, vocabulary)
    if separate is not None:
        warn_of_known(config, stream, *separate)
        return stream, *separate
    parts = cut_for_evaluation(of_run, stream)
    if learns_alike or _fingerprints(of_run, *parts).items() <= folder.began_with().items():
        return parts
    with _where_it_lies():
        _, held_out, eval_name = read_texts(of_run, tokenizer, vocabulary)
    return _without_held_out(config.data.text, stream, held_out, eval_name)


@contextmanager
def _where_it_lies() -> Iterator[None]:
    """For the block that reads what a run was judged on."""
    try:
        yield
    except DataError as error:
        raise DataError(
            f"{error}; --set data.eval_text names where the run's evaluation text lies now, or another"
        ) from None


def _fingerprints(of_run: RunConfig, learned: torch.Tensor, held_out: torch.Tensor, eval_name: str) -> dict[str, str]:
    """Of texts, as the run would have taken them."""
    window = of_run.data.window
    try:
        windows_WT = evaluation_windows(held_out, window, max_windows=of_run.data.eval_tokens // window)
    except DataError:  # too short to be that of a run
        return {"evaluation": ""}
    return {"text": text_fingerprint(learned), "evaluation": Protocol.of(eval_name, windows_WT).text_sha256}


def _without_held_out(
    name: str, stream: torch.Tensor, held_out: torch.Tensor, eval_name: str
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """What of a stream may be learned from, beside the text that a run held out."""
    known_N = repeated(stream, held_out)
    if known_N.any():
        logger.warning(
            "%s of %s tokens of %s stand in %s, too, and are left out",
            f"{int(known_N.sum()):,}",
            f"{len(stream):,}",
            name,
            eval_name,
        )
    return stream[~known_N], held_out, eval_name


class Before(NamedTuple):
    """What the run kept: its loss on the evaluation text and on that which chooses a state, and its parameters."""

    loss: float
    held_out: float
    parameters: int

    @classmethod
    def of(cls, model: Any, source: Source) -> "Before":
        loss, held_out = (mean_loss(model, windows_WT) for windows_WT in (source.eval_windows_WT, source.held_out_WT))
        return cls(loss, held_out, count_parameters(model))


@dataclass(frozen=True)
class Prepared:
    """A training, fingerprints of the weights that it reads, by name, ranks of layers, and what the run kept."""

    training: Training
    weights: dict[str, str]
    ranks: list[int]
    before: Before


@contextmanager
def set_up(source: Source, ranks: list[int] | None, *, teach: bool) -> Iterator[Prepared]:
    """What is trained, for the length of the block. Ranks are computed if they are not known.

    Args:
        teach: hold the dense model to distil from, if that is asked for; no step can be taken without it.
    """
    teach = teach and source.config.recover.distill > 0
    if source.config.recover.masks == "policy":
        with _before_the_cut(source, ranks, teach=teach) as prepared:
            yield prepared
    else:
        yield _after_the_cut(source, ranks, teach=teach)


def _after_the_cut(source: Source, ranks: list[int] | None, *, teach: bool) -> Prepared:
    """The run's model; the dense one is held beside it only to teach."""
    settings = source.config.recover
    dense = None
    teacher = None
    weights = dict[str, str]()
    if teach or (ranks is None and settings.ranks == "influence"):
        dense = _dense(source)
        teacher = dense.model if teach else None
        weights["dense"] = weights_fingerprint(dense.model)
    ranks = ranks or _ranks(source, dense, whole=False)
    dense = None  # before the other is loaded
    trained = kept_model(source)
    before, weights["weights"] = Before.of(trained, source), weights_fingerprint(trained)
    adapters = _adapters(source, trained, ranks)
    training = Training(trained, adapters, source.train, source.held_out_WT, settings, teacher=teacher)
    return Prepared(training, weights, ranks, before)


@contextmanager
def _before_the_cut(source: Source, ranks: list[int] | None, *, teach: bool) -> Iterator[Prepared]:
    """The dense model under masks of the policy; the run's is let go before that is loaded."""
    settings, before = source.config.recover, Before.of(kept_model(source), source)
    dense = _dense(source)
    ranks = ranks or _ranks(source, dense, whole=True)
    teacher = _dense(source).model if teach else None
    weights = {"dense": weights_fingerprint(dense.model)}
    adapters = _adapters(source, dense.model, ranks)
    with masked(adapted_view(dense), TORCH) as live:
        masks = SampledMasks(live, _policy(source), dense.space.mask(source.plan), seed=source.config.seed)
        training = Training(
            dense.model, adapters, source.train, source.held_out_WT, settings, teacher=teacher, masks=masks
        )
        yield Prepared(training, weights, ranks, before)


def _adapters(source: Source, model: Any, ranks: list[int]) -> Adapters:
    family, config = family_of(source.plan.architecture.model_type), source.config
    return Adapters(model, family, ranks, scale=config.recover.scale, seed=config.seed)


def kept_model(source: Source) -> Any:
    """The model that the run kept, repaired if it was."""
    device = find_device(source.config.model.device)
    return load_model(str(source.folder.model), dtype=source.config.model.dtype, device=device)


def _dense(source: Source) -> ModelView:
    try:
        model = open_model(source.config, find_device(source.config.model.device))
    except ModelError as error:
        said = str(error).rstrip(".")
        raise ModelError(f"{said}; --set model.path names the dense model that the run began with") from None
    return describe(model, source.config.granularity)


def _ranks(source: Source, view: ModelView | None, *, whole: bool) -> list[int]:
    """Ranks of the layers of the dense model, if that is trained as a ``whole``, or of those that remain of it."""
    settings, layers = source.config.recover, source.plan.layers
    kept = [index for index, layer in enumerate(layers) if whole or not layer.is_empty]
    if view is None or settings.ranks == "uniform" or len(kept) == 1:
        return [settings.rank] * len(kept)
    return whole_ranks(shares_by_importance(_influence(source, view)[kept], 1 / len(kept)), settings.rank)


def _influence(source: Source, view: ModelView) -> torch.Tensor:
    """Influence of each layer of the dense model, on the first windows that are trained on."""
    windows_WT = source.train.windows(0, min(_INFLUENCE_WINDOWS, source.train.num_windows))
    context = Context(view, windows_WT, source.config.seed, TORCH, source.config.recover.rows, Options())
    return layer_influence(context, source.config.initial.influence)


def _policy(source: Source) -> torch.Tensor:
    """Keep probabilities that the run ended with, of which an older checkpoint knows nothing."""
    try:
        steps = json.loads(source.folder.report.read_text(encoding="utf-8"))["search"]["steps"]
        path = checkpoint_at(source.folder.checkpoints, steps)
        if not path.is_file():
            raise RunError(f"{path.parent} holds no {path.name}")
        state = read_state(path)
    except (RunError, OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(
            f"the policy that the run has learned cannot be read, which recover.masks 'policy' needs: {error}"
        ) from None
    found: torch.Tensor = state["search"]["probs_U"]
    return found
