"""Scores in a file: of a metric that took long, or of one's own making.

A safetensors file with one tensor ``scores``, ``[U]`` in the order of the model's unit space, and in its metadata the
``fingerprint`` of that space, without which nobody could tell whose they are.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bernprune.errors import ConfigError
from bernprune.models.view import ModelView
from bernprune.scores.base import Metric
from bernprune.storage import write_bytes
from bernprune.units import UnitSpace

SUFFIX = ".safetensors"
_KEY, _FINGERPRINT = "scores", "fingerprint"


def write_scores(path: Path, space: UnitSpace, scores_U: torch.Tensor, facts: dict[str, str] | None = None) -> None:
    """Write scores with the space's fingerprint and, for whoever reads it, other ``facts``, whole or not at all."""
    metadata = {**(facts or {}), _FINGERPRINT: space.fingerprint}
    write_bytes(path, save({_KEY: scores_U.double().contiguous()}, metadata))


def metric_of_file(path: Path) -> Metric:
    """A metric that takes its scores from a file, as they are. What it gives and checks is ``read_scores``."""

    def needs(view: ModelView, windows_WT: torch.Tensor) -> None:
        read_scores(path, view.space)

    return Metric(
        str(path),
        "scores in a file",
        "",
        lambda context: read_scores(path, context.view.space),
        passes=lambda layers, options: 0.0,
        needs=needs,
    )


def holds_scores(path: Path) -> bool:
    """Whether it is a file of scores, of whatever units."""
    try:
        with safe_open(path, framework="pt") as file:
            return _FINGERPRINT in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


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
    if fingerprint != space.fingerprint or scores_U.shape != (space.size,):
        raise ConfigError(
            f"score file {path} holds {scores_U.numel()} scores of another model's units, or of another granularity: "
            f"fingerprint {fingerprint}, but this model with {', '.join(space.kinds)} has {space.size} units and "
            f"{space.fingerprint}"
        )
    if not scores_U.is_floating_point() or not scores_U.isfinite().all():
        raise ConfigError(f"score file {path} must hold finite floating-point numbers")
    return scores_U.double()
