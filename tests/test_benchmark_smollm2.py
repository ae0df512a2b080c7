"""The benchmark of a larger model that others trained: rows are run once, and say where they come from."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import Place

from benchmarks.learning.rows import read_rows
from benchmarks.smollm2 import run
from bernprune.config import make_config


def test_rows_of_runs(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tiny ones; the file of rows holds no path of this machine."""
    monkeypatch.setattr(run, "MODEL", place.model)
    monkeypatch.setattr(run, "TEXT", place.text)

    def small(given: dict[str, Any]) -> Any:
        data = given["data"] | {"window": 16, "eval_tokens": 320}
        return make_config(given | {"data": data, "initial": {"windows": 4}, "repair": {"windows": 8}})

    monkeypatch.setattr(run, "make_config", small)
    given = ["--sequences=0,144", f"--folder={tmp_path}"]
    run.main(given)
    rows = read_rows(tmp_path / "results.jsonl", run.KEY)
    assert [(row["sequences"], row["seed"]) for row in rows] == [(0, 0), (144, 0)]
    assert rows[0]["loss"]["unrepaired"] == rows[0]["loss"]["initial"] and rows[0]["finalists"] is None
    assert str(tmp_path) not in (tmp_path / "results.jsonl").read_text()
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| 30%")]
    assert len(lines) == 2 and all(
        f"{row['loss']['pruned']:.3f}" in line for row, line in zip(rows, lines, strict=True)
    )
    run.main(given)
    assert read_rows(tmp_path / "results.jsonl", run.KEY) == rows


def test_without_the_model_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MODEL", tmp_path / "model")
    with pytest.raises(SystemExit, match=r"error: model is missing: fetch\.py makes the model"):
        run.main([f"--folder={tmp_path}"])
