"""The rows of the learning benchmark: none is run twice, sweeps decide, and what cannot be is refused."""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_tasks import random_masks, source_of, task_of
from tiny_run import Place

from benchmarks.learning import run
from benchmarks.learning.rivals import METHODS, RIVALS, Method
from benchmarks.learning.rows import KEY, append_row, kept_units, overlap, read_rows, removed_units
from benchmarks.learning.task import SOURCES, Source, Task
from bernprune.errors import ConfigError, DataError


@pytest.fixture
def source(place: Place) -> Source:
    return source_of(place)


# Rows


def fake() -> Any:
    """A method that runs two windows and keeps what a metric says, a poor one if asked; it notes its calls."""

    def method(task: Task, settings: Any) -> torch.Tensor:
        calls.append(settings)
        task.losses(random_masks(task, 1), task.text(2))
        scores_U = task.scores("random") if settings.get("poor") else task.scores()
        return task.select_by(scores_U, "layer")

    calls: list[Any] = []
    return method, calls


@pytest.fixture
def bench(source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command on one tiny source and two fake methods; returns the calls of these."""
    plain, plain_calls = fake()
    swept, swept_calls = fake()
    monkeypatch.setitem(SOURCES, "tiny", source)
    monkeypatch.setitem(METHODS, "plain", Method(plain))
    monkeypatch.setitem(METHODS, "swept", Method(swept, ({"poor": True}, {"poor": False})))

    def command(*more: str) -> tuple[list[Any], list[Any]]:
        plain_calls.clear()
        swept_calls.clear()
        run.main(["--folder", str(tmp_path), "--model", "tiny", "--sequences", "500", *more])
        return plain_calls, swept_calls

    return command


def test_rows_are_not_run_twice(bench: Any, tmp_path: Path) -> None:
    """A second time only what is missing is run, and the files keep what they had."""
    assert len(bench("--method", "plain", "--sparsity", "0.3", "--seed", "0,1")[0]) == 2
    before = (tmp_path / "results.jsonl").read_text()
    assert bench("--method", "plain", "--sparsity", "0.3", "--seed", "0,1")[0] == []
    assert (tmp_path / "results.jsonl").read_text() == before
    assert len(bench("--method", "plain", "--sparsity", "0.3,0.5", "--seed", "1,2")[0]) == 3
    assert (tmp_path / "results.jsonl").read_text().startswith(before)
    assert len(read_rows(tmp_path / "results.jsonl")) == 5


def test_rows_on_another_text_are_refused(bench: Any, tmp_path: Path) -> None:
    """Losses on what other packages say are no rows of the same benchmark; the file stays as it was."""
    bench("--method", "plain", "--sparsity", "0.3", "--seed", "0")
    (row,) = read_rows(tmp_path / "results.jsonl")
    append_row(tmp_path / "results.jsonl", row | {"model": "other", "protocol": row["protocol"] | {"text_sha256": "x"}})
    bench("--method", "plain", "--sparsity", "0.3", "--seed", "1")  # that is another model's
    append_row(tmp_path / "results.jsonl", row | {"seed": 7, "protocol": row["protocol"] | {"text_sha256": "y"}})
    before = (tmp_path / "results.jsonl").read_text()
    text = row["protocol"]["text_sha256"]
    with pytest.raises(DataError, match=f"the held-out text of tiny is {text} here, but .* taken on y; install what"):
        bench("--method", "plain", "--sparsity", "0.3", "--seed", "2")
    assert (tmp_path / "results.jsonl").read_text() == before


def test_the_sweep_decides(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By development text alone, once; the row says which settings."""
    assert [run.sweep_budget(sequences) for sequences in (500, 8192, 163_840)] == [500, 4096, 32_768]
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.learning.task._held_out", lambda *_: pytest.fail("held-out text was touched"))
        bench("--method", "swept", "--sparsity", "0.3", "--seed", "0", "--development")
    swept = read_rows(tmp_path / "sweeps.jsonl")
    assert [(row["sequences"], row["seed"]) for row in swept] == [(500, 100), (500, 100), (500, 0)]
    assert swept[0]["loss"] != swept[1]["loss"]
    best = min(swept[:2], key=lambda row: row["loss"])["settings"]
    assert bench("--method", "swept", "--sparsity", "0.3", "--seed", "0")[1] == [best]
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["settings"] == best
    assert row["protocol"]["text"] == "held-out"
    assert row["used"] == 10


def test_settings_that_are_too_dear_are_not_tried(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The best of the others is taken; if there is none, the method is left out with a sentence."""

    def dear(task: Task, settings: Any) -> torch.Tensor:
        if task.meter.left < settings["least"]:
            raise ConfigError("too few")
        return task.uniform_mask()

    monkeypatch.setitem(METHODS, "dear", Method(dear, ({"least": 400}, {"least": 501})))
    monkeypatch.setitem(METHODS, "dearest", Method(dear, ({"least": 600}, {"least": 501})))
    monkeypatch.setitem(METHODS, "greedy", Method(lambda task, *_: task.losses(random_masks(task, 1), task.text(501))))
    bench("--method", "dearest,greedy,default,dear", "--sparsity", "0.3", "--seed", "0", "--sequences", "500,20")
    said = capsys.readouterr().out
    assert "dearest with 500 sequences is skipped: none of the settings" in said
    assert "greedy with 500 sequences is skipped: 501 more windows" in said
    assert "default with 20 sequences is skipped: setting 'search.sequences'" in said
    rows = [(row["method"], row["sequences"]) for row in read_rows(tmp_path / "results.jsonl")]
    assert rows == [("default", 500), ("dear", 500)]
    assert len(read_rows(tmp_path / "sweeps.jsonl")) == 1


def test_a_row_tells_all(bench: Any, source: Source, tmp_path: Path) -> None:
    """Losses as the task itself finds them, and a mask that can be read back."""
    bench("--method", "plain", "--sparsity", "0.3", "--seed", "4")
    (row,) = read_rows(tmp_path / "results.jsonl")
    task = task_of(source, seed=4)
    mask_U = task.uniform_mask()
    (dense, loss), protocol = task.report(torch.stack([torch.ones_like(mask_U), mask_U]), held_out=True)
    assert (row["dense_loss"], row["uniform_loss"], row["loss"]) == (dense, loss, loss)
    assert row["perplexity"] == pytest.approx(math.exp(loss))
    assert row["protocol"] == protocol.to_dict()
    assert row["removed"] == removed_units(mask_U)
    assert row["reached"] == pytest.approx(task.budget.removed_share(mask_U))


def test_a_missing_folder_is_skipped_with_a_sentence(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And the rest goes on."""
    monkeypatch.setitem(SOURCES, "absent", Source("embedded", str(tmp_path / "none.jsonl"), "embedded"))
    bench("--method", "plain", "--sparsity", "0.3", "--seed", "0", "--model", "absent,tiny")
    assert f"absent is skipped: {tmp_path / 'none.jsonl'} does not exist" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "results.jsonl")) == 1


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With the known ones."""
    with pytest.raises(SystemExit):
        run.main(["--method", "lottery"])
    assert "'lottery' is unknown; known are default, default-auto, reinforce" in capsys.readouterr().err


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """By its line, rather than run over."""
    path = tmp_path / "results.jsonl"
    append_row(path, dict.fromkeys(KEY, 0))
    path.write_text(path.read_text() + '{"model": "tiny"}\n')
    with pytest.raises(DataError, match=r"results.jsonl, line 2, is not a row"):
        read_rows(path)


def test_overlap_is_of_what_is_removed() -> None:
    """1 for equal masks, 0 for disjoint ones, else shared over either."""
    masks = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 0]]).bool()
    first, second, third = map(removed_units, masks)
    assert overlap(first, first) == 1
    assert overlap(first, third) == 0
    assert overlap(first, second) == pytest.approx(1 / 3)
    assert first["sha256"] != second["sha256"]
    assert (first["count"], first["of"]) == (2, 5)


def test_the_whole_benchmark_names_what_is_run_on_each_model() -> None:
    """Every rival at every sparsity on both, the dearest part on one of them."""
    given = Namespace(method=None, sparsity=None, sequences=None)
    stories, embedded = (list(run._jobs(given, model)) for model in ("stories", "embedded"))
    for jobs, usual in ((stories, 20_480), (embedded, 8_192)):
        assert {(name, sparsity, usual) for name in RIVALS for sparsity in (0.2, 0.3, 0.5)} <= set(jobs)
        assert ("default", 0.5, 3 * usual) in jobs and len(jobs) == len(set(jobs))
        assert {(name, 0.3, usual) for name in run.ABLATIONS} <= set(jobs)
    assert ("default", 0.3, 163_840) in stories and ("paper", 0.3, 163_840) in stories
    assert not {65_536} & {sequences for *_, sequences in embedded}


def test_masks_are_read_as_they_were_written() -> None:
    """Also of a number of units that fills no byte."""
    mask_U = torch.rand(21, generator=torch.Generator().manual_seed(0)) > 0.4
    assert kept_units(removed_units(mask_U)).equal(mask_U)
