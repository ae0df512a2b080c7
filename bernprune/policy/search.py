"""Ask and tell: a search proposes masks and is told losses. It never sees a model.

Its whole state is the policy and what it remembers: masks are functions of (seed, step).

Letters: B windows of text, K masks a window, C chunks of a window, U units.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from bernprune.errors import BudgetError, ConfigError, RunError
from bernprune.policy.bernoulli import entropy
from bernprune.policy.budget import Budget
from bernprune.policy.contrast import contrast
from bernprune.policy.diagnostics import entropy_by_layer, rank_correlation
from bernprune.policy.masks import CPU, Design, Masks, amplitude
from bernprune.units import MaskRows


@dataclass(frozen=True)
class StepStats:
    """What one step did; losses in nats per token, entropy in bits per unit."""

    loss: float
    loss_spread: float
    advantage_spread: float
    largest_move: float
    expected_sparsity: float
    entropy: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


Seen = Callable[[int, slice, torch.Tensor], None]


@dataclass(frozen=True)
class Reading:
    """A step's text token by token.

    Attributes:
        losses_BKT: losses of each mask, so that the sum over T is the window's loss; float64.
        look: shows how active channels are under the current selection: it calls the function it is given, for each
            layer and some of the windows in turn, with the layer, the windows, and ``[R, T, F]`` of the layer's F
            channels. The size of an entry is the activity, in any scale. It may show the same more than once. Among the
            sequences one look a step is counted.
    """

    losses_BKT: torch.Tensor
    look: Callable[[Seen], None]


class MaskSearch(ABC):
    """A policy on the budget, and its masks; how it learns is its subclasses'.

    To make one of your own, write ``tell``, and what it keeps from step to step into ``state_dict`` and
    ``load_state_dict``; a run takes it by the place where it stands, ``search.method: path/to/file.py:MySearch``. How
    much advantages that leave one out tell of a unit, ``contrasts_U``, depends on how masks hang together, which in a
    run is antithetically by default.

    Args:
        probs_U: where to start, float64 ``[U]``.
        design: how the masks of a step are laid out.

    Raises:
        BudgetError: the number of probabilities is not that of the units.
        ConfigError: exact masks of units that lie in one another.
    """

    needs_reference = False  # whether ``tell`` needs the losses of a reference mask on the same text
    needs_reading = False  # whether ``tell`` is given a ``Reading``, which takes one more pass
    drew_in = False  # whether the last step took back what the policy had become

    def __init__(self, budget: Budget, probs_U: torch.Tensor, *, seed: int, design: Design) -> None:
        if probs_U.shape != (budget.space.size,):
            raise BudgetError(f"{budget.space.size} probabilities are needed, but got {tuple(probs_U.shape)}")
        if design.sampling == "exact" and budget.space.nested:
            raise ConfigError(f"sampling 'exact' needs units that do not nest, but got {budget.space.kinds}")
        self.budget, self.seed, self.design = budget, seed, design
        self.probs_U = probs_U.double()
        self._worked_out: tuple[torch.Tensor, Design, dict[Any, Any]] | None = None  # for which policy and design

    @classmethod
    def begin(cls, budget: Budget, probs_U: torch.Tensor, *, seed: int, design: Design, **given: Any) -> Self:
        """As a run makes one of your own; to be overridden by a class that takes more.

        Args:
            given: ``scores_US`` of the metrics that the policy starts from, float64 ``[U, S]``; ``round_steps``, maybe
                with a fraction; ``floor``, ``ceiling`` and ``discount`` as configured; ``kernels`` that sum over masks.
        """
        del given
        return cls(budget, probs_U, seed=seed, design=design)

    @property
    def priorities_U(self) -> torch.Tensor:
        """What the final selection goes by, larger is kept, float64 ``[U]``: the policy, if there is nothing else."""
        return self.probs_U

    @property
    def priced(self) -> bool:
        """Whether priorities are what units are believed to save for their cost, in nats per token."""
        return False

    def draw(self, random: torch.Generator) -> torch.Tensor:
        """What the priorities may as well be, for all that is known: float64 ``[U]``.

        The mask that a unit's noise would give it, softened: sigmoid(logit s + logistic noise).
        """
        noise_U = torch.rand(len(self.probs_U), generator=random, dtype=torch.float64)
        return torch.sigmoid(self.probs_U.logit() + noise_U.logit(eps=1e-12))  # finite, also where s is 0 or 1

    def ask(self, step: int) -> MaskRows:
        """The masks of a step, bool ``[B, K, C, U]``; the same whenever asked, and made when they are looked at."""
        shared = self._of_policy("masks", dict)
        return Masks(self.design.rows_BKC, self.probs_U, self.design, self.budget, self.seed, step, _of_policy=shared)

    @abstractmethod
    def tell(
        self,
        masks_BKCU: MaskRows,
        losses_BKC: torch.Tensor,
        *,
        learning_rate: float,
        reference_BC: torch.Tensor | None = None,
        reading: Reading | None = None,
    ) -> StepStats:
        """Learn from the losses of masks it was asked for.

        Args:
            masks_BKCU: what ``ask`` gave, or a tensor.
            losses_BKC: float64 nats per token of the window: a chunk's is its share of the mean over all predictions,
                so that the sum over C is the window's loss. What is dropped must be dropped from both.
            learning_rate: step size for the *mean* over masks, hence independent of their number.
            reference_BC: losses of the reference mask on the same text, if the search needs them.
            reading: the same losses by token, and where channels were active, if the search needs them.

        Raises:
            ConfigError: antithetic masks of which some are missing, or losses that are not one for each mask.
        """

    def conclude(self) -> bool:
        """There will be no more steps: learn from what a round that is not over has seen; whether there was any."""
        return False

    def diagnose(self, scores_U: torch.Tensor) -> dict[str, Any]:
        """Where the policy stands, as plain data: entropy of each layer in bits per unit, and for each kind the rank
        correlation of the priorities with the scores that the search began with."""
        return {
            "entropy_by_layer": entropy_by_layer(self.budget.space, self.probs_U),
            "rank_correlation": rank_correlation(self.budget.space, self.priorities_U, scores_U),
        }

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of all that a search like this one needs to go on: plain data and tensors."""
        return {**self._belonging(), "probs_U": self.probs_U}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``RunError`` if the state belongs to other units, another budget or another method."""
        self._check_state(state)
        self.probs_U = state["probs_U"].double()

    def _check_told(self, masks_BKCU: MaskRows, losses_BKC: torch.Tensor) -> None:
        """Raises ``ConfigError`` if some of a step's antithetic masks are missing, or not each mask has one loss."""
        if losses_BKC.shape != masks_BKCU.shape[:-1]:
            raise ConfigError(
                f"masks of B windows, K each, for C chunks are told with losses [B, K, C], here "
                f"{list(masks_BKCU.shape[:-1])}, but got {list(losses_BKC.shape)}"
            )
        if not losses_BKC.isfinite().all():
            raise ConfigError("losses must be finite numbers, but some are not")
        given, asked = masks_BKCU.shape[1], self.design.masks
        if self.design.sampling == "antithetic" and given != asked:
            raise ConfigError(f"antithetic masks are told all together: {asked} on each text, but got {given}")

    def _of_policy(self, what: Any, work_out: Callable[[], Any]) -> Any:
        """What is worked out once for each policy, which is replaced, never written on."""
        known = self._worked_out
        if known is None or known[0] is not self.probs_U or known[1] is not self.design:
            known = self._worked_out = self.probs_U, self.design, {}
        if what not in known[2]:
            known[2][what] = work_out()
        return known[2][what]

    @property
    def contrasts_U(self) -> torch.Tensor:
        """See ``contrast``."""
        return self._contrasts_on(CPU)

    def _contrasts_on(self, device: torch.device) -> torch.Tensor:
        return self._of_policy(
            ("contrast", device), lambda: contrast(self.probs_U, self.design, self._amplitude_U).to(device)
        )

    @property
    def _amplitude_U(self) -> torch.Tensor:
        return self._amplitude_on(CPU)

    def _amplitude_on(self, device: torch.device) -> torch.Tensor:
        return self._of_policy(
            ("amplitude", device), lambda: amplitude(self.probs_U, self.design, self.budget.space).to(device)
        )

    def _belonging(self) -> dict[str, Any]:
        """What a state must have in common with the search that it is loaded into."""
        return {"fingerprint": self.budget.space.fingerprint, "budget": str(self.budget)}

    def _check_state(self, state: dict[str, Any]) -> None:
        ours = self._belonging()
        if not _alike(state, self.state_dict()):
            raise RunError(
                f"the checkpoint was not written by a {type(self).__name__} of this version; that which did can go on"
            )
        if state["fingerprint"] != ours["fingerprint"]:
            raise RunError("the checkpoint was written for another model or another granularity")
        if state["budget"] != ours["budget"]:
            raise RunError(f"the checkpoint was written for a budget of {state['budget']}, not {ours['budget']}")

    def stats(self, losses_BKC: torch.Tensor, advantages_BKC: torch.Tensor, before_U: torch.Tensor) -> StepStats:
        """What a step did, of which the policy was ``before_U``."""
        losses_BK = losses_BKC.sum(-1)
        return StepStats(
            loss=losses_BK.mean().item(),
            loss_spread=losses_BK.std(1, correction=0).mean().item(),
            advantage_spread=advantages_BKC.square().mean().sqrt().item(),
            largest_move=(self.probs_U - before_U).abs().max().item() if before_U is not self.probs_U else 0.0,
            expected_sparsity=self._of_policy("sparsity", lambda: self.budget.removed_share(self.probs_U)),
            entropy=self._of_policy("entropy", lambda: entropy(self.probs_U)),
        )


def _alike(state: Any, other: Any) -> bool:
    """Whether nested dictionaries have the same keys.

    ``last_round`` is not looked into, nor what is None or empty in ``other``: the search has not got there yet.
    """
    if other is None or other == {}:
        return True
    if not isinstance(state, dict) or not isinstance(other, dict):
        return isinstance(state, dict) == isinstance(other, dict)
    return state.keys() == other.keys() and all(
        name == "last_round" or _alike(value, other[name]) for name, value in state.items()
    )


def rewards_to_go(losses_C: torch.Tensor, discount: float) -> torch.Tensor:
    """What each chunk's mask answers for, ``[..., C]``: its own loss, and that of later chunks at a discount.

    A mask reaches later chunks only through the keys and values that it left behind, so most of what happens there is
    others' doing; discounting trades a small bias for much less noise. At 1 the policy gradient is unbiased.
    """
    returns_C = losses_C.clone()
    for chunk in range(losses_C.shape[-1] - 2, -1, -1):
        returns_C[..., chunk] += discount * returns_C[..., chunk + 1]
    return returns_C
