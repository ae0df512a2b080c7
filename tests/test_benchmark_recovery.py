"""The benchmark of recoveries: rows are run once, rates are chosen on other text and seeds, and the table adds up."""

from pathlib import Path
from typing import Any

import pytest
from benchmark_tasks import source_of
from tiny_run import Place, tiny_text

from benchmarks.learning.rows import append_row, read_rows
from benchmarks.learning.task import SOURCES
from benchmarks.recovery import run, show
from bernprune.errors import DataError
from bernprune.settings import merge


@pytest.fixture
def tiny(place: Place, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a benchmark of a second."""
    tiny_text(place.text, 4000)
    monkeypatch.setitem(SOURCES, "tiny", source_of(place))
    monkeypatch.setitem(run.SEQUENCES, "tiny", 200)
    monkeypatch.setattr(run, "RATES", [1e-2, 1e-6])
    ways = {name: {"batch": 4, "held_out": 4, **way} for name, way in run.WAYS.items()}
    monkeypatch.setattr(run, "WAYS", ways)
    small = {"data": {"window": 16}, "repair": {"windows": 60}}
    monkeypatch.setattr(run, "PLANS", {"wanda-sp": merge(run.PLANS["wanda-sp"], small)})
    return ["--model", "tiny", "--sparsity", "0.3", "--seed", "0", "--tokens", "640", "--way", "lora"]


def test_rows_are_filled_once(tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    run.main([*tiny, "--folder", str(folder)])
    rows, sweep = (read_rows(folder / f"{name}.jsonl", show.KEY) for name in ("results", "sweeps"))
    assert [row["seed"] for row in rows] == [0] and {row["seed"] for row in sweep} == {run.SWEEP_SEED}
    assert [row["learning_rate"] for row in sweep] == run.RATES
    best = min(sweep, key=lambda row: row["loss"]["after"])
    assert rows[0]["learning_rate"] == best["learning_rate"] == 1e-2
    texts = {row["protocol"]["text"] for row in rows}, {row["protocol"]["text"] for row in sweep}
    assert texts == ({"held-out"}, {"development"})
    assert rows[0]["protocol"]["text_sha256"] != sweep[0]["protocol"]["text_sha256"]
    assert str(tmp_path) not in (folder / "results.jsonl").read_text() + (folder / "sweeps.jsonl").read_text()
    assert rows[0]["loss"]["after"] < rows[0]["loss"]["before"]
    assert rows[0]["peak_mib"] > 0
    before = (folder / "results.jsonl").read_bytes()
    run.main([*tiny, "--folder", str(folder)])
    assert (folder / "results.jsonl").read_bytes() == before
    assert f"{rows[0]['loss']['after']:.3f}" in (folder / "table.md").read_text()


def made_row(seed: int, before: float, after: float, **changes: Any) -> dict[str, Any]:
    key = {"model": "tiny", "plan": "default", "sparsity": 0.3, "seed": seed, "way": "lora", "tokens": 10}
    loss = {"before": before, "after": after}
    return {**key, "learning_rate": 0.1, "loss": loss, "seconds": 4.0, "protocol": {"text": "one"}, **changes}


def test_the_table_is_made_from_the_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows yet"):
        show.show(tmp_path)
    for row in (made_row(0, 3.0, 2.0), made_row(1, 3.2, 2.4)):
        append_row(tmp_path / "results.jsonl", row)
    show.show(tmp_path)
    assert "| `default` | lora | 0.1 | 3.100 | 2.200 ± 0.283 | +0.800 | 2 | 4 |" in (tmp_path / "table.md").read_text()
    append_row(tmp_path / "results.jsonl", made_row(2, 3.0, 2.0, protocol={"text": "another"}))
    with pytest.raises(DataError, match="taken by several protocols"):
        show.show(tmp_path)
