"""Metrics of one's own, by the place where they stand: ``path/to/file.py:name``."""

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bernprune.errors import BernpruneError, ConfigError
from bernprune.names import meant
from bernprune.scores.base import Context, Metric
from bernprune.scores.stream import Projection, by_column

_MODULE = "bernprune_scores_of_ones_own_"  # before the name of a file, which may be that of another module


def own_metric(file: str, name: str) -> Metric:
    """The ``Metric``, or the function of columns, of that name in a Python file, which is executed.

    Raises:
        ConfigError: no such file or name in it, a file that cannot be executed, or something else of that name.
    """
    path, place = Path(file).resolve(), f"{file}:{name}"
    if not path.is_file():
        raise ConfigError(f"score file {file} does not exist")
    defined = _executed(path, path.stat().st_mtime_ns)
    if name not in defined:
        scores = [other for other, value in defined.items() if _is_score(other, value, path)]
        raise ConfigError(f"score file {file} has no {name!r}{meant(name, scores) or f', only {scores}'}")
    found = defined[name]
    if isinstance(found, Metric):
        return replace(found, name=place, run=_guarded(place, found.run))
    if not callable(found) or isinstance(found, type):
        raise ConfigError(f"score {place} must be a function or a Metric, but is {found!r}")
    return of_ones_own(_guarded(place, found), place)


def of_ones_own(score: Metric | Callable[[Projection], torch.Tensor], name: str | None = None) -> Metric:
    """A metric as it is, or the one that a function of columns makes."""
    if isinstance(score, Metric):
        return score
    name = name or str(getattr(score, "__name__", type(score).__name__))
    return Metric(name, "a function of one's own", "", by_column(_of_columns(name, score)), layerwise=True)


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

    def run(given: Projection | Context) -> torch.Tensor:
        try:
            return _tensor(place, score(given))
        except BernpruneError:
            raise
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]  # from the function's own on
            at = f" in line {frames[0].lineno}" if frames and frames[0].filename != __file__ else ""
            raise ConfigError(f"score {place} failed{at}: {type(error).__name__}: {error}") from error

    return run


def _tensor(name: str, found: Any) -> torch.Tensor:
    if not isinstance(found, torch.Tensor):
        raise ConfigError(f"score {name} must give a tensor, but gave {found!r:.100}")
    return found


@functools.lru_cache(maxsize=16)
def _executed(path: Path, changed_ns: int) -> dict[str, Any]:
    """What a file defines; it is executed once for each state that it is in."""
    name = _MODULE + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "every .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"score file {path} cannot be executed: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[name]
    return vars(module)


def _is_score(name: str, value: Any, path: Path) -> bool:
    """Whether it may be meant as a score, and is not merely imported."""
    ours = getattr(value, "__module__", None) in (_MODULE + path.stem, "functools")  # of what partial makes
    return isinstance(value, Metric) or (callable(value) and not isinstance(value, type) and ours and name[0] != "_")
