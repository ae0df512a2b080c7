"""The folder of a run: what is in it, who may write it, and whether it is finished.

config.yaml       the resolved configuration
initial.safetensors   initial scores and the policy's start
metrics.jsonl     one line a step
checkpoints/      the newest two states
plan.json         what is kept
model/            the pruned model
report.json       written last: its presence means the run is finished
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

from bernprune.config import RunConfig, make_config, read_yaml
from bernprune.errors import RunError
from bernprune.storage import write_bytes

CONFIG, METRICS, PLAN, MODEL, REPORT = "config.yaml", "metrics.jsonl", "plan.json", "model", "report.json"
CHECKPOINTS, INITIAL, LOCK = "checkpoints", "initial.safetensors", ".lock"
_OURS = {CONFIG, METRICS, PLAN, MODEL, REPORT, CHECKPOINTS, INITIAL, LOCK}


class RunFolder:
    """A path with the names of what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.metrics, self.plan = path / CONFIG, path / METRICS, path / PLAN
        self.model, self.report = path / MODEL, path / REPORT
        self.checkpoints, self.initial = path / CHECKPOINTS, path / INITIAL

    @property
    def finished(self) -> bool:
        return self.report.is_file()

    def check(self, config: RunConfig, *, overwrite: bool) -> bool:
        """Whether a run of this config may use the folder; True if it continues an unfinished one.

        Raises:
            RunError: it holds something else, a finished run, or a run of another config, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"output {self.path} is a file, but a folder is needed")
        self._check_writable()
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return False
        self._check_is_run()
        if overwrite:
            return False
        if self.finished:
            raise RunError(f"{self.path} holds a finished run; give another --out, or --overwrite to replace it")
        difference = _difference(self.read_config().to_dict(), config.to_dict())
        if difference:
            raise RunError(
                f"{self.path} holds an unfinished run of another configuration ({difference}); "
                "give another --out, or --overwrite to replace it"
            )
        return True

    def _check_writable(self) -> None:
        parent = self.path
        while not parent.exists() and not parent.is_symlink():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise RunError(f"output {self.path} cannot be written: {parent} is not a writable folder")

    def _check_is_run(self) -> None:
        if not self.config.is_file():
            raise RunError(f"{self.path} is not empty and holds no bernprune run; give another --out")

    def read_config(self) -> RunConfig:
        """The stored configuration. Raises ``ConfigError`` if it is damaged."""
        return make_config(read_yaml(self.config))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The folder, made if need be, for this process alone. Raises ``RunError``."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / LOCK, "w")  # noqa: SIM115 - closed below
        except OSError as error:
            raise RunError(f"output {self.path} cannot be written: {error.strerror or error}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"another process is working in {self.path}") from None
            yield

    def start(self, config: RunConfig) -> None:
        """Begin a fresh run, in the place of an earlier one of ours. Raises ``OSError``."""
        for name in _OURS - {LOCK}:
            _remove(self.path / name)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        write_bytes(self.config, text.encode())

    def open_metrics(self, step: int) -> TextIO:
        """The metrics stream, cut to the steps before ``step``, ready for that step's line."""
        kept = [line for line in _lines(self.metrics) if _step_of(line) < step]
        write_bytes(self.metrics, "".join(f"{line}\n" for line in kept).encode())
        return open(self.metrics, "a", encoding="utf-8")


def sync(file: TextIO) -> None:
    """Make what was written so far durable."""
    file.flush()
    os.fsync(file.fileno())


def open_run(path: Path) -> RunFolder:
    """The folder of an existing run. Raises ``RunError`` if there is none."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise RunError(f"{path} holds no bernprune run (no {CONFIG} in it)")
    return folder


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def _step_of(line: str) -> float:
    """A line's step; infinite for a line cut off by a crash."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _difference(stored: dict[str, Any], given: dict[str, Any], prefix: str = "") -> str | None:
    """The first setting that differs, in words."""
    for key in given:
        mine, theirs = stored.get(key), given[key]
        if isinstance(mine, dict) and isinstance(theirs, dict):
            inner = _difference(mine, theirs, f"{prefix}{key}.")
            if inner:
                return inner
        elif mine != theirs:
            return f"{prefix}{key} is {mine!r} there and {theirs!r} here"
    return None
