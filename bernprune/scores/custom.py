"""Custom metrics, by the place where they stand: ``path/to/file.py:name``."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bernprune.custom import blamed, defined_at
from bernprune.errors import ConfigError
from bernprune.scores.base import Context, Metric
from bernprune.scores.stream import Projection, by_column


def metric_at(file: str, name: str) -> Metric:
    """The ``Metric``, or the function of columns, of that name in a Python file, which is executed.

    Raises:
        ConfigError: no such file or name in it, a file that cannot be executed, or something else of that name.
    """
    place, found = f"{file}:{name}", defined_at("score", file, name, _is_score)
    if not _is_score(found):
        raise ConfigError(f"score {place} must be a function or a Metric, but is {found!r}")
    if isinstance(found, Metric):
        return replace(found, name=place, run=_guarded(place, found.run))
    return as_metric(_guarded(place, found), place)


def as_metric(score: Metric | Callable[[Projection], torch.Tensor], name: str | None = None) -> Metric:
    """A metric as it is, or the one that a function of columns makes."""
    if isinstance(score, Metric):
        return score
    name = name or str(getattr(score, "__name__", type(score).__name__))
    return Metric(name, "a custom function", "", by_column(_of_columns(name, score)), layerwise=True)


def _of_columns(name: str, score: Callable[[Projection], torch.Tensor]) -> Callable[[Projection], torch.Tensor]:
    """The function, and one sentence on what is wrong with what it gives."""

    def run(projection: Projection) -> torch.Tensor:
        found, wanted = _tensor(name, score(projection)), [projection.weight_DE.shape[1]]
        if found.is_complex() or list(found.shape) != wanted:
            given = f"{list(found.shape)} of {str(found.dtype).removeprefix('torch.')}"
            raise ConfigError(
                f"score {name} must give real numbers {wanted}, one for each column of the weight that reads "
                f"{projection.kind}s in layer {projection.layer}, but gave {given}"
            )
        return found

    return run


def _guarded(place: str, score: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """The function in a file, of which all that goes wrong is told as a fault of the setting that named it."""
    run = blamed("score", place, score)

    def checked(given: Projection | Context) -> torch.Tensor:
        return _tensor(place, run(given))

    return checked


def _tensor(name: str, found: Any) -> torch.Tensor:
    if not isinstance(found, torch.Tensor):
        raise ConfigError(f"score {name} must give a tensor, but gave {found!r:.100}")
    if found.layout != torch.strided or found.is_meta:
        raise ConfigError(
            f"score {name} must give a dense tensor with values, but gave {found.layout} on {found.device}"
        )
    return found


def _is_score(value: Any) -> bool:
    return isinstance(value, Metric) or (callable(value) and not isinstance(value, type))
