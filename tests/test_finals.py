"""What is kept: finalists and challengers on text of their own, inside the budget, and to the bit after a crash."""

import errno
import io
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from children import Child
from spaces import random_numbers
from tiny_run import (
    METHODS,
    SETTINGS,
    Place,
    finish,
    in_one_sentence,
    interrupted,
    read_json,
    run,
    state_of,
    stopped_in_step,
    succeed,
    tiny_text,
)
from tqdm import tqdm

from bernprune import objective, progress, storage
from bernprune.config import make_config
from bernprune.data import TokenWindows
from bernprune.objective import MaskedObjective
from bernprune.policy.race import Heat
from bernprune.policy.selection import select
from bernprune.report import table
from bernprune.run import finals, loop, pipeline
from bernprune.run.checkpoint import read_state, write_state
from bernprune.run.finals import Finals, run_finals
from bernprune.run.folder import RunFolder
from bernprune.run.plans import read_plan
from bernprune.run.searches import make_search
from bernprune.run.stage import Stage, set_stage
from bernprune.run.workload import Work
from bernprune.settings import merge, parse_settings
from bernprune.units import UnitSpace

# --- the choice alone, with losses made by hand ---

WORK = Work(step=7, sequences=1000)


@pytest.fixture(scope="module")
def stage(prepared: Place) -> Stage:
    given = {"model": {"path": str(prepared.model)}, "data": {"text": str(prepared.text)}}
    settings = parse_settings([*SETTINGS, "search.selection=0.1", "search.final_windows=5"])
    return replace(set_stage(make_config(merge(given, settings))), kept_back=None)


def choose(
    stage: Stage,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    loss: Callable[[torch.Tensor], torch.Tensor],
    *,
    budget: int,
    text: list[torch.Tensor] | None = None,
    priced: bool = False,
    names: tuple[str, ...] = ("learned", "initial", "uniform"),
) -> tuple[Finals, dict[str, torch.Tensor]]:
    """Race three selections of different kind where masks ``[N, U]`` have the losses ``[N]``, whatever the text."""
    random_U = [random_numbers(stage.budget.space.size, seed) for seed in range(3)]
    search = make_search(stage.config, stage.budget, random_U[0], random_U[0][:, None])
    monkeypatch.setattr(type(search), "priced", priced)
    finalists = {name: select(at, stage.budget, limits=stage.limits) for name, at in zip(names, random_U, strict=True)}

    def window_losses(masks_KU: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        if text is not None:
            text.append(tokens_BT)
        return torch.stack([loss(masks_KU) for _ in tokens_BT], dim=1)

    monkeypatch.setattr(Stage, "objective", lambda *_, **__: nullcontext(SimpleNamespace(window_losses=window_losses)))
    folder.mkdir(exist_ok=True)
    stage = replace(stage, workload=replace(stage.workload, choosing=budget / 1000, sequences=None))
    scores_U = random_numbers(stage.budget.space.size, 7)
    return run_finals(stage, RunFolder(folder), search, finalists, scores_U, WORK), finalists


def level(masks_NU: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(masks_NU), dtype=torch.float64)


@pytest.mark.parametrize("best", ["learned", "initial", "uniform"])
def test_the_best_finalist_is_kept(best: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is, and no challenger that is worse; of equals, what was learned."""
    _, finalists = choose(stage, tmp_path, monkeypatch, level, budget=0)

    def only(masks_NU: torch.Tensor) -> torch.Tensor:
        return 1 - (masks_NU == finalists[best]).all(1).double()

    found, _ = choose(stage, tmp_path / "a", monkeypatch, only, budget=200)
    assert found.kept == best and torch.equal(found.mask_U, finalists[best])
    assert found.heats and all(heat["winner"] == heat["changed_units"] == 0 for heat in found.heats)
    found, _ = choose(stage, tmp_path / "b", monkeypatch, level, budget=200)
    assert found.kept == "learned" and torch.equal(found.mask_U, finalists["learned"])


def test_single_channels_are_learned_if_that_clearly_shows(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between what was learned and its widths in the metric's order, the latter, unless the former is better by more
    than a standard error; the first only where there is nothing to choose by."""
    names = ("learned", "widths", "uniform")
    _, finalists = choose(stage, tmp_path, monkeypatch, level, budget=0, names=names)
    for lead, kept in ((-1.0, "widths"), (0.0, "widths"), (0.25, "widths"), (1.0, "learned")):
        windows = itertools.cycle([-1.0, 1.0, -1.0, 1.0, -1.0])

        def led(masks_NU: torch.Tensor, lead: float = lead, windows: Iterator[float] = windows) -> torch.Tensor:
            learned_N = (masks_NU == finalists["learned"]).all(1).double()
            return 5 - learned_N * (1 + lead + next(windows)) - (masks_NU == finalists["widths"]).all(1).double()

        found, _ = choose(stage, tmp_path / f"{lead}", monkeypatch, led, budget=200, names=names)
        assert found.kept == kept
    found, _ = choose(stage, tmp_path / "none", monkeypatch, level, budget=0, names=names)
    assert found.kept == "learned"


def test_challengers_that_win_are_challenged(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss is what the kept units cost, each winner is better than the last, by what its heat says."""
    value_U = random_numbers(stage.budget.space.size, 9)
    found, finalists = choose(stage, tmp_path, monkeypatch, lambda masks_NU: masks_NU.double() @ value_U, budget=900)
    losses = {name: (mask_U.double() @ value_U).item() for name, mask_U in finalists.items()}
    assert found.kept == min(losses, key=lambda name: losses[name])
    won = [heat for heat in found.heats if heat["winner"]]
    gained = sum(heat["difference"] for heat in won)
    assert len(won) > 2 and (found.mask_U.double() @ value_U).item() == pytest.approx(losses[found.kept] + gained)
    assert all((heat["difference"] < 0) == (heat["winner"] > 0) == (heat["changed_units"] > 0) for heat in found.heats)
    assert stage.budget.removed_share(found.mask_U) >= 0.3


@pytest.mark.parametrize("budget", range(0, 60, 3))
def test_no_more_is_spent_than_there_is(
    budget: int, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three selections on two windows, if it only suffices for that; then as many heats as fit."""
    rows: list[int] = []

    def counted(masks_NU: torch.Tensor) -> torch.Tensor:
        rows.append(len(masks_NU))
        return level(masks_NU)

    found, _ = choose(stage, tmp_path, monkeypatch, counted, budget=budget)
    assert sum(rows) == found.sequences <= budget
    assert (
        (found.sequences > 0)
        == (found.windows_read > 0)
        == (budget >= 6)
        == (tmp_path / "finals.safetensors").is_file()
    )
    assert found.sequences > budget - 24, "another heat, of 24, would have fitted"
    assert found.ended.startswith("sequences: ")


@pytest.mark.parametrize("priced", [False, True], ids=["challengers", "looks"])
@pytest.mark.parametrize("budget", range(0, 400, 11))
def test_passes_of_the_dense_model_are_inside_the_budget(
    budget: int, priced: bool, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each window, where divergences from it are what is compared; and no heat more would have fitted."""
    rows = list[int]()

    def counted(masks_NU: torch.Tensor) -> torch.Tensor:
        rows.append(1 + len(masks_NU))
        return level(masks_NU)

    config = stage.config.model_copy(update={"search": stage.config.search.model_copy(update={"objective": "kl"})})
    stage = replace(stage, config=config)
    found, _ = choose(stage, tmp_path, monkeypatch, counted, budget=budget, priced=priced)
    assert sum(rows) == found.sequences <= budget
    assert found.ended.startswith("changes") or found.sequences > budget - (111 if priced else 29)


def test_text_that_nobody_has_seen(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows after those of the search, in order, each read in one heat alone."""
    text: list[torch.Tensor] = []
    found, _ = choose(stage, tmp_path, monkeypatch, level, budget=200, text=text)
    first = WORK.step * stage.config.search.windows
    wanted = [stage.train.batch(window, 1) for window in range(first, first + found.windows_read)]
    assert torch.equal(torch.cat(text), torch.cat(wanted)) and found.windows_read == 5 * (1 + len(found.heats))


def test_text_that_was_kept_back(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order from its first window; of fewer than a heat wants, all; four times at most, whatever could be spent."""
    for number, count in enumerate((4, 9)):
        text: list[torch.Tensor] = []
        kept_back = TokenWindows(torch.arange(16 * count), window=16, seed=0)
        found, _ = choose(
            replace(stage, kept_back=kept_back), tmp_path / str(number), monkeypatch, level, budget=900, text=text
        )
        wanted = [kept_back.batch(window, 1) for window in range(found.windows_read)]
        assert torch.equal(torch.cat(text), torch.cat(wanted))
        assert found.windows_read == min(5, count) * (1 + len(found.heats))
        assert 4 * count - min(5, count) < found.windows_read <= 4 * count and found.sequences < 600
        assert found.ended.startswith("text: ") and found.ended.endswith("4 times")


def test_it_ends_where_nothing_is_left_to_try(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could still be spent is kept, and the reason is given."""
    monkeypatch.setattr(finals, "challengers", lambda search, mask_U, *_: mask_U.new_empty(0, len(mask_U)))
    found, _ = choose(stage, tmp_path, monkeypatch, level, budget=200)
    assert (found.heats, found.ended) == ([], "changes: none was left to try") and 0 < found.sequences < 20


def test_a_challenger_must_win_clearly(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lead of half a standard error is none: of a finalist, and then of a challenger."""
    windows = itertools.cycle([-1.0, 1.0, -1.0, 1.0, -1.0])

    def close(masks_NU: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0] + [0.95 + next(windows)] * (len(masks_NU) - 1), dtype=torch.float64)

    found, finalists = choose(stage, tmp_path, monkeypatch, close, budget=200)
    assert found.kept == "learned" and torch.equal(found.mask_U, finalists["learned"]) and found.heats
    for heat in found.heats:
        assert heat["winner"] == 0 and heat["difference"] == pytest.approx(-0.25) and 0.4 < heat["error"] < 0.6


def test_looks_lead_to_what_is_better(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss is what the kept units save, each step gains what its heat says, and its priorities select it."""
    value_U = random_numbers(stage.budget.space.size, 9)

    def loss(masks_NU: torch.Tensor) -> torch.Tensor:
        return -(masks_NU.double() @ value_U)

    found, finalists = choose(stage, tmp_path, monkeypatch, loss, budget=900, priced=True)
    losses = {name: loss(mask_U[None]).item() for name, mask_U in finalists.items()}
    assert found.kept == min(losses, key=lambda name: losses[name])
    won = [heat for heat in found.heats if heat["winner"]]
    gained = sum(heat["difference"] for heat in won)
    assert won and loss(found.mask_U[None]).item() == pytest.approx(losses[found.kept] + gained)
    assert all((heat["difference"] < 0) == (heat["winner"] > 0) == (heat["changed_units"] > 0) for heat in found.heats)
    assert stage.budget.removed_share(found.mask_U) >= 0.3 and found.priorities_U is not None
    again_U = select(found.priorities_U, stage.budget, limits=stage.limits, tie_break_U=found.mask_U.double())
    assert torch.equal(again_U, found.mask_U)
    groups = stage.budget.space.of_kind("kv_group")
    best_U = select(value_U / stage.budget.costs_U, stage.budget, limits=stage.limits)
    assert (found.mask_U == best_U)[groups].sum() > (finalists[found.kept] == best_U)[groups].sum()


def test_looks_of_equals_change_nothing(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no change does anything there is no step: of equals, what is kept stays."""
    found, finalists = choose(stage, tmp_path, monkeypatch, level, budget=900, priced=True)
    assert torch.equal(found.mask_U, finalists["learned"]) and found.priorities_U is None
    assert found.sequences > 800 and found.heats == []


@pytest.mark.parametrize("kept", ["learned", "initial"])
def test_looks_go_by_the_order_of_the_winner(
    kept: str, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of single channels by what was learned only if that was kept, or else by the metric."""
    given: list[torch.Tensor] = []
    monkeypatch.setattr(finals, "changes", lambda mask_U, priorities_U, *_: given.append(priorities_U) or [])
    _, finalists = choose(stage, tmp_path, monkeypatch, level, budget=0)

    def only(masks_NU: torch.Tensor) -> torch.Tensor:
        return 1 - (masks_NU == finalists[kept]).all(1).double()

    choose(stage, tmp_path, monkeypatch, only, budget=200, priced=True)
    order_U = random_numbers(stage.budget.space.size, 0 if kept == "learned" else 7)
    for members_N in stage.budget.space.by_layer("channel"):
        for some_N in (members_N[finalists[kept][members_N]], members_N[~finalists[kept][members_N]]):
            in_order_N = given[-1][some_N[order_U[some_N].argsort()]]
            assert (in_order_N.diff() >= 0).all()
    assert given[-1].unique().numel() > 10


def test_a_step_must_win_clearly(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a challenger must: a lead of half a standard error does not do."""
    windows = itertools.cycle([-1.0, 1.0, -1.0, 1.0, -1.0])

    def close(masks_NU: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0] + [0.95 + next(windows)] * (len(masks_NU) - 1), dtype=torch.float64)

    found, finalists = choose(stage, tmp_path, monkeypatch, close, budget=900, priced=True)
    assert torch.equal(found.mask_U, finalists["learned"]) and len(found.heats) > 2
    assert all(heat["winner"] == 0 and heat["difference"] == pytest.approx(-0.25) for heat in found.heats)


def test_worths_are_known_after_a_round(stage: Stage) -> None:
    """Before, priorities are probabilities, by which no change can be judged."""
    random_U = random_numbers(stage.budget.space.size, 0)
    search: Any = make_search(stage.config, stage.budget, random_U, random_U[:, None])
    assert not search.priced
    search.rounds = 1
    assert search.priced


# Looks at 15 changes on five windows, 80 sequences, and heats of four masks on three windows and two on two, 16.
@pytest.mark.parametrize("budget", range(0, 400, 23))
def test_looks_stay_inside_the_budget(
    budget: int, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as fit, on text that is read in order and once."""
    rows, text = list[int](), list[torch.Tensor]()
    value_U = random_numbers(stage.budget.space.size, 9)

    def counted(masks_NU: torch.Tensor) -> torch.Tensor:
        rows.append(len(masks_NU))
        return -(masks_NU.double() @ value_U)

    found, _ = choose(stage, tmp_path, monkeypatch, counted, budget=budget, text=text, priced=True)
    assert budget - 96 < sum(rows) == found.sequences <= budget
    assert found.ended.startswith("sequences: ")
    first = WORK.step * stage.config.search.windows
    wanted = [stage.train.batch(window, 1) for window in range(first, first + found.windows_read)]
    assert len(text) == 0 == len(wanted) or torch.equal(torch.cat(text), torch.cat(wanted))


def test_looks_end_where_nothing_can_change(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could still be spent is kept, and the reason is given."""
    monkeypatch.setattr(finals, "changes", lambda *_: [])
    found, _ = choose(stage, tmp_path, monkeypatch, level, budget=200, priced=True)
    assert (found.heats, found.ended) == ([], "changes: none was left to try")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_loses(
    bad: float, stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finalist or a challenger, without a trace in the report but a large number."""
    _, finalists = choose(stage, tmp_path, monkeypatch, level, budget=0)

    def broken(masks_NU: torch.Tensor) -> torch.Tensor:
        return torch.where((masks_NU == finalists["uniform"]).all(1), 2.0, bad).double()

    found, _ = choose(stage, tmp_path / "a", monkeypatch, broken, budget=200)
    assert found.kept == "uniform" and torch.equal(found.mask_U, finalists["uniform"])
    storage.write_json(tmp_path / "heats.json", found.heats)  # which knows no other numbers
    assert len(found.heats) > 3


# --- whole runs ---

# Its choice: three finalists on three windows, then looks of 42 sequences at most, one after the other to the last.
CHOICE = ("search.selection=0.6", "search.final_windows=3", "search.look_windows=2")
RUN = (*METHODS["posterior-chunk"], "search.sequences=600", *CHOICE)


@pytest.fixture(scope="module")
def undisturbed(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finish(prepared, tmp_path_factory.mktemp("undisturbed"), *RUN)


def arguments(place: Place, *more: str) -> list[str]:
    """As ``finish`` gives them."""
    held_out = tiny_text(place.folder / "held-out.txt", 400, seed=9)
    return [*place.prune(*RUN, *more), "--eval-text", str(held_out)]


def same_choice(out: Path, other: Path) -> None:
    """To the bit: the heats, what was learned from them, and what is kept."""
    assert state_of(out / "finals.safetensors") == state_of(other / "finals.safetensors")
    assert state_of(out / "learned.safetensors") == state_of(other / "learned.safetensors")
    assert (out / "plan.json").read_bytes() == (other / "plan.json").read_bytes()
    ours, theirs = (read_json(folder / "report.json")["search"] for folder in (out, other))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def heats_of(out: Path) -> int:
    """After that of the finalists, saved so far."""
    return len(read_state(out / "finals.safetensors")["heats"])


def before_race(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[int]:
    """Have something happen as each heat begins, told its number; returns the numbers."""
    original, numbers = finals.race, list[int]()

    def race(*given: Any, **more: Any) -> Any:
        numbers.append(len(numbers))
        act(numbers[-1])
        return original(*given, **more)

    monkeypatch.setattr(finals, "race", race)
    return numbers


def test_the_report_tells_of_the_choice(undisturbed: Path) -> None:
    """Its heats, and what they changed, as they were saved; and so does the table, in a line."""
    report, state = read_json(undisturbed / "report.json"), read_state(undisturbed / "finals.safetensors")
    (line,) = [line for line in table(report).splitlines() if line.startswith("choice ")]
    search = report["search"]
    ended = search["finals"].pop("ended")
    assert ended.startswith("sequences: ")
    won = sum(heat["winner"] > 0 for heat in state["heats"])
    counts = f"{state['sequences']} of these sequences: changes tried in {len(state['heats'])} rounds, kept in {won}"
    assert line.split(maxsplit=1)[1] == f"{counts}; stopped because {ended.removeprefix('sequences: ')}"
    assert search["finals"] == {"sequences": state["sequences"], "heats": state["heats"]}
    assert search["kept"] == state["kept"] and len(state["heats"]) > 3
    assert all(heat.keys() == {"winner", "difference", "error", "changed_units"} for heat in state["heats"])


@pytest.mark.parametrize("kind", ["cross-entropy", "kl"])
def test_the_bar_moves_with_every_pass(
    kind: str, prepared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By as many windows as are counted in the end, those of the dense model too."""
    bars = []

    class Bar(tqdm):  # type: ignore[type-arg]
        moves = 0

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "disable": False, "file": io.StringIO()})
            bars.extend([self] * (named["desc"] == "finals"))

        def update(self, n: float | None = 1) -> bool | None:
            self.moves += 1
            return super().update(n)

    monkeypatch.setattr(progress, "tqdm", Bar)
    out = finish(prepared, tmp_path, *RUN, f"search.objective={kind}", "search.rows_per_forward=8")
    (bar,) = bars
    assert bar.n == state_of(out / "finals.safetensors")["sequences"]
    assert bar.moves > 2 * len(state_of(out / "finals.safetensors")["heats"])


def test_other_sparsities_go_by_where_steps_led(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved to select by is what was learned of units, moved by what looks told."""
    monkeypatch.setattr(finals, "race", lambda masks_NU, *_, **__: Heat(len(masks_NU) - 1, -1.0, 0.1))
    succeed(*arguments(place))
    state, learned = (read_state(place.out / f"{name}.safetensors") for name in ("finals", "learned"))
    assert len(state["heats"]) > 2 and torch.equal(learned["priorities_U"], state["priorities_U"])
    assert torch.equal(learned["mask_U"], state["mask_U"])


@pytest.mark.parametrize(("heat", "number"), [(0, signal.SIGINT), (2, signal.SIGTERM)], ids=["first", "third"])
def test_an_interrupted_choice_goes_on(heat: int, number: signal.Signals, place: Place, undisturbed: Path) -> None:
    """Ctrl-C in the race of the finalists or later: not a pass more, and what was saved before is not run twice."""
    passes = list[int]()

    def stop(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(objective.MaskedObjective, "_losses", lambda *_: passes.append(1))
        os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        before_race(patch, lambda at: stop(patch) if at == heat else None)
        done = run(*arguments(place))
    assert done.code == 130 and done.err == interrupted(place.out)
    assert passes == [] and not (place.out / "plan.json").exists()
    assert (place.out / "finals.safetensors").is_file() == (heat > 0) and (not heat or heats_of(place.out) == heat - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", None)
        numbers = before_race(patch, lambda _: None)
        assert succeed("resume", str(place.out)).err == ""
    assert len(numbers) == 1 + heats_of(undisturbed) - heat
    same_choice(place.out, undisturbed)


def test_a_killed_choice_goes_on(place: Place, tmp_path: Path) -> None:
    """SIGKILL between two heats of a slow one: what was saved counts, the rest is repeated."""
    slow = ("search.rows_per_forward=1", "search.sequences=720", "search.selection=0.8")
    child = Child(arguments(place, *slow), place.folder)
    child.wait_for((place.out / "finals.safetensors").is_file)
    child.send(signal.SIGKILL)
    assert child.ended().code == -signal.SIGKILL
    ran = heats_of(place.out)
    with pytest.MonkeyPatch.context() as patch:
        numbers = before_race(patch, lambda _: None)
        succeed("resume", str(place.out))
    assert len(numbers) == heats_of(place.out) - ran > 0, "too late: the choice was over"
    same_choice(place.out, finish(place, tmp_path, *RUN, *slow))


def stopped(place: Place, undisturbed: Path) -> Path:
    """The run interrupted in the third heat after that of its finalists; returns the saved heats."""
    with pytest.MonkeyPatch.context() as patch:
        before_race(patch, lambda at: os.kill(os.getpid(), signal.SIGINT) if at == 3 else None)
        assert run(*arguments(place)).code == 130
    return place.out / "finals.safetensors"


def test_a_choice_is_ended_where_it_stands(place: Place, undisturbed: Path) -> None:
    """By ``--finish`` once the search is over: with the heats that were run, and not one more."""
    path = stopped(place, undisturbed)
    before = read_state(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", None)
        patch.setattr(finals, "race", None)
        done = succeed("resume", str(place.out), "--finish")
    report = read_json(place.out / "report.json")
    assert report["search"]["finals"]["heats"] == before["heats"] and len(before["heats"]) == 2
    assert "kept in" in done.out and "stopped because the run was told to finish" in done.out
    assert torch.equal(read_state(place.out / "learned.safetensors")["mask_U"], before["mask_U"])


def test_a_choice_that_was_ended_stays_so(place: Place, undisturbed: Path) -> None:
    """Also if the run dies after it, and is continued without another word."""
    path = stopped(place, undisturbed)
    before = read_state(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_pruned", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run("resume", str(place.out), "--finish").code == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finals, "race", None)
        succeed("resume", str(place.out))
    search = read_json(place.out / "report.json")["search"]["finals"]
    assert search["heats"] == before["heats"] and search["ended"].startswith("asked: ")


def test_a_choice_that_ended_by_itself_was_not_asked_to(place: Place, undisturbed: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_pruned", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(*arguments(place)).code == 130
    succeed("resume", str(place.out), "--finish")
    searches = [read_json(out / "report.json")["search"] for out in (place.out, undisturbed)]
    assert searches[0]["finals"] == searches[1]["finals"] and searches[0]["ended"] == searches[1]["ended"]


def test_finish_ends_first_the_search_then_the_choice(place: Place, undisturbed: Path) -> None:
    """Given once, the choice is made as ever; given again, it is the race of the finalists alone."""
    assert stopped_in_step(0, arguments(place)).code == 130
    with pytest.MonkeyPatch.context() as patch:
        before_race(patch, lambda at: os.kill(os.getpid(), signal.SIGINT))
        assert run("resume", str(place.out), "--finish").code == 130
    with pytest.MonkeyPatch.context() as patch:
        numbers = before_race(patch, lambda _: None)
        succeed("resume", str(place.out), "--finish")
    search = read_json(place.out / "report.json")["search"]
    assert numbers == [0] and search["finals"]["heats"] == [] and search["steps"] == 2
    assert search["ended"].startswith("asked: ") and search["finals"]["ended"].startswith("asked: ")


def test_finalists_are_raced_however_soon_a_choice_ends(place: Place, undisturbed: Path) -> None:
    """Nobody has told yet whether what was learned is better than the metric's."""
    with pytest.MonkeyPatch.context() as patch:
        before_race(patch, lambda at: os.kill(os.getpid(), signal.SIGINT))
        assert run(*arguments(place)).code == 130
    with pytest.MonkeyPatch.context() as patch:
        numbers = before_race(patch, lambda _: None)
        succeed("resume", str(place.out), "--finish")
    assert numbers == [0] and heats_of(place.out) == 0
    first, whole = (read_json(out / "report.json")["search"] for out in (place.out, undisturbed))
    assert first["kept"] == whole["kept"]


def test_damaged_heats_are_run_again(place: Place, undisturbed: Path) -> None:
    """Which is said, and ends the same."""
    path = stopped(place, undisturbed)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        numbers = before_race(patch, lambda _: None)
        done = succeed("resume", str(place.out))
    assert "finals.safetensors" in done.err and "racing the finalists again" in done.err
    assert len(numbers) == 1 + heats_of(undisturbed)
    same_choice(place.out, undisturbed)


@pytest.mark.parametrize("fewer", [1, 0])
def test_heats_of_another_search_are_not_used(fewer: int, place: Place, undisturbed: Path) -> None:
    """Those saved after fewer steps than the search now has are of an older policy; so are those of a search that is
    begun anew, as its checkpoints are lost."""
    path = stopped(place, undisturbed)
    state = read_state(path)
    write_state(path, state | {"step": state["step"] - fewer, "kept": "uniform", "mask_U": ~state["mask_U"]})
    if not fewer:
        shutil.rmtree(place.out / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        numbers = before_race(patch, lambda _: None)
        assert succeed("resume", str(place.out)).err == ""
    assert len(numbers) == 1 + heats_of(undisturbed)
    same_choice(place.out, undisturbed)


@pytest.mark.parametrize("name", ["finals.safetensors", "learned.safetensors", "0.2.json"])
def test_a_full_disk(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, nothing half-written, and once there is room the run goes on to its end."""
    original = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.os, "replace", fail)
        sentence = in_one_sentence(run(*arguments(place, "plans.sparsities=[0.2]")))
    assert "No space left" in sentence and "bernprune resume" in sentence
    assert not list(place.out.rglob(f"*{name}*")) and not list(place.out.rglob("*.part"))
    succeed("resume", str(place.out))
    assert list(place.out.rglob(name)) and (place.out / "report.json").is_file()


def choose_this(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Let a finalist win its races; what is returned will hold them all."""
    losses, choose, seen = MaskedObjective.window_losses, pipeline.run_finals, dict[str, torch.Tensor]()

    def run_finals(stage: Any, folder: Any, search: Any, finalists: Any, *given: Any, **named: Any) -> Any:
        seen.update(finalists)
        return choose(stage, folder, search, finalists, *given, **named)

    def window_losses(self: Any, masks_KU: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        losses_KB = losses(self, masks_KU, tokens_BT)
        if seen:
            losses_KB[(masks_KU == seen[name]).all(-1)] = 0.0
        return losses_KB

    monkeypatch.setattr(pipeline, "run_finals", run_finals)
    monkeypatch.setattr(MaskedObjective, "window_losses", window_losses)
    return seen


def check_order(learned: dict[str, Any], kinds: tuple[str, ...]) -> None:
    """Priorities of these kinds are in the order of scores within each layer."""
    scores_U, space = learned["scores_U"], UnitSpace.from_dict(json.loads(learned["space"]))
    for group, start in zip(space.groups, space.starts, strict=False):
        of_group = slice(start, start + group.count)
        order = learned["priorities_U"][of_group].argsort()
        assert group.kind not in kinds or torch.equal(order, scores_U[of_group].argsort())


def test_the_learned_widths_may_win_without_the_learned_order(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many units in each layer as were learned, the best ones by the metric; also at other sparsities."""
    finalists = choose_this("widths", monkeypatch)
    done = succeed(*arguments(place, "search.sequences=1500", "search.selection=0.1"))
    search, learned = read_json(place.out / "report.json")["search"], read_state(place.out / "learned.safetensors")
    assert search["kept"] == "widths" and "the best by the metric" in done.out
    assert torch.equal(learned["mask_U"], finalists["widths"])
    space = UnitSpace.from_dict(json.loads(learned["space"]))
    counts = [
        [mask_U[space.group_U == group].sum() for group in range(len(space.groups))] for mask_U in finalists.values()
    ]
    assert counts[0] == counts[1] != counts[2]
    check_order(learned, ("channel",))


@pytest.mark.parametrize("best", ["learned", "widths"])
def test_where_steps_led_is_forgotten_with_the_finalist(best: str, stage: Stage) -> None:
    """If another one is better once repaired: it has priorities of its own."""
    masks_NU = torch.eye(stage.budget.space.size).bool()
    finalists, led_U = {"learned": masks_NU[0], "widths": masks_NU[1]}, random_numbers(stage.budget.space.size, 5)
    made = Finals("learned", finalists["learned"], priorities_U=led_U)
    workshop: Any = SimpleNamespace(prefer=lambda plans, path: (best, dict.fromkeys(plans, 1.0)), judging_WT=[1])
    judged = pipeline._judge(stage, RunFolder(Path("out")), workshop, made, finalists)
    assert judged["finalists"].keys() == finalists.keys()
    assert (made.kept, made.priorities_U is led_U) == (best, best == "learned")
    assert made.mask_U.equal(finalists[best])


def test_what_was_learned_is_not_kept_where_it_is_worse(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start beats it: its mask is saved with its own priorities, and the report says so."""
    finalists = choose_this("initial", monkeypatch)
    done = succeed(*arguments(place))
    search, learned = read_json(place.out / "report.json")["search"], read_state(place.out / "learned.safetensors")
    assert search["kept"] == "initial" and search["changed_units"] == 0
    assert "it was better than what was learned" in done.out
    assert torch.equal(learned["mask_U"], finalists["initial"])
    check_order(learned, ("kv_group", "channel"))
    for sparsity in ("0.2", "0.4"):  # of other sparsities, the uniform cut
        succeed("select", str(place.out), "--sparsity", sparsity)
        plan = read_plan(place.out / "plans" / f"{sparsity}.json")
        for sizes in ([len(layer.kv_groups) for layer in plan.layers], [len(layer.channels) for layer in plan.layers]):
            assert max(sizes) - min(sizes) <= 1
