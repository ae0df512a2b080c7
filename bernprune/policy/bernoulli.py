"""The product-Bernoulli policy: its start from scores, its entropy.

The maps from scores to keep probabilities are those of Gao et al., 2024 (arXiv 2406.10576, released code): each acts
on one set of scores and gives it the mean ``keep`` before clamping to [0, 1].
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from bernprune.errors import ConfigError
from bernprune.names import Kind, MapName, Scope, check_name
from bernprune.units import UnitSpace

_EPSILON = 1e-8


def sigmap(scores_N: torch.Tensor, keep: float) -> torch.Tensor:
    """Sigmoid of the standardised scores, shifted to the wanted mean."""
    deviation = scores_N.std() if len(scores_N) > 1 else torch.zeros((), dtype=scores_N.dtype)
    squashed = torch.sigmoid((scores_N - scores_N.mean()) / (deviation + _EPSILON))
    return (squashed + keep - squashed.mean()).clamp(0, 1)


def norm(scores_N: torch.Tensor, keep: float) -> torch.Tensor:
    """Scores scaled to a range of one, shifted to the wanted mean."""
    low, high = scores_N.min(), scores_N.max()
    scaled = (scores_N - low) / (high - low + _EPSILON)
    return (scaled + keep - scaled.mean()).clamp(0, 1)


def const(scores_N: torch.Tensor, keep: float, *, sharpness: float = 1.0) -> torch.Tensor:
    """``sharpness`` for the best scores, 1 - ``sharpness`` for the others; earlier units win ties."""
    num_kept = round(keep * len(scores_N))
    best = scores_N.argsort(descending=True, stable=True)[:num_kept]
    probs = torch.full_like(scores_N, 1 - sharpness)
    probs[best] = sharpness
    return probs


def initial_probs(
    space: UnitSpace,
    scores_U: torch.Tensor,
    *,
    keep: float,
    map_name: MapName = "sigmap",
    scope: Scope = "layer",
    sharpness: float = 0.95,
    ceiling: float = 0.99,
    shares_G: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep probabilities from scores, float64 ``[U]``, not yet on the budget.

    Args:
        scores_U: larger is kept; any scale.
        keep: wanted mean of each mapped set.
        scope: ``layer`` maps each kind in each layer by itself, so every layer starts equal (published); ``global``
            maps each kind over all layers; ``pooled`` maps all that is mapped at once, for scores that compare across
            kinds. A kind with one unit a layer is never mapped layer by layer.
        sharpness: the high probability of the map ``const``.
        ceiling: the start of units that contain others: what to remove is left to the finer ones at first.
        shares_G: what each group of units is to keep in place of ``keep``, where all that are mapped at once keep the
            same; see ``bernprune.policy.allocation``.

    Raises:
        ConfigError: an unknown map or scope; scores that are not finite numbers, one a unit; no share to keep.
    """
    check_name("map", map_name, MapName)
    if scores_U.shape != (space.size,) or not scores_U.isfinite().all():
        raise ConfigError(f"scores must be {space.size} finite numbers, one a unit, but are {_described(scores_U)}")
    if not 0 < keep < 1:
        raise ConfigError(f"the share of units to keep must be above 0 and below 1, but is {keep:g}")
    probs_U = torch.full((space.size,), ceiling, dtype=torch.float64)
    for kind, units_N in _mapped_sets(space, scope):
        share = _share(space, units_N, keep, shares_G)
        scores_N = scores_U[units_N].double()
        scores_N = scores_N / scores_N.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # beside _EPSILON
        probs_U[units_N] = _map_of(map_name, kind, sharpness)(scores_N, share)
    return probs_U


def _described(scores_U: torch.Tensor) -> str:
    unknown = int((~scores_U.isfinite()).sum())
    return f"{list(scores_U.shape)}" + (f", {unknown} of them not finite" if unknown else "")


def _share(space: UnitSpace, units_N: torch.Tensor, keep: float, shares_G: torch.Tensor | None) -> float:
    """The share that a set of units keeps: that of its groups, if they have one in common, else ``keep``."""
    shares = None if shares_G is None else shares_G[space.group_U[units_N].unique()]
    return keep if shares is None or bool((shares != shares[0]).any()) else float(shares[0])


def graded(
    space: UnitSpace,
    scores_U: torch.Tensor,
    scope: Scope = "layer",
    *,
    keep: float = 0.5,
    shares_G: torch.Tensor | None = None,
) -> torch.Tensor:
    """Priorities by which a selection takes the same share of every set that ``initial_probs`` maps, at any sparsity.

    Rank p of each score in its set, float64 ``[U]`` in (0, 1), where earlier units win ties; units that contain others
    have 1. Raises ``ConfigError`` for an unknown scope.

    Args:
        shares_G: what each group keeps when ``keep`` is kept of all. When k is, it keeps
            ``share ** (log(k) / log(keep))``. A unit of rank p then enters at a k that falls with
            x = -log(1 - p) log(keep) / log(share), and has the priority x / (1 + x).
    """
    priorities_U = torch.ones(space.size, dtype=torch.float64)
    for _, units_N in _mapped_sets(space, scope):
        behind_N = scores_U[units_N].argsort(descending=True, stable=True).argsort()  # how many come before
        priorities_N = (len(units_N) - 0.5 - behind_N.double()) / len(units_N)
        if shares_G is not None:
            share = min(max(_share(space, units_N, keep, shares_G), _EPSILON), 1 - _EPSILON)
            # In the order of 1 - (1 - p)^(log keep / log share), which rounds to 1 in a set that keeps nearly all.
            falls_N = -torch.log1p(-priorities_N) * math.log(keep) / math.log(share)
            priorities_N = falls_N / (1 + falls_N)
        priorities_U[units_N] = priorities_N
    return priorities_U


def reordered(
    space: UnitSpace, priorities_U: torch.Tensor, scores_U: torch.Tensor, kinds: Sequence[Kind] = ("channel",)
) -> torch.Tensor:
    """The same priorities, ``[U]``, dealt anew within each layer by scores: widths stay, members change."""
    reordered_U = priorities_U.clone()
    for units_N in itertools.chain.from_iterable(space.by_layer(kind) for kind in kinds):
        order_N = scores_U[units_N].argsort(descending=True, stable=True)
        reordered_U[units_N[order_N]] = priorities_U[units_N].sort(descending=True).values
    return reordered_U


def _mapped_sets(space: UnitSpace, scope: Scope) -> Iterator[tuple[Kind, torch.Tensor]]:
    """Kind and units of each set of units that are mapped together; units that contain others are in none."""
    check_name("scope", scope, Scope)
    parents = set(space.parents_U[space.parents_U >= 0].tolist())
    sets: list[tuple[Kind, torch.Tensor]] = []
    for kind in space.kinds:
        units = space.by_layer(kind)
        if any(int(units_N[0]) in parents for units_N in units):
            continue
        one_a_layer = all(len(units_N) == 1 for units_N in units)
        together = [torch.cat(units)] if scope != "layer" or one_a_layer else units
        sets += [(kind, units_N) for units_N in together]
    if scope == "pooled":
        sets = [("channel", torch.cat([units_N for _, units_N in sets]))]
    yield from sets


def _map_of(name: MapName, kind: str, sharpness: float) -> Callable[[torch.Tensor, float], torch.Tensor]:
    if name == "uniform":
        return lambda scores, keep: torch.full_like(scores, keep)
    if name == "const":
        return lambda scores, keep: const(scores, keep, sharpness=sharpness)
    if name == "hybrid":
        return norm if kind == "channel" else sigmap
    return {"sigmap": sigmap, "norm": norm}[name]


def entropy(probs_U: torch.Tensor) -> float:
    """Mean entropy of a unit, in bits."""
    nats_U: torch.Tensor = torch.special.entr(probs_U) + torch.special.entr(1 - probs_U)
    return nats_U.mean().item() / math.log(2)


def ranks(scores_N: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, float64 ``[N]``; equal scores share the mean of theirs."""
    _, place_N, counts_V = scores_N.unique(return_inverse=True, return_counts=True)
    ranks_N: torch.Tensor = (counts_V.cumsum(0) - (counts_V + 1) / 2.0)[place_N].double()
    return ranks_N
