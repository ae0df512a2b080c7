"""Finished runs side by side: what makes a group, what is said of it, and what does not compare."""

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import (
    SETTINGS,
    Place,
    hurry,
    in_one_sentence,
    read_json,
    run,
    settings,
    stopped_in_step,
    succeed,
    tiny_text,
    words,
)
from tolerances import assert_close

from bernprune.config import make_config
from bernprune.errors import RunError
from bernprune.run.comparing import compare_runs
from bernprune.run.folder import RunFolder
from bernprune.settings import merge
from bernprune.storage import write_json

SEEDS = (0, 1, 2)
CODE = "def fewest(projection):\n    return {}projection.weight_DE.abs().sum(0)\n"
REINFORCE = ["--preset", "reinforce", *settings("search.chunk=null")]


@pytest.fixture(scope="module")
def runs(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs, to be read alone, by names and seeds: ``plain-0`` to ``plain-2``, and some others."""
    folder = tmp_path_factory.mktemp("runs")
    held_out, mine = tiny_text(folder / "held-out.txt", 400, seed=9), folder / "mine.py"
    (folder / "elsewhere").mkdir()
    shutil.copy(prepared.text, folder / "elsewhere")
    mine.write_text(CODE.format(""))
    (folder / "elsewhere" / "mine.py").write_text(CODE.format(""))
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)

        def make(name: str, seed: int, *more: str, text: Path | None = None) -> None:
            command = prepared.prune(out=folder / f"{name}-{seed}", text=text)
            succeed(*command, "--eval-text", str(held_out), "--seed", str(seed), *more)

        for seed in SEEDS:
            make("plain", seed)
        for seed in (1, 2, 7):
            make("reinforce", seed, *REINFORCE)
        make("moved", 4, *settings("search.rows_per_forward=3"), text=folder / "elsewhere" / prepared.text.name)
        make("mine", 1, "--score", f"{mine}:fewest")
        make("moved-mine", 2, "--score", f"{folder / 'elsewhere' / 'mine.py'}:fewest")
    return folder


def remade(out: Path, copy: Path, given: dict[str, Any], **began: str) -> Path:
    """A copy of a run as if it had had other settings, and begun with other fingerprints."""
    folder = RunFolder(Path(shutil.copytree(out, copy)))
    folder.write_config(make_config(merge(folder.read_config().to_dict(), given)))
    write_json(folder.versions, folder.began_with() | began)
    return copy


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
    plain, reinforce = compare_runs(
        [runs / name for name in ("plain-2", "reinforce-7", "plain-0", "reinforce-1", "moved-4")]
    )["groups"]
    assert plain["runs"] == [str(runs / name) for name in ("plain-2", "plain-0", "moved-4")]
    assert (plain["seeds"], reinforce["seeds"]) == ([2, 0, 4], [7, 1])
    assert (plain["settings"], plain["against"]) == ({}, None)


def test_figures_are_those_of_the_reports(runs: Path) -> None:
    """Means and deviations over all runs of a group; differences over the seeds that both have."""
    paths = [runs / f"plain-{seed}" for seed in SEEDS], [runs / f"reinforce-{seed}" for seed in (1, 2, 7)]
    found = compare_runs([*paths[0], *paths[1]])
    for group, members in zip(found["groups"], paths, strict=True):
        losses, reports = [loss_of(path) for path in members], [read_json(path / "report.json") for path in members]
        assert_close(group["loss"], statistics.fmean(losses), 1e-12)
        assert_close(group["deviation"], statistics.stdev(losses), 1e-12)
        assert group["sequences"] == reports[0]["search"]["sequences"] < group["in_all"]
        assert_close(group["removed"], statistics.fmean(one["sparsity"]["block_parameters"] for one in reports), 1e-12)
    apart = [loss_of(runs / f"reinforce-{seed}") - loss_of(runs / f"plain-{seed}") for seed in (1, 2)]
    against = found["groups"][1]["against"]
    assert against["seeds"] == [1, 2] and against["equal"] == 0
    assert against["better"] == sum(value < 0 for value in apart)
    assert_close(against["difference"], statistics.fmean(apart), 1e-12)
    assert_close(against["error"], abs(apart[0] - apart[1]) / 2, 1e-9)
    assert found["dense"] == read_json(paths[0][0] / "report.json")["loss"]["dense"]
    assert found["protocol"] == read_json(paths[0][0] / "report.json")["protocol"]


DIFFERENT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "score": ("plain-1", {"initial": {"score": "magnitude"}}, {"initial.score": "magnitude"}),
    "budget": ("plain-1", {"budget": {"sparsity": 0.4}}, {"budget.sparsity": 0.4}),
    "preset": ("reinforce-1", {}, {"preset": "reinforce"}),
    "preset and more": ("reinforce-1", {"search": {"pull": 0.5}}, {"preset": "reinforce", "search.pull": 0.5}),
}


@pytest.mark.parametrize(("name", "given", "expected"), DIFFERENT.values(), ids=DIFFERENT)
def test_settings_that_differ_are_told(
    name: str, given: dict[str, Any], expected: dict[str, Any], runs: Path, tmp_path: Path
) -> None:
    """Whichever of the two comes first; what follows from a preset goes without saying, what only seems to does not."""
    first, second = runs / "plain-1", remade(runs / name, tmp_path / "run", given)
    found, back = compare_runs([first, second])["groups"][1], compare_runs([second, first])["groups"][1]
    assert expected.items() <= found["settings"].items() and back["settings"].keys() == found["settings"].keys()
    by_both = {setting.partition("=")[0] for setting in SETTINGS} if "preset" in expected else set()
    assert found["settings"].keys() - expected.keys() <= by_both | {"search.chunk", "search.refit"}
    assert_close(found["against"]["difference"], -back["against"]["difference"], 1e-12)
    assert found["against"]["error"] is None
    if "preset" in expected:
        assert found["settings"]["search.masks"] == 3, "which both were given, while their presets differ"


def test_texts_and_code_are_told_by_what_is_in_them(runs: Path, tmp_path: Path) -> None:
    """Wherever they lie; and if only that differs, so it is said."""
    plain, mine = runs / "plain-1", f"{runs / 'mine.py'}:fewest"
    text = remade(plain, tmp_path / "text", {"data": {"text": "/other.txt"}}, text="0123")
    assert compare_runs([plain, text])["groups"][1]["settings"] == {"data.text": "/other.txt"}
    assert compare_runs([plain, runs / "mine-1"])["groups"][1]["settings"] == {"initial.score": mine}
    (same,) = compare_runs([runs / "mine-1", runs / "moved-mine-2"])["groups"]
    assert same["seeds"] == [1, 2]
    edited = remade(runs / "mine-1", tmp_path / "edited", {}, **{str(runs / "mine.py"): "0123"})
    other = compare_runs([runs / "mine-1", edited])["groups"][1]
    assert other["settings"] == {"initial.score": f"{mine} with other contents"}
    files = [
        remade(plain, tmp_path / name, {"initial": {"score": f"/{name}/scores.safetensors"}}, scores=scores)
        for name, scores in (("a", "0123"), ("b", "0123"), ("c", "4567"))
    ]
    assert "the same settings" in in_one_sentence(run("compare", *map(str, files[:2])))
    other = compare_runs([files[0], files[2]])["groups"][1]
    assert other["settings"] == {"initial.score": "/c/scores.safetensors"}


def test_what_is_printed(runs: Path) -> None:
    """A line a group with what it differs in; or all of it as JSON."""
    paths = [str(runs / name) for name in ("plain-0", "plain-1", "plain-2", "mine-1", "reinforce-7")]
    found = compare_runs(paths)
    assert json.loads(succeed("compare", "--json", *paths).out) == found
    title, *lines = succeed("compare", *paths).out.splitlines()
    plain, mine, _ = found["groups"]
    assert title.split()[-3:] == ["against", "the", "first"]
    assert lines[0].startswith(f"{paths[0]} and 2 others")
    assert (
        f"{plain['loss']:.4f} ± {plain['deviation']:.4f}" in lines[0] and f"{math.exp(plain['loss']):.3f}" in lines[0]
    )
    apart = mine["against"]["difference"]
    assert lines[1].endswith(f"{apart:+.4f}, better in {int(apart < 0)} of 1 seed") and "±" not in lines[1]
    assert lines[2].endswith("no seed in common")
    assert f"settings     {paths[3]}: initial.score {runs / 'mine.py'}:fewest" in lines
    assert "unlike" not in "".join(lines)
    assert f"runs         {paths[0]} (seed 0), {paths[1]} (seed 1), {paths[2]} (seed 2)" in lines
    alone = succeed("compare", paths[0]).out
    assert "against" not in alone and "settings" not in alone and "±" not in alone


def test_a_loss_beyond_all_numbers_has_a_perplexity(runs: Path, changed: Callable[..., Path]) -> None:
    """The largest, as everywhere."""
    lost = changed("mine-1", "report.json", lambda report: report["loss"].update(pruned=800.0))
    assert "800.0000" in succeed("compare", str(runs / "plain-1"), str(lost)).out


def test_what_was_ended_early_is_told(runs: Path, changed: Callable[..., Path]) -> None:
    """Its settings are those of the others, but not what it searched."""
    early = changed("plain-2", "report.json", lambda report: report["search"].update(sequences=5))
    found = compare_runs([runs / "plain-1", early])
    searched = read_json(runs / "plain-1" / "report.json")["search"]["sequences"]
    assert len(found["groups"]) == 1
    assert found["unlike"] == {f"searched in {runs / 'plain-1'} and others": ["5", f"{searched}"]}


def test_code_that_was_mended_on_the_way_is_told(runs: Path, place: Place) -> None:
    """Of a run that went on with it; which went on is what was said then."""
    mine = place.file("mine.py", CODE.format(""))
    assert stopped_in_step(3, [*place.prune(), "--score", f"{mine}:fewest"]).code == 130
    mine.write_text(CODE.format("-"))
    said = succeed("resume", str(place.out)).err
    (told,) = compare_runs([place.out])["unlike"]["changed on the way"]
    assert str(mine) in told and told.partition(" began with ")[2] in said


def test_other_libraries_and_machines_are_told(runs: Path, changed: Callable[..., Path]) -> None:
    """They may round otherwise; it is still the same configuration."""
    other = changed("plain-2", "versions.json", lambda began: began.update(torch="2.6.0", machine="a GPU"))
    found = compare_runs([runs / "plain-1", other])
    assert found["unlike"].keys() == {"torch", "machine"} and "2.6.0" in found["unlike"]["torch"]
    assert len(found["groups"]) == 1
    assert "unlike       machine: " in succeed("compare", str(runs / "plain-1"), str(other)).out


def test_what_does_not_compare(runs: Path, place: Place, changed: Callable[..., Path]) -> None:
    """Each in one sentence that names both runs, or the one that is no finished run."""
    plain = str(runs / "plain-1")
    other = str(changed("mine-1", "versions.json", lambda began: began.update(weights="0123")))
    assert "pruned different models" in (said := in_one_sentence(run("compare", plain, other)))
    assert plain in said and other in said
    judged = changed("plain-2", "report.json", lambda report: report["protocol"].update(window=32))
    assert "were judged differently" in (said := in_one_sentence(run("compare", plain, str(judged))))
    assert "window 16" in said and "window 32" in said
    rows = remade(runs / "plain-1", place.folder / "rows", {"search": {"rows_per_forward": 3}})
    for again in (plain, str(rows)):
        assert "the same settings and the same seed, 1" in in_one_sentence(run("compare", plain, again))
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
