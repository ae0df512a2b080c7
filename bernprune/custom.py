"""Custom code in a run, by the place where it stands: ``path/to/file.py:name``."""

import functools
import hashlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from bernprune.errors import BernpruneError, ConfigError
from bernprune.names import meant

_MODULE = "bernprune_custom_"  # before the name of a file, which may be that of another module


def defined_at(what: str, file: str, name: str, suits: Callable[[Any], bool]) -> Any:
    """What stands at a place, in a Python file, which is executed.

    Args:
        what: the word for it.
        suits: what else in the file may have been meant, where there is nothing of that name.

    Raises:
        ConfigError: no such file or name in it, or a file that cannot be executed.
    """
    path = _path_of(file)
    defined = _executed(what, path).defined
    if name not in defined:
        others = [other for other, value in defined.items() if suits(value) and _is_ours(other, value, path)]
        known = f", only {others}" if others else ""
        raise ConfigError(f"{what} file {file} has no {name!r}{meant(name, others) or known}")
    return defined[name]


def _is_ours(name: str, value: Any, path: Path) -> bool:
    """Whether it is for others to use, and was not merely imported."""
    imported = isinstance(value, FunctionType | type) and value.__module__ != _module_name(path)
    return not name.startswith("_") and not imported


class _Executed(NamedTuple):
    """What a file defines; when it, and what it found beside it, had been changed; and the digest of all that."""

    defined: dict[str, Any]
    changed: dict[Path, int]
    digest: str

    @property
    def is_current(self) -> bool:
        return all(file.is_file() and file.stat().st_mtime_ns == then for file, then in self.changed.items())


_executed_files: dict[Path, _Executed] = {}
_beside: dict[str, ModuleType] = {}  # modules that custom files found beside them; others may have modules of that name
_unchanging = threading.local()


@contextmanager
def unchanging() -> Iterator[None]:
    """Each file is executed once at most within the block: changes on the disk meanwhile are ignored."""
    before, _unchanging.files = getattr(_unchanging, "files", None), dict[Path, _Executed]()
    try:
        yield
    finally:
        _unchanging.files = before


def code_digest(what: str, file: str) -> str:
    """Of what is executed of a file. Raises ``ConfigError`` as ``defined_at`` does."""
    return _executed(what, _path_of(file)).digest


def _path_of(file: str) -> Path:
    return Path(os.path.expanduser(file)).resolve()


def _executed(what: str, path: Path) -> _Executed:
    """A file is executed once for each state that it is in."""
    kept: dict[Path, _Executed] | None = getattr(_unchanging, "files", None)
    if kept is not None and path in kept:
        return kept[path]
    if not path.is_file():
        raise ConfigError(f"{what} file {path} does not exist")
    known = _executed_files.get(path)
    if known is None or not known.is_current:
        _executed_files[path] = known = _execute(what, path)
    if kept is not None:
        kept[path] = known
    return known


def _execute(what: str, path: Path) -> _Executed:
    """With its folder on the path while it is executed, so that it finds what lies beside it, as that is now."""
    for name, module in _beside.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _beside.clear()
    module = ModuleType(_module_name(path))
    module.__file__, source = str(path), path.read_bytes()
    known, places = set(sys.modules), list(sys.path)
    sys.modules[module.__name__] = module  # where dataclasses look, also those that are made later
    sys.path.insert(0, str(path.parent))
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        at = f" in line {lines[-1]}" if lines else ""
        raise ConfigError(f"{what} file {path} cannot be executed: {type(error).__name__}{at}: {error}") from error
    finally:
        sys.path[:] = places
        _beside.update(_found_beside(path, set(sys.modules) - known))
    files = sorted({path, *(Path(str(found.__file__)) for found in _beside.values())})
    digest = hashlib.sha256(b"".join(source if file == path else file.read_bytes() for file in files))
    return _Executed(vars(module), {file: file.stat().st_mtime_ns for file in files}, digest.hexdigest()[:16])


def _module_name(path: Path) -> str:
    return f"{_MODULE}{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"


def _found_beside(path: Path, names: Iterable[str]) -> dict[str, ModuleType]:
    """Those of the modules that lie beside a file, as modules or in packages."""
    found: dict[str, ModuleType] = {}
    for name in names:
        origin = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
        if origin is None or getattr(sys.modules[name], "__file__", None) is None:
            continue
        top = Path(origin).parent if Path(origin).name == "__init__.py" else Path(origin)
        if top.parent == path.parent and not name.startswith(_MODULE):
            found[name] = sys.modules[name]
    return found


def blamed(what: str, place: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A custom function, whose errors are reported as faults of the setting that named it."""

    @functools.wraps(run)
    def call(*given: Any) -> Any:
        try:
            return run(*given)
        except (BernpruneError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)[1:]  # from the function's own on
            frame = frames[0] if frames and frames[0].filename != __file__ else None
            raise _fault(what, place, frame, error) from error

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
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        for what, place in places:
            file = _path_of(place.rpartition(":")[0])
            own = [frame for frame in frames if Path(frame.filename).parent == file.parent]  # or what lies beside it
            if own:
                raise _fault(what, place, own[-1], error) from error
        raise


def _fault(what: str, place: str, frame: traceback.FrameSummary | None, error: BaseException) -> ConfigError:
    at = "" if frame is None else f" in line {frame.lineno}"
    if frame is not None and frame.filename != str(_path_of(place.rpartition(":")[0])):
        at += f" of {frame.filename}"
    return ConfigError(f"{what} {place} failed{at}: {type(error).__name__}: {error}")
