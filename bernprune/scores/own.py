"""Metrics of one's own, by the place where they stand: ``path/to/file.py:name``."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bernprune.errors import ConfigError
from bernprune.names import meant
from bernprune.scores.base import Metric
from bernprune.scores.stream import Projection, by_column


def own_metric(file: str, name: str) -> Metric:
    """The ``Metric``, or the function of columns, of that name in a Python file, which is executed.

    Raises:
        ConfigError: no such file or name in it, a file that cannot be executed, or something else of that name.
    """
    path = Path(file).resolve()
    if not path.is_file():
        raise ConfigError(f"score file {file} does not exist")
    defined = _executed(path, path.stat().st_mtime_ns)
    if name not in defined:
        scores = [other for other, value in defined.items() if _is_score(value, path)]
        raise ConfigError(f"score file {file} has no {name!r}{meant(name, scores) or f', only {scores}'}")
    if not callable(defined[name]) and not isinstance(defined[name], Metric):
        raise ConfigError(f"score {file}:{name} must be a function or a Metric, but is {defined[name]!r}")
    return of_ones_own(defined[name])


def of_ones_own(score: Metric | Callable[[Projection], torch.Tensor]) -> Metric:
    """A metric as it is, or the one that a function of columns makes."""
    if isinstance(score, Metric):
        return score
    name = getattr(score, "__name__", type(score).__name__)
    return Metric(name, "a function of one's own", "", by_column(score), layerwise=True)


@functools.lru_cache(maxsize=16)
def _executed(path: Path, changed_ns: int) -> dict[str, Any]:
    """What a file defines; it is executed once for each state that it is in."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "every .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"score file {path} cannot be executed: {type(error).__name__}: {error}") from error
    return vars(module)


def _is_score(value: Any, path: Path) -> bool:
    """Whether it may be meant as a score, and is not merely imported."""
    return isinstance(value, Metric) or (callable(value) and getattr(value, "__module__", None) == path.stem)
