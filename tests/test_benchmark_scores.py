"""The benchmark of metrics alone: what it tries, what a row says, and that its table is made of rows alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Place, tiny_text

from benchmarks.learning.rows import read_rows
from benchmarks.learning.task import SOURCES, Source
from benchmarks.memory import Peak
from benchmarks.scores import run, show
from bernprune.scores import SCORES


@pytest.fixture
def model(place: Place, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny one in the place of the benchmark's."""
    held_out = tiny_text(place.folder / "held-out.txt", count=400, seed=1)
    config = {"data": {"window": 16}, "initial": {"windows": 8}, "search": {"windows": 2}}
    monkeypatch.setitem(SOURCES, "tiny", Source(str(place.model), str(place.text), str(held_out), config))
    return "tiny"


def test_rows_of_metrics_alone(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each variant, not again when run again; of another sparsity the same scores, and more loss."""
    given = [f"--model={model}", "--score=wanda-sp,block-influence", "--seed=0", f"--folder={tmp_path}"]
    run.main([*given, "--sparsity=0.2"])
    rows = read_rows(tmp_path / "results.jsonl", show.KEY)
    assert {(row["score"], row["inputs"], row["allocation"]) for row in rows} == {
        ("wanda-sp", "dense", "uniform"),
        ("wanda-sp", "dense", "global"),
        ("wanda-sp", "dense", "block-influence"),
        ("wanda-sp", "dense", "search"),
        ("wanda-sp", "pruned", "uniform"),
        ("block-influence", "dense", "pooled"),
    }
    assert all(0.2 <= row["reached"] < 0.45 and row["seconds"] >= 0 for row in rows)  # a block is a sixth
    assert len({row["loss"] for row in rows}) >= 4
    run.main([*given, "--sparsity=0.2,0.5"])
    more = read_rows(tmp_path / "results.jsonl", show.KEY)
    assert more[: len(rows)] == rows and len(more) == 2 * len(rows)
    assert (tmp_path / "table.md").read_text() == show.table(more)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_metric_is_tried() -> None:
    """Uniform, global and as it is by default; blocks as they are by default."""
    for metric in SCORES.values():
        tried = list(run.variants(metric))
        assert ("dense", metric.allocation) in tried and len(set(tried)) == len(tried)
        if "channel" in metric.kinds:
            assert {("dense", "uniform"), ("dense", "global")} <= set(tried)


def row_of(seed: int, score: str, loss: float) -> dict[str, Any]:
    protocol = {"windows": 12, "window": 16}
    names = {"model": "tiny", "score": score, "inputs": "dense", "allocation": "uniform", "sparsity": 0.3, "seed": seed}
    figures = {"loss": loss, "perplexity": 2 * loss, "dense_loss": 1.0, "seconds": 1.5, "peak_mib": 20}
    return {**names, **figures, "machine": "a machine", "protocol": protocol}


def test_the_table_has_means_and_spreads() -> None:
    """By hand; the best first."""
    told = show.table([row_of(0, "flap", 3.0), row_of(0, "cfsp", 2.0), row_of(1, "cfsp", 2.5)])
    lines = [line for line in told.splitlines() if line.startswith("| `")]
    assert lines == [
        "| `cfsp` | uniform | 2.250 ± 0.354 | 4.50 | 1.5 | 20 | 2 |",
        "| `flap` | uniform | 3.000 | 6.00 | 1.5 | 20 | 1 |",
    ]
    assert "12 windows of 16 tokens, dense 1.000; a machine." in told


def test_memory_is_that_of_the_peak() -> None:
    """Of what is taken meanwhile, also if it is given back."""
    peak = Peak(torch.device("cpu"))
    held = torch.ones(64 * 2**20 // 4)
    held += 1
    del held
    assert 50 < peak.mib() < 200
