"""How much is run: everything counts, nothing is left over but what does not fit, and the search knows when to stop."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import (
    METHODS,
    PASSES,
    PROBE,
    STEPS,
    WINDOW,
    Place,
    read_json,
    run,
    same_run,
    steps_of,
    succeed,
    tiny_text,
)

from bernprune.config import make_config
from bernprune.repair.needs import needed_windows
from bernprune.run import loop
from bernprune.run.initial import scoring_sequences
from bernprune.run.stage import Stage
from bernprune.run.workload import (
    AUTO_REGRET,
    AUTO_TIMES,
    LEAST_SEQUENCES,
    MOST_SEQUENCES,
    ROUND_WINDOWS,
    Work,
    Workload,
    _fitting,
    default_sequences,
    finalist_windows,
    judging_windows,
    plan_work,
    repair_windows,
)
from bernprune.units import Architecture, LayerShape, UnitGroup

UNITS = 5000

# Planned


def walk(workload: Workload) -> tuple[Work, int]:
    """The work of a search that nothing stops before its sequences are spent, and its rounds."""
    work, rounds = Work(), 0
    while workload.progress(work) < 1:
        ends = workload.round_ends(work.step)
        work.step += 1
        rounds += ends
        work.sequences += workload.step_sequences + ends * workload.probe_sequences
    return work, rounds


def units_of(count: int) -> Any:
    """What is known here of so many units."""
    return SimpleNamespace(
        size=count, groups=[UnitGroup("kv_group", 0, 7, 11, 29.0), UnitGroup("channel", 0, 5, 3, 6.0)]
    )


@pytest.mark.parametrize(("window", "channels"), [(128, 512), (128, 11_008), (2048, 11_008), (100, 1537)])
def test_a_repair_reads_as_much_as_its_widest_projection_asks_for(window: int, channels: int) -> None:
    """24 tokens to fit on for each input, and no window more, but never less than small models take."""
    shapes = (LayerShape(32, 8, 64), LayerShape(32, 8, channels))
    architecture, data = Architecture("llama", 400, 10, shapes), {"window": window}
    count = repair_windows(make_config({"data": data}), architecture)
    fitted, fewer = ((windows - windows // 4) * window for windows in (count, count - 1))
    assert count == 128 or fewer < 24 * channels <= fitted
    assert count >= 128 and fitted >= 24 * channels
    assert finalist_windows(architecture, window, count) == max(128, needed_windows(channels, window, 6))
    assert finalist_windows(architecture, window, 7) == 7
    assert repair_windows(make_config({"data": data, "repair": {"windows": 7}}), architecture) == 7
    assert judging_windows(7) == 7 and judging_windows(count) == min(count, 256)


KINDS: dict[str, dict[str, Any]] = {
    **{f"posterior-{per}": {"method": "posterior", "masks_per": per} for per in ("chunk", "sequence", "batch")},
    "reinforce": {"method": "reinforce", "masks_per": "batch"},
    "reinforce-matched": {
        "method": "reinforce",
        "masks_per": "sequence",
        "baseline": "matched",
        "sampling": "independent",
    },
}
PLAIN: dict[str, dict[str, Any]] = {"posterior": {}, "reinforce": {"masks_per": "batch", "sampling": "independent"}}
SELECTIONS = (0, 0.1, 0.37, 0.9)
ROUNDS = (None, 1, 3, 24)


def workloads(
    kind: str, objective: str, amounts: tuple[Any, ...], **more: Any
) -> Iterator[tuple[dict[str, Any], Workload, int]]:
    """Workloads of 5 masks on 3 windows, and what they may spend."""
    rounds = (None,) if kind.startswith("reinforce") else ROUNDS
    for amount, selection, wanted in itertools.product(amounts, SELECTIONS, rounds):
        search = {"masks": 5, "windows": 3, "sequences": amount, "rounds": wanted, "selection": selection}
        search |= KINDS[kind] | {"objective": objective} | more
        yield search, plan_work(make_config({"search": search}), units_of(UNITS)), amount or default_sequences(UNITS)


both = pytest.mark.parametrize("objective", ["cross-entropy", "kl"])
every_kind = pytest.mark.parametrize("kind", KINDS)


@both
@every_kind
def test_all_that_is_run_fits(kind: str, objective: str) -> None:
    """Steps, probes of the selection and the choice at the end; a step at least; and the choice gets its share."""
    for search, workload, available in workloads(kind, objective, (42, 45, 97, 100, 1000, 8192, None)):
        work, rounds = walk(workload)
        choosing = workload.selection_sequences(work)
        assert work.step == workload.steps >= 1 and work.sequences + choosing <= available, search
        share = search["selection"]
        assert choosing <= share * (work.sequences + choosing) + 1e-6, "the search has the rest at least"
        if available >= 1000 and share < 0.9:
            assert choosing > share * available - 25, "and the choice all of its share, but for a step's worth"
        if workload.probe_sequences:
            assert abs(workload.steps / workload.round_steps - rounds) < 1e-9, "the last round ends with the work"


@both
@every_kind
def test_steps_and_rounds(kind: str, objective: str) -> None:
    """What a step and a probe take; no further step would have fitted; as many rounds as asked for or sensible."""
    dense, reference = int(objective == "kl"), int(kind == "reinforce-matched")
    least = 2 if kind == "posterior-batch" else 1
    for search, workload, available in workloads(kind, objective, (200, 1000, 8192, None)):
        assert workload.steps is not None
        read = int(kind.startswith("posterior") and kind != "posterior-batch")
        per_step, per_probe = (5 + dense + reference + read) * 3, (1 + dense) * 3 if kind.startswith("posterior") else 0
        assert workload.step_sequences == per_step
        left = (1 - search["selection"]) * available
        if left + 1e-6 < least * per_step + per_probe:  # no room to probe, nor to choose
            assert workload.probe_sequences == 0
            continue
        assert workload.probe_sequences == per_probe
        work, rounds = walk(workload)
        assert work.sequences <= left + 1e-6
        assert left - work.sequences < per_step + (1 + ROUND_WINDOWS) * per_probe
        if search["rounds"] in (None, 1) and workload.steps * 3 < ROUND_WINDOWS:
            assert left - work.sequences < per_step, "of one round, nothing is left over but less than a step"
        wanted = search["rounds"] or workload.steps * 3 // ROUND_WINDOWS
        assert rounds == max(1, min(wanted, workload.steps // least))


def test_a_step_more_would_not_fit() -> None:
    """By trying: with the rounds that so many steps would have."""
    for amount in (200, 333, 1000, 4321):
        for wanted in (2, 3, 24):
            search = {"masks": 5, "windows": 3, "sequences": amount, "rounds": wanted, "selection": 0}
            workload = plan_work(make_config({"search": search}), units_of(UNITS))
            assert workload.steps is not None
            for more in (1, 2):
                steps = workload.steps + more
                assert 18 * steps + 3 * min(wanted, steps) > amount


@both
@every_kind
def test_nothing_is_done_on_request(kind: str, objective: str) -> None:
    """search.sequences=0: no step, no probe, no choice."""
    for _, workload, _ in workloads(kind, objective, (0,), seconds=None):
        assert workload.sequences == 0
        assert workload.progress(Work()) >= 1 and workload.selection_sequences(Work()) == 0


# Nine changes: a look runs ten masks on 8 windows, and a race four on 16 and two on 16 more: 176. Four finalists on 64
# windows and two on 64 more take 384.
@pytest.mark.parametrize("sequences", [3000, 8192, 20480, 240_000])
def test_the_choice_has_what_six_looks_take(sequences: int) -> None:
    """And not much more; of few sequences three tenths; a tenth where nothing is looked at."""
    wanted = 384 + 6 * 176
    for method, share in (("posterior", min(0.3, wanted / sequences)), ("reinforce", 0.1)):
        workload = plan_work(
            make_config({"search": {"sequences": sequences, "method": method, "refit": False, **PLAIN[method]}}),
            units_of(UNITS),
        )
        choosing = workload.selection_sequences(walk(workload)[0])
        if method == "posterior" and share < 0.3:
            assert wanted <= choosing < wanted + 50
        else:
            assert share * sequences - 150 < choosing <= share * sequences


@pytest.mark.parametrize("sequences", [8192, 20480, "auto"])
def test_a_search_that_settles_leaves_enough_to_look(sequences: int | str) -> None:
    """Three tenths of all that is run at most, and no more than what is left; a given share stays what it is."""
    settled = replace(Work(), settled=True)
    for selection in (None, 0.05):
        given = {"sequences": sequences, "regret": 0.3, "refit": False, "selection": selection}
        workload = plan_work(make_config({"search": given}), units_of(UNITS))
        assert workload.steps is not None
        for steps in (3, workload.steps // 4, workload.steps // 2, workload.steps):
            work = replace(settled, step=steps, sequences=steps * workload.step_sequences)
            choosing = workload.selection_sequences(work)
            if selection is not None:
                assert choosing == workload.selection_sequences(replace(work, settled=False))
            elif steps < workload.steps:
                assert choosing == min(384 + 6 * 176, int(0.3 / 0.7 * work.sequences + 1e-9))
            assert work.sequences + choosing <= workload.sequences


def test_there_is_no_choice_where_repair_chooses() -> None:
    """Unless it is asked for."""
    for given, share in (({}, 0.0), ({"selection": 0.2}, 0.2)):
        workload = plan_work(make_config({"search": {"sequences": 8192, **given}}), units_of(UNITS))
        assert workload.choosing == pytest.approx(share / (1 - share))


def test_auto_spends_several_times_the_default() -> None:
    """Within what was published; with a regret of its own, or the given one; both as the settings say."""
    assert (AUTO_TIMES, AUTO_REGRET) == (8, 0.1)
    for units in (10, UNITS, 10**6):
        workload = plan_work(make_config({"search": {"sequences": "auto"}}), units_of(units))
        assert workload.sequences == min(MOST_SEQUENCES, AUTO_TIMES * default_sequences(units))
        assert workload.regret == AUTO_REGRET
    assert workload.sequences == MOST_SEQUENCES and default_sequences(10) == LEAST_SEQUENCES
    assert plan_work(make_config({"search": {"sequences": "auto", "regret": 0.3}}), units_of(10)).regret == 0.3
    assert plan_work(make_config({"search": {"regret": 0.3}}), units_of(10)).regret == 0.3
    assert plan_work(make_config({}), units_of(10)).regret is None


def test_seconds_are_shared_like_sequences() -> None:
    """The search has what the choice leaves; whichever limit is met first ends it, and says so."""
    workload = plan_work(
        make_config({"search": {"seconds": 100, "sequences": 8192, "selection": 0.25}}), units_of(UNITS)
    )
    assert workload.seconds == 75 and workload.steps is not None
    assert workload.progress(Work(seconds=37.5)) == 0.5
    assert workload.progress(Work(step=workload.steps)) == 1
    assert workload.why_over(Work(step=workload.steps, seconds=80)).startswith("sequences")
    assert workload.why_over(Work(step=3, seconds=80)).startswith("seconds")
    unlimited = plan_work(make_config({"search": {"seconds": 100, "selection": 0.25}}), units_of(UNITS))
    assert unlimited.steps is None and unlimited.progress(Work(step=10**6, seconds=60)) == 0.8
    assert unlimited.selection_sequences(Work(sequences=3001)) == 1000


# Run


def count_rows(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Where the rows of forward passes are noted: those of the search, and those of the choice."""
    original, searching, choosing = Stage.objective, list[int](), list[int]()

    @contextmanager
    def counted(self: Stage, *given: Any) -> Any:
        noted: list[int] = [[], searching, choosing][len(given)]
        with original(self, *given) as objective:
            hook = self.view.decoder.register_forward_pre_hook(
                lambda _, args, kwargs: noted.append(len(kwargs["input_ids"])), with_kwargs=True
            )
            try:
                yield objective
            finally:
                hook.remove()

    monkeypatch.setattr(Stage, "objective", counted)
    return searching, choosing


def searched(place: Place, *given: str) -> dict[str, Any]:
    """What a report says of the search."""
    done = succeed(*place.prune(*given))
    assert done.err == ""
    search: dict[str, Any] = read_json(place.out / "report.json")["search"]
    return search


def check_passes(place: Place, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], steps: int, spent: int) -> None:
    """So many steps, with what is reported and was run besides."""
    searching, choosing = count_rows(monkeypatch)
    search = searched(place, *given)
    assert (search["steps"], search["sequences"]) == (steps, spent)
    assert sum(searching + choosing) == search["sequences"] and search["forward_tokens"] == search["sequences"] * WINDOW


MASKS_AND_REFERENCES = {
    "search.baseline=leave-one-out": 3,
    "search.baseline=none": 3,
    "search.baseline=moving-average": 3,
    "search.baseline=published": 3,
    "search.baseline=matched": 4,
    "search.baseline=matched search.reference=dense": 4,
    "search.baseline=matched search.reference=current": 4,
    "search.baseline=matched search.reference=mean-field": 4,
    "search.baseline=leave-one-out search.sampling=antithetic search.pull=0.1": 3,
    "search.objective=kl": 4,
    "search.objective=kl search.baseline=matched": 5,
    "search.baseline=matched search.masks_per=sequence": 4,
    "search.baseline=matched search.masks_per=chunk search.chunk=8": 4,
}


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("given", MASKS_AND_REFERENCES)
def test_every_pass_is_counted(given: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """search.sequences holds reference and dense passes too, and what is reported is what was run."""
    per_step = 2 * MASKS_AND_REFERENCES[given]
    more = (*METHODS["reinforce"], *given.split(), "search.sequences=45")
    check_passes(place, monkeypatch, more, 45 // per_step, 45 // per_step * per_step)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize(("objective", "dense"), [("cross-entropy", 0), ("kl", 1)])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "reinforce"])
def test_every_pass_of_the_posterior_is_counted(
    method: str, objective: str, dense: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has masks of its own, and whether or not the rounds divide the steps: probes of the selection too."""
    probes, passes = 2 * (1 + dense) * 2, 3 + (method != "posterior-batch") + dense
    steps = (45 - probes) // (2 * passes)
    more = (*METHODS[method], "search.rounds=2", f"search.objective={objective}", "search.sequences=45")
    check_passes(place, monkeypatch, more, steps, 2 * passes * steps + probes)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
@pytest.mark.parametrize("also", [[], ["flap"], ["flap", "magnitude"]], ids=len)
@pytest.mark.parametrize("window", [None, 64])
def test_sequences_of_scoring(inputs: str, also: list[str], window: int | None) -> None:
    """Windows of each score that looks at text, half as long ones as halves; on pruned inputs each runs twice."""
    initial = {"windows": 12, "window": window, "also": also, "inputs": inputs}
    config = make_config({"initial": initial, "data": {"window": 128}})
    looking = 1 + ("flap" in also)
    assert scoring_sequences(config, 5) == looking * 12 * (2 if inputs == "pruned" else 1) * (window or 128) / 128


# Of 400 sequences 240 at most are for the choice: of three masks (of which one leaves) on 3 windows, 8; then looks at
# 15 changes on two windows, each with a heat of four masks on two windows and two on the third, 42; or heats of 14, of
# eight masks on one window, four on the next, two on the third. Dense passes come on top.
CHOICE = ("search.selection=0.6", "search.final_windows=3", "search.sequences=400")
LOOKS = ("search.look_windows=2",)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize(
    ("method", "objective", "more", "heat"),
    [
        ("posterior-chunk", "cross-entropy", LOOKS, 42),
        ("reinforce", "cross-entropy", (), 14),
        ("posterior-batch", "kl", LOOKS, 47),
    ],
)
def test_every_pass_of_the_choice_is_counted(
    method: str, objective: str, more: tuple[str, ...], heat: int, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside search.sequences, and as much of it as there are whole heats."""
    searching, choosing = count_rows(monkeypatch)
    search = searched(place, *METHODS[method], *CHOICE, *more, f"search.objective={objective}")
    spent = search["finals"]["sequences"]
    before = search["sequences"] - spent
    available = min(400 - before, before * 3 // 2)
    assert (sum(searching), sum(choosing)) == (before, spent) and len(search["finals"]["heats"]) >= 2
    assert available - heat < spent <= available


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("method", ["posterior-chunk", "reinforce"])
def test_no_sequences_make_no_pass(method: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric alone is taken as it is."""
    check_passes(place, monkeypatch, (*METHODS[method], "search.sequences=0", "search.selection=0.5"), 0, 0)


@pytest.mark.usefixtures("one_by_one")
def test_a_smallest_run_makes_a_step(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step takes all there is, nothing is looked at and nothing chosen."""
    check_passes(place, monkeypatch, (f"search.sequences={PASSES}", "search.selection=0.5"), 1, PASSES)


@pytest.mark.usefixtures("ticking")
def test_seconds_end_a_search_and_its_choice(place: Place) -> None:
    """Without a number of sequences the choice takes its share of what was run."""
    tiny_text(place.text, 4000)  # enough to keep some back
    given = ("search.sequences=null", "search.seconds=1", "search.selection=0.2", "search.final_windows=2")
    search = searched(place, *given)
    assert search["ended"].startswith("seconds") and search["steps"] == 52, "the first that ends at 0.8 or later"
    spent = search["finals"]["sequences"]
    assert 0 < spent <= 0.2 * search["sequences"] + 1e-6


# Stopping


AUTO = ("search.sequences=auto", "search.rounds=200", "search.checkpoint_steps=3")


def test_auto_stops_once_there_is_little_to_gain(place: Place) -> None:
    """With the first round whose regret is below the limit, which is said; a resumed run stays stopped."""
    tiny_text(place.text, 4000)  # enough to keep some back
    search = searched(place, *AUTO, "search.regret=1e6", "search.selection=0.2", "search.final_windows=2")
    lines = [json.loads(line) for line in (place.out / "metrics.jsonl").read_text().splitlines()]
    assert search["ended"].startswith("settled") and "1e+06 nats" in search["ended"]
    assert [line["step"] for line in lines if "round" in line] == [search["steps"] - 1]
    assert 0 < search["finals"]["sequences"] <= 0.2 * search["sequences"] + 1e-6, "the choice is a share of less, too"
    (place.out / "report.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", None)
        succeed("resume", str(place.out))
    assert read_json(place.out / "report.json")["search"] == search


def test_the_regret_is_that_of_the_last_round(place: Place) -> None:
    """The search ends with the first round that knows enough, and not with one that knows a little less."""
    free = place.folder / "free"
    succeed(*place.prune(*METHODS["posterior-chunk"], out=free))
    lines = [json.loads(line) for line in (free / "metrics.jsonl").read_text().splitlines()]
    regrets = [line["round"]["regret"] for line in lines if "round" in line]
    least = regrets.index(min(regrets))
    search = searched(place, *METHODS["posterior-chunk"], f"search.regret={1.001 * regrets[least]!r}")
    first = next(index for index, regret in enumerate(regrets) if regret < 1.001 * regrets[least])
    assert search["steps"] == 2 * (first + 1) and search["ended"].startswith("settled")


def test_auto_otherwise_spends_all(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be reached does not stop it before its sequences are spent; interrupted, it ends the same."""
    monkeypatch.setattr("bernprune.run.workload.MOST_SEQUENCES", 80)
    given = ("search.sequences=auto", "search.regret=1e-300", "search.rounds=3", "search.checkpoint_steps=3")
    search = searched(place, *given)
    assert search["ended"].startswith("sequences") and search["steps"] == (80 - 3 * PROBE) // PASSES == STEPS + 1
    step = loop._Loop.step

    def interrupted(self: Any, *given: Any) -> Any:
        if self.work.step == 5:
            raise KeyboardInterrupt
        return step(self, *given)

    again = place.folder / "again"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", interrupted)
        assert run(*place.prune(*given, out=again)).code == 130
    succeed("resume", str(again))
    assert steps_of(again) == list(range(STEPS + 1))
    same_run(again, place.out)


@pytest.mark.parametrize("rounds", [None, 1, 7])
def test_as_many_steps_are_planned_as_fit(rounds: int | None) -> None:
    """One more would not; of any limit, at once."""
    step, probe = 8, 2

    def used(steps: int) -> int:
        return steps * step + max(1, min(rounds or steps * 2 // ROUND_WINDOWS, steps)) * probe

    for limit in [*range(10, 400, 13), 10**5 + 7, 10**18]:
        config = make_config({"search": {"sequences": limit, "rounds": rounds, "windows": 2, "masks": 3}})
        steps, planned = _fitting(config, limit, step, probe)
        assert used(steps) <= limit < used(steps + 1)
        assert planned == (used(steps) - steps * step) // probe
