"""What tests of whole runs start from: a tiny model with a text, a copy of it to work in, and a finished run."""

from pathlib import Path

import pytest
from tiny_run import Place, finish, prepare, visit


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
