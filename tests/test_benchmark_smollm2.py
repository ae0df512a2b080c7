"""The benchmark of a larger model that others trained: rows are run once, and say where they come from."""

from pathlib import Path
from typing import Any

import pytest
from tiny_run import Place

from benchmarks.learning.rows import read_rows
from benchmarks.smollm2 import run, tasks, windows
from bernprune.config import make_config
from bernprune.embedded import MODEL_FOLDER
from bernprune.repair import Repairer


@pytest.fixture
def small(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model and text in place of the files."""

    def made(given: dict[str, Any]) -> Any:
        data = given["data"] | {"window": 16, "eval_tokens": 320}
        return make_config(given | {"data": data, "initial": {"windows": 4}, "repair": {"windows": 8}})

    monkeypatch.setattr(run, "MODEL", place.model)
    monkeypatch.setattr(run, "TEXT", place.text)
    for module in (run, windows):
        monkeypatch.setattr(module, "make_config", made)


@pytest.mark.usefixtures("small")
def test_rows_of_runs(tmp_path: Path) -> None:
    """Of tiny ones; the file of rows holds no path of this machine."""
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


@pytest.mark.usefixtures("small")
def test_rows_of_repairs_on_more_and_less_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the widths of a run; each is fitted on what it says, judged on other text, and undone."""
    fitted, judged, repair = [], [], Repairer.repair
    monkeypatch.setattr(windows, "JUDGING", 8)

    def watched(self: Repairer, plan: Any, method: Any) -> Any:
        fitted.append({tuple(row_T.tolist()) for row_T in self.windows_WT})
        judged.append([(len(layer.kv_groups), len(layer.channels)) for layer in plan.layers])
        return repair(self, plan, method)

    folder = f"--folder={tmp_path}"
    run.main(["--sequences=144", folder])
    monkeypatch.setattr(Repairer, "repair", watched)
    (made,) = read_rows(tmp_path / "results.jsonl", run.KEY)
    windows.main(["--sequences=144", "--windows=20,8,8", folder])
    rows = read_rows(tmp_path / "windows.jsonl", windows.KEY)
    assert [len(read) for read in fitted] == [row["fitted"] for row in rows] == [8, 20] and fitted[0] < fitted[1]
    assert all(layers == [tuple(layer) for layer in made["layers"]] for layers in judged)
    windows.main(["--sequences=144", "--windows=20", folder])
    assert len(fitted) == 2 and (tmp_path / "windows.md").read_text().count("| 144 |") == 2
    (tmp_path / "windows.jsonl").unlink()
    windows.main(["--sequences=144", "--windows=20", folder])
    assert read_rows(tmp_path / "windows.jsonl", windows.KEY)[0]["loss"] == rows[1]["loss"] != rows[0]["loss"]
    with pytest.raises(SystemExit, match=r"results\.jsonl has no row with 7 sequences"):
        windows.main(["--sequences=7", folder])


@pytest.mark.usefixtures("small")
def test_tasks_of_runs_that_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each model is asked once; a run that was not kept is left out."""
    asked: list[tuple[Path, str]] = []

    def ask(folder: Path, name: str) -> dict[str, Any]:
        asked.append((folder, name))
        return {"metric": "acc", "value": 0.5, "questions": 101}

    monkeypatch.setattr(tasks, "ask", ask)
    monkeypatch.setattr(tasks, "version", lambda name: "0")
    given = [f"--folder={tmp_path}", f"--runs={tmp_path / 'runs'}"]
    run.main(["--sequences=0,144", given[0]])
    rows = read_rows(tmp_path / "results.jsonl", run.KEY)
    run.main(["--sequences=0", *given])
    assert read_rows(tmp_path / "results.jsonl", run.KEY) == rows
    run.main(["--sequences=0", *given])  # there is nothing to do: a finished run would be refused
    tasks.main(given)
    assert "144 sequences, seed 0: left out, as no folder of the run was kept" in capsys.readouterr().err
    tasks.main(given)
    models = (run.MODEL, tmp_path / "runs/0.3-0-0/model")
    assert asked == [(model, task) for model in models for task in tasks.TASKS]
    assert models[1].is_dir()
    lines = (tmp_path / "tasks.md").read_text().splitlines()[-2:]
    assert [line.count("50.0% ± 5.0%") for line in lines] == [len(tasks.TASKS)] * 2
    assert "30% removed, 0 sequences, seed 0" in lines[1]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_task_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the harness itself, of a model folder; the share is of so many questions."""
    pytest.importorskip("lm_eval")
    if not tasks.DATA.is_dir():
        pytest.skip("the questions are not here")
    monkeypatch.setattr(tasks, "LIMIT", 7)
    found = tasks.ask(MODEL_FOLDER, name)
    assert found["questions"] == 7 and found["metric"] == tasks.TASKS[name]["metric"]
    assert 0 <= found["value"] <= 1 and round(found["value"] * 7, 6).is_integer()


def test_without_the_model_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MODEL", tmp_path / "model")
    with pytest.raises(SystemExit, match=r"error: model is missing: fetch\.py makes the model"):
        run.main([f"--folder={tmp_path}"])
