"""Plans for other sparsities: on their budgets, nested on request, the same whoever writes them."""

import errno
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from selection_checks import check, check_group, minimum_of, pool_limits, selected, step_of
from spaces import FLAT, SPACES, alive_by_hand, make_space, random_numbers
from tiny_run import METHODS, WINDOW, Place, finish, read_json, run, succeed
from tolerances import EXACT, assert_close

from bernprune.config import RunConfig, make_config
from bernprune.errors import BudgetError
from bernprune.objective import MaskedObjective
from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits, select
from bernprune.report import table
from bernprune.run import plans
from bernprune.run.plans import Learned, read_plan, removed_share
from bernprune.units import UnitSpace

# What may be selected

SPARSITIES = tuple(round(0.15 + 0.01 * step, 2) for step in range(31))  # half to one and a half of 0.3
LIMITS: dict[str, dict[str, int]] = {
    "free": {"min_kv_groups": 0, "min_channels": 0},
    "usual": {},
    "tight": {"min_channels": 3, "channel_multiple": 2},
}
# A layer may stay neither without its kv groups nor without its channels.
WHOLE_LAYERS = make_space(("layer", "kv_group", "channel"), [(2, 5), (3, 7), (2, 4)])
LEARNED = {
    "whole_layers": (WHOLE_LAYERS, "joint"),
    **{name: (space, "joint") for name, space in SPACES.items()},
    "separate": (FLAT, "separate"),
}
limited = pytest.mark.parametrize("given", LIMITS.values(), ids=LIMITS)
learnable = pytest.mark.parametrize(("space", "pools"), LEARNED.values(), ids=LEARNED)


def learn(space: UnitSpace, given: dict[str, Any], *, seed: int = 1) -> tuple[Learned, RunConfig, Limits]:
    """Random priorities, many of them equal, and a mask at 30 % that a heat has changed."""
    config = make_config({"budget": {"sparsity": 0.3, **given}})
    limits = Limits(config.budget.min_kv_groups, config.budget.min_channels, config.budget.channel_multiple)
    priorities_U = (6 * random_numbers(space.size, seed)).round()
    changed_U = torch.where(random_numbers(space.size, seed + 1) < 0.2, priorities_U.flip(0), priorities_U)
    mask_U = select(changed_U, budget_at(space, 0.3, config), limits=limits)
    return Learned(space, priorities_U, random_numbers(space.size, seed + 2), mask_U), config, limits


def budget_at(space: UnitSpace, sparsity: float, config: RunConfig) -> Budget:
    return Budget(space, sparsity, measure=config.budget.measure, pools=config.budget.pools)


@limited
@learnable
def test_every_plan_is_a_selection(space: UnitSpace, pools: str, given: dict[str, Any]) -> None:
    """By the priorities, then the scores; at the run's own sparsity, what the run keeps."""
    learned, config, limits = learn(space, {**given, "pools": pools})
    for sparsity in SPARSITIES:
        mask_U, budget = learned.select(config, sparsity), budget_at(space, sparsity, config)
        check(mask_U, budget, limits)
        if sparsity == 0.3:
            assert torch.equal(mask_U, learned.mask_U)
        else:
            wanted_U = select(learned.priorities_U, budget, limits=limits, tie_break_U=learned.scores_U)
            assert torch.equal(mask_U, wanted_U)


@limited
@learnable
def test_nested_plans_are_a_chain(space: UnitSpace, pools: str, given: dict[str, Any]) -> None:
    """What is kept at a higher sparsity is part of what is kept at any lower one; budgets and limits hold."""
    for seed in (1, 11, 21):
        learned, config, limits = learn(space, {**given, "pools": pools}, seed=seed)
        chain = [learned.select(config, sparsity, nested=True) for sparsity in SPARSITIES]
        assert torch.equal(chain[SPARSITIES.index(0.3)], learned.mask_U)
        for larger_U, smaller_U in itertools.pairwise(chain):
            assert not (smaller_U & ~larger_U).any()
        assert chain[0].sum() >= learned.mask_U.sum() >= chain[-1].sum() and chain[0].sum() > chain[-1].sum()
        for sparsity, mask_U in zip(SPARSITIES, chain, strict=True):
            check_nested(mask_U, budget_at(space, sparsity, config), limits)


def check_nested(mask_U: torch.Tensor, budget: Budget, limits: Limits) -> None:
    """Limits hold; of each pool less is left than what is kept or cut in one piece."""
    space = budget.space
    assert alive_by_hand(space, mask_U.tolist()) == mask_U.tolist()
    pieces = []
    for found in selected(space, mask_U):
        check_group(found, limits)
        minimum, step = minimum_of(found.group, limits), step_of(found.group, limits)
        pieces.append(max(minimum, step) * found.group.parameters)
    for members_U, limit in pool_limits(budget):
        kept_cost = budget.costs_U[members_U & mask_U].sum().item()
        assert kept_cost <= limit * (1 + 1e-12)
        if not space.nested:
            assert kept_cost > limit - max(pieces)


@pytest.mark.parametrize("pools", ["joint", "separate"])
def test_nested_plans_go_by_the_priorities(pools: str) -> None:
    """Of a group, the best of what the run keeps go last, and the best of the others come first."""
    space = FLAT
    learned, config, _ = learn(space, {"pools": pools})
    for sparsity in (0.2, 0.42):
        mask_U = learned.select(config, sparsity, nested=True)
        among_U = learned.mask_U if sparsity > 0.3 else ~learned.mask_U
        pairs = 0
        for found in selected(space, mask_U):
            units = [unit for unit in found.units if among_U[unit]]
            kept = [learned.priorities_U[unit].item() for unit in units if mask_U[unit]]
            cut = [learned.priorities_U[unit].item() for unit in units if not mask_U[unit]]
            assert min(kept, default=math.inf) >= max(cut, default=-math.inf)
            pairs += bool(kept and cut)
        assert pairs


def test_what_a_run_has_not_explored_is_refused() -> None:
    """Just inside its range it is not."""
    learned, config, _ = learn(FLAT, {})
    for sparsity in (0.15, 0.45):
        learned.select(config, sparsity)
    for sparsity in (0.1499, 0.4501, 0.0, 1.0, -0.3, math.nan, math.inf):
        with pytest.raises(BudgetError, match=r"outside what a run at 0\.3 explores, 0\.15 to 0\.45"):
            learned.select(config, sparsity)


def test_passing_over_is_what_breaks_a_chain() -> None:
    """A selection that passes over what no longer fits is fuller, but not always part of a larger one."""
    learned, config, limits = learn(FLAT, {})
    masks = [
        select(learned.priorities_U, budget_at(FLAT, sparsity, config), limits=limits, tie_break_U=learned.scores_U)
        for sparsity in SPARSITIES
    ]
    assert any((smaller & ~larger).any() for larger, smaller in itertools.pairwise(masks))


def test_what_was_learned_is_read_back(tmp_path: Path) -> None:
    """All of it, to the bit."""
    learned, config, _ = learn(FLAT, {})
    learned.write(tmp_path / "learned")
    read = Learned.read(tmp_path / "learned")
    assert read.space.fingerprint == FLAT.fingerprint and read.mask_U.dtype == torch.bool
    for name in ("priorities_U", "scores_U", "mask_U"):
        assert torch.equal(getattr(read, name), getattr(learned, name))
    assert torch.equal(read.select(config, 0.2), learned.select(config, 0.2))


# Of a run

RUN = (*METHODS["posterior-chunk"], "search.sequences=150", "search.selection=0.4", "search.final_windows=3")


@pytest.fixture(scope="module")
def planned(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at 30 % with plans for two other sparsities."""
    return finish(prepared, tmp_path_factory.mktemp("planned"), *RUN, "plans.sparsities=[0.4, 0.2]")


def copy_of(planned: Path, place: Place) -> Path:
    """The run's files that select needs, without its plans."""
    place.out.mkdir(parents=True)
    for name in ("config.yaml", "learned.safetensors"):
        (place.out / name).write_bytes((planned / name).read_bytes())
    return place.out


def test_a_run_writes_its_plans(planned: Path) -> None:
    """In the report, in order, each with a file; as a table in Markdown, and on the screen."""
    report = read_json(planned / "report.json")
    assert [row["sparsity"] for row in report["plans"]] == [0.2, 0.4]
    assert {path.name for path in (planned / "plans").iterdir()} == {"0.2.json", "0.4.json", "table.md"}
    lines = (planned / "plans" / "table.md").read_text().splitlines()
    shown = [line.split() for line in table(report).splitlines()]
    prunable = report["parameters"]["prunable"]
    for row, line in zip(report["plans"], lines[2:4], strict=True):
        assert row["plan"] == f"{row['sparsity']:g}.json" and row["perplexity"] == math.exp(row["loss"])
        assert 0 <= row["removed"] - row["sparsity"] < 3 * 36 / prunable, "within one channel"
        cells = [f"{row['sparsity']:g}", f"{row['removed']:.2%}", f"{row['perplexity']:.3f}", f"`{row['plan']}`"]
        assert line == f"| {' | '.join(cells)} |"
        assert ["plan", f"{row['sparsity']:g}", f"{row['perplexity']:.3f}"] in shown
    assert "20 windows of 16 tokens" in lines[-1] and report["protocol"]["text"] in lines[-1]


@pytest.mark.parametrize("sparsity", ["0.2", "0.4"])
def test_a_plan_is_worth_what_is_said(sparsity: str, planned: Path, place: Place) -> None:
    """Applied to a copy of the model it gives the perplexity and the size of the report."""
    report = read_json(planned / "report.json")
    (row,) = [row for row in report["plans"] if row["sparsity"] == float(sparsity)]
    assert succeed("apply", str(planned / "plans" / f"{sparsity}.json"), str(place.model), "applied").err == ""
    text = str(planned.parent / "held-out.txt")
    done = succeed("evaluate", "applied", "--text", text, "--window", str(WINDOW), "--tokens", "320", "--json")
    result = json.loads(done.out)
    assert result["perplexity"] == pytest.approx(row["perplexity"], rel=1e-5)
    assert report["parameters"]["dense"] - result["parameters"] == round(
        row["removed"] * report["parameters"]["prunable"]
    )


def test_select_writes_what_the_run_wrote(planned: Path, place: Place) -> None:
    """To the byte, however often; and at the run's own sparsity what the run keeps. Nothing else is touched."""
    out = copy_of(planned, place)
    for _ in range(2):
        for sparsity in ("0.2", "0.3", "0.4"):
            assert succeed("select", str(out), "--sparsity", sparsity).err == ""
        for sparsity in ("0.2", "0.4"):
            assert (out / "plans" / f"{sparsity}.json").read_bytes() == (
                planned / "plans" / f"{sparsity}.json"
            ).read_bytes()
        assert (out / "plans" / "0.3.json").read_bytes() == (planned / "plan.json").read_bytes()
    assert {path.name for path in out.iterdir()} == {"config.yaml", "learned.safetensors", "plans"}


def test_select_says_what_is_kept(planned: Path, place: Place) -> None:
    """By layer, with the share that goes, and the command that cuts a model by it."""
    out = copy_of(planned, place)
    lines = succeed("select", str(out), "--sparsity", "0.4").out.splitlines()
    plan, report = read_plan(out / "plans" / "0.4.json"), read_json(planned / "report.json")
    for layer, (line, kept) in enumerate(zip(lines[1:4], plan.layers, strict=True)):
        assert line.split() == [str(layer), str(len(kept.kv_groups)), "of", "3", str(len(kept.channels)), "of", "19"]
    assert f"{report['plans'][1]['removed']:.2%} of the prunable" in lines[5]
    assert f"bernprune apply {out / 'plans' / '0.4.json'} MODEL OUT" in lines[6]


def test_a_nested_plan_has_a_file_of_its_own(planned: Path, place: Place) -> None:
    """Whichever comes last, the other is what it was."""
    out = copy_of(planned, place)
    succeed("select", str(out), "--sparsity", "0.4")
    before = (out / "plans" / "0.4.json").read_bytes()
    succeed("select", str(out), "--sparsity", "0.4", "--nested")
    assert {path.name for path in (out / "plans").iterdir()} == {"0.4.json", "0.4-nested.json"}
    assert (out / "plans" / "0.4.json").read_bytes() == before


def test_a_plan_without_a_loss_is_no_reason_to_fail(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no figure, and the run, its own plan and the others have theirs."""

    def broken(self: MaskedObjective, masks_KU: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        losses_K = losses(self, masks_KU, tokens_BT)
        share = removed_share(self._view.space, masks_KU[0]) if len(masks_KU) == 1 else 0
        return losses_K * math.nan if share > 0.39 else losses_K

    losses = MaskedObjective.losses
    monkeypatch.setattr(MaskedObjective, "losses", broken)
    done = succeed(*place.prune(*RUN, "plans.sparsities=[0.4, 0.2]"))
    assert "the loss at sparsity 0.4 on the evaluation text is nan" in done.err
    report = read_json(place.out / "report.json")
    assert [row["loss"] is None for row in report["plans"]] == [False, True]
    assert ["plan", "0.4", "not", "finite"] in [line.split() for line in done.out.splitlines()]
    assert "| not finite | `0.4.json` |" in (place.out / "plans" / "table.md").read_text()
    assert (place.out / "plans" / "0.4.json").is_file() and (place.out / "plan.json").is_file()


def test_other_states_are_not_what_was_learned(planned: Path, place: Place) -> None:
    """Whole files, but of something else."""
    out = copy_of(planned, place)
    (out / "learned.safetensors").write_bytes((planned / "initial.safetensors").read_bytes())
    done = run("select", str(out), "--sparsity", "0.4")
    assert done.code == 2 and "learned.safetensors does not say what a run has learned" in done.err


def test_a_disk_full_while_selecting(planned: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind, not even a folder; plans that are there stay."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = copy_of(planned, place)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "write_json", full)
        assert "No space left" in run("select", str(out), "--sparsity", "0.4").err
        assert not (out / "plans").exists()
    succeed("select", str(out), "--sparsity", "0.2")
    monkeypatch.setattr(plans, "write_json", full)
    assert "No space left" in run("select", str(out), "--sparsity", "0.4").err
    assert [path.name for path in (out / "plans").iterdir()] == ["0.2.json"]


def kept_by(path: Path) -> set[tuple[int, str, int]]:
    """All that a plan keeps."""
    return {
        (index, kind, unit)
        for index, layer in enumerate(read_plan(path).layers)
        for kind, units in (("kv_group", layer.kv_groups), ("channel", layer.channels))
        for unit in units
    }


@pytest.mark.parametrize("more", [(), ("budget.channel_multiple=4",)], ids=["plain", "multiples"])
def test_nested_plans_of_a_run(more: tuple[str, ...], planned: Path, place: Place) -> None:
    """plans.nested and select --nested give the same plans, each of them part of the one before."""
    given = ("plans.nested=true", "plans.sparsities=[0.45, 0.25, 0.35]", *RUN, *more)
    succeed(*place.prune(*given), "--eval-text", str(planned.parent / "held-out.txt"))
    sparsities = ("0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.45")
    written = {name: (place.out / "plans" / f"{name}-nested.json").read_bytes() for name in ("0.25", "0.35", "0.45")}
    for sparsity in sparsities:
        succeed("select", str(place.out), "--sparsity", sparsity, "--nested")
    for name, data in written.items():
        assert (place.out / "plans" / f"{name}-nested.json").read_bytes() == data
    kept = [kept_by(place.out / "plans" / f"{sparsity}-nested.json") for sparsity in sparsities]
    assert kept[3] == kept_by(place.out / "plan.json")
    assert all(smaller <= larger for larger, smaller in itertools.pairwise(kept))
    assert kept[0] > kept[3] > kept[-1]
    removed = [row["removed"] for row in read_json(place.out / "report.json")["plans"]]
    assert all(share >= sparsity - EXACT for share, sparsity in zip(removed, (0.25, 0.35, 0.45), strict=True))


def test_a_fresh_run_forgets_the_plans_before(planned: Path, place: Place) -> None:
    """--overwrite removes them with all that was learned."""
    out = copy_of(planned, place)
    succeed("select", str(out), "--sparsity", "0.25")
    succeed(*place.prune("search.sequences=0"), "--overwrite")
    assert not (out / "plans").exists()
    learned = Learned.read(out / "learned.safetensors")
    falls_U = learned.priorities_U / (1 - learned.priorities_U)
    assert_close(-torch.expm1(-falls_U).mean(), 0.5, EXACT)  # ranks, as graded has them: nothing was learned
