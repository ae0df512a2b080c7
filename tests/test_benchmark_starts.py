"""The benchmark of metrics as starts: a row for each metric and budget, once, and a table of rows alone."""

from pathlib import Path

import pytest
from benchmark_tasks import source_of
from tiny_run import Place

from benchmarks.learning.rows import read_rows
from benchmarks.learning.task import SOURCES
from benchmarks.scores import starts
from bernprune.scores import SCORES


def test_rows_of_starts(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "tiny", source_of(place))
    monkeypatch.setattr(starts, "STARTS", ["wanda-sp", "wanda-sp/global", "random"])
    folder = tmp_path / "rows"
    given = [
        "--model=tiny",
        "--sparsity=0.3",
        "--seed=0",
        "--score=wanda-sp,wanda-sp/global,random",
        "--sequences=0,400",
        f"--folder={folder}",
    ]
    starts.main(given)
    rows = read_rows(folder / "starts.jsonl", starts.KEY)
    assert [(row["score"], row["sequences"]) for row in rows] == [
        (score, sequences) for score in ("wanda-sp", "wanda-sp/global", "random") for sequences in (0, 400)
    ]
    assert {row["protocol"]["text"] for row in rows} == {"held-out"}
    alone, unlike = rows[0], rows[2]
    assert unlike["unrepaired"] != alone["unrepaired"], "its allocation is another"
    assert alone["unrepaired"] == pytest.approx(alone["initial"]) and alone["seconds"] < rows[1]["seconds"]
    assert len({row["loss"] for row in rows}) >= 2
    text = (folder / "starts.md").read_text()
    assert all(f"{row['loss']:.3f}" in text for row in rows) and "| metric | alone | 400 sequences | draws |" in text
    assert (folder / "starts.png").read_bytes().startswith(b"\x89PNG")
    starts.main(given)
    assert read_rows(folder / "starts.jsonl", starts.KEY) == rows


def test_all_metrics_of_units_can_start() -> None:
    """And one by another allocation than its own."""
    assert set(SCORES) - set(starts.STARTS) == {"block-influence", "block-perplexity"}
    assert set(starts.STARTS) - set(SCORES) == {"wanda-sp/search"}
