"""Plans for other sparsities from what one run has learned, without another search."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bernprune.config import RunConfig
from bernprune.errors import BudgetError, ModelError, RunError
from bernprune.evaluation.perplexity import Protocol
from bernprune.names import CapName
from bernprune.policy.selection import select
from bernprune.report import shown
from bernprune.run.checkpoint import read_state, write_state
from bernprune.run.folder import PLAN, RunFolder, open_run
from bernprune.run.workload import check_budget, make_budget, make_limits
from bernprune.storage import write_json, writing
from bernprune.units import KeepPlan, UnitSpace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learned:
    """What decides at other sparsities: what the kept mask went by, what breaks ties, and that mask, each ``[U]``."""

    space: UnitSpace
    priorities_U: torch.Tensor
    scores_U: torch.Tensor
    mask_U: torch.Tensor

    def write(self, path: Path) -> None:
        write_state(path, {**vars(self), "space": json.dumps(self.space.to_dict())})

    @classmethod
    def read(cls, path: Path) -> "Learned":
        """Raises ``RunError`` if there is none, or it is damaged or something else."""
        if not path.is_file():
            raise RunError(f"the run in {path.parent} has not learned yet what to keep: {path.name} is missing")
        state = read_state(path)
        if state.keys() != cls.__dataclass_fields__.keys():
            raise RunError(f"{path} does not say what a run has learned, but something else")
        return cls(**state | {"space": UnitSpace.from_dict(json.loads(state["space"]))})

    def select(self, config: RunConfig, sparsity: float, *, nested: bool = False) -> torch.Tensor:
        """The mask of another budget, bool ``[U]``.

        Args:
            nested: of two sparsities, what the higher keeps is part of what the lower keeps, the run's own among them;
                under ``budget.also`` one of the two must be the run's own. That may leave a little more of the budget
                unspent.

        Raises:
            BudgetError: a sparsity too far from the run's, or one that the limits do not allow.
        """
        low, high = config.explored
        if not low <= sparsity <= high:
            raise BudgetError(
                f"sparsity {sparsity:g} lies outside what a run at {config.budget.sparsity:g} explores, {low:g} to "
                f"{high:g}; prune at that sparsity instead"
            )
        if sparsity == config.budget.sparsity:
            return self.mask_U
        budget, limits = make_budget(config, self.space, sparsity), make_limits(config)
        check_budget(config, budget, limits)
        return select(
            self.priorities_U,
            budget,
            limits=limits,
            tie_break_U=self.scores_U,
            core_U=self.mask_U if nested else None,
        )


def read_plan(path: str | Path) -> KeepPlan:
    """A plan from its JSON file. Raises ``ModelError`` if there is none or it is not one."""
    try:
        return KeepPlan.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ModelError(f"plan {path} does not exist") from None
    except IsADirectoryError:
        raise ModelError(f"plan {path} is a folder; that of a run is the {PLAN} in it") from None
    except ModelError as error:
        raise ModelError(f"plan {path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"plan {path} cannot be read: {error}") from None


def write_plan(folder: RunFolder, sparsity: float, plan: KeepPlan, *, nested: bool = False) -> Path:
    """Write a plan among the run's plans; returns its path."""
    folder.plans.mkdir(exist_ok=True)
    path = folder.plans / f"{sparsity:g}{'-nested' if nested else ''}.json"
    try:
        write_json(path, plan.to_dict())
    except OSError:
        if not any(folder.plans.iterdir()):
            folder.plans.rmdir()
        raise
    return path


def select_plan(out: str | Path, sparsity: float | str, *, nested: bool = False) -> tuple[Path, dict[str, Any]]:
    """Write the plan of another sparsity into the run folder ``out``; returns its path, and what it keeps.

    Raises:
        RunError: no run, one that is not done with learning, or what another run has learned; or the plan cannot be
            written.
        ModelError: the plan of the run is damaged.
        BudgetError: no share between 0 and 1; or see ``Learned.select``.
    """
    share, folder = _share(sparsity), open_run(Path(out))
    config, learned = folder.read_config(), Learned.read(folder.learned)
    if folder.plan.is_file() and learned.space.plan(learned.mask_U) != read_plan(folder.plan):
        raise RunError(f"{folder.learned} says what another run has learned: it does not fit {folder.plan}")
    mask_U = learned.select(config, share, nested=nested)
    plan = learned.space.plan(mask_U)
    with writing(folder.plans):
        path = write_plan(folder, share, plan, nested=nested)
    mask_U = learned.space.mask(plan)
    kept = {
        "removed": removed_share(learned.space, mask_U),
        "measure": config.budget.measure,
        "achieved": make_budget(config, learned.space, share).removed_share(mask_U),
        "layers": describe_plan(plan),
    }
    return path, kept


def _share(sparsity: float | str) -> float:
    try:
        share = float(sparsity)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 < share < 1:
        raise BudgetError(f"sparsity must be a number between 0 and 1, but got {sparsity!r}")
    return share


def plans_table(plans: list[dict[str, Any]], protocol: Protocol) -> str:
    """A table of plans in Markdown."""
    lines = ["| sparsity | removed | perplexity | plan |", "| --- | --- | --- | --- |"]
    for plan in plans:
        figure = shown(plan["perplexity"])
        lines.append(f"| {plan['sparsity']:g} | {plan['removed']:.2%} | {figure} | `{plan['plan']}` |")
    return "\n".join(
        [
            *lines,
            "",
            "Removed: share of the prunable block parameters. Perplexity before any repair, on "
            f"{protocol.windows:,} windows of {protocol.window} tokens of {protocol.text}.",
            "",
        ]
    )


def removed_share(space: UnitSpace, mask_U: torch.Tensor, of: CapName = "parameters") -> float:
    """Share that a mask removes of what all units cost together, by default of the prunable block parameters."""
    costs_U = space.costs_U(of)
    return 1 - ((costs_U * space.alive(mask_U)).sum() / costs_U.sum()).item()


def describe_plan(plan: KeepPlan) -> list[dict[str, int]]:
    """What each layer keeps, in numbers."""
    return [
        {
            "kv_groups": len(layer.kv_groups),
            "of_kv_groups": shape.kv_groups,
            "channels": len(layer.channels),
            "of_channels": shape.channels,
        }
        for layer, shape in zip(plan.layers, plan.architecture.layers, strict=True)
    ]
