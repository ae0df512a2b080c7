"""What tests of whole runs start from: a tiny model with a text, a copy of it to work in, and a finished run."""

import gc
import itertools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import interpreting  # noqa: F401
import pytest
import torch
from tiny_run import Place, finish, prepare, visit

from bernprune.costs import Planner
from bernprune.run import loop

gc.disable()  # until all is imported, none of which is garbage
torch.set_num_threads(1)  # there is a worker for each core
os.fsync = lambda _: None  # no test cuts the power, and disks are slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what runs in the background


def pytest_collection_finish() -> None:
    """From here on garbage is looked for among what tests make, not among what was imported."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Or libraries that look for leaks when Python ends would find some."""
    gc.unfreeze()


@pytest.fixture
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, the largest integers or true: what a kernel forgot to write shows."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **options: Any) -> torch.Tensor:
            fresh = make(*args, **options)
            if fresh.is_floating_point():
                return fresh.fill_(math.nan)
            return fresh.fill_(True if fresh.dtype == torch.bool else torch.iinfo(fresh.dtype).max)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a search, 1/64 second goes by from one look at the clock to the next: it looks before a step and after."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 64))


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks on the same windows go through one after the other: each sequence that is counted is a row that is run."""
    monkeypatch.setattr(Planner, "together", lambda *_, **__: False)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """To be copied, never to be worked in."""
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def place(prepared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return visit(prepared, tmp_path / "place", monkeypatch)


@pytest.fixture(scope="module")
def finished(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; tests that change it work on a copy."""
    return finish(prepared, tmp_path_factory.mktemp("finished"))
