"""A run chooses how masks are run by what it measured once, and goes on by that."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tiny_run import Place, succeed

from bernprune.costs import Costs
from bernprune.run import pipeline
from bernprune.run import stage as module
from bernprune.run.stage import Stage

MEASURED = Costs(passing=32.0, copying=8.0, blocks=0.5)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The windows of each measurement; they all find the same."""
    windows: list[int] = []

    def measure(view: Any, ops: Any, window: int) -> Costs:
        windows.append(window)
        return replace(MEASURED)

    monkeypatch.setattr(module, "measure", measure)
    return windows


def searched_with(monkeypatch: pytest.MonkeyPatch) -> list[Costs]:
    """The costs of every search that begins from now on."""
    found, search = list[Costs](), pipeline.run_search

    def watched(stage: Stage, *given: Any, **more: Any) -> Any:
        found.append(stage.costs)
        return search(stage, *given, **more)

    monkeypatch.setattr(pipeline, "run_search", watched)
    return found


@pytest.mark.parametrize(
    ("least", "setting", "expected"),
    [(0, "measured", MEASURED), (0, "fixed", Costs()), (10**9, "measured", Costs())],
    ids=["large", "fixed", "small"],
)
def test_costs_of_large_models_are_measured(
    least: int, setting: str, expected: Costs, place: Place, measurements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, unless it is not wanted; they are kept in the run folder."""
    monkeypatch.setattr(module, "_MEASURED_FROM", least)
    found = searched_with(monkeypatch)
    succeed(*place.prune(f"search.costs={setting}"))
    assert found == [expected] and len(measurements) == (expected == MEASURED)
    assert json.loads((place.out / "costs.json").read_text()) == expected.to_dict()


@pytest.mark.parametrize("stored", ["{}", "[1]", "{", '{"passing": "much"}', '{"speed": 3}', None])
def test_a_run_goes_on_with_what_it_measured(
    stored: str | None, place: Place, measurements: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And measures once more if that is lost or damaged."""
    monkeypatch.setattr(module, "_MEASURED_FROM", 0)
    succeed(*place.prune())
    path, kept, found = place.out / "costs.json", Costs(1.0, 2.0, 0.25), searched_with(monkeypatch)
    resumes: list[tuple[Callable[[], Any], Costs]] = [
        (lambda: path.write_text(json.dumps(kept.to_dict())), kept),
        (lambda: path.unlink() if stored is None else path.write_text(stored), MEASURED),
    ]
    for spoil, expected in resumes:
        spoil()
        (place.out / "report.json").unlink()
        measurements.clear()
        succeed("resume", str(place.out))
        assert found[-1] == expected and len(measurements) == (expected == MEASURED)
        assert json.loads(path.read_text()) == expected.to_dict()
