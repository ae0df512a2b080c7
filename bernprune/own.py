"""Code of one's own in a run, by the place where it stands: ``path/to/file.py:name``."""

import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from bernprune.errors import BernpruneError, ConfigError
from bernprune.names import meant

_MODULE = "bernprune_code_of_ones_own_"  # before the name of a file, which may be that of another module


def defined_at(what: str, file: str, name: str, suits: Callable[[Any], bool]) -> Any:
    """What stands at a place, in a Python file, which is executed.

    Args:
        what: the word for it.
        suits: what else in the file may have been meant, where there is nothing of that name.

    Raises:
        ConfigError: no such file or name in it, or a file that cannot be executed.
    """
    path = Path(file).resolve()
    if not path.is_file():
        raise ConfigError(f"{what} file {file} does not exist")
    defined = _executed(path, path.stat().st_mtime_ns)
    if name not in defined:
        others = [other for other, value in defined.items() if suits(value) and _is_ours(other, value, path)]
        raise ConfigError(f"{what} file {file} has no {name!r}{meant(name, others) or f', only {others}'}")
    return defined[name]


def _is_ours(name: str, value: Any, path: Path) -> bool:
    """Whether it is for others to use, and was not merely imported."""
    imported = isinstance(value, FunctionType | type) and value.__module__ != _MODULE + path.stem
    return not name.startswith("_") and not imported


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
        raise ConfigError(f"file {path} cannot be executed: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[name]
    return vars(module)


def blamed(what: str, place: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one's own, of which all that goes wrong is told as a fault of the setting that named it."""

    @functools.wraps(run)
    def call(*given: Any) -> Any:
        try:
            return run(*given)
        except (BernpruneError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]  # from the function's own on
            line = frames[0].lineno if frames and frames[0].filename != __file__ else None
            raise _fault(what, place, line, error) from error

    return call


@contextmanager
def blaming(places: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Tell what goes wrong in the files of these as a fault of the setting that named it; each is a word and a place.

    What goes wrong elsewhere is raised as it is.
    """
    try:
        yield
    except (BernpruneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        for what, place in places:
            file = str(Path(place.rpartition(":")[0]).resolve())
            lines = [frame.lineno for frame in frames if frame.filename == file]
            if lines:
                raise _fault(what, place, lines[-1], error) from error
        raise


def _fault(what: str, place: str, line: int | None, error: BaseException) -> ConfigError:
    at = "" if line is None else f" in line {line}"
    return ConfigError(f"{what} {place} failed{at}: {type(error).__name__}: {error}")
