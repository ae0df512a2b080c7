"""What is made of the rows of the learning benchmark, and the surrogate of large models beside it."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from benchmarks.learning import show, simulate
from benchmarks.learning.rows import SIMULATED, append_row, read_rows, removed_units
from benchmarks.picture import dots
from bernprune.errors import BernpruneError, ConfigError, DataError

# The table and the picture


def made_row(method: str, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    row = {"model": "tiny", "method": method, "settings": {}, "sparsity": 0.3, "sequences": 100, "seed": seed}
    mask_U = torch.arange(12) % 3 != seed % 3
    results = {"used": 90, "equivalent": 90, "loss": loss, "dense_loss": 1.0, "uniform_loss": 3.0, "reached": 0.31}
    protocol = {"text": "held-out", "text_sha256": "ab", "window": 16, "windows": 20, "tokens": 300}
    rest = {"seconds": 2.0, "protocol": protocol, "removed": removed_units(mask_U)}
    return {**row, **results, **rest, **changes}


def test_show_makes_table_and_picture(tmp_path: Path) -> None:
    """From the rows alone: the best first, mean and spread over seeds, and agreement between them."""
    for row in (
        made_row("worse", 0, 2.5),
        made_row("better", 0, 2.0),
        made_row("better", 3, 2.2),
        made_row("other", 0, 1.5, sparsity=0.5, settings={"rate": 0.1}, equivalent=270),
    ):
        append_row(tmp_path / "results.jsonl", row)
    show.main(["--folder", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert table.index("`better`") < table.index("`worse`") < table.index("`other` rate 0.1")
    assert "| `better` | 90 | 90 | 2.1000 ± 0.1414 | 55.0% | 8.17 | 31.0% | 1.00 | 2 | 2 |" in table
    assert "| `worse` | 90 | 90 | 2.5000 | 75.0% | 12.18 | 31.0% | - | 1 | 2 |" in table
    assert "Dense 1.0000 nats; uniform Wanda-sp 3.0000" in table
    pixels = imread(io.BytesIO((tmp_path / "picture.png").read_bytes()))
    assert pixels.shape[0] > 300 and pixels.std() > 0


def test_ablations_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Their mean difference to ``default`` and its standard error, in a table of their own, of equal budgets."""
    rows = [made_row("default", seed, 2.0 + seed) for seed in (0, 1, 2)]
    rows += [made_row("without-wings", seed, 2.1 + seed + 0.1 * seed) for seed in (0, 1)]
    rows += [made_row("without-feet", 2, 3.9), made_row("without-tail", 0, 1.0, sequences=500)]
    for row in rows:
        append_row(tmp_path / "results.jsonl", row)
    show.main(["--folder", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert "| wings | 100 | +0.1500 | 0.0500 | 2 |" in table
    assert "| feet | 100 | -0.1000 | nan | 1 |" in table
    assert "tail" not in table and "`without" not in table


def test_losses_taken_differently_are_not_compared(tmp_path: Path) -> None:
    """Nor those of a model that was trained again, and no table is made of nothing."""
    with pytest.raises(DataError, match="no rows yet"):
        show.main(["--folder", str(tmp_path)])
    with pytest.raises(DataError, match=r"tiny at sparsity 0.3 are of models with other weights"):
        show.lines_of([made_row("better", 0, 2.0), made_row("worse", 0, 2.5, dense_loss=1.1)])
    other = made_row("worse", 0, 2.5)["protocol"] | {"window": 32}
    for row in (made_row("better", 0, 2.0), made_row("worse", 0, 2.5, protocol=other)):
        append_row(tmp_path / "results.jsonl", row)
    with pytest.raises(BernpruneError, match=r"tiny at sparsity 0.3 .* 2 protocols"):
        show.main(["--folder", str(tmp_path)])


def test_dots_stand_where_losses_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the mean over seeds, the best line at the top of its panel, with the standard deviation."""
    drawn: dict[str, tuple[list[float], list[int], list[float]]] = {}
    monkeypatch.setattr(
        Axes, "errorbar", lambda _, x, y, xerr, label, **__: drawn.update({label: (list(x), list(y), list(xerr))})
    )
    points = [
        ("panel", line, name, loss)
        for line, name, loss in (
            ("worst", "none", 3.0),
            ("best", "none", 2.5),
            ("best", "ridge", 1.0),
            ("best", "ridge", 2.0),
            ("mid", "none", 2.0),
        )
    ]
    dots(points, ["none", "ridge"], "loss")
    assert drawn["none"] == ([3.0, 2.0, 2.5], [0, 1, 2], [0.0, 0.0, 0.0])
    assert drawn["ridge"] == ([1.5], [2], [pytest.approx(0.5**0.5)])


def test_names_do_not_cover_each_other() -> None:
    """Those of lines that end nearby stand above one another, in the order of their losses; far ones stay level."""
    axes = Figure().subplots()
    axes.set(xscale="log", xlim=(100, 1e6), ylim=(0, 36))  # a line of text is one high
    ends = [("second", 1e4, 5.1), ("first", 1.5e4, 5.0), ("third", 2e4, 5.2), ("far", 1e6, 5.1), ("above", 1e4, 20.0)]
    show._name(axes, ends, dict.fromkeys(["first", "second", "third", "far", "above"], "black"))
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert heights == pytest.approx({"first": 5.0, "second": 6.0, "third": 7.0, "far": 5.1, "above": 20.0})


# The surrogate of large models


def test_the_surrogate_is_on_its_scale() -> None:
    """The score's own selection costs what it should and recovers nothing, the best there is costs less."""
    surrogate = simulate.Surrogate(simulate.make_space(700), seed=3)
    start_U = simulate.uniform_selection(surrogate.space, surrogate.scores_U)
    assert surrogate.excess(torch.ones_like(start_U)) == 0
    assert surrogate.excess(start_U) == pytest.approx(simulate.START_EXCESS)
    assert surrogate.recovered(start_U) == pytest.approx(0)
    assert surrogate.best < 0.8 * surrogate.start and 0 < surrogate.levels < 1
    assert surrogate.scores_U.std() / surrogate.scores_U.mean() == pytest.approx(simulate.SCORE_SPREAD, rel=0.2)


@pytest.mark.parametrize(("chunks", "windows"), [(1, 1), (4, 1), (1, 8)])
def test_what_the_surrogate_tells_is_as_uncertain_as_the_text_is_short(chunks: int, windows: int) -> None:
    """Right on average; and the variance of a difference between masks falls with the tokens under each."""
    surrogate = simulate.Surrogate(simulate.make_space(700), seed=3)
    dense_U = torch.ones(surrogate.space.size, dtype=torch.bool)
    start_U = simulate.uniform_selection(surrogate.space, surrogate.scores_U)
    groups = 2000
    masks_BKCU = torch.stack([dense_U, start_U])[None, :, None].expand(groups, 2, chunks, -1)
    losses_BKC = surrogate.losses(masks_BKCU, step=0, windows=windows)
    difference_BC = losses_BKC[:, 1] - losses_BKC[:, 0]
    removed_U = surrogate.worth_U[~start_U]
    deviation = simulate.TEXT_SHARE * removed_U.square().sum().sqrt().item() * math.sqrt(1 / windows)
    whole_B = difference_BC.sum(1)  # of all chunks: a window's, however it is cut
    assert whole_B.std().item() == pytest.approx(deviation, rel=0.1)
    assert whole_B.mean().item() == pytest.approx(surrogate.start, abs=5 * deviation / math.sqrt(groups))


@pytest.mark.parametrize(
    ("units", "per_unit", "said"), [("95", "1", "at least 96 units"), ("352", "0.001", "0 sequences are less")]
)
def test_what_cannot_be_simulated_is_refused(units: str, per_unit: str, said: str, tmp_path: Path) -> None:
    """In a sentence, and nothing is written."""
    with pytest.raises(ConfigError, match=said):
        simulate.main(["--folder", str(tmp_path), "--units", units, "--per-unit", per_unit])
    assert not list(tmp_path.iterdir())


def test_simulated_searches_are_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their rows become a table."""
    asked = ["--folder", str(tmp_path), "--units", "352", "--per-unit", "2", "6", "--seed", "0", "1"]
    simulate.main([*asked, "--method", "default"])
    rows = read_rows(tmp_path / "simulation.jsonl", SIMULATED)
    assert [(row["sequences"], row["seed"]) for row in rows] == [(704, 0), (704, 1), (2112, 0), (2112, 1)]
    for row in rows:
        assert len(row["recovered"]) == len(row["used"]) == 8
        assert max(row["recovered"]) <= 1.001 and max(row["used"]) <= row["sequences"]
    capsys.readouterr()
    simulate.main([*asked, "--method", "default", "paper, rate 0.002"])
    assert "default" not in capsys.readouterr().out
    append_row(tmp_path / "results.jsonl", made_row("better", 0, 2.0))
    show.main(["--folder", str(tmp_path)])
    rows = [row for row in read_rows(tmp_path / "simulation.jsonl", SIMULATED) if row["sequences"] == 2112]
    ours, theirs = ([row["recovered"][-1] for row in rows if row["method"].startswith(by)] for by in ("def", "paper"))
    mean, paper, levels = sum(ours) / 2, sum(theirs) / 2, sum(row["levels"] for row in rows) / 4
    said = f"| 352 | 2,112 | {mean:.2f} (2) | {paper:.2f} (2) | {levels:.2f} (2) |"
    assert said in (tmp_path / "table.md").read_text()


def test_a_short_search_is_looked_at_after_each_step(tmp_path: Path) -> None:
    """No look is counted that was not taken."""
    row = simulate.run("default", 352, 3 * 64 + 8, seed=0)
    assert row["used"] == [64, 128] and len(row["recovered"]) == 2
