"""The methods of the learning benchmark: what is counted, and what every one of them may return.

Everything on a tiny random model, by the very files that a full benchmark runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_tasks import CONFIG, SEQUENCES, SPARSITY, random_masks, source_of, task_of
from selection_checks import check, selected
from tiny_run import Place

from benchmarks.learning.rivals import METHODS, RIVALS
from benchmarks.learning.rivals.ablations import ABLATIONS
from benchmarks.learning.rivals.blockpruner import blockpruner
from benchmarks.learning.task import Meter, OverBudget, Source, Task
from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits
from bernprune.run import finals, pipeline
from bernprune.run.stage import set_stage
from bernprune.settings import merge

OF_BONSAI = 1760  # sequences, the least that its regressions take
ABLATED = [name for name in METHODS if name not in RIVALS]
OURS = ("default", "default-auto", "reinforce", "reinforce-pulled", "paper", "paper-published", *ABLATED)
TRIED = [(name, index) for name, method in METHODS.items() for index in sorted({0, len(method.grid) - 1})]


@pytest.fixture
def source(place: Place) -> Source:
    return source_of(place)


def limit_of(name: str) -> int:
    """Of a budget that is large enough for any of its settings."""
    return METHODS[name].sequences or (OF_BONSAI if name == "bonsai" else SEQUENCES)


# Counting


def test_the_meter_counts_and_refuses() -> None:
    """What it refuses is not counted; gradients cost two passes more and do not use up the limit."""
    meter = Meter(10)
    meter.spend(4)
    meter.spend(3, backward=True)
    with pytest.raises(OverBudget, match=r"4 more .* 3 of 10"):
        meter.spend(4)
    meter.spend(3)
    assert (meter.sequences, meter.backward, meter.equivalent, meter.left) == (10, 3, 16, 0)


def test_nothing_is_run_beyond_the_limit(source: Source) -> None:
    """Each way to run windows is refused before the model sees them."""
    task = task_of(source, limit=5)
    masks_KU, gates_U = random_masks(task, 2), torch.ones(task.space.size)
    ways = [
        lambda: task.losses(masks_KU, task.text(3)),
        lambda: task.gated_loss(gates_U, task.text(6)),
        lambda: task.scores(),
    ]
    with rows_run(task) as rows:
        for way in ways:
            with pytest.raises(OverBudget):
                way()
    assert rows == []


@contextmanager
def rows_run(task: Task) -> Iterator[list[int]]:
    """The number of windows of every forward pass of the task's model."""
    rows: list[int] = []
    hook = task.view.decoder.register_forward_pre_hook(
        lambda module, inputs, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    yield rows
    hook.remove()


@pytest.mark.parametrize(("name", "index"), TRIED)
def test_every_method(name: str, index: int, source: Source, request: pytest.FixtureRequest) -> None:
    """Within budget and limits; all windows that the model sees are counted; the model is left as it was."""
    method, limit = METHODS[name], limit_of(name)
    if name not in OURS:
        request.getfixturevalue("one_by_one")  # so that they can be counted
    task = task_of(source, limit=limit)
    before = {key: value.clone() for key, value in task.view.model.state_dict().items()}
    with rows_run(task) as rows:
        mask_U = method.run(task, method.grid[index])
    assert not any(parameter.requires_grad for parameter in task.view.model.parameters())
    assert all(value.equal(before[key]) for key, value in task.view.model.state_dict().items())
    assert 0 < task.meter.sequences <= limit
    if name in OURS:  # a run of its own, on a model of its own
        assert rows == []
        settled = name == "default-auto"
        assert settled or limit - task.meter.sequences < 2 * 128 + 64  # two selections not compared, and a step
    elif name == "wanda-sp-in-turn":
        assert sum(rows) == len(task.stage.initial_windows_WT) == task.meter.sequences / 2  # layers run again
    elif name.split("-")[0] in ("magnitude", "random"):  # which are charged for text that they do not look at
        assert rows == []
    else:
        assert sum(rows) == task.meter.sequences
    check_mask(name, task, mask_U)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("name", ["default", "reinforce", "paper"])
def test_presets_pay_for_all_that_they_run(name: str, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their run takes its own count to the meter: that is as many windows as its model saw in scoring and searching."""
    rows: dict[str, int] = {"take_start": 0, "run_search": 0, "run_finals": 0}
    running, stages = [], []

    def counted(part: str) -> Any:
        function = getattr(pipeline, part)

        def call(*given: Any, **named: Any) -> Any:
            running.append(part)
            try:
                return function(*given, **named)
            finally:
                running.pop()

        return call

    def watched(*given: Any) -> Any:
        stage = set_stage(*given)

        def count(module: Any, inputs: Any, named: Any) -> None:
            if running:
                rows[running[-1]] += len(named["input_ids"])

        stage.view.decoder.register_forward_pre_hook(count, with_kwargs=True)
        stages.append(stage)
        return stage

    for part in rows:
        monkeypatch.setattr(pipeline, part, counted(part))
    monkeypatch.setattr(pipeline, "set_stage", watched)
    task = task_of(source)
    METHODS[name].run(task, METHODS[name].grid[0])
    (stage,) = stages
    scored = len(stage.initial_windows_WT)
    assert rows["take_start"] == scored
    if name == "paper":  # each layer runs once more, pruned
        scored *= 2
    assert (rows["run_finals"] > 0) == (name != "paper") and rows["run_search"] > 0
    assert task.meter.sequences == scored + rows["run_search"] + rows["run_finals"]


def check_mask(name: str, task: Task, mask_U: torch.Tensor) -> None:
    """Under the budget and the limits that the method has."""
    if name == "blockpruner":
        unit = task.budget.costs_U.max().item() / task.budget.total
        assert SPARSITY <= task.budget.removed_share(mask_U) < SPARSITY + unit
        groups = list(selected(task.space, mask_U))
        assert sum(len(found.kept) not in (0, len(found.units)) for found in groups) <= 1  # the last block
        assert groups[0].kept  # attention of the first layer
    elif name.startswith("paper"):
        check(mask_U, Budget(task.space, SPARSITY, pools="separate"), Limits(0, 0))
    else:
        check(mask_U, task.budget, task.limits)


@pytest.mark.parametrize("sparsity", [0.15, 0.25, 0.4])
def test_of_the_last_block_as_much_comes_back_as_fits(sparsity: float, source: Source) -> None:
    """Its best units; at these sparsities whole blocks would miss the budget by more than one."""
    task = Task(source, Path(source.text).parent, sparsity=sparsity, seed=0, limit=2000)
    mask_U, scores_U = blockpruner(task, {"windows": 4}), task.scores()
    unit = task.budget.costs_U.max().item() / task.budget.total
    assert sparsity <= task.budget.removed_share(mask_U) < sparsity + unit
    (last,) = [units for units in task.groups if 0 < mask_U[units].sum() < len(units)]
    assert scores_U[last[mask_U[last]]].min() >= scores_U[last[~mask_U[last]]].max()


SEARCHES = ["random", "bonsai", "evopress", "evopress-units", "ste", "l0", "default"]


@pytest.mark.parametrize("name", SEARCHES)
def test_equal_seeds_give_equal_masks(name: str, source: Source) -> None:
    """And others do not, or nothing would be random."""
    method = METHODS[name]
    limit = limit_of(name)
    masks = [method.run(task_of(source, seed=seed, limit=limit), method.grid[0]) for seed in (0, 0, 1)]
    assert masks[0].equal(masks[1])
    assert not masks[0].equal(masks[2])


def test_every_ingredient_is_missed(source: Source) -> None:
    """Where the search itself is changed, other units are learned; those of a random model would not win in the end."""
    learning = {"data": {"window": 64}, "search": {"selection": 0.0, "rounds": 4}}  # two chunks a window
    unseen = replace(source, config=merge(CONFIG, learning))
    learned = [name for name, ablation in ABLATIONS.items() if not ablation.given and name != "looks"]
    names = ["default", *(f"without-{name}" for name in learned)]
    masks = {name: METHODS[name].run(task_of(unseen), {}) for name in names}
    assert [name for name in names if masks[name].equal(masks["default"])] == ["default"]


@pytest.mark.parametrize(("name", "looked"), [("default", True), ("without-looks", False)])
def test_looks_are_missed(name: str, looked: bool, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them the final choice goes on by random challengers."""
    seen, original = list[str](), {part: getattr(finals, part) for part in ("moves", "challengers")}

    def noting(part: str) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            seen.append(part)
            return original[part](*given)

        return noted

    for part in original:
        monkeypatch.setattr(finals, part, noting(part))
    choosing = replace(source, config=merge(CONFIG, {"search": {"selection": 0.6, "final_windows": 4}}))
    METHODS[name].run(task_of(choosing), {})
    assert set(seen) == {"moves" if looked else "challengers"}
