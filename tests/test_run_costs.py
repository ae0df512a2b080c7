"""A run chooses how masks are run by what it measured once, and goes on by that."""

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import Place, succeed

from bernprune.config import make_config
from bernprune.costs import Costs
from bernprune.run import opening, pipeline
from bernprune.run import stage as module
from bernprune.run.stage import Stage, row_bytes, rows_per_forward

MEASURED = Costs(passing=32.0, copying=8.0, blocks=0.5)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The windows of each measurement; they all find the same."""
    windows: list[int] = []

    def measure(view: Any, ops: Any, window: int, rows: int) -> Costs:
        assert rows == 64, "as many as a pass of the run"
        windows.append(window)
        return replace(MEASURED)

    monkeypatch.setattr(module, "measure", measure)
    return windows


def searched_with(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Costs], list[int]]:
    """The costs and rows of every search that begins from now on."""
    found, rows, search = list[Costs](), list[int](), pipeline.run_search

    def watched(stage: Stage, *given: Any, **more: Any) -> Any:
        found.append(stage.costs)
        rows.append(stage.rows)
        return search(stage, *given, **more)

    monkeypatch.setattr(pipeline, "run_search", watched)
    return found, rows


@pytest.mark.parametrize(
    ("least", "setting", "expected"),
    [(0, "measured", MEASURED), (0, "fixed", Costs()), (10**9, "measured", Costs())],
    ids=["large", "fixed", "small"],
)
def test_costs_of_large_models_are_measured(
    least: int, setting: str, expected: Costs, place: Place, measurements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, unless it is not wanted; they are kept in the run folder."""
    monkeypatch.setattr(opening, "_LARGE", least)
    found, _ = searched_with(monkeypatch)
    succeed(*place.prune(f"search.costs={setting}", "search.dtype=same"))
    assert found == [expected] and len(measurements) == (expected == MEASURED)
    assert json.loads((place.out / "costs.json").read_text()) == {"rows": 64, "dtype": "same", **expected.to_dict()}


OTHER_DTYPE = json.dumps({"rows": 64, "dtype": "float8", **MEASURED.to_dict()})


@pytest.mark.parametrize("stored", [OTHER_DTYPE, "{}", "[1]", "{", '{"passing": "much"}', '{"speed": 3}', None])
def test_a_run_goes_on_with_what_it_measured(
    stored: str | None, place: Place, measurements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And measures once more if that is lost or damaged."""
    monkeypatch.setattr(opening, "_LARGE", 0)
    succeed(*place.prune("search.dtype=same"))
    path, kept = place.out / "costs.json", Costs(1.0, 2.0, 0.25)
    found, found_rows = searched_with(monkeypatch)
    resumes: list[tuple[Callable[[], Any], Costs]] = [
        (lambda: path.write_text(json.dumps({"rows": 5, "dtype": "same", **kept.to_dict()})), kept),
        (lambda: path.unlink() if stored is None else path.write_text(stored), MEASURED),
    ]
    for spoil, expected in resumes:
        spoil()
        (place.out / "report.json").unlink()
        measurements.clear()
        succeed("resume", str(place.out))
        assert found[-1] == expected and len(measurements) == (expected == MEASURED)
        rows = 5 if expected == kept else 64
        assert found_rows[-1] == rows and json.loads(path.read_text()) == {
            "rows": rows,
            "dtype": "same",
            **expected.to_dict(),
        }
    (place.out / "report.json").unlink()
    earlier = {name: value for name, value in kept.to_dict().items() if name != "listing"}
    path.write_text(json.dumps({"rows": 5, **earlier}))  # as earlier versions did
    succeed("resume", str(place.out), "--set", "search.rows_per_forward=3")
    assert found[-1] == kept and found_rows[-1] == 3


def test_rows_that_were_given_may_be_left_to_the_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it goes on: only those that it found by itself are taken as they were."""
    found_rows = searched_with(monkeypatch)[1]
    succeed(*place.prune("search.rows_per_forward=4"))
    (place.out / "report.json").unlink()
    succeed("resume", str(place.out), "--set", "search.rows_per_forward=auto")
    assert found_rows == [4, 64]


@pytest.mark.parametrize(
    ("free", "expected"),
    [(10**15, 256), (8 * 2**30, 16), (2**30, 8), (10**7, 1), (0, 1)],
    ids=lambda number: f"{number}",
)
def test_rows_follow_from_the_memory_of_a_gpu(free: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is free, up to a limit; a power of 2, one at least. A number that is given is taken."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**15))
    monkeypatch.setattr(module, "_ACTIVATION_BYTES", 2**30 if free < 10**15 else 10**15)
    model = SimpleNamespace(dtype=torch.bfloat16)
    shape = SimpleNamespace(layers=[SimpleNamespace(channels=100_000)], hidden_size=20_000)
    view = SimpleNamespace(model=model, architecture=shape, device=torch.device("cuda"))
    config = make_config({"data": {"window": 70}})
    assert row_bytes(config, view) == 2 * 70 * 420_000
    assert rows_per_forward(config, view) == expected
    assert rows_per_forward(make_config({"search": {"rows_per_forward": 7}}), view) == 7
