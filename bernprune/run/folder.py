"""The folder of a run: what is in it, who may write it, and whether it is finished.

config.yaml            the resolved configuration
versions.json          versions of the libraries, and fingerprints of weights and texts, that the run began with
initial.safetensors    initial scores and the policy's start
metrics.jsonl          one line a step
checkpoints/           the newest two states
learned.safetensors    what was learned of every unit
costs.json             costs of forward passes where the run began, the rows of one, and the number format
finals.safetensors     heats of the final choice, so far
judged.json            what finalists lose once they are repaired, so far
plan.json              what is kept
plans/                 what would be kept at other sparsities
model/                 the pruned model
report.png             what each layer keeps, and the losses of the search
report.json            its presence means the run is finished
"""

import contextlib
import fcntl
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TextIO

import yaml

from bernprune.config import RunConfig, make_config
from bernprune.errors import ConfigError, RunError
from bernprune.run.origin import CHANGED, INPUTS, changed_versions, origin_of, versions
from bernprune.settings import difference, read_yaml, without
from bernprune.storage import check_writable, nearest_parent, remove_empty, sync, write_bytes, write_json

logger = logging.getLogger(__name__)

CONFIG, METRICS, PLAN, MODEL, REPORT = "config.yaml", "metrics.jsonl", "plan.json", "model", "report.json"
RECOVERY_CONFIG, COSTS, JUDGED = "recover.yaml", "costs.json", "judged.json"
CHECKPOINTS, INITIAL, PICTURE, LOCK = "checkpoints", "initial.safetensors", "report.png", ".lock"
LEARNED, FINALS, PLANS, VERSIONS = "learned.safetensors", "finals.safetensors", "plans", "versions.json"
_OURS = {CONFIG, METRICS, PLAN, MODEL, REPORT, CHECKPOINTS, INITIAL, PICTURE, LOCK, LEARNED, FINALS, PLANS, VERSIONS}
_OURS |= {COSTS, JUDGED}

# What may change while a run is under way: where it runs, and where what it reads lies, which is told by fingerprints;
# memory, checkpoints, what a loss does that is not finite, the repair, which comes last, and what is measured besides.
FREE_SETTINGS = (
    "model.path",
    "model.device",
    "data.text",
    "data.eval_text",
    "search.rows_per_forward",
    "search.checkpoint_seconds",
    "search.checkpoint_steps",
    "search.non_finite",
    "repair",
    "recover",
    "report",
)


class RunFolder:
    """A path with the names of what lies in it.

    Args:
        overwrite: what lies in it now is to be replaced; it is not, until a new run starts.

    Attributes:
        FREE: settings that may change on the way.
        WORK: what is done in it, in a word.
    """

    CONFIG, WORK, OTHER = CONFIG, "run", "give another --out"
    FREE: tuple[str, ...] = FREE_SETTINGS

    def __init__(self, path: Path, *, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite
        self.config, self.metrics, self.plan = path / self.CONFIG, path / METRICS, path / PLAN
        self.model, self.report, self.picture = path / MODEL, path / REPORT, path / PICTURE
        self.checkpoints, self.initial = path / CHECKPOINTS, path / INITIAL
        self.learned, self.finals, self.plans = path / LEARNED, path / FINALS, path / PLANS
        self.versions, self.costs, self.judged = path / VERSIONS, path / COSTS, path / JUDGED
        self._to_replace = self._config_written() if overwrite else None

    @property
    def finished(self) -> bool:
        """Whether there is a run with its result; one that is to be replaced counts for none, here and below."""
        return self._has_run and self.report.is_file()

    @property
    def unfinished(self) -> bool:
        """Whether there is a run to continue."""
        return self._has_run and not self.report.is_file()

    @property
    def _has_run(self) -> bool:
        return self._config_written() != self._to_replace

    def _config_written(self) -> int | None:
        """When, in nanoseconds; None if there is none."""
        with contextlib.suppress(OSError):
            return self.config.stat().st_mtime_ns
        return None

    def look(self, config: RunConfig) -> None:
        """As ``check``, before the work of loading. Raises ``RunError`` also if another process works in the folder."""
        self.check(config)
        try:
            with open(self.path / LOCK, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken() from None
        except OSError:  # no lock, or none to be had: ``locked`` will tell
            pass

    def _taken(self) -> RunError:
        return RunError(f"another process is working in {self.path}")

    def check(self, config: RunConfig) -> bool:
        """Whether a run of this config may use the folder; True if it continues an unfinished one.

        Raises:
            RunError: it holds something else, a finished run, or a run of another config, or cannot be written.
        """
        check_writable(self.path)
        if not self.path.is_dir() or all(_is_scrap(item.name) for item in self.path.iterdir()):
            return False
        self._check_is_run()
        self._check_apart(config)
        if self.overwrite:
            return False
        if self.finished:
            raise RunError(f"{self.path} holds a finished {self.WORK}; {self.OTHER}, or --overwrite to replace it")
        stored, given = (without(each.to_dict(), self.FREE) for each in (self.read_config(), config))
        differs = difference(stored, given)
        if differs:
            repaired = differs.startswith("search.refit")  # which follows from the repair, unless it is given
            advice = f"bernprune resume {shlex.quote(str(self.path))} --set to change its repair, " if repaired else ""
            raise RunError(
                f"{self.path} holds an unfinished {self.WORK} of another configuration ({differs}); "
                f"{advice}{self.OTHER}, or --overwrite to replace it"
            )
        return True

    def _check_is_run(self) -> None:
        """What is to be replaced must be ours: others, too, call a file config.yaml, and a folder model."""
        sections = {"model", "data", "budget", "search", "policy", "repair", "report"}  # ours name every setting
        try:
            is_run = self.config.is_file() and sections <= read_yaml(self.config).keys()
        except ConfigError:
            is_run = False
        if not is_run:
            raise RunError(f"{self.path} is not empty and holds no bernprune {self.WORK}; {self.OTHER}")

    def _check_apart(self, config: RunConfig) -> None:
        """What the run reads must not lie where it removes what an earlier one left."""
        ours = {self.path / name for name in _OURS}
        read = {"model.path": config.model.path, "data.text": config.data.text, "data.eval_text": config.data.eval_text}
        for name, given in read.items():
            if given is None:
                continue
            path = Path(os.path.expanduser(given)).resolve()
            if any(path.is_relative_to(each.resolve()) for each in ours):
                raise RunError(
                    f"{name} {given} lies in {self.path}, where the {self.WORK} would replace it; {self.OTHER}"
                )

    def read_config(self) -> RunConfig:
        """The stored configuration. Raises ``ConfigError`` if it is damaged."""
        try:
            return make_config(read_yaml(self.config))
        except ConfigError as error:
            raise ConfigError(f"{self.config} is not what a {self.WORK} leaves: {error}") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The folder for this process alone. It is made if need be, and gone again if no run began in it.

        Raises:
            RunError: it cannot be made or locked, or another process works in it.
        """
        existed = nearest_parent(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / LOCK, "w")  # noqa: SIM115 - closed below
        except OSError as error:
            remove_empty(self.path, existed)
            raise RunError(f"output {self.path} cannot be written: {error.strerror or error}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_at(self.path / LOCK, file):  # who held it has begun no run, and took it away
                    raise BlockingIOError
            except BlockingIOError:
                raise self._taken() from None
            except OSError as error:
                self._give_up(existed)
                raise RunError(
                    f"output {self.path} cannot be locked against other processes: {error.strerror or error}; "
                    f"{self.OTHER}, on a file system that can"
                ) from None
            try:
                yield
            finally:
                self._give_up(existed)

    def _give_up(self, existed: Path) -> None:
        """Leave nothing where no run began."""
        if not self.config.is_file():
            (self.path / LOCK).unlink(missing_ok=True)
            remove_empty(self.path, existed)

    def start(self, config: RunConfig, inputs: Mapping[str, str] = MappingProxyType({})) -> None:
        """Begin a fresh run, in the place of an earlier one of ours. Raises ``OSError``.

        Args:
            inputs: fingerprints of what it begins with: ``weights``, ``text``, ``evaluation``.
        """
        began_with = self._versions(config) | dict(inputs)  # which reads files: before anything is changed
        _remove(self.report)  # first, so that what is left is not taken for a finished run
        sync(self.path)
        for name in sorted(_OURS - {LOCK, self.CONFIG}):  # without its config, the rest is not known for a run
            _remove(self.path / name)
        self.write_config(config)
        write_json(self.versions, began_with)

    def _versions(self, config: RunConfig) -> dict[str, str]:
        """What it begins with, beside its inputs."""
        return origin_of(config)

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Raises ``RunError`` if the run began with other fingerprints than these, as far as they are known."""
        began = self.began_with()
        for name, now in inputs.items():
            before = began.get(name, now)
            if before != now:
                changed = changed_versions(began, versions())  # whose own text the embedded one is
                raise RunError(
                    f"{INPUTS[name]} that the {self.WORK} in {self.path} began with (fingerprint {before}, but now "
                    f"{now}); give it back to go on, or start over with --overwrite"
                    + (f"; it began with {changed}" if changed else "")
                )

    def go_on(self, config: RunConfig, inputs: Mapping[str, str]) -> None:
        """Take up a run that was begun, maybe with other settings and libraries. Raises ``OSError``."""
        now = self._versions(config)
        self.write_config(config)
        if not self.versions.is_file():  # it was killed as it began, and begins now
            write_json(self.versions, now | dict(inputs))
        if changed := changed_versions(self.began_with(), now):
            write_json(self.versions, self.began_with() | {CHANGED: changed})
            logger.warning("the %s began with %s: it may not go on to the bit", self.WORK, changed)

    def began_with(self) -> dict[str, str]:
        """Versions and fingerprints, see ``start``; empty for a run that was killed as it began."""
        try:
            return dict(json.loads(self.versions.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def write_config(self, config: RunConfig) -> None:
        """Raises ``OSError``."""
        text = yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)
        if "\x85" in text:  # a line end of its own, which PyYAML writes as it is, and reads as a space
            text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        write_bytes(self.config, text.encode())

    def forget_choice(self) -> None:
        """Remove what was chosen, where a search goes on that was over, as its checkpoints were lost.

        Raises ``OSError``.
        """
        for path in (self.finals, self.learned, self.plan, self.plans):
            _remove(path)

    def remove_model(self) -> None:
        """Remove the model, and what a process that was killed while writing it left. Raises ``OSError``."""
        for path in self._models():
            _remove(path)

    @contextlib.contextmanager
    def delivering(self) -> Iterator[None]:
        """For the block that writes model and report: if it fails, neither is left, as neither is verified."""
        try:
            yield
        except BaseException:
            self.report.unlink(missing_ok=True)
            self.remove_model()
            raise

    def model_bytes(self) -> int:
        """What that would free."""
        folders = [path for path in self._models() if not path.is_symlink()]
        return sum(file.lstat().st_size for folder in folders for file in folder.rglob("*"))

    def _models(self) -> list[Path]:
        return [self.model, *self.path.glob(f".{MODEL}.*")]

    def read_report(self) -> dict[str, Any]:
        """What a finished run came to. Raises ``RunError`` if the file is damaged."""
        try:
            return dict(json.loads(self.report.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.report} is damaged ({error})") from None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records of all steps."""
        return [json.loads(line) for line in _lines(self.metrics)]

    def open_metrics(self, step: int) -> TextIO:
        """The metrics stream, cut to the steps before ``step``, ready for that step's line; lines are seen at once."""
        kept = [line for line in _lines(self.metrics) if _step_of(line) < step]
        write_bytes(self.metrics, "".join(f"{line}\n" for line in kept).encode())
        return open(self.metrics, "a", encoding="utf-8", buffering=1)


def open_run(path: Path) -> RunFolder:
    """The folder of an existing run. Raises ``RunError`` if there is none."""
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise RunError(f"{path} holds no bernprune run (no {CONFIG} in it){_but(path)}")
    return folder


def _but(path: Path) -> str:
    """What lies there instead, if it is of ours, and what to do with it, as the end of a sentence."""
    if (path / RECOVERY_CONFIG).is_file():
        return "; it holds a recovery, which the bernprune recover command that began it goes on with"
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    if names and all(map(_is_scrap, names)):
        return (
            "; one that was stopped before anything was saved begins anew by the bernprune prune command that began it"
        )
    return ""


def _is_scrap(name: str) -> bool:
    """Whether a process that was killed before its run began may have left it."""
    return name == LOCK or (name.startswith(".") and name.endswith(".part"))


def _is_at(path: Path, file: IO[Any]) -> bool:
    """Whether an open file is still that of the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _step_of(line: str) -> float:
    """A line's step; infinite for a line cut off by a crash."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
