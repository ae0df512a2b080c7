"""Finished runs side by side: what makes a group, what is said of it, and what does not compare."""

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import Place, hurry, in_one_sentence, read_json, run, settings, succeed, tiny_folder, tiny_text, words
from tolerances import assert_close

from bernprune.errors import RunError
from bernprune.run.comparing import compare_runs
from bernprune.storage import write_json

SEEDS = (0, 1, 2)
CODE = "def fewest(projection):\n    return {}projection.weight_DE.abs().sum(0)\n"
OTHERS = {
    "reinforce": ["--preset", "reinforce", *settings("search.chunk=null")],
    "magnitude": ["--score", "magnitude"],
    "rows": settings("search.rows_per_forward=3", "report.latency_repeats=3"),
    "more": settings("budget.sparsity=0.4"),
}


@pytest.fixture(scope="module")
def runs(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, to be read alone: ``plain-0`` to ``plain-2``, others by their names and seeds."""
    folder = tmp_path_factory.mktemp("runs")
    held_out = tiny_text(folder / "held-out.txt", 400, seed=9)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)

        def make(name: str, seed: int, *more: str, model: Path | None = None, text: Path | None = None) -> None:
            command = prepared.prune(out=folder / f"{name}-{seed}", model=model, text=text)
            succeed(*command, "--eval-text", str(held_out), "--seed", str(seed), *more)

        for seed in SEEDS:
            make("plain", seed)
        for name, more in OTHERS.items():
            make(name, 1, *more)
        make("reinforce", 2, *OTHERS["reinforce"])
        make("reinforce", 7, *OTHERS["reinforce"])
        make("moved", 4, text=Path(shutil.copy(prepared.text, folder)))
        make("text", 1, text=tiny_text(folder / "other.txt", seed=3))
        make("model", 1, model=tiny_folder(folder / "another", seed=5))
        for sign in ("", "-"):
            (folder / "mine.py").write_text(CODE.format(sign))
            make(f"mine{sign}", 1, "--score", f"{folder / 'mine.py'}:fewest")
    return folder


@pytest.fixture
def changed(runs: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a run, of which a JSON file is changed by a function."""

    def change(name: str, file: str, by: Callable[[Any], object]) -> Path:
        copy = Path(shutil.copytree(runs / name, tmp_path / name))
        content = read_json(copy / file)
        by(content)
        write_json(copy / file, content)
        return copy

    return change


def loss_of(path: Path) -> float:
    return float(read_json(path / "report.json")["loss"]["pruned"])


def test_groups_are_runs_that_differ_in_their_seeds_alone(runs: Path) -> None:
    """In the order given, whatever a run is told of memory and times, and wherever the same text lies."""
    names = ["plain-2", "reinforce-7", "plain-0", "reinforce-1", "moved-4", "rows-1"]
    plain, reinforce = compare_runs([runs / name for name in names])["groups"]
    assert plain["runs"] == [str(runs / name) for name in ("plain-2", "plain-0", "moved-4", "rows-1")]
    assert (plain["seeds"], reinforce["seeds"]) == ([0, 1, 2, 4], [1, 7])
    assert (plain["settings"], plain["against"]) == ({}, None)


def test_figures_are_those_of_the_reports(runs: Path) -> None:
    """Means and deviations over all runs of a group; differences over the seeds that both have."""
    paths = [runs / f"plain-{seed}" for seed in SEEDS], [runs / f"reinforce-{seed}" for seed in (1, 2, 7)]
    found = compare_runs([*paths[0], *paths[1]])
    for group, members in zip(found["groups"], paths, strict=True):
        losses, reports = [loss_of(path) for path in members], [read_json(path / "report.json") for path in members]
        assert_close(group["loss"], statistics.fmean(losses), 1e-12)
        assert_close(group["deviation"], statistics.stdev(losses), 1e-12)
        assert group["sequences"] == reports[0]["search"]["sequences"]
        assert group["in_all"] == sum(reports[0]["windows_run"].values()) > group["sequences"]
        assert_close(group["removed"], statistics.fmean(one["sparsity"]["block_parameters"] for one in reports), 1e-12)
    apart = [loss_of(runs / f"reinforce-{seed}") - loss_of(runs / f"plain-{seed}") for seed in (1, 2)]
    against = found["groups"][1]["against"]
    assert against["seeds"] == [1, 2] and against["better"] == sum(value < 0 for value in apart)
    assert_close(against["difference"], statistics.fmean(apart), 1e-12)
    assert_close(against["error"], abs(apart[0] - apart[1]) / 2, 1e-9)
    assert found["dense"] == read_json(paths[0][0] / "report.json")["loss"]["dense"]
    assert found["protocol"] == read_json(paths[0][0] / "report.json")["protocol"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reinforce", {"preset": "reinforce"}),
        ("magnitude", {"initial.score": "magnitude"}),
        ("more", {"budget.sparsity": 0.4}),
    ],
)
def test_settings_that_differ_are_told(runs: Path, name: str, expected: dict[str, Any]) -> None:
    """Whichever of the two comes first; what follows from a preset goes without saying."""
    first, second = runs / "plain-1", runs / f"{name}-1"
    found, back = compare_runs([first, second])["groups"][1], compare_runs([second, first])["groups"][1]
    assert expected.items() <= found["settings"].items()
    assert found["settings"].keys() == back["settings"].keys() and found["settings"] != back["settings"]
    assert found["settings"].keys() - expected.keys() <= {"search.chunk", "search.sequences"}
    assert_close(found["against"]["difference"], -back["against"]["difference"], 1e-12)
    assert found["against"]["error"] is None


def test_texts_and_code_are_told_by_what_is_in_them(runs: Path) -> None:
    """Another calibration text, and a file of ours that was edited between two runs."""
    text = compare_runs([runs / "plain-1", runs / "text-1"])["groups"][1]
    assert text["settings"] == {"data.text": str(runs / "other.txt")}
    mine = str(runs / "mine.py")
    first, edited = compare_runs([runs / "mine-1", runs / "mine--1"])["groups"]
    assert edited["settings"].keys() == {mine} and len(first["runs"]) == len(edited["runs"]) == 1
    assert compare_runs([runs / "plain-1", runs / "mine-1"])["groups"][1]["settings"] == {
        "initial.score": f"{mine}:fewest"
    }


def test_what_is_printed(runs: Path) -> None:
    """A line a group with what it differs in; or all of it as JSON."""
    paths = [str(runs / name) for name in ("plain-0", "plain-1", "plain-2", "magnitude-1", "reinforce-7")]
    found = compare_runs(paths)
    assert json.loads(succeed("compare", "--json", *paths).out) == found
    title, *lines = succeed("compare", *paths).out.splitlines()
    plain, magnitude, _ = found["groups"]
    assert title.split()[-3:] == ["against", "the", "first"]
    assert lines[0].startswith(f"{paths[0]} and 2 others")
    assert (
        f"{plain['loss']:.4f} ± {plain['deviation']:.4f}" in lines[0] and f"{math.exp(plain['loss']):.3f}" in lines[0]
    )
    apart = magnitude["against"]["difference"]
    assert lines[1].endswith(f"{apart:+.4f}, better in {int(apart < 0)} of 1 seed") and "±" not in lines[1]
    assert lines[2].endswith("no seed in common")
    assert f"settings     {paths[3]}: initial.score magnitude" in lines
    assert "unlike" not in "".join(lines)
    alone = succeed("compare", paths[0]).out
    assert "against" not in alone and "settings" not in alone and "±" not in alone


def test_a_loss_that_is_not_finite_compares_with_nothing(runs: Path, changed: Callable[..., Path]) -> None:
    broken = changed("magnitude-1", "report.json", lambda report: report["loss"].update(pruned=None))
    group = compare_runs([runs / "plain-1", broken])["groups"][1]
    assert group["loss"] is group["deviation"] is group["against"]["difference"] is None
    assert group["against"]["better"] == 0
    said = succeed("compare", str(runs / "plain-1"), str(broken)).out.splitlines()[2]
    assert said.endswith("not finite") and said.count("not finite") == 3


def test_other_libraries_and_machines_are_told(runs: Path, changed: Callable[..., Path]) -> None:
    """They may round otherwise; it is still the same configuration."""
    other = changed("plain-2", "versions.json", lambda began: began.update(torch="2.6.0", machine="a GPU"))
    found = compare_runs([runs / "plain-1", other])
    assert found["unlike"].keys() == {"torch", "machine"} and "2.6.0" in found["unlike"]["torch"]
    assert len(found["groups"]) == 1
    assert "unlike       machine: " in succeed("compare", str(runs / "plain-1"), str(other)).out


def test_what_does_not_compare(runs: Path, place: Place, changed: Callable[..., Path]) -> None:
    """Each in one sentence that names both runs, or the one that is no finished run."""
    plain, other = str(runs / "plain-1"), str(runs / "model-1")
    assert "pruned different models" in (said := in_one_sentence(run("compare", plain, other)))
    assert plain in said and other in said
    judged = changed("plain-2", "report.json", lambda report: report["protocol"].update(window=32))
    assert "were judged differently" in (said := in_one_sentence(run("compare", plain, str(judged))))
    assert "window 16" in said and "window 32" in said
    assert "the same settings and the same seed, 1" in in_one_sentence(run("compare", plain, str(runs / "rows-1")))
    assert "the same settings and the same seed, 1" in in_one_sentence(run("compare", plain, plain))
    (judged / "report.json").unlink()
    assert "is not finished" in in_one_sentence(run("compare", plain, str(judged)))
    assert "holds no bernprune run" in in_one_sentence(run("compare", plain, str(place.folder)))
    with pytest.raises(RunError, match="nothing to compare"):
        compare_runs([])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"loss": {"pruned": 3.0}}', words(3)])
@pytest.mark.parametrize("file", ["report.json", "versions.json"])
def test_a_damaged_run_is_refused(runs: Path, tmp_path: Path, file: str, content: str) -> None:
    copy = Path(shutil.copytree(runs / "plain-1", tmp_path / "run"))
    (copy / file).write_text(content)
    said = in_one_sentence(run("compare", str(copy)))
    assert str(copy) in said and "damaged" in said
