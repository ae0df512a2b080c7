"""Bonsai (Dery et al., 2024, arXiv 2402.05406; released code): regression on perturbed sub-models, round by round.

Each round removes a share of the parameters. A prior, Wanda-sp on what is left of the model, names the candidates: of
each kind in each layer the lowest units, twice the share. A sub-model drops half of them, drawn in proportion to how
low they are, and its complement drops the others; a coin for each kind in each layer says which of the two drops which
half. A ridge regression of the losses on the masks says what each candidate is worth, and the least worthy go.

Departures: ridge in closed form, its weight chosen by cross-validation (the code: Adam over a grid of regularisers); no
layer loses its last unit of a kind; candidates may go by worth per parameter (``per: cost``) instead of worth.

Letters: K sub-models, U units, N candidates, G candidates of a group.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from benchmarks.learning.task import Settings, Task
from bernprune.errors import ConfigError
from bernprune.seeding import generator

_RIDGES = [10.0**power for power in range(-2, 5)]
_FOLDS = 5
_PRIOR_WINDOWS = 128


def bonsai(task: Task, settings: Settings) -> torch.Tensor:
    """Keep what the regressions did not cut.

    Args:
        settings: ``share`` of the parameters a round removes, ``windows`` that a sub-model is run on, ``per``.

    Raises:
        ConfigError: a budget with too few sub-models for a regression.
    """
    share, windows, budget = settings["share"], settings["windows"], task.budget
    rounds = math.ceil(round(budget.sparsity / share, 6))
    pairs = (task.meter.left // rounds - _PRIOR_WINDOWS) // (2 * windows)
    if pairs < _FOLDS:
        raise ConfigError(f"{task.meter.left:,} sequences are too few for {rounds} rounds on {windows} windows each")
    alive_U, cuts = torch.ones(task.space.size, dtype=torch.bool), []
    for index in range(rounds):
        tokens_BT, random = task.text(windows), generator(task.seed, "bonsai", index)
        prior_U = task.scores(tokens_BT=task.text(_PRIOR_WINDOWS), mask_U=alive_U)
        groups = list(_candidates(task.groups, prior_U, alive_U, share))
        masks_KU = torch.stack([mask for _ in range(pairs) for mask in _pair(alive_U, groups, random)])
        losses_K = task.losses(masks_KU, tokens_BT)
        at_N = torch.cat([at_G for at_G, _, _ in groups])
        worth_N = ridge(masks_KU[:, at_N].double(), -losses_K)
        if settings["per"] == "cost":
            worth_N = worth_N / budget.costs_U[at_N]
        for unit in at_N[worth_N.argsort(stable=True)].tolist():
            if budget.removed_share(alive_U) >= min(budget.sparsity, (index + 1) * share):
                break
            alive_U[unit] = False
            cuts.append(unit)
    priorities_U = torch.full((task.space.size,), float(len(cuts)), dtype=torch.float64)
    priorities_U[cuts] = torch.arange(len(cuts), dtype=torch.float64)  # what went last comes back first, if it fits
    return task.select(priorities_U, prior_U)


def ridge(masks_KN: torch.Tensor, values_K: torch.Tensor) -> torch.Tensor:
    """Coefficients ``[N]`` of a regression with a constant; the ridge that predicts unseen pairs best."""
    fold_K = torch.arange(len(values_K)) // 2 % _FOLDS
    errors = []
    for weight in _RIDGES:
        error = 0.0
        for fold in range(_FOLDS):
            seen_K = fold_K != fold
            fitted_N = _fit(masks_KN[seen_K], values_K[seen_K], weight)
            centre_N, mean = masks_KN[seen_K].mean(0), values_K[seen_K].mean()
            residual_K = values_K[~seen_K] - mean - (masks_KN[~seen_K] - centre_N) @ fitted_N
            error += residual_K.square().sum().item()
        errors.append(error)
    return _fit(masks_KN, values_K, _RIDGES[errors.index(min(errors))])


def _fit(masks_KN: torch.Tensor, values_K: torch.Tensor, weight: float) -> torch.Tensor:
    masks_KN, values_K = masks_KN - masks_KN.mean(0), values_K - values_K.mean()
    gram_NN = masks_KN.T @ masks_KN + weight * torch.eye(masks_KN.shape[1], dtype=torch.float64)
    fitted_N: torch.Tensor = torch.linalg.solve(gram_NN, masks_KN.T @ values_K)
    return fitted_N


def _candidates(
    all_groups: Sequence[torch.Tensor], prior_U: torch.Tensor, alive_U: torch.Tensor, share: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Of each kind in each layer: the candidates, their odds of being dropped, and how many a sub-model drops."""
    for group in all_groups:
        units = group[alive_U[group]]
        count = min(len(units) - 1, len(units) - int(len(units) * (1 - 2 * share)))
        if count > 0:
            at_G = units[prior_U[units].argsort(stable=True)[:count]]
            odds_G = prior_U[units].max() - prior_U[at_G]
            yield at_G, odds_G + 1e-9 * odds_G.max() + 1e-300, min(count, int(share * len(units)) + 1)


def _pair(
    alive_U: torch.Tensor, groups: list[tuple[torch.Tensor, torch.Tensor, int]], random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sub-model, and the one that drops the candidates which this one keeps.

    Without the coins, a single candidate would be dropped by the first of every pair, that of one layer always together
    with that of every other, and no regression could tell them apart.
    """
    mask_U, complement_U = alive_U.clone(), alive_U.clone()
    for at_G, odds_G, count in groups:
        dropped = torch.zeros(len(at_G), dtype=torch.bool)
        dropped[odds_G.multinomial(count, generator=random)] = True
        if torch.rand((), generator=random) < 0.5:
            dropped = ~dropped
        mask_U[at_G], complement_U[at_G] = ~dropped, dropped
    return mask_U, complement_U
