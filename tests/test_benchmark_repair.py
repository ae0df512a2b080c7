"""The benchmark of repairs: a row is what it says, and the table is made from the rows alone."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_tasks import source_of, task_of
from tiny_run import Place

from benchmarks.learning.rows import append_row, read_rows, removed_units
from benchmarks.learning.task import SOURCES
from benchmarks.repair import run, show
from bernprune.errors import DataError


def test_rows_are_filled_once(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every plan, that of the learning benchmark among them, and with no repair left in the model for the next."""
    source = source_of(place)
    monkeypatch.setitem(SOURCES, "tiny", source)
    monkeypatch.setattr(run, "WINDOWS", 20)
    monkeypatch.setattr(run, "JUDGING", 6)
    monkeypatch.setattr(run, "LEARNED", tmp_path / "learned.jsonl")
    mask_U = task_of(source).uniform_mask()
    monkeypatch.setitem(run.SEQUENCES, "tiny", 10_000)
    learned = ("default", "evopress", "l0", "paper")
    for method, sequences in itertools.product(learned, (40, 10_000)):  # of few, the rows are not meant
        kept_U = mask_U if sequences > 40 else torch.ones_like(mask_U)
        place_of = {
            "model": "tiny",
            "method": method,
            "settings": {},
            "sparsity": 0.3,
            "sequences": sequences,
            "seed": 0,
        }
        append_row(tmp_path / "learned.jsonl", {**place_of, "removed": removed_units(kept_U)})
    arguments = ["--model", "tiny", "--sparsity", "0.3", "--seed", "0", "--folder", str(tmp_path)]
    run.main([*arguments, "--repair", "bias,ridge"])
    rows = read_rows(tmp_path / "results.jsonl", run.KEY)
    assert [(row["plan"], row["repair"]) for row in rows] == [
        (plan, repair) for plan in run.PLANS for repair in ("bias", "ridge")
    ]
    same = [row for row in rows if row["plan"] in ("wanda-sp", *learned)]  # all of one mask
    assert len({row["unrepaired"] for row in same}) == 1
    assert len({row["loss"] for row in same}) == len({(row["repair"], row["loss"]) for row in same}) == 2
    assert all(row["peak_mib"] >= 0 for row in rows)
    run.main([*arguments, "--repair", "bias,ridge"])
    assert read_rows(tmp_path / "results.jsonl", run.KEY) == rows


def test_a_plan_that_nobody_learned_is_named(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LEARNED", tmp_path / "learned.jsonl")
    with pytest.raises(DataError, match=r"no plan of .* units for model tiny, method default, sparsity 0\.3, seed 0"):
        run.mask_of(task_of(source_of(place)), "tiny", "default")


def made_row(name: str, seed: int, loss: float, gain: float, **changes: Any) -> dict[str, Any]:
    method, target, biases = run.REPAIRS[name]
    key = {"model": "tiny", "plan": "flap", "sparsity": 0.3, "seed": seed}
    key |= {"repair": method, "target": target, "biases": biases}
    results = {"loss": loss, "unrepaired": 3.0, "judged_gain": gain, "judged_error": 0.1, "seconds": 2.0}
    return {**key, **results, "protocol": {"text": "held-out"}, **changes}


def test_the_table(tmp_path: Path) -> None:
    """Means over seeds; ``auto`` goes by the judging text alone, and takes what is clearly better than nothing."""
    for row in (
        made_row("ridge", 0, 2.5, 0.3),
        made_row("two-step", 0, 2.6, 0.4),  # judged the better one, though it is not
        made_row("ridge", 1, 2.9, 0.05),
        made_row("two-step", 1, 3.1, 0.08),
    ):
        append_row(tmp_path / "results.jsonl", row)
    show.main(["--folder", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "| flap | `none` | 3.0000 | +0.0000 | +0.0000 | 0 | 2 | 0 |" in table
    assert "| flap | `auto` | 2.8000 | +0.2000 | +0.0000 | 0 | 2 | 4 |" in table
    assert "| flap | `ridge` | 2.7000 | +0.3000 | +0.1000 | 0 | 2 | 2 |" in table
    assert "| flap | `two-step` | 2.8500 | +0.1500 | -0.1000 | 1 | 2 | 2 |" in table


def test_losses_that_were_not_taken_alike_are_refused(tmp_path: Path) -> None:
    rows = made_row("ridge", 0, 2.5, 0.3), made_row("ridge", 1, 2.5, 0.3, protocol={"text": "another"})
    with pytest.raises(DataError, match="2 protocols"):
        show.table(show.places_of(rows))
    with pytest.raises(DataError, match="no rows yet"):
        show.main(["--folder", str(tmp_path)])


def test_every_repair_has_one_name() -> None:
    assert len(set(run.REPAIRS.values())) == len(run.REPAIRS)
    assert set(show.AUTO) <= set(run.REPAIRS)
