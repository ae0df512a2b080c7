"""What is seen of a command while it works, and how it begins."""

import io
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_models import random_tokens, tiny_model
from tiny_run import Place, hurry, read_json, succeed
from tqdm import tqdm

import bernprune
from bernprune import progress
from bernprune.cli.terminal import run_app, show
from bernprune.models.view import describe
from bernprune.progress import bar, bars, followed
from bernprune.repair import ExpectedWeights, Repairer
from bernprune.report import table
from bernprune.run.folder import RunFolder

COMMAND = Path(__file__).parents[1] / "bernprune/cli/command/__init__.py"
START = f"import runpy; runpy.run_path({str(COMMAND)!r})['main']()"


def start(folder: Path, package: str, before: str = "") -> "subprocess.CompletedProcess[str]":
    """The command with a package in the place of ours."""
    (folder / "bernprune/cli").mkdir(parents=True)
    (folder / "bernprune/__init__.py").write_text(package, encoding="utf-8")
    (folder / "bernprune/cli/__init__.py").write_text("def main(): print('runs')", encoding="utf-8")
    command = [sys.executable, "-c", before + START]
    return subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, timeout=60, check=False)


INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT); "


def test_ctrl_c_while_libraries_are_imported(tmp_path: Path) -> None:
    """In one word, whatever they are at; and as ever from then on."""
    done = start(tmp_path / "a", INTERRUPT + "print('went on')")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    assert start(tmp_path / "b", INTERRUPT, ignoring).stdout == "runs\n"  # as after nohup
    told = "import signal, atexit; atexit.register(lambda: print(signal.getsignal(signal.SIGINT).__name__))"
    assert start(tmp_path / "c", told).stdout == "runs\ndefault_int_handler\n"


def test_what_a_terminal_cannot_show_is_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a path, which was told of in vain otherwise."""
    app, written = typer.Typer(), io.BytesIO()

    @app.command()
    def say(word: str) -> None:
        show(word)

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run_app(app, ["r\xfcn"]) == 0
    assert written.getvalue() == b"r\\xfcn\n"


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_wait_without_spinning_unless_told_to(given: str | None, tmp_path: Path) -> None:
    """Before torch is loaded, as its threads ask but then."""
    before = "" if given is None else f"import os; os.environ['OMP_WAIT_POLICY'] = {given!r}; "
    done = start(tmp_path, "import os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)", before)
    assert done.stdout == f"{given or 'passive'} False\nruns\n"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars that are drawn, on what might be a terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    made = list[Any]()

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "file": Terminal(), "delay": 0})
            if not self.disable:
                made.append(self)

    monkeypatch.setattr(progress, "tqdm", Bar)
    return made


@pytest.mark.parametrize("shown", [True, False, None])
def test_bars_are_shown_as_is_said_and_else_on_a_terminal(shown: bool | None, drawn: list[Any]) -> None:
    with bars(shown):
        assert list(followed("abc", "letters", unit="letter")) == ["a", "b", "c"]
        with bar("steps", total=7, unit="step", done=2) as steps:
            steps.update()
    assert [each.desc for each in drawn] == ([] if shown is False else ["letters", "steps"])
    assert [each.n for each in drawn] == ([] if shown is False else [3, 3])
    assert list(followed("d", "others", unit="letter")) == ["d"]
    assert drawn[-1].desc == "others", "what was said holds for the block alone"


def test_a_repair_shows_how_many_layers_are_done(drawn: list[Any]) -> None:
    view = describe(tiny_model("llama"))
    masks_U = torch.ones(view.space.size, dtype=torch.bool)
    masks_U[view.space.span("channel", 0)] = torch.arange(view.space.size)[view.space.span("channel", 0)] % 2 == 0
    Repairer(view, random_tokens(32, 16)).repair(view.space.plan(masks_U), "scale").undo()
    (layers,) = drawn
    assert (layers.desc, layers.n, layers.total) == ("repair scale", len(view.layers), len(view.layers))


def test_weights_for_a_policy_show_how_many_layers_are_done(drawn: list[Any]) -> None:
    view = describe(tiny_model("llama"))
    ExpectedWeights(view, random_tokens(6, 8), rows_per_forward=3).undo()
    (layers,) = drawn
    assert (layers.desc, layers.n) == ("weights for the policy", len(view.layers))


def test_debug_says_what_is_done_without_a_terminal(place: Place) -> None:
    said = succeed(*place.prune("repair.method=scale"), "--debug").err.splitlines()
    assert "INFO: searching" in said and "INFO: repairing by 'scale' what is kept" in said


def test_what_counts_on_a_repair_is_not_left_to_be_misread(place: Place) -> None:
    """Where what was learned is worse than the metric before its repair, and was judged after it."""
    succeed(*place.prune("repair.method=scale", "repair.judge_finalists=true"))
    report = read_json(place.out / "report.json")
    report["search"]["kept"], report["repair"]["chosen"] = "learned", "scale"
    report["perplexity"] |= {"initial": 20.0, "unrepaired": 21.0}
    note = "what is learned counts on its repair"
    assert note in table(report)
    report["perplexity"]["unrepaired"] = 20.0
    assert note not in table(report)
    report["perplexity"]["unrepaired"] = 21.0
    del report["repair"]["finalists"]
    assert note not in table(report)


@pytest.mark.parametrize("shown", [True, False])
def test_runs_and_recoveries_show_bars_if_they_are_told_to(
    shown: bool, finished: Path, tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    bernprune.prune(RunFolder(finished).read_config(), tmp_path / "again", progress=shown)
    few = {"tokens": 256, "batch": 4, "held_out": 4, "rank": 2, "ranks": "uniform"}
    bernprune.recover(finished, tmp_path / "recovered", changes={"recover": few}, progress=shown)
    wanted = {"score", "search", "evaluation", "recover"} if shown else set()
    assert {each.desc for each in drawn} == wanted
