"""A run that is killed, interrupted or started twice is continued to the same result, or refused in time."""

import errno
import fcntl
import functools
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import Child
from tiny_run import (
    METHODS,
    PASSES,
    PASSES_OF,
    PROBE,
    SETTINGS,
    STEPS,
    Outcome,
    Place,
    finish,
    in_one_sentence,
    interrupted,
    read_json,
    run,
    same_run,
    settings,
    steps_of,
    stopped_in_step,
    succeed,
    tiny_folder,
    tiny_text,
)

import bernprune
from bernprune.config import changed_config, make_config
from bernprune.errors import ConfigError, RunError
from bernprune.run import finals, loop, origin, pipeline, verification
from bernprune.run import folder as folder_module
from bernprune.run.folder import RunFolder
from bernprune.run.signals import Interrupted, signals
from bernprune.run.stage import set_stage
from bernprune.settings import merge, parse_settings, read_yaml

# 20 steps; a checkpoint within a round, or a baseline with a memory; and what was learned is what is kept. Those of one
# run take a twentieth of a second each, so that a signal from without meets a search at work.
CHUNKS = (*METHODS["posterior-chunk"], "search.rounds=5", "search.checkpoint_steps=10")
RUNS = {
    "slow": (*CHUNKS, "search.masks=8", "search.rows_per_forward=1", "search.sequences=370"),
    "posterior": (*CHUNKS, f"search.sequences={20 * PASSES + 5 * PROBE}"),
    "refit": (*CHUNKS, f"search.sequences={20 * PASSES + 5 * PROBE}", "search.refit=true"),
    "reinforce": (
        *METHODS["reinforce"],
        *("search.checkpoint_steps=10", f"search.sequences={20 * PASSES}", "search.baseline=matched"),
    ),
}


@pytest.fixture(scope="module")
def uninterrupted(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run with nothing in its way."""
    return functools.cache(lambda name: finish(prepared, tmp_path_factory.mktemp(name), *RUNS[name]))


def kill(place: Place, command: list[str]) -> None:
    child = Child(command, place.folder)
    child.wait_for((place.out / "checkpoints" / "step-00000010.safetensors").is_file)
    child.send(signal.SIGKILL)
    assert child.ended().code == -signal.SIGKILL


def leave_as_if_killed(place: Place, command: list[str]) -> None:
    """The run's folder as it is in step 12, without the seconds that a process takes to start."""
    kept = place.folder / "kept"
    assert stopped_in_step(12, command, before=lambda: shutil.copytree(place.out, kept)).code == 130
    shutil.rmtree(place.out)
    kept.rename(place.out)


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_are_ten_and_a_kill_and_ten(name: str, place: Place, uninterrupted: Callable[[str], Path]) -> None:
    """A process killed by SIGKILL after its checkpoint at step 10, and resumed, repeats the other to the last bit."""
    held_out = tiny_text(place.folder / "held-out.txt", 400, seed=9)
    command = [*place.prune(*RUNS[name]), "--eval-text", str(held_out)]
    if name == "slow":
        kill(place, command)
    else:
        leave_as_if_killed(place, command)
    assert not (place.out / "checkpoints" / "step-00000020.safetensors").exists(), "too late: the search was over"
    with open(place.out / "metrics.jsonl", "a") as metrics:  # what a crash may leave: steps beyond, and half a line
        metrics.write('{"step": 10}\n{"step": 11, "sequ')
    succeed("resume", str(place.out))
    assert steps_of(place.out) == list(range(20))
    assert len(list((place.out / "checkpoints").iterdir())) == 2
    same_run(place.out, uninterrupted(name))


def test_an_interrupted_search_says_how_to_go_on(place: Place, uninterrupted: Callable[[str], Path]) -> None:
    """A checkpoint at the step at work, exit code 130, and a command that finishes the same run."""
    held_out = tiny_text(place.folder / "held-out.txt", 400, seed=9)
    child = Child([*place.prune(*RUNS["slow"]), "--eval-text", str(held_out)], place.folder)
    metrics = place.out / "metrics.jsonl"
    child.wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2)
    child.send(signal.SIGINT)
    done = child.ended()
    steps = len(steps_of(place.out))
    assert 2 <= steps < 20
    goes_on(place, done, steps, uninterrupted("slow"))


def goes_on(place: Place, done: Outcome, steps: int, uninterrupted: Path) -> None:
    """As it says, from a checkpoint of that many steps."""
    assert done.code == 130 and done.err == interrupted(place.out)
    assert (place.out / "checkpoints" / f"step-{steps:08d}.safetensors").is_file()
    succeed(*done.err.strip().partition("bernprune ")[2].split())
    same_run(place.out, uninterrupted)


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGTERM, "posterior"), (signal.SIGHUP, "posterior"), (signal.SIGINT, "reinforce")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_other_signals_interrupt_a_search_alike(
    number: signal.Signals, name: str, place: Place, uninterrupted: Callable[[str], Path]
) -> None:
    """In this process."""
    held_out = tiny_text(place.folder / "held-out.txt", 400, seed=9)
    done = stopped_in_step(7, [*place.prune(*RUNS[name]), "--eval-text", str(held_out)], number)
    goes_on(place, done, 8, uninterrupted(name))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_that_is_ignored_stays_so(number: signal.Signals, place: Place) -> None:
    """As a shell sets SIGINT for what a script runs in the background, and nohup SIGHUP."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert stopped_in_step(3, place.prune(), number).code == 0
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("method", METHODS)
def test_a_search_is_ended_where_it_stands(method: str, place: Place) -> None:
    """By ``--finish``: one more step concludes it, then comes the choice, of the share that is its own. A run that
    dies after that does not search on."""
    more = (*METHODS[method], "search.selection=0.5", "search.final_windows=2", "search.sequences=200")
    assert stopped_in_step(2, place.prune(*more)).err == interrupted(place.out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", _interrupt)
        assert run("resume", str(place.out), "--finish").code == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", None)
        done = succeed("resume", str(place.out))
    search, metrics = read_json(place.out / "report.json")["search"], steps_of(place.out)
    assert metrics == list(range(4)) and search["steps"] == 4
    assert search["ended"] == "asked: the run was told to finish" and "because the run was told to finish" in done.out
    taken = search["sequences"] - search["finals"]["sequences"]
    assert 4 * PASSES_OF[method] <= taken <= 4 * (PASSES_OF[method] + PROBE)
    assert 0 < search["finals"]["sequences"] <= taken and not search["finals"]["ended"].startswith("asked")
    records = [json.loads(line) for line in (place.out / "metrics.jsonl").read_text().splitlines()]
    assert "round" in records[-1]


def test_a_search_ends_where_it_had_hardly_begun(place: Place) -> None:
    """What one batch has shown concludes nothing: the metric decides."""
    stopped_in_step(0, place.prune(*METHODS["posterior-batch"]))
    shutil.rmtree(place.out / "checkpoints")  # as if killed before there was one
    succeed("resume", str(place.out), "--finish")
    report = read_json(place.out / "report.json")
    assert report["search"]["steps"] == 1 and report["search"]["changed_units"] == 0
    assert "entropy_by_layer" in report["diagnostics"] and "signal_to_noise" not in report["diagnostics"]


def test_a_second_signal_stops_at_once() -> None:
    """The first is a flag, which is raised when the block ends."""
    reached = list[bool]()

    def work(*numbers: signal.Signals) -> None:
        with signals() as stopping:
            for number in numbers:
                os.kill(os.getpid(), number)
                reached.append(stopping.is_set())

    with pytest.raises(Interrupted):
        work(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught:
        work(signal.SIGINT, signal.SIGTERM)
    assert caught.type is KeyboardInterrupt and reached == [True, True]


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_interrupted_before_the_search(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the model is loaded or scored leaves nothing, and no advice to resume nothing."""
    before = place.contents()
    for name in ("set_stage", "take_start"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, name, _interrupt)
            done = run(*place.prune())
        assert (done.code, done.err) == (130, "interrupted\n")
        assert place.contents() == before


@pytest.fixture(autouse=True)
def _hangups() -> Iterator[None]:
    """SIGHUP as a terminal sets it, also where the tests run behind nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_terminated_before_the_search(number: signal.Signals, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM and SIGHUP outside the search unwind like Ctrl-C, so that nothing is left either."""
    before = place.contents()

    def terminate(*_: Any, **__: Any) -> None:
        assert signal.getsignal(number) is not signal.SIG_DFL, "this would end the tests"
        os.kill(os.getpid(), number)

    monkeypatch.setattr(pipeline, "take_start", terminate)
    assert run(*place.prune()).code == 130
    assert place.contents() == before


def test_interrupted_after_the_search(place: Place, finished: Path) -> None:
    """Ctrl-C while the model is verified leaves no model, and the search need not be repeated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", _interrupt)
        done = run(*place.prune(), "--eval-text", str(finished.parent / "held-out.txt"))
    assert done.code == 130 and "bernprune resume" in done.err
    assert not (place.out / "model").exists() and (place.out / "plan.json").is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", None)
        succeed("resume", str(place.out))
    assert (place.out / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


@pytest.mark.parametrize("happens", [KeyboardInterrupt, MemoryError, OSError])
def test_a_verified_model_stays(happens: type[BaseException], place: Place, finished: Path) -> None:
    """What is measured of the metric's model after that can fail, or be interrupted: the run is finished."""

    def fail(*_: Any) -> None:
        raise happens("here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "timed_initial", fail)
        done = run(*place.prune("report.initial_latency=true"), "--eval-text", str(finished.parent / "held-out.txt"))
    assert done.code == (130 if happens is KeyboardInterrupt else 0) and "bernprune resume" not in done.err
    assert "initial" not in read_json(place.out / "report.json")["latency"]
    assert (place.out / "model" / "config.json").is_file()
    if happens is KeyboardInterrupt:
        assert f"interrupted; the run in {place.out} is finished, and its result lies in {place.out}/model" in done.err
        assert not (place.out / "report.png").exists()
    again = succeed("resume", str(place.out))
    assert f"result       {place.out}/model" in again.out and (not done.out or again.out == done.out)
    assert (place.out / "report.png").exists()


@pytest.mark.parametrize(("module", "last"), [(loop, "write_checkpoint"), (finals, "write_state")])
def test_a_signal_at_the_very_end_counts(module: Any, last: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM during the last save of the search or of the choice ends the run there, to be resumed."""
    original, saved = getattr(module, last), 0

    def terminated(*given: Any) -> None:
        nonlocal saved
        original(*given)
        saved += 1
        os.kill(os.getpid(), signal.SIGTERM)

    more = ("search.sequences=60", "search.selection=0.2", "search.final_windows=2")  # a race, and no heat
    monkeypatch.setattr(module, last, terminated)
    done = run(*place.prune(*more))
    assert (done.code, saved) == (130, 1) and "bernprune resume" in done.err
    assert not (place.out / "plan.json").exists()
    monkeypatch.setattr(module, last, original)
    succeed("resume", str(place.out))


def test_the_advice_survives_a_space(place: Place) -> None:
    """The command to resume can be pasted into a shell whatever the folder is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", _interrupt)
        done = run(*place.prune(out=Path("my run")))
    assert done.err == "interrupted; continue with: bernprune resume 'my run'\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", lambda *_, **__: os.stat("not there"))
        done = run(*place.prune(out=Path("my  run")))
    assert in_one_sentence(done).endswith("continue with: bernprune resume 'my  run'")


def test_a_run_that_python_began_goes_on_from_elsewhere(
    place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its paths were relative."""
    monkeypatch.chdir(place.folder)
    given = {
        "model": {"path": "model"},
        "data": {"text": "text.txt", "eval_text": os.path.relpath(finished.parent / "held-out.txt")},
    }
    config = make_config(merge(given, parse_settings(SETTINGS)))
    with monkeypatch.context() as patch:
        patch.setattr(verification, "verify_saved", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            bernprune.prune(config, "out")
    monkeypatch.chdir(place.folder.parent)
    assert bernprune.resume(place.folder / "out")["layers"] == read_json(finished / "report.json")["layers"]


def test_a_run_that_was_killed_as_it_began_knows_what_with(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are told apart from the next time on."""
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_json", _interrupt)
        run(*place.prune())
    assert (place.out / "config.yaml").is_file() and not (place.out / "versions.json").exists()
    stopped_in_step(2, ["resume", str(place.out)])
    shutil.rmtree(place.model)
    tiny_folder(place.model, seed=5)
    assert "the model's weights are not those" in in_one_sentence(run("resume", str(place.out)))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_continues(method: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an unfinished run of its own, ``prune`` goes on from the last checkpoint, in the middle of a round or not,
    repeats no step, and ends as if nothing had happened."""
    rounds, probes = ((), 0) if method == "reinforce" else (("search.rounds=2",), 2 * PROBE)
    more = (
        *METHODS[method],
        f"search.sequences={10 * PASSES_OF[method] + probes}",
        "search.checkpoint_steps=4",
        *rounds,
    )
    undisturbed = place.folder / "undisturbed"
    succeed(*place.prune(*more, out=undisturbed))
    step, done = loop._Loop.step, []

    def counted(self: Any, *given: Any) -> Any:
        done.append(self.work.step)
        if len(done) == 7:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(loop._Loop, "step", counted)
    assert run(*place.prune(*more)).code == 130
    assert succeed(*place.prune(*more)).err == ""
    assert done == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9]
    assert steps_of(place.out) == list(range(10))
    names = sorted(path.name for path in (place.out / "checkpoints").iterdir())
    assert names == ["step-00000008.safetensors", "step-00000010.safetensors"]
    same_run(place.out, undisturbed)


def test_overwrite_replaces_a_finished_run(place: Place, finished: Path) -> None:
    """--overwrite starts over with another config, and touches nothing in the folder that is not a run's."""
    shutil.copytree(finished, place.out)
    (place.out / "notes.txt").write_text("mine")
    arguments = [*place.prune(), "--seed", "7"]
    assert "finished run" in in_one_sentence(run(*arguments))
    succeed(*arguments, "--overwrite")
    assert read_yaml(place.out / "config.yaml")["seed"] == 7
    assert (place.out / "metrics.jsonl").read_text() != (finished / "metrics.jsonl").read_text()
    assert steps_of(place.out) == list(range(STEPS)) and (place.out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("where", "overwritten", "offered"),
    [("take_start", False, True), ("take_start", True, False), ("run_search", True, True)],
    ids=["same", "before", "begun"],
)
@pytest.mark.parametrize(
    "how", [KeyboardInterrupt(), RunError("it cannot"), OSError(errno.ENOSPC, "it is full")], ids=repr
)
def test_no_run_is_offered_that_was_to_be_replaced(
    where: str, overwritten: bool, offered: bool, how: BaseException, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where --overwrite comes not so far, the earlier run lies there as it was, but another was asked for."""
    command = place.prune()
    monkeypatch.setattr(pipeline, "run_search", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(*command).code == 130
    monkeypatch.setattr(pipeline, where, lambda *_, **__: (_ for _ in ()).throw(how))
    done = run(*command, *(["--overwrite", "--seed", "7"] if overwritten else []))
    assert ("bernprune resume" in done.err) == offered
    assert read_yaml(place.out / "config.yaml")["seed"] == (7 if overwritten and offered else 0)


def test_what_costs_memory_or_time_may_change(place: Place, finished: Path) -> None:
    """The same command with other such settings continues an unfinished run, and they are what is stored."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", _interrupt)
        run(*place.prune(), "--eval-text", str(finished.parent / "held-out.txt"))
    free = ("search.rows_per_forward=1", "search.checkpoint_steps=3", "report.latency_repeats=3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", None)
        succeed(*place.prune(*free), "--eval-text", str(finished.parent / "held-out.txt"))
    assert read_yaml(place.out / "config.yaml")["search"]["rows_per_forward"] == 1
    assert (place.out / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


def test_resume_takes_what_may_change(place: Place, finished: Path) -> None:
    """As the same command with other such settings does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", _interrupt)
        run(*place.prune(), "--eval-text", str(finished.parent / "held-out.txt"))
    before = RunFolder(place.out).read_config()
    with pytest.raises(RunError, match=r"another configuration \(seed is 0 there and 7 here\)"):
        pipeline.resume(place.out, changes={"seed": 7})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", None)
        free = ("search.rows_per_forward=1", "report.latency_repeats=3")
        succeed("resume", str(place.out), *settings(*free))
    wanted = merge(before.to_dict(), parse_settings(free))
    assert RunFolder(place.out).read_config() == make_config(wanted) != before
    assert (place.out / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


def test_a_run_may_move(place: Place, finished: Path) -> None:
    """To another machine, where the same model and texts lie elsewhere; others are refused, and nothing changes."""
    held_out, moved = finished.parent / "held-out.txt", place.folder / "moved"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", _interrupt)
        run(*place.prune(), "--eval-text", str(held_out))
    shutil.copytree(place.model, moved / "model")
    texts = {"data.text": place.text, "data.eval_text": held_out}
    for path in texts.values():
        shutil.copy(path, moved)
    here = [f"model.path={moved / 'model'}", "model.device=cpu"]
    here += [f"{name}={moved / path.name}" for name, path in texts.items()]
    other, before = tiny_text(place.folder / "other.txt", 400, seed=5), place.contents()
    for name, what in {"data.text": "training", "data.eval_text": "evaluation"}.items():
        refused = in_one_sentence(run("resume", str(place.out), *settings(*here, f"{name}={other}")))
        assert f"the {what} text is not the one" in refused and "; it began with" not in refused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bernprune, "__version__", "9.9")  # another package's docstrings may be what has changed
        assert "; it began with bernprune " in in_one_sentence(
            run("resume", str(place.out), f"--set=data.text={other}")
        )
    assert place.contents() == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", None)
        succeed("resume", str(place.out), *settings(*here))
    assert RunFolder(place.out).read_config().model.path == str(moved / "model")
    assert (place.out / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


@pytest.mark.parametrize(
    "setting",
    [
        "seed=7",
        "preset=reinforce",
        "model.dtype=float32",
        "data.window=64",
        "budget.sparsity=0.4",
        "initial.also=[flap]",
        "policy.floor=0.01",
        "search.masks=2",
        "search.windows=4",
        "search.sequences=5000",
        "search.selection=0.2",
        "plans.sparsities=[0.2]",
    ],
)
def test_what_decides_the_result_may_not_change(setting: str, tmp_path: Path) -> None:
    """An unfinished run is not continued under another setting, which is named."""
    folder = RunFolder(tmp_path)
    folder.write_config(make_config({}))
    assert folder.check(make_config({}))
    name = setting.split("=")[0]
    with pytest.raises(RunError, match=rf"of another configuration \({name} is .* there and .* here\)"):
        folder.check(make_config(parse_settings([setting])))


def test_a_repair_is_changed_by_resume(tmp_path: Path) -> None:
    """The same command with another would be another search, on other weights; what to do instead is said."""
    folder = RunFolder(tmp_path)
    folder.write_config(make_config({}))
    with pytest.raises(
        RunError, match=r"search\.refit.*; bernprune resume .* --set to change its repair, give another"
    ):
        folder.check(make_config({"repair": {"method": "none"}}))
    before = make_config({"repair": {"windows": 99, "judge_finalists": True, "ridges": [0.1]}})
    assert changed_config(before, {"repair": {"method": "none"}}).repair.windows is None
    assert changed_config(before, {"repair": {"method": "bias"}}).repair.windows == 99
    with pytest.raises(ConfigError, match=r"repair\.windows has no meaning for repair\.method 'none'"):
        changed_config(before, {"repair": {"method": "none", "windows": 9}})


def test_versions_are_compared_where_a_run_goes_on(place: Place) -> None:
    """Those that it began with are kept, and told of where others go on; the report has those that ended it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", _interrupt)
        run(*place.prune())
        began = read_json(place.out / "versions.json")
        patch.setattr(bernprune, "__version__", "9.9")
        patch.setattr(origin, "machine", lambda _: "another")
        again = run(*place.prune())
        assert f"the run began with bernprune {began['bernprune']} and not 9.9, machine " in again.err
        assert f"{began['machine']} and not another: it may not go on to the bit" in again.err
        (place.out / "versions.json").unlink()  # as of a run that was killed as it began
        assert "the run began" not in run(*place.prune()).err
    done = succeed("resume", str(place.out))
    assert "the run began with bernprune 9.9 and not" in done.err
    libraries, inputs = {"bernprune", "torch", "transformers", "numpy", "datasets"}, {"weights", "text", "evaluation"}
    assert began.keys() == libraries | inputs | {"python", "machine"}
    assert read_json(place.out / "report.json")["versions"].items() < began.items()


@pytest.mark.parametrize("removed", [0, 1, 4, 7, 11])
def test_overwriting_can_be_cut_short(removed: int, place: Place, finished: Path) -> None:
    """Wherever it is killed, the folder is still known for a run's, and the same command replaces it."""
    shutil.copytree(finished, place.out)
    count = itertools.count()

    def remove(path: Path) -> None:
        if next(count) == removed:
            raise KeyboardInterrupt
        original(path)

    original = folder_module._remove
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "_remove", remove)
        assert run(*place.prune(), "--seed", "7", "--overwrite").code == 130
    folder = RunFolder(place.out)
    assert folder.config.is_file() and (folder.model.is_dir() or not folder.finished)
    succeed(*place.prune(), "--seed", "7", "--overwrite")
    assert read_yaml(place.out / "config.yaml")["seed"] == 7


def test_a_second_process_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one works in a folder, another that would begin or continue a run there says so, before it loads anything,
    and changes nothing."""
    folder = RunFolder(place.out)
    monkeypatch.setattr(pipeline, "set_stage", lambda config: pytest.fail("it was loaded"))
    with folder.locked():
        assert "another process" in in_one_sentence(run(*place.prune()))
        data = {"text": str(place.text), "window": 16}
        folder.start(
            make_config(
                {
                    "model": {"path": str(place.model)},
                    "data": data,
                    "repair": {"method": "none"},
                    "search": {"selection": 0},
                }
            )
        )
        before = place.contents()
        assert "another process" in in_one_sentence(run("resume", str(place.out)))
        assert place.contents() == before


def test_a_lock_that_was_taken_away_locks_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who held it has begun no run, and left nothing: another may have made a new one since."""
    lock = fcntl.flock

    def late(file: Any, how: int) -> None:
        (place.out / ".lock").unlink()
        lock(file, how)

    monkeypatch.setattr(folder_module.fcntl, "flock", late)
    with pytest.raises(RunError, match="another process is working"), RunFolder(place.out).locked():
        pytest.fail("it is not locked")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_locked(number: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: the reason is given, no other process is blamed, and nothing is left."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_module.fcntl, "flock", refuse)
    before = place.contents()
    sentence = in_one_sentence(run(*place.prune()))
    assert "cannot be locked" in sentence and os.strerror(number) in sentence and "another process" not in sentence
    assert place.contents() == before


def test_a_run_finished_meanwhile_is_not_replaced(
    place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who found the folder free, and loaded while another process filled it, looks again before it starts."""

    def load(config: Any) -> Any:
        shutil.copytree(finished, place.out)
        return set_stage(config)

    monkeypatch.setattr(pipeline, "set_stage", load)
    assert "finished run" in in_one_sentence(run(*place.prune()))
    assert (place.out / "report.json").read_bytes() == (finished / "report.json").read_bytes()


def test_scraps_of_a_killed_process_are_no_obstacle(place: Place) -> None:
    """What SIGKILL leaves before a run began, or while it saved its model, is used or cleared away."""
    place.out.mkdir(parents=True)
    (place.out / ".lock").touch()
    (place.out / ".config.yaml.part").write_text("seed:")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", _interrupt)
        assert run(*place.prune()).code == 130
    (place.out / ".model.0123abcd").mkdir()
    succeed("resume", str(place.out))
    assert not list(place.out.glob(".model*"))
