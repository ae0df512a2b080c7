"""The search of a run, made as configured: one of ours, or a custom one."""

from typing import Any

import torch

from bernprune.config import RunConfig
from bernprune.errors import ConfigError, RunError
from bernprune.kernels.reference import SumKernels
from bernprune.policy.budget import Budget
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.search import MaskSearch
from bernprune.run.checkpoint import check_state
from bernprune.run.methods import (
    GIVEN,
    METHODS,
    baseline_of,
    design_of,
    reads_activity,
    runs_reference,
    search_class,
)
from bernprune.run.workload import plan_work


def make_search(
    config: RunConfig,
    budget: Budget,
    probs_U: torch.Tensor,
    scores_US: torch.Tensor,
    kernels: SumKernels | None = None,
) -> MaskSearch:
    """The search of a run, at its beginning.

    Args:
        probs_U: where the policy starts, not yet on the budget.
        scores_US: of the metrics that it starts from, ``[U, S]``.
        kernels: that sum over masks; None: plain torch.

    Raises:
        ConfigError: a custom search that is not what its class said.
    """
    search = config.search
    policy = config.policy
    found = search_class(config)
    round_steps = plan_work(config, budget.space).round_steps
    given: dict[str, Any] = {
        "seed": config.seed,
        "design": design_of(config),
        "floor": policy.floor,
        "ceiling": policy.ceiling,
        "discount": search.discount,
    }
    if issubclass(found, PosteriorSearch):
        given |= {"round_steps": round_steps, "forgetting": search.forgetting, "by_activity": search.by_activity}
        made: MaskSearch = found(budget, probs_U, scores_US, kernels=kernels, **given)
    elif issubclass(found, ReinforceSearch):
        given |= {"scaling": search.scaling, "epsilon": search.epsilon, "pull": search.pull}
        made = found(budget, probs_U, baseline=baseline_of(config), projection=policy.projection, **given)
    else:
        given |= {"scores_US": scores_US, "round_steps": round_steps, "kernels": kernels}
        assert given.keys() == {"seed", "design", *GIVEN}, "begin was tried with these"
        made = found.begin(budget, probs_U, **given)
    if search.method not in METHODS:
        _check_made(config, made)
    return made


def _check_made(config: RunConfig, search: MaskSearch) -> None:
    """Raises ``ConfigError`` if a custom search is not what its class said, by which sequences were planned, or
    cannot be saved."""
    name = config.search.method
    if not isinstance(search, MaskSearch):
        raise ConfigError(f"search {name} must begin as a MaskSearch, but began as {search!r:.100}")
    for what, planned in (("needs_reading", reads_activity(config)), ("needs_reference", runs_reference(config))):
        if getattr(search, what) != planned:
            raise ConfigError(
                f"search {name} must have {what} {planned} with these masks, as its class says, but has "
                f"{getattr(search, what)}"
            )
    size = len(search.probs_U)
    for what, values_U in (("priorities_U", search.priorities_U), ("draw", search.draw(torch.Generator()))):
        if not isinstance(values_U, torch.Tensor) or values_U.shape != (size,):
            given = getattr(values_U, "shape", values_U)
            raise ConfigError(f"search {name} must give {size} numbers as {what}, one a unit, but gave {given!r:.100}")
    state, least = search.state_dict(), MaskSearch.state_dict(search).keys()
    if not isinstance(state, dict) or not least <= state.keys():
        raise ConfigError(f"search {name} must keep in state_dict what MaskSearch does: {', '.join(least)}")
    try:
        check_state(state)
    except RunError as error:
        raise ConfigError(f"search {name} must keep in state_dict what can be saved, but {error}") from None
