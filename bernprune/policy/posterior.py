"""Learning as estimation: what each unit is worth, how sure that is, and a policy that follows from it.

A step of plain REINFORCE moves every unit by what is mostly noise, and thousands of units without a signal walk at
random. Here the same score-function estimates are *observations* with a variance of their own. They are gathered over
rounds into beliefs (``bernprune.policy.beliefs``), and a unit is kept with the probability that it is worth its price:

    s_u = Phi((mu_u - lambda c_u) / sigma_u),  between floor and ceiling,

with the price lambda at which the policy meets the budget, and c_u what keeping the unit costs under the policy of the
round before. From this masks are drawn. What is selected in the end follows from mu, sigma and c: of each group as many
units as are expected to be worth their price, the best ones (``expected_order``).

Where masks swing (``bernprune.policy.masks``), what the channels of a layer are worth together is observed by itself.

Where little is known of many units that policy is soft, and in a deep model its masks may leave nothing that works.
When they tell less than half as much as those of the first policy (``bernprune.policy.rounds``), the policy is *drawn
in*: ``softness`` is halved. Only a share ``softness`` of each deviation sigma is left to chance; what is left of sigma
decides how many units of a group are kept, as it does in the final selection. Estimates under the old policy are
forgotten, unless a round ends there. After a round that told twice as much as the first, ``softness`` doubles again.

Letters: B windows of text, K masks a window, C chunks of a window, U units, G groups (units of one kind in one layer),
N units of a group, S scores.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch

from bernprune.errors import ConfigError
from bernprune.kernels.reference import SumKernels
from bernprune.names import Kind
from bernprune.policy.activity import ActiveTokens
from bernprune.policy.baselines import less_the_others
from bernprune.policy.beliefs import Beliefs, GroupMean
from bernprune.policy.budget import Budget
from bernprune.policy.diagnostics import correlation_by_kind, expected_regret, signal_to_noise
from bernprune.policy.masks import CPU, Design, Masks
from bernprune.policy.rounds import Informativeness, RoundSums, copied, round_ends
from bernprune.policy.search import MaskSearch, Reading, StepStats, rewards_to_go
from bernprune.policy.sums import MaskSums
from bernprune.units import MaskRows, UnitSpace

_LEAST_ESTIMATES = 2  # of a round, for a variance
_ROUNDING = 1e-12  # what a variance of nothing may come to, as a share of a typical one
_LEAST_SOFTNESS = 1 / 64  # by when a policy has all but decided
_NODES = 15  # equally likely values that stand for a normal distribution; odd, so that its mean is one of them


@dataclass(frozen=True)
class PosteriorStats(StepStats):
    """``rounds`` concluded so far; ``reliability``: mean share of a unit's observed difference that is signal;
    ``softness``: share of the deviations that is left to chance; ``unread``: windows of the step in which activities
    are not finite, so that only their losses were learned from."""

    rounds: int
    reliability: float
    softness: float
    unread: int


@dataclass(frozen=True)
class Estimates:
    """Of one step, a window each.

    Attributes:
        effects_BU: what keeping a unit does to the window's loss.
        advantages_BKC: of masks, over the others on the same text.
        swung_BG: what the levels of masks had to do with their losses; None without swing.
        predicted_BKC: what the current worths say of the losses, up to a constant.
        sums: over the masks of the step.
    """

    effects_BU: torch.Tensor
    advantages_BKC: torch.Tensor
    swung_BG: torch.Tensor | None
    predicted_BKC: torch.Tensor
    sums: MaskSums


class PosteriorSearch(MaskSearch):
    """Empirical-Bayes estimation of every unit's worth, in rounds.

    Args:
        probs_U: policy of the first round, float64 ``[U]``; sharp, so that what is sampled resembles what is shipped.
        scores_US: initial scores, larger is kept, of one metric or several; only their order counts, channels' within a
            layer, other kinds' over all layers. ``[U]`` is one metric's.
        round_steps: steps of a round; with a fraction, a round ends at the next whole step.
        forgetting: share of a line's past that a round forgets; see ``Beliefs``.
        floor, ceiling: bounds of every probability, strictly within 0 and 1.
        discount: what a chunk's mask answers for of the chunks behind it; see ``rewards_to_go``.
        design: ``swing`` is that of the first round; round r has an r-th of it. Masks that swing must be told as they
            were asked for, not as a tensor.
        by_activity: learn of channels from where they are active (``bernprune.policy.activity``), if told where.
        kernels: what sums over masks; None: plain torch, on the masks' device.

    Raises:
        ConfigError: fewer than two masks on the same text, bounds that leave a unit without chance, or scores of other
            units.
        BudgetError: the budget cannot be met between floor and ceiling.
    """

    def __init__(
        self,
        budget: Budget,
        probs_U: torch.Tensor,
        scores_US: torch.Tensor,
        *,
        seed: int,
        design: Design,
        round_steps: float,
        forgetting: float = 0.1,
        floor: float = 0.02,
        ceiling: float = 0.98,
        discount: float = 0.4,
        by_activity: bool = True,
        kernels: SumKernels | None = None,
    ) -> None:
        super().__init__(budget, probs_U, seed=seed, design=design)
        if design.masks < 2:
            raise ConfigError(f"the posterior policy needs at least 2 masks on the same text, but got {design.masks}")
        if not round_steps > 0:
            raise ConfigError(f"a round must have more than 0 steps, but has {round_steps:g}")
        if not 0 < floor < ceiling < 1:
            raise ConfigError(f"the posterior policy needs 0 < floor < ceiling < 1, but got {floor:g} and {ceiling:g}")
        if not len(scores_US) == budget.space.size or not scores_US.isfinite().all():
            raise ConfigError(
                f"scores must be [{budget.space.size}] or of several metrics, all finite, but are "
                f"{list(scores_US.shape)}, {int((~scores_US.isfinite()).sum())} of them not finite"
            )
        self.discount, self.round_steps, self._first_swing = discount, round_steps, design.swing
        self._kernels = kernels
        self._bounds = {"floor": floor, "ceiling": ceiling}
        size = budget.space.size
        self.beliefs = Beliefs(budget.space, scores_US.view(size, -1), forgetting)
        self.probs_U = budget.project(self.probs_U.clamp(floor, ceiling), **self._bounds)
        self.steps, self.rounds = 0, 0
        self._sums, self._swung = RoundSums.empty(size), RoundSums.empty(len(budget.space.groups))
        self._priorities_U = torch.zeros(size, dtype=torch.float64)
        self._active = ActiveTokens(budget.space)
        self.needs_reading = by_activity and can_read(design, budget.space.kinds)
        self._last_round: dict[str, Any] = {}
        self._informativeness, self.softness = Informativeness(), 1.0

    @property
    def worth_U(self) -> torch.Tensor:
        """What keeping each unit is believed to save, nats per token, ``[U]``."""
        return self.beliefs.worth_U

    @property
    def deviation_U(self) -> torch.Tensor:
        """How uncertain that is: a standard deviation, ``[U]``; 0 before the first round."""
        return self.beliefs.deviation_U

    @property
    def priorities_U(self) -> torch.Tensor:
        """Values, of which each group has as many above any price as are expected to be worth it."""
        return self._priorities_U if self.rounds else self.probs_U

    @property
    def priced(self) -> bool:
        """True after the first round."""
        return self.rounds > 0

    def draw(self, random: torch.Generator) -> torch.Tensor:
        """Priorities, each moved by a draw of what is not known of its unit (after Thompson, 1933)."""
        noise_U = torch.randn(len(self.probs_U), generator=random, dtype=torch.float64)
        return self.priorities_U + noise_U * self.deviation_U / self.budget.marginal_cost(self.probs_U)

    def diagnose(self, scores_U: torch.Tensor) -> dict[str, Any]:
        """Also, of the round last concluded: ``signal_to_noise`` of what it observed and ``agreement``, the correlation
        of that between two halves of its text, both for each kind; and ``regret``, see ``expected_regret``. None of
        them, where what a round saw was forgotten or told nothing."""
        return super().diagnose(scores_U) | self._last_round

    def tell(
        self,
        masks_BKCU: MaskRows,
        losses_BKC: torch.Tensor,
        *,
        learning_rate: float,
        reference_BC: torch.Tensor | None = None,
        reading: Reading | None = None,
    ) -> StepStats:
        """As every search's, but without a step size: how far the policy moves follows from what is known."""
        self._check_told(masks_BKCU, losses_BKC)
        losses_BKC = losses_BKC.double().cpu()
        before_U = self.probs_U
        unread = 0
        levels_BKCG = self._levels(masks_BKCU)
        seen = self.estimate(masks_BKCU, losses_BKC, levels_BKCG)
        if masks_BKCU.shape[1] > 1:  # a mask without others says nothing
            self._informativeness.add(losses_BKC, self.contrasts_U)
            self._sums.add(seen.effects_BU)
            if seen.swung_BG is not None and masks_BKCU.shape[1] == self.design.masks:  # else levels have a sum
                self._swung.add(seen.swung_BG)
            if reading is not None:
                amplitude_U = self._amplitude_on(seen.sums.device)
                unread = self._active.add(
                    seen.sums, reading, seen.predicted_BKC, levels_BKCG=levels_BKCG, amplitude_U=amplitude_U
                )
        self.steps += 1
        self.drew_in = self.softness > _LEAST_SOFTNESS and self._informativeness.too_soft
        if self.drew_in:
            self.softness /= 2
        if round_ends(self.steps - 1, self.round_steps) and self._sums.count >= _LEAST_ESTIMATES:
            self._conclude_round()
        elif self.drew_in:
            self._begin_again()
        stats = self.stats(losses_BKC, seen.advantages_BKC, before_U).to_dict()
        return PosteriorStats(
            **stats, rounds=self.rounds, reliability=self.beliefs.reliability, softness=self.softness, unread=unread
        )

    def conclude(self) -> bool:
        if self._sums.count < _LEAST_ESTIMATES:
            return False
        self._conclude_round()
        return True

    def estimate(
        self, masks_BKCU: MaskRows, losses_BKC: torch.Tensor, levels_BKCG: torch.Tensor | None = None
    ) -> Estimates:
        """What keeping each unit does to the losses of windows under these masks.

        E[L | m_u = 1] - E[L | m_u = 0] = E[A (m_u - s_u)] / contrast_u, where the contrast of independent masks is
        s_u (1 - s_u), and s_u the probability at the level of u's group. Where chunks have masks of their own it is
        the sum over chunks of what keeping the unit in that one alone does. Unbiased if the discount is 1 and masks are
        not ``exact``; where masks swing, the mean over levels, weighted by their contrasts.

        What the current worths predict of the losses is taken out of the advantages and put back exactly, a linear
        control variate, so that only what they do not explain makes noise.

        Args:
            levels_BKCG: the levels of groups, of masks that swing.
        """
        sums = MaskSums(masks_BKCU, self._kernels)
        predicted_BKC = -sums.kept(self.worth_U)
        unexplained_BKC = losses_BKC - predicted_BKC / losses_BKC.shape[-1]
        advantages_BKC = less_the_others(rewards_to_go(unexplained_BKC, self.discount))
        # Probabilities that masks on a text share are not subtracted, as advantages sum to zero.
        effects_BU, swung_BG = sums.scores(advantages_BKC) / advantages_BKC.shape[1], None
        if levels_BKCG is not None:
            swung_BG = torch.einsum("bkc,bkcg->bg", advantages_BKC, levels_BKCG) / advantages_BKC.shape[1]
            swung_BU = swung_BG.to(sums.device)[:, self.budget.space.group_U.to(sums.device)]
            effects_BU = effects_BU - swung_BU * self._amplitude_on(sums.device)
        effects_BU = effects_BU / self._contrasts_on(sums.device) - self.worth_U.to(sums.device)
        return Estimates(effects_BU, advantages_BKC, swung_BG, predicted_BKC, sums)

    def _levels(self, masks_BKCU: MaskRows) -> torch.Tensor | None:
        """Levels of the groups of masks, float64 ``[B, K, C, G]``; None without swing."""
        if not self.design.swing:
            return None
        if not isinstance(masks_BKCU, Masks):
            raise ConfigError("masks that swing are told as they were asked for, but got a tensor")
        return masks_BKCU.levels().double()

    def _group_means(self) -> list[GroupMean]:
        """What was observed of the channels of each layer by their swing: their worths' mean, weighted by amplitude.

        For a linear loss E[sum_k A_k z_k / K] = -(sum_k z_k^2 / (K - 1)) sum_u a_u w_u, as levels z add up to zero.
        What was predicted of the losses is put back.
        """
        sums, self._swung = self._swung, RoundSums.empty(len(self.budget.space.groups))
        masks = self.design.masks
        space = self.budget.space
        found = []
        if sums.count < _LEAST_ESTIMATES or not sums.variance_U()[space.of_groups("channel")].all():
            return []  # too few told of levels, or their losses did not differ
        strength = 2 * (masks // 2) / (masks - 1)
        for group, members_N in zip(space.of_groups("channel"), space.by_layer("channel"), strict=True):
            amplitude_N = self._amplitude_U[members_N]
            scale, weights_N = strength * amplitude_N.sum(), amplitude_N / amplitude_N.sum()
            mean = weights_N @ self.worth_U[members_N] - sums.mean_U()[group] / scale
            found.append(GroupMean(members_N, weights_N, mean, sums.variance_U()[group] / scale.square()))
        return found

    def _begin_again(self) -> None:
        """Forget what was seen of this policy, which cannot be added to what will be seen of another."""
        self._last_round = {}
        self._sums, self._swung = RoundSums.empty(len(self.probs_U)), RoundSums.empty(len(self.budget.space.groups))
        self._active.forget_round()
        self._follow(self.budget.marginal_cost(self.probs_U))

    def _follow(self, costs_U: torch.Tensor) -> None:
        """Take the policy that follows from what is believed.

        Groups keep about as much of their units whatever the softness. By means alone, those of which little is known
        would be kept or cut as a whole.
        """
        worth_U, chance_U = self.worth_U, self.softness * self.deviation_U
        if self.softness < 1:
            decided_U = (1 - self.softness**2) ** 0.5 * self.deviation_U
            worth_U = costs_U * expected_order(self.budget.space, worth_U / costs_U, decided_U / costs_U)
        self.probs_U = self.budget.at_price(worth_U, chance_U, costs_U, **self._bounds)
        self._informativeness.renew(first=not self.rounds)

    def _conclude_round(self) -> None:
        """From what was observed to what is believed, and from that to the next policy."""
        self._sums.to(CPU)
        observed_U = -self._sums.mean_U()
        noise_U = self._noise_U()
        halves = self._sums.halves()
        self._sums, means = RoundSums.empty(len(observed_U)), self._group_means()
        if not noise_U.any():
            self._active.forget_round()
            self._last_round = {}
            return  # the losses did not differ: nothing was learned
        seen = self._active.conclude_round(
            observed_U, noise_U, halves, contrast_U=self.contrasts_U, worth_U=self.worth_U, means=means
        )
        self.beliefs.learn(observed_U, noise_U, [] if seen else means)
        costs_U = self.budget.marginal_cost(self.probs_U)
        if self._informativeness.ample:
            self.softness = min(1.0, 2 * self.softness)
        self._follow(costs_U)
        self._end_round(self.rounds + 1)
        space, charged_U = self.budget.space, self.budget.marginal_cost(self.probs_U)
        self._priorities_U = expected_order(space, self.worth_U / charged_U, self.deviation_U / charged_U)
        free_U = self.budget.at_price(self.worth_U, self.deviation_U, costs_U, floor=0.0, ceiling=1.0)
        self._last_round = {
            "signal_to_noise": signal_to_noise(space, observed_U, noise_U),
            "agreement": correlation_by_kind(space, *halves),
            "regret": expected_regret(free_U, self.deviation_U),
        }

    def _end_round(self, rounds: int) -> None:
        """So many rounds have ended. What is known of layers is kept, so masks need to swing less and less."""
        self.rounds = rounds
        self.design = replace(self.design, swing=self._first_swing / (1 + rounds))

    def _noise_U(self) -> torch.Tensor:
        """Variance of what was observed of each unit, ``[U]``.

        Units share the advantages, so those of a group differ by their contrast alone. A unit's own estimate would
        take one that happened never to change for one that is known exactly.
        """
        contrast_U = self.contrasts_U
        levels_U = self._sums.variance_U() * contrast_U
        everywhere = levels_U.mean()
        for members_N in self.beliefs.groups:
            level = levels_U[members_N].mean()
            seen = level > _ROUNDING * everywhere  # else none of them was seen to change
            levels_U[members_N] = level if seen else everywhere
        return levels_U / contrast_U

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "steps": self.steps,
            "rounds": self.rounds,
            **copied(vars(self._sums)),
            "swung": copied(vars(self._swung)),
            "priorities_U": self._priorities_U,
            "active": self._active.state_dict(),
            "last_round": self._last_round,
            "telling": self._informativeness.state_dict(),
            "softness": self.softness,
            "beliefs": self.beliefs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        self.beliefs.load_state_dict(state["beliefs"])  # first, as it may refuse
        super().load_state_dict(state)
        self._active.load_state_dict(state["active"])
        self.steps = state["steps"]
        self._end_round(state["rounds"])
        self._sums = RoundSums(**copied({name: state[name] for name in vars(self._sums)}))
        self._swung = RoundSums(**copied(state["swung"]))
        self._priorities_U = state["priorities_U"].clone()
        self._last_round = state["last_round"]
        self._informativeness.load_state_dict(state["telling"])
        self.softness = state["softness"]


def expected_order(space: UnitSpace, mean_U: torch.Tensor, deviation_U: torch.Tensor) -> torch.Tensor:
    """Values, ``[U]``; in each group as many lie above any price as would be expected of normal ones.

    The r-th best of the N units of one kind in a layer is given the (r - 1/2) / N quantile, from above, of all values
    that they may have. By their means alone, a layer whose units are hardly told apart would be kept or cut as a whole.
    """
    nodes_Q = torch.special.ndtri((torch.arange(_NODES, dtype=torch.float64) + 0.5) / _NODES)
    order_U = torch.empty_like(mean_U)
    for units in space.spans:
        mean_N, deviation_N = mean_U[units], deviation_U[units]
        values = (mean_N[:, None] + deviation_N[:, None] * nodes_Q).flatten().numpy()
        values.sort()  # several times as fast as torch does it
        falling = torch.from_numpy(values[::-1][_NODES // 2 :: _NODES].copy())
        order_U[units][mean_N.argsort(descending=True, stable=True)] = falling
    return order_U


def can_read(design: Design, kinds: Collection[Kind]) -> bool:
    """Whether a window's activity tells of masks: those of a whole batch compete on all of it at once."""
    return "channel" in kinds and design.groups * design.chunks > 1
