"""Initial scores, and where the policy starts from them."""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bernprune.config import RunConfig
from bernprune.custom import blaming, unchanging
from bernprune.errors import ConfigError, RunError
from bernprune.models.products import quick_products
from bernprune.policy.allocation import search_shares, shares_by_importance, shares_by_kind, shares_of_groups
from bernprune.policy.bernoulli import graded, reordered
from bernprune.policy.selection import select
from bernprune.run.initial import (
    SEARCH_EVERY,
    allocation_of,
    evolution_of,
    options_of,
    scope_of,
    score_names,
    start_probs,
)
from bernprune.run.methods import custom_places
from bernprune.run.stage import Stage, set_stage
from bernprune.scores import holds_scores, initial_scores, metric_named, write_scores
from bernprune.scores.base import Context
from bernprune.scores.block_influence import layer_influence
from bernprune.scores.files import facts_of
from bernprune.storage import check_writable, writing
from bernprune.units import UnitSpace

_SCORED_TOKENS = 2048  # of one forward pass for a metric, which keeps float32 copies of activations


def scores_of(stage: Stage, name: str, notes: dict[str, float] | None = None) -> torch.Tensor:
    """Scores by a metric's name, or from a file of them, float64 ``[U]``.

    Raises:
        ConfigError: what ``metric_named`` or ``initial_scores`` refuse.
    """
    return initial_scores(
        stage.view,
        stage.initial_windows_WT,
        metric_named(name),
        seed=stage.config.seed,
        ops=stage.ops,
        rows_per_forward=_rows(stage),
        options=options_of(stage.config),
        notes=notes,
    )


@dataclass(frozen=True)
class Start:
    """Where a run begins; saved, so that one that is resumed begins at the very same.

    Attributes:
        scores_US: of each unit by each metric, float64.
        shares_G: of its units, what each group keeps at first where scores of layers are not compared.
        probs_U: where the policy starts, not yet on the budget.
        notes: figures that each metric left along with its scores, such as how sure they are.
    """

    scores_US: torch.Tensor
    shares_G: torch.Tensor
    probs_U: torch.Tensor
    notes: dict[str, dict[str, float]]


def take_start(stage: Stage) -> Start:
    """Score the units, and start the policy from that."""
    config = stage.config
    notes: dict[str, dict[str, float]] = {name: {} for name in score_names(config)}
    scores_US = torch.stack([scores_of(stage, name, notes[name]) for name in score_names(config)], dim=1)
    shares_G = group_shares(stage, scores_US[:, 0])
    probs_U = start_probs(config, stage.view.space, scores_US[:, 0], shares_G)
    return Start(scores_US, shares_G, probs_U, notes)


@dataclass(frozen=True)
class ByMetric:
    """What the metric says before anything is learned, ``[U]``.

    Attributes:
        graded_U: its scores, graded so that layers compare as its allocation says; they break all ties.
        start_U: where the policy starts, on the budget.
        initial_U: priorities of the start.
        evenly_U: priorities by which every layer loses the same share.
        masks: what these two keep, ``initial`` and ``uniform``.
    """

    graded_U: torch.Tensor
    start_U: torch.Tensor
    initial_U: torch.Tensor
    evenly_U: torch.Tensor
    masks: dict[str, torch.Tensor]

    @classmethod
    def of(cls, stage: Stage, start: Start, probs_U: torch.Tensor) -> "ByMetric":
        """Of a start, and the policy that it became on the budget."""
        config = stage.config
        space = stage.view.space
        scores_U = start.scores_US[:, 0]
        keep, shares_G = 1 - config.budget.sparsity, start.shares_G
        graded_U = graded(space, scores_U, scope_of(config), keep=keep, shares_G=shares_G)
        # The map const knows two levels only: within them, the order says what comes first.
        initial_U = graded_U if config.initial.map == "const" else probs_U
        evenly_U = graded(space, scores_U)
        masks = {
            name: select(values_U, stage.budget, limits=stage.limits, tie_break_U=graded_U)
            for name, values_U in (("initial", initial_U), ("uniform", evenly_U))
        }
        return cls(graded_U, probs_U, initial_U, evenly_U, masks)

    def followed(self, space: UnitSpace, learned_U: torch.Tensor) -> dict[str, torch.Tensor]:
        """The priorities that each finalist goes by at other sparsities."""
        if torch.equal(learned_U, self.start_U):  # nothing was learned
            learned_U = self.initial_U
        widths_U = reordered(space, learned_U, self.graded_U)
        return {"learned": learned_U, "widths": widths_U, "initial": self.initial_U, "uniform": self.evenly_U}


def group_shares(stage: Stage, scores_U: torch.Tensor) -> torch.Tensor:
    """What each group of units keeps at first where scores of layers are not compared, float64 ``[G]``."""
    config = stage.config
    space = stage.view.space
    keep = 1 - stage.config.budget.sparsity
    allocation = allocation_of(config)
    if config.initial.kv_sparsity is not None:
        return shares_by_kind(space, stage.budget.costs_U, keep, 1 - config.initial.kv_sparsity)
    if allocation == "search":
        return _searched(stage, scores_U)
    if allocation != "block-influence":
        return torch.full((len(space.groups),), keep, dtype=torch.float64)
    options = replace(options_of(config), pruned_inputs=False)  # whole layers are compared, and nothing is pruned
    context = Context(stage.view, stage.initial_windows_WT, config.seed, stage.ops, _rows(stage), options)
    importance_L = layer_influence(context, config.initial.influence)
    return shares_of_groups(space, shares_by_importance(importance_L, keep))


def _searched(stage: Stage, scores_U: torch.Tensor) -> torch.Tensor:
    """Shares with which the best units of each group lose least together, within budget and limits, on some windows."""
    space, keep = stage.view.space, 1 - stage.config.budget.sparsity

    def mask_by(shares_G: torch.Tensor) -> torch.Tensor:
        priorities_U = graded(space, scores_U, keep=keep, shares_G=shares_G)
        return select(priorities_U, stage.budget, limits=stage.limits, tie_break_U=scores_U)

    with stage.objective() as objective:

        def losses_of(shares_KG: torch.Tensor) -> torch.Tensor:
            masks_KU = torch.stack([mask_by(shares_G) for shares_G in shares_KG])
            losses_K = objective.losses(masks_KU, stage.initial_windows_WT[::SEARCH_EVERY])
            return losses_K.nan_to_num(nan=math.inf)

        found_G = search_shares(
            len(space.groups), keep, losses_of, seed=stage.config.seed, evolution=evolution_of(stage.config)
        )
    kept = mask_by(found_G).double().split([group.count for group in space.groups])
    return torch.stack([kept_N.mean() for kept_N in kept])  # on the budget


def score_model(config: RunConfig, out: str | Path | None = None) -> dict[str, Any]:
    """Score a model's units as a run would, and write the scores to a file if one is given.

    Returns:
        For each layer and kind how many units there are and their median and largest score, and what the metric noted.

    Raises:
        ConfigError: the config names more than one metric.
        RunError: ``out`` cannot be written, or is something else than scores; before the work.
    """
    out = None if out is None else Path(out)
    if config.initial.also:
        raise ConfigError(f"units are scored by initial.score alone, but initial.also is {list(config.initial.also)}")
    if out is not None:
        check_writable(out.parent)
        if out.exists() and not holds_scores(out):
            raise RunError(f"output {out} exists and holds no scores; give a file that does not exist")
    notes, name = dict[str, float](), config.initial.score
    with unchanging(), blaming(custom_places(config)):
        stage = set_stage(config, chooses=False)
        started = time.monotonic()
        with quick_products(stage.view.device, stage.view.model.dtype):
            scores_U = scores_of(stage, name, notes)
    seconds, space = time.monotonic() - started, stage.view.space
    if out is not None:
        facts = {"score": name, "text": config.data.text, "seed": str(config.seed)}
        facts |= facts_of(metric_named(name), stage.view, config.model.path)
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_scores(out, space, scores_U, facts)
    groups = [
        {
            "layer": group.layer,
            "kind": group.kind,
            "units": group.count,
            "median": part_N.median().item(),
            "largest": part_N.max().item(),
        }
        for group, part_N in zip(space.groups, scores_U.split([g.count for g in space.groups]), strict=True)
    ]
    return {"score": name, "units": space.size, "seconds": seconds, "groups": groups, "notes": notes}


def _rows(stage: Stage) -> int:
    return max(1, _SCORED_TOKENS // stage.initial_windows_WT.shape[1])
