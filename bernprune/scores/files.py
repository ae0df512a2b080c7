"""Scores in a file: of a metric that took long, or of your own making.

A safetensors file with one tensor ``scores``, ``[U]`` in the order of the model's unit space, and in its metadata the
``fingerprint`` of that space, without which nobody could tell whose they are. Where it also says of which ``weights``
they were made, others of the same form are told of, not refused: a base model's scores may well serve its descendants.
"""

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bernprune.errors import ConfigError
from bernprune.models.view import ModelView, weights_fingerprint
from bernprune.names import Allocation
from bernprune.scores.base import Context, Metric
from bernprune.storage import write_bytes
from bernprune.units import UnitSpace

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
_KEY, _FINGERPRINT, _WEIGHTS, _MODEL, _ALLOCATION = "scores", "fingerprint", "weights", "model", "allocation"


def write_scores(path: Path, space: UnitSpace, scores_U: torch.Tensor, facts: dict[str, str] | None = None) -> None:
    """Write scores with the space's fingerprint and, for whoever reads it, other ``facts``, whole or not at all.

    Of these, ``facts_of`` gives what ``metric_of_file`` goes by.
    """
    metadata = {**(facts or {}), _FINGERPRINT: space.fingerprint}
    write_bytes(path, save({_KEY: scores_U.double().contiguous()}, metadata))


def facts_of(metric: Metric, view: ModelView, model: str) -> dict[str, str]:
    """How a metric's scores are used by default, and what tells them from those of a model of the same form: its
    weights, and its name for people."""
    return {_ALLOCATION: metric.allocation, _MODEL: model, _WEIGHTS: weights_fingerprint(view.model)}


def metric_of_file(path: Path) -> Metric:
    """A metric that takes its scores from a file, as they are. What it gives and checks is ``read_scores``.

    Its allocation is that of the metric that made them, if the file says so.
    """

    def needs(view: ModelView, windows_WT: torch.Tensor) -> None:
        read_scores(path, view.space)

    def run(context: Context) -> torch.Tensor:
        scores_U = read_scores(path, context.view.space)
        facts = _facts(path)
        if facts.get(_WEIGHTS, own := weights_fingerprint(context.view.model)) != own:
            logger.warning(
                "score file %s was made of other weights, those of %s, or of the same in another dtype; its scores are "
                "taken as they are",
                path,
                facts.get(_MODEL, "an unnamed model"),
            )
        return scores_U

    metric = Metric(str(path), "scores in a file", "", run, passes=lambda layers, options: 0.0, needs=needs)
    allocation: Any = _facts(path).get(_ALLOCATION)
    return replace(metric, allocation=allocation) if allocation in get_args(Allocation) else metric


def _facts(path: Path) -> dict[str, str]:
    """What a file says of its scores; nothing, if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def scores_digest(path: Path) -> str:
    """16 hexadecimal digits that tell apart what a run takes of files: scores, and how they are used by default.

    Raises:
        ConfigError: it cannot be read, or holds no scores.
    """
    try:
        with safe_open(path, framework="pt") as file:
            scores_U, facts = file.get_tensor(_KEY), file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"score file {path} cannot be read: {error}") from None
    found = hashlib.sha256(scores_U.double().numpy().tobytes())
    found.update(facts.get(_ALLOCATION, "").encode())
    return found.hexdigest()[:16]


def holds_scores(path: Path) -> bool:
    """Whether it is a file of scores, of whatever units."""
    return _FINGERPRINT in _facts(path)


def read_scores(path: Path, space: UnitSpace) -> torch.Tensor:
    """Scores of the units of a space, float64 ``[U]``.

    Raises:
        ConfigError: no such file, or not one of scores of these units.
    """
    try:
        with safe_open(path, framework="pt") as file:
            scores_U = file.get_tensor(_KEY) if _KEY in file.keys() else None  # noqa: SIM118
            fingerprint = (file.metadata() or {}).get(_FINGERPRINT)
    except FileNotFoundError:
        raise ConfigError(f"score file {path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"score file {path} cannot be read: {error}") from None
    if scores_U is None or fingerprint is None:
        raise ConfigError(
            f"score file {path} needs a tensor {_KEY!r} and the metadata {_FINGERPRINT!r}, as bernprune scores writes "
            "them"
        )
    if fingerprint != space.fingerprint:
        raise ConfigError(
            f"score file {path} holds {scores_U.numel()} scores of another model's units, or of another granularity: "
            f"fingerprint {fingerprint}, but this model with {', '.join(space.kinds)} has {space.size} units and "
            f"{space.fingerprint}"
        )
    if scores_U.shape != (space.size,):
        raise ConfigError(f"score file {path} must hold [{space.size}] scores, but holds {list(scores_U.shape)}")
    if not scores_U.is_floating_point():
        raise ConfigError(f"score file {path} must hold floating-point numbers, but holds {scores_U.dtype}")
    if not scores_U.isfinite().all():
        odd = int((~scores_U.isfinite()).int().argmax())
        raise ConfigError(f"score file {path} must hold finite numbers, but unit {odd} has {scores_U[odd].item()}")
    return scores_U.double()
