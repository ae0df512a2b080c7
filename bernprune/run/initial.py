"""What a run's settings say of its initial metrics: which they are, what they cost, and how far they compare."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bernprune.config import RunConfig
from bernprune.errors import ConfigError
from bernprune.models.view import ModelView
from bernprune.names import Allocation, Kind, Scope
from bernprune.policy.allocation import Evolution
from bernprune.policy.bernoulli import initial_probs
from bernprune.scores import Metric, Options, metric_named
from bernprune.scores.base import PARTS
from bernprune.scores.files import SUFFIX, scores_digest
from bernprune.units import UnitSpace, finest

_BY_LAYER: tuple[Allocation, ...] = ("block-influence", "search")
_BY_KIND: tuple[Allocation, ...] = ("uniform", "global")  # in which kinds do not compete
SEARCH_EVERY = 4  # an allocation is searched on every fourth calibration window
_SCOPES: dict[Allocation, Scope] = {"uniform": "layer", "global": "global", "pooled": "pooled"}


def options_of(config: RunConfig) -> Options:
    """What metrics are told besides model and text."""
    initial = config.initial
    return Options(
        sparsity=config.budget.sparsity,
        pruned_inputs=initial.inputs == "pruned",
        cost_power=initial.cost_power,
        pairs=initial.pairs,
        step=initial.step,
        members=tuple(metric_named(name) for name in initial.members),
        kinds=config.granularity,
    )


def score_names(config: RunConfig) -> tuple[str, ...]:
    """Metrics and files of scores; the policy starts from the first."""
    return config.initial.score, *config.initial.also


def metrics_of(config: RunConfig) -> list[Metric]:
    """The metrics that are taken, and those that are files of scores. Raises ``ConfigError`` if one is not there."""
    return [metric_named(name) for name in score_names(config)]


def scores_fingerprint(config: RunConfig) -> str:
    """Of the files of scores that are taken; empty without any. Raises ``ConfigError`` if one cannot be read."""
    names = (*score_names(config), *config.initial.members)
    return "-".join(scores_digest(Path(os.path.expanduser(name))) for name in names if name.endswith(SUFFIX))


def check_scores(config: RunConfig) -> None:
    """Raises ``ConfigError`` if a metric cannot score what may be removed, or a file of scores is not there."""
    initial = config.initial
    options = options_of(config)
    metrics = metrics_of(config)
    for metric in metrics:
        metric.check(finest(config.granularity), options)
    for metric in options.members:  # of which ranks count
        metric.check(finest(config.granularity), replace(options, cost_power=None))
    told = [name for metric in (*metrics, *options.members) for name in metric.reads]
    for name in ("pairs", "step", "members"):
        if config.changed(f"initial.{name}") and name not in told:
            raise ConfigError(f"initial.{name} has no meaning for the score {' or '.join(score_names(config))}")
    _check_members(initial.members, options.members)
    given, allocation = finest(config.granularity), allocation_of(config)
    if initial.cost_power is not None and any(name.endswith(SUFFIX) for name in score_names(config)):
        raise ConfigError("initial.cost_power has no meaning for a file of scores, which are taken as they are")
    if initial.inputs == "pruned" and not set(PARTS) & set(config.granularity):
        raise ConfigError(
            "initial.inputs 'pruned' prunes kv groups and channels of the earlier layers, but granularity is "
            f"{', '.join(config.granularity)}; use 'dense'"
        )
    for name, meant in (("influence", "block-influence"), ("generations", "search")):
        if config.changed(f"initial.{name}") and allocation != meant:
            raise ConfigError(
                f"initial.{name} has no meaning for initial.allocation {allocation!r}, only for {meant!r}"
            )
    if initial.kv_sparsity is not None:
        _check_kv_sparsity(config, given, allocation)
    if allocation in _BY_LAYER and not set(given) <= {"kv_group", "channel"}:
        raise ConfigError(
            f"initial.allocation {allocation!r} says how many units each layer keeps, but with granularity "
            f"{', '.join(config.granularity)} a layer has one of a kind; take another, or add kv_group and channel"
        )


def _check_members(names: Sequence[str], members: Sequence[Metric]) -> None:
    """Raises ``ConfigError`` where ``initial.members`` is nothing to fuse."""
    if len(names) == 1 or len(set(names)) < len(names):
        raise ConfigError(f"initial.members must name two different metrics or more, but has {', '.join(names)}")
    for metric in members:
        if "members" in metric.reads:
            raise ConfigError(f"initial.members cannot hold a fusion, but has {metric.name!r}")


def _check_kv_sparsity(config: RunConfig, finest_kinds: Sequence[Kind], allocation: Allocation) -> None:
    """Raises ``ConfigError`` where ``initial.kv_sparsity`` would be ignored."""
    if allocation not in _BY_KIND or set(finest_kinds) != set(PARTS):
        raise ConfigError(
            f"initial.kv_sparsity needs kv_group and channel as the finest granularity, and initial.allocation "
            f"{' or '.join(map(repr, _BY_KIND))}, but they are {', '.join(finest_kinds)} and {allocation!r}"
        )
    if config.budget.pools != "joint" or config.initial.map != "const":
        raise ConfigError(
            f"initial.kv_sparsity needs budget.pools 'joint' and initial.map 'const', but they are "
            f"{config.budget.pools!r} and {config.initial.map!r}"
        )
    share, least = config.initial.kv_sparsity, config.budget.also_kv_cache
    if share is not None and least is not None and share < least:
        raise ConfigError(
            f"initial.kv_sparsity lets {share:g} of the kv groups go at first, but budget.also_kv_cache is {least:g}; "
            "give as much or more, or leave it out"
        )


def check_scoring(config: RunConfig, view: ModelView, windows_WT: torch.Tensor) -> None:
    """Check metrics and files of scores once model and text are there, before the work.

    Raises:
        ConfigError: a file of other scores, or too little text for a metric.
        ModelError: a model that a metric cannot score.
    """
    for metric in (*metrics_of(config), *options_of(config).members):
        metric.check_model(view, windows_WT)


def allocation_of(config: RunConfig) -> Allocation:
    """How many units each layer keeps at first: as set, or as suits the first metric."""
    return config.initial.allocation or metric_named(config.initial.score).allocation


def evolution_of(config: RunConfig) -> Evolution:
    """The evolution by which shares of layers are searched for."""
    return Evolution(generations=config.initial.generations)


def scope_of(config: RunConfig) -> Scope:
    """Which scores are compared; where layers have shares of their own, those of a layer and kind."""
    return _SCOPES.get(allocation_of(config), "layer")


def start_probs(
    config: RunConfig, space: UnitSpace, scores_U: torch.Tensor, shares_G: torch.Tensor | None = None
) -> torch.Tensor:
    """Where the policy starts, float64 ``[U]``, not yet on the budget; see ``initial_probs``."""
    return initial_probs(
        space,
        scores_U,
        keep=1 - config.budget.sparsity,
        map_name=config.initial.map,
        scope=scope_of(config),
        sharpness=config.initial.sharpness,
        ceiling=config.policy.ceiling,
        shares_G=shares_G,
    )


def scoring_sequences(config: RunConfig, num_layers: int, windows: int | None = None) -> int:
    """What the initial metrics cost, in windows of the search run forward; it is not part of its budget.

    Args:
        windows: on which they are taken, if that is not as many as they are meant to be.
    """
    initial, window = config.initial, config.data.window
    passes = sum(metric.forwards(num_layers, options_of(config)) for metric in metrics_of(config))
    allocation = allocation_of(config)
    if allocation == "block-influence":
        passes += 1
    elif allocation == "search":
        passes += evolution_of(config).tried / SEARCH_EVERY
    windows = initial.windows if windows is None else windows
    return math.ceil(windows * passes * (initial.window or window) / window)
