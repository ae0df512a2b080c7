"""The learning benchmark: what is counted, what every method may return, and that no row is run twice.

Everything on a tiny random model, by the very files that a full benchmark runs.
"""

import functools
import io
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from selection_checks import check, selected
from tiny_models import random_tokens, tiny_model
from tiny_run import LAYERS, Place, tiny_text
from tolerances import EXACT, LOGITS, assert_close

from benchmarks.learning import run, show, simulate
from benchmarks.learning.gates import gated
from benchmarks.learning.rivals import METHODS, RIVALS, Method
from benchmarks.learning.rivals.ablations import ABLATIONS
from benchmarks.learning.rivals.bonsai import _candidates, _pair, ridge
from benchmarks.learning.rivals.evopress import Switches
from benchmarks.learning.rivals.gradients import learning_rates
from benchmarks.learning.rivals.ste import prefix
from benchmarks.learning.rivals.taylor import unit_importance
from benchmarks.learning.rows import KEY, SIMULATED, append_row, overlap, read_rows, removed_units
from benchmarks.learning.task import SOURCES, Meter, OverBudget, Source, Task
from bernprune.data import tokenize
from bernprune.errors import BernpruneError, ConfigError, DataError
from bernprune.models.loading import load_tokenizer
from bernprune.models.view import describe
from bernprune.objective import masked_objective, token_losses
from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits
from bernprune.run import finals, pipeline
from bernprune.run.stage import set_stage
from bernprune.seeding import generator
from bernprune.settings import merge
from bernprune.text import load_documents

WINDOW, SPARSITY = 16, 0.3
SEQUENCES, OF_BONSAI = 640, 1760  # the least that its regressions take
CONFIG = {"data": {"window": WINDOW, "eval_tokens": 320}, "initial": {"windows": 8}}
ABLATED = [name for name in METHODS if name not in RIVALS]
OURS = ("default", "reinforce", "paper", "paper-published", *ABLATED)
TRIED = [(name, index) for name, method in METHODS.items() for index in sorted({0, len(method.grid) - 1})]


@pytest.fixture
def source(place: Place) -> Source:
    """A tiny model and two texts."""
    held_out = tiny_text(place.folder / "held-out.txt", 400, seed=9)
    return Source(str(place.model), str(place.text), str(held_out), CONFIG)


def limit_of(name: str) -> int:
    """Of a budget that is large enough for any of its settings."""
    return METHODS[name].sequences or (OF_BONSAI if name == "bonsai" else SEQUENCES)


def task_of(source: Source, *, seed: int = 0, limit: int = SEQUENCES) -> Task:
    return Task(source, Path(source.text).parent, sparsity=SPARSITY, seed=seed, limit=limit)


def random_masks(task: Task, count: int) -> torch.Tensor:
    """Masks ``[K, U]`` on the budget."""
    random = torch.Generator().manual_seed(3)
    scores_KU = torch.rand(count, task.space.size, generator=random, dtype=torch.float64)
    return torch.stack([task.select(scores_U) for scores_U in scores_KU])


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
def test_every_method(name: str, index: int, source: Source) -> None:
    """Within budget and limits; all windows that the model sees are counted; the model is left as it was."""
    method, limit = METHODS[name], limit_of(name)
    task = task_of(source, limit=limit)
    before = {key: value.clone() for key, value in task.view.model.state_dict().items()}
    with rows_run(task) as rows:
        mask_U = method.run(task, method.grid[index])
    assert not any(parameter.requires_grad for parameter in task.view.model.parameters())
    assert all(value.equal(before[key]) for key, value in task.view.model.state_dict().items())
    assert 0 < task.meter.sequences <= limit
    if name in OURS:  # a run of its own, on a model of its own
        assert rows == []
        assert limit - task.meter.sequences < 2 * 128 + 64  # two selections that were not compared, and a step
    elif name == "wanda-sp-in-turn":
        assert sum(rows) == task.meter.sequences == len(task.view.layers) * len(task.stage.initial_windows_WT)
    else:
        assert sum(rows) == task.meter.sequences
    check_mask(name, task, mask_U)


@pytest.mark.parametrize("name", ["default", "reinforce", "paper"])
def test_presets_pay_for_all_that_they_run(name: str, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their run takes its own count to the meter: that is as many windows as its model saw in scoring and searching."""
    rows: dict[str, int] = {"initial_scores": 0, "run_search": 0, "run_finals": 0}
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
    (stage,), layers = stages, LAYERS
    scored = len(stage.initial_windows_WT)
    if name == "paper":  # each layer in a pass that ends with it
        assert rows["initial_scores"] == layers * scored
        scored = math.ceil((layers + 1) / 2 * scored)
    else:
        assert rows["initial_scores"] == scored
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
    masks = {
        name: torch.cat([METHODS[name].run(task_of(unseen, seed=seed), {}) for seed in range(2)]) for name in names
    }
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


# Texts


def test_the_three_texts_share_nothing(source: Source) -> None:
    """Training windows end where the development text begins, and the held-out text is another file."""
    task = task_of(source)
    tokenizer = load_tokenizer(source.model)
    stream, held_out = (
        tokenize(tokenizer, load_documents(text, split="train"), vocab_size=10**6)
        for text in (source.text, source.held_out)
    )
    cut = len(stream) * 9 // 10
    windows_WT = task.text(task.stage.train.num_windows)
    assert sorted(windows_WT.tolist()) == sorted(stream[: cut // WINDOW * WINDOW].view(-1, WINDOW).tolist())
    development = task.stage.eval_windows_WT
    assert development.flatten().equal(stream[cut:][: development.numel()])
    _, protocol = task.report(random_masks(task, 1), held_out=True)
    assert protocol.windows == len(held_out) // WINDOW


def test_reading_goes_on(source: Source) -> None:
    """Where the last reading ended."""
    first, second = task_of(source), task_of(source)
    assert torch.cat([first.text(3), first.text(5)]).equal(second.text(8))


# Gates


@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}], ids=str)
def test_gates_of_0_and_1_are_masks(changes: Any) -> None:
    """The loss under hooks on the plain model is that of the masked objective."""
    model, tokens_BT = tiny_model("llama", **changes), random_tokens(3, 11)
    view = describe(model)
    random = torch.Generator().manual_seed(0)
    masks_KU = torch.rand(4, view.space.size, generator=random) < 0.6
    masks_KU[0, view.space.span("channel", 1)] = False  # a whole branch
    with masked_objective(view) as objective:
        expected_K = objective.losses(masks_KU, tokens_BT)
    with torch.no_grad():
        found = [gated_loss(view, mask_U, tokens_BT).item() for mask_U in masks_KU]
    assert_close(found, expected_K, LOGITS[torch.float64])


def gated_loss(view: Any, gates_U: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    with gated(view, gates_U):
        hidden_BTD = view.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return token_losses(view.model.get_output_embeddings(), hidden_BTD, tokens_BT).mean()


def test_gates_are_differentiable() -> None:
    """Autograd agrees with finite differences, at gates between 0 and 1 too, and no hook stays."""
    view, tokens_BT = describe(tiny_model("llama", num_hidden_layers=2, intermediate_size=5)), random_tokens(2, 6)
    view.model.requires_grad_(False)
    gates_U = torch.rand(view.space.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = functools.partial(gated_loss, view, tokens_BT=tokens_BT)
    # Norms are taken in float32, so finite differences must not be too small.
    assert torch.autograd.gradcheck(loss, gates_U.requires_grad_(), eps=1e-3, atol=2e-3, rtol=1e-3)
    assert not any(module._forward_pre_hooks for module in view.model.modules())


def test_scores_of_a_part_see_the_part(source: Source) -> None:
    """What is removed scores nothing; the first layer's attention does not notice; what lies behind does."""
    task = task_of(source)
    dense_U, mask_U = task.scores(), random_masks(task, 1)[0]
    part_U = task.scores(mask_U=mask_U)
    assert (part_U[~mask_U] == 0).all()
    first, last = task.space.span("kv_group", 0), task.space.span("channel", LAYERS - 1)
    assert part_U[first][mask_U[first]].equal(dense_U[first][mask_U[first]])
    assert (part_U[last][mask_U[last]] != dense_U[last][mask_U[last]]).all()


# Single rivals


@pytest.mark.parametrize("form", ["vector", "element"])
def test_taylor_by_hand(form: str) -> None:
    """One kv group and one channel of a model whose gradients are taken here; and a sum is at most its parts."""
    model, tokens_BT = tiny_model("llama"), random_tokens(21, 9)
    view = describe(model.requires_grad_(False))
    found_U = unit_importance(view, tokens_BT, form)
    model.requires_grad_(True)
    logits = model(input_ids=tokens_BT).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens_BT[:, 1:].flatten()).backward()
    layer, heads = model.model.layers[2], model.config.num_attention_heads // model.config.num_key_value_heads
    width = model.config.head_dim

    def importance(projection: Any, lines: range, axis: int) -> float:
        salience = (projection.weight * projection.weight.grad).detach()
        parts = [salience.select(axis, line) for line in lines]
        return sum(part.sum().abs().item() if form == "vector" else part.abs().sum().item() for part in parts)

    attention, ffn = layer.self_attn, layer.mlp
    queries, keys = range(heads * width, 2 * heads * width), range(width, 2 * width)  # of kv group 1
    group = sum(
        importance(projection, lines, axis)
        for projection, lines, axis in (
            (attention.q_proj, queries, 0),
            (attention.k_proj, keys, 0),
            (attention.v_proj, keys, 0),
            (attention.o_proj, queries, 1),
        )
    )
    channel = sum(
        importance(projection, range(7, 8), axis)
        for projection, axis in ((ffn.gate_proj, 0), (ffn.up_proj, 0), (ffn.down_proj, 1))
    )
    expected = [group, channel]
    places = [view.space.span("kv_group", 2).start + 1, view.space.span("channel", 2).start + 7]
    assert_close(found_U[places], expected, LOGITS[torch.float32])  # norms are taken in float32


def test_ridge_finds_what_is_there() -> None:
    """A noiseless linear loss to within the smallest ridge; noise alone is taken for less than least squares do."""
    random = torch.Generator().manual_seed(0)
    worth_N = torch.randn(7, generator=random, dtype=torch.float64)
    masks_KN = (torch.rand(200, 7, generator=random) < 0.5).double()
    assert (ridge(masks_KN, masks_KN @ worth_N + 5) - worth_N).abs().max() < 1e-3
    noise_K = torch.randn(200, generator=random, dtype=torch.float64)
    least_squares_N = torch.linalg.lstsq(masks_KN - masks_KN.mean(0), noise_K[:, None]).solution
    assert ridge(masks_KN, noise_K).norm() < 0.5 * least_squares_N.norm()


def test_sub_models_come_in_pairs(source: Source) -> None:
    """Of a pair, each candidate is dropped by one alone; the others stay, and no group loses all."""
    task = task_of(source)
    alive_U = random_masks(task, 1)[0]
    groups = list(_candidates(task.groups, task.scores(), alive_U, 0.2))
    at_N = torch.cat([at_G for at_G, _, _ in groups])
    assert alive_U[at_N].all()
    for index in range(5):
        mask_U, complement_U = _pair(alive_U, groups, generator(index, "pair"))
        assert (mask_U[at_N] ^ complement_U[at_N]).all()
        rest_U = alive_U.clone()
        rest_U[at_N] = False
        assert mask_U[rest_U].all()
        assert not mask_U[~alive_U].any()
        assert not complement_U[~alive_U].any()
        assert all((mask_U & complement_U)[units].any() for units in task.groups)


def test_single_candidates_of_several_layers_are_told_apart(source: Source) -> None:
    """Where a sub-model drops one of each kind in each layer, too: no candidate goes with another's in every pair."""
    task = task_of(source)
    alive_U = torch.ones(task.space.size, dtype=torch.bool)
    groups = [(at_G[:1], odds_G[:1], 1) for at_G, odds_G, _ in _candidates(task.groups, task.scores(), alive_U, 0.2)]
    masks_KU = torch.stack([mask for index in range(64) for mask in _pair(alive_U, groups, generator(index, "pair"))])
    masks_KN = masks_KU[:, torch.cat([at_G for at_G, _, _ in groups])].double()
    assert torch.linalg.matrix_rank(masks_KN - masks_KN.mean(0)) == masks_KN.shape[1] > 2


@pytest.mark.parametrize("switch", [{"switch": "levels", "channels": 3}, {"switch": "units", "band": 0.5}], ids=str)
def test_offspring_keep_the_budget(switch: Any, source: Source) -> None:
    """They differ from one another, cost no more than allowed, hardly less, and empty no group."""
    task = task_of(source)
    switches = Switches(task, task.scores(), generator(0, "offspring"))
    parent_U = task.select_by(task.scores(), "layer")
    masks_KU = switches.offspring(parent_U, {**switch, "offspring": 12})
    assert len({tuple(mask_U.tolist()) for mask_U in masks_KU}) == 12
    dearest = task.budget.costs_U.max().item()
    for mask_U in masks_KU:
        spare = (1 - SPARSITY) * task.budget.total - task.budget.alive_cost(mask_U)
        assert -1e-6 <= spare < 4 * dearest
        assert all(mask_U[units].any() for units in task.groups)


def test_a_level_is_of_the_metrics_worst_and_best(source: Source) -> None:
    """Whatever evolves, a group keeps its best units by score."""
    task = task_of(source)
    scores_U = task.scores()
    switches = Switches(task, scores_U, generator(0, "offspring"))
    settings = {"switch": "levels", "channels": 2, "offspring": 12}
    for mask_U in switches.offspring(task.select_by(scores_U, "layer"), settings):
        for units in task.groups:
            kept, removed = scores_U[units][mask_U[units]], scores_U[units][~mask_U[units]]
            assert not len(removed) or kept.min() >= removed.max()


def test_the_prefix_fits(source: Source) -> None:
    """Within the budget but for what a group's last unit costs, in order, and exactly ones and zeros."""
    task = task_of(source)
    priorities_U = torch.rand(task.space.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mask_U = prefix(task, priorities_U)
    assert set(mask_U.tolist()) == {0.0, 1.0}
    best = {int(units[priorities_U[units].argmax()]) for units in task.groups}
    kept = set(mask_U.nonzero().flatten().tolist())
    assert best <= kept
    ordered = priorities_U.argsort(descending=True).tolist()
    limit, cost = (1 - SPARSITY) * task.budget.total, 0.0
    for unit in ordered:
        cost += task.budget.costs_U[unit].item()
        assert (unit in kept) == (cost <= limit or unit in best)


def test_rates_fall_and_add_up(source: Source) -> None:
    """To the travel, whatever the budget; and too small a budget is refused."""
    for limit in (16, 100, 2400):
        rates = learning_rates(task_of(source, limit=limit), {"travel": 0.7, "windows": 16})
        assert len(rates) == limit // 16
        assert rates == sorted(rates, reverse=True)
        assert_close(sum(rates), 0.7, EXACT)
    with pytest.raises(ConfigError, match="15 sequences"):
        learning_rates(task_of(source, limit=15), {"travel": 0.7, "windows": 16})


# Rows


def fake(mask_seed: int) -> Any:
    """A method that runs two windows and keeps what a seed says; it counts its calls."""

    def method(task: Task, settings: Any) -> torch.Tensor:
        calls.append(settings)
        task.losses(random_masks(task, 1), task.text(2))
        scores_U = task.scores("random") if settings.get("poor") else task.scores()
        return task.select_by(scores_U, "layer")

    calls: list[Any] = []
    return method, calls


@pytest.fixture
def bench(source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The command on one tiny source and two fake methods; returns the calls of these."""
    plain, plain_calls = fake(0)
    swept, swept_calls = fake(1)
    monkeypatch.setitem(SOURCES, "tiny", source)
    monkeypatch.setitem(METHODS, "plain", Method(plain))
    monkeypatch.setitem(METHODS, "swept", Method(swept, ({"poor": True}, {"poor": False})))

    def command(*more: str) -> tuple[list[Any], list[Any]]:
        plain_calls.clear()
        swept_calls.clear()
        run.main(["--folder", str(tmp_path), "--model", "tiny", "--sequences", "500", *more])
        return plain_calls, swept_calls

    return command


def test_rows_are_not_run_twice(bench: Any, tmp_path: Path) -> None:
    """A second time only what is missing is run, and the files keep what they had."""
    assert len(bench("--method", "plain", "--sparsity", "0.3", "--seed", "0,1")[0]) == 2
    before = (tmp_path / "results.jsonl").read_text()
    assert bench("--method", "plain", "--sparsity", "0.3", "--seed", "0,1")[0] == []
    assert (tmp_path / "results.jsonl").read_text() == before
    assert len(bench("--method", "plain", "--sparsity", "0.3,0.5", "--seed", "1,2")[0]) == 3
    assert (tmp_path / "results.jsonl").read_text().startswith(before)
    assert len(read_rows(tmp_path / "results.jsonl")) == 5


def test_rows_on_another_text_are_refused(bench: Any, tmp_path: Path) -> None:
    """Losses on what other packages say are no rows of the same benchmark; the file stays as it was."""
    bench("--method", "plain", "--sparsity", "0.3", "--seed", "0")
    (row,) = read_rows(tmp_path / "results.jsonl")
    append_row(tmp_path / "results.jsonl", row | {"model": "other", "protocol": row["protocol"] | {"text_sha256": "x"}})
    bench("--method", "plain", "--sparsity", "0.3", "--seed", "1")  # that is another model's
    append_row(tmp_path / "results.jsonl", row | {"seed": 7, "protocol": row["protocol"] | {"text_sha256": "y"}})
    before = (tmp_path / "results.jsonl").read_text()
    text = row["protocol"]["text_sha256"]
    with pytest.raises(DataError, match=f"the held-out text of tiny is {text} here, but .* taken on y; install what"):
        bench("--method", "plain", "--sparsity", "0.3", "--seed", "2")
    assert (tmp_path / "results.jsonl").read_text() == before


def test_the_sweep_decides(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By development text alone, once; the row says which settings."""
    assert [run.sweep_budget(sequences) for sequences in (500, 8192, 163_840)] == [500, 4096, 32_768]
    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.learning.task._held_out", lambda *_: pytest.fail("held-out text was touched"))
        bench("--method", "swept", "--sparsity", "0.3", "--seed", "0", "--development")
    swept = read_rows(tmp_path / "sweeps.jsonl")
    assert [(row["sequences"], row["seed"]) for row in swept] == [(500, 100), (500, 100), (500, 0)]
    assert swept[0]["loss"] != swept[1]["loss"]
    best = min(swept[:2], key=lambda row: row["loss"])["settings"]
    assert bench("--method", "swept", "--sparsity", "0.3", "--seed", "0")[1] == [best]
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row["settings"] == best
    assert row["protocol"]["text"] == "held-out"
    assert row["used"] == 10


def test_settings_that_are_too_dear_are_not_tried(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The best of the others is taken; if there is none, the method is left out with a sentence."""

    def dear(task: Task, settings: Any) -> torch.Tensor:
        if task.meter.left < settings["least"]:
            raise ConfigError("too few")
        return task.uniform_mask()

    monkeypatch.setitem(METHODS, "dear", Method(dear, ({"least": 400}, {"least": 501})))
    monkeypatch.setitem(METHODS, "dearest", Method(dear, ({"least": 600}, {"least": 501})))
    monkeypatch.setitem(METHODS, "greedy", Method(lambda task, *_: task.losses(random_masks(task, 1), task.text(501))))
    bench("--method", "dearest,greedy,default,dear", "--sparsity", "0.3", "--seed", "0", "--sequences", "500,20")
    said = capsys.readouterr().out
    assert "dearest with 500 sequences is skipped: none of the settings" in said
    assert "greedy with 500 sequences is skipped: 501 more windows" in said
    assert "default with 20 sequences is skipped: setting 'search.sequences'" in said
    rows = [(row["method"], row["sequences"]) for row in read_rows(tmp_path / "results.jsonl")]
    assert rows == [("default", 500), ("dear", 500)]
    assert len(read_rows(tmp_path / "sweeps.jsonl")) == 1


def test_a_row_tells_all(bench: Any, source: Source, tmp_path: Path) -> None:
    """Losses as the task itself finds them, and a mask that can be read back."""
    bench("--method", "plain", "--sparsity", "0.3", "--seed", "4")
    (row,) = read_rows(tmp_path / "results.jsonl")
    task = task_of(source, seed=4)
    mask_U = task.uniform_mask()
    (dense, loss), protocol = task.report(torch.stack([torch.ones_like(mask_U), mask_U]), held_out=True)
    assert (row["dense_loss"], row["uniform_loss"], row["loss"]) == (dense, loss, loss)
    assert row["perplexity"] == pytest.approx(math.exp(loss))
    assert row["protocol"] == protocol.to_dict()
    assert row["removed"] == removed_units(mask_U)
    assert row["reached"] == pytest.approx(task.budget.removed_share(mask_U))


def test_a_missing_folder_is_skipped_with_a_sentence(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And the rest goes on."""
    monkeypatch.setitem(SOURCES, "absent", Source("embedded", str(tmp_path / "none.jsonl"), "embedded"))
    bench("--method", "plain", "--sparsity", "0.3", "--seed", "0", "--model", "absent,tiny")
    assert f"absent is skipped: {tmp_path / 'none.jsonl'} does not exist" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "results.jsonl")) == 1


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With the known ones."""
    with pytest.raises(SystemExit):
        run.main(["--method", "lottery"])
    assert "'lottery' is unknown; known are default, reinforce" in capsys.readouterr().err


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    """By its line, rather than run over."""
    path = tmp_path / "results.jsonl"
    append_row(path, dict.fromkeys(KEY, 0))
    path.write_text(path.read_text() + '{"model": "tiny"}\n')
    with pytest.raises(DataError, match=r"results.jsonl, line 2, is not a row"):
        read_rows(path)


def test_overlap_is_of_what_is_removed() -> None:
    """1 for equal masks, 0 for disjoint ones, else shared over either."""
    masks = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 0]]).bool()
    first, second, third = map(removed_units, masks)
    assert overlap(first, first) == 1
    assert overlap(first, third) == 0
    assert overlap(first, second) == pytest.approx(1 / 3)
    assert first["sha256"] != second["sha256"]
    assert (first["count"], first["of"]) == (2, 5)


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
    """Nor is a table made of nothing."""
    with pytest.raises(DataError, match="no rows yet"):
        show.main(["--folder", str(tmp_path)])
    other = made_row("worse", 0, 2.5)["protocol"] | {"window": 32}
    for row in (made_row("better", 0, 2.0), made_row("worse", 0, 2.5, protocol=other)):
        append_row(tmp_path / "results.jsonl", row)
    with pytest.raises(BernpruneError, match=r"tiny at sparsity 0.3 .* 2 protocols"):
        show.main(["--folder", str(tmp_path)])


def test_names_do_not_cover_each_other() -> None:
    """Those of lines that end nearby stand above one another, in the order of their losses; far ones stay level."""
    axes = Figure().subplots()
    axes.set(xscale="log", xlim=(100, 1e6), ylim=(0, 36))  # a line of text is one high
    ends = [("second", 1e4, 5.1), ("first", 1.5e4, 5.0), ("third", 2e4, 5.2), ("far", 1e6, 5.1), ("above", 1e4, 20.0)]
    show._name(axes, ends, dict.fromkeys(["first", "second", "third", "far", "above"], "black"))
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    assert heights == pytest.approx({"first": 5.0, "second": 6.0, "third": 7.0, "far": 5.1, "above": 20.0})


def test_the_whole_benchmark_names_what_is_run_on_each_model() -> None:
    """Every rival at every sparsity on both, the dearest part on one of them."""
    given = Namespace(method=None, sparsity=None, sequences=None)
    stories, embedded = (list(run._jobs(given, model)) for model in ("stories", "embedded"))
    for jobs, usual in ((stories, 20_480), (embedded, 8_192)):
        assert {(name, sparsity, usual) for name in RIVALS for sparsity in (0.2, 0.3, 0.5)} <= set(jobs)
        assert ("default", 0.5, 3 * usual) in jobs and len(jobs) == len(set(jobs))
    assert ("default", 0.3, 163_840) in stories and set(ABLATED) <= {name for name, *_ in stories}
    assert not set(ABLATED) & {name for name, *_ in embedded}


# The surrogate of large models


def test_the_surrogate_is_on_its_scale() -> None:
    """The score's own selection costs what it should and recovers nothing, the best there is costs less."""
    surrogate = simulate.Surrogate(simulate.make_space(700), seed=3)
    start_U = simulate.uniform_selection(surrogate.space, surrogate.scores_U)
    assert surrogate.excess(torch.ones_like(start_U)) == 0
    assert surrogate.excess(start_U) == pytest.approx(simulate.START_EXCESS)
    assert surrogate.recovered(start_U) == pytest.approx(0)
    assert surrogate.best < 0.8 * surrogate.start


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
    mean = (rows[2]["recovered"][-1] + rows[3]["recovered"][-1]) / 2
    assert f"| 352 | 2,112 | {mean:.2f} (2) |" in (tmp_path / "table.md").read_text()


def test_a_short_search_is_looked_at_after_each_step(tmp_path: Path) -> None:
    """No look is counted that was not taken."""
    row = simulate.run("default", 352, 3 * 64 + 8, seed=0)
    assert row["used"] == [64, 128] and len(row["recovered"]) == 2
