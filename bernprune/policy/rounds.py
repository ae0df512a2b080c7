"""What a round of the posterior search gathers, whether its policy is worth asking, and where rounds end.

Letters: B windows of text, K masks a window, C chunks of a window, U units, W windows so far.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from bernprune.policy.masks import CPU

HAIR = 1e-9  # by which a whole number may be missed through rounding
_TRIED = 16  # windows after which it is first asked whether a policy is too soft; then after twice as many, and so on


@dataclass
class RoundSums:
    """Estimates of one round: their number, sum, sum of squares, and the sum of every second one."""

    count: int
    sum_U: torch.Tensor
    squares_U: torch.Tensor
    half_U: torch.Tensor

    @classmethod
    def empty(cls, size: int) -> "RoundSums":
        return cls(0, *(torch.zeros(size, dtype=torch.float64) for _ in range(3)))

    def add(self, effects_BU: torch.Tensor) -> None:
        self.to(effects_BU.device)
        self.half_U += effects_BU[self.count % 2 :: 2].sum(0)
        self.count += len(effects_BU)
        self.sum_U += effects_BU.sum(0)
        self.squares_U += effects_BU.square().sum(0)

    def to(self, device: torch.device) -> "RoundSums":
        """Move them, in place."""
        self.sum_U, self.squares_U, self.half_U = (
            sums_U.to(device) for sums_U in (self.sum_U, self.squares_U, self.half_U)
        )
        return self

    def halves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means of the estimates of even and of odd number."""
        odd = self.count // 2
        return self.half_U / (self.count - odd), (self.sum_U - self.half_U) / odd

    def mean_U(self) -> torch.Tensor:
        return self.sum_U / self.count

    def variance_U(self) -> torch.Tensor:
        """Variance of the mean."""
        spread_U = (self.squares_U / self.count - self.mean_U().square()).clamp(min=0)
        return spread_U / (self.count - 1)


class Informativeness:
    """How much masks of a policy tell of a unit: the noise of an estimate, Var[L] / contrast, L the losses on one text.

    Less noise tells more. A soft policy, of which units are as likely to be kept as not, has more contrast; but where
    most of what is sampled no longer works, losses differ by what has no bearing on single units, and it tells less.
    Others are compared with the first policy, which is sharp.
    """

    def __init__(self) -> None:
        self._noise_W, self._added = torch.zeros(0, dtype=torch.float64), 0
        self._first_noise, self._contrast = 0.0, 0.0
        self._first_contrast = 1.0  # until it is known: as none is so large, no policy counts as softer

    def add(self, losses_BKC: torch.Tensor, contrast_U: torch.Tensor) -> None:
        """Add the windows of a step under the policy at hand."""
        self._contrast = contrast_U.mean().item()
        self._noise_W = torch.cat([self._noise_W, losses_BKC.sum(2).var(1) / self._contrast])
        self._added = len(losses_BKC)

    def renew(self, *, first: bool) -> None:
        """Another policy follows; ``first`` says whether the one until now was the first."""
        if first:
            self._first_noise, self._first_contrast = self._noise_W.mean().item(), self._contrast
        self._noise_W = self._noise_W[:0]

    @property
    def too_soft(self) -> bool:
        """Whether this policy is softer than the first, and tells less than half as much.

        Not asked after every step: means of few windows differ by chance, and the more often they are looked at, the
        more likely they are to differ once.
        """
        tried, before = len(self._noise_W) // _TRIED, (len(self._noise_W) - self._added) // _TRIED
        if tried.bit_length() == before.bit_length() or not self._contrast > self._first_contrast:
            return False
        return bool(self._noise_W.mean() > 2 * self._first_noise)

    @property
    def ample(self) -> bool:
        """Whether this policy tells more than twice as much as the first."""
        return bool(2 * self._noise_W.mean() < self._first_noise)

    def state_dict(self) -> dict[str, Any]:
        return copied(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(copied(state))


def rounds_in(steps: int, round_steps: float) -> int:
    """How many rounds of ``round_steps`` on average have ended after so many steps."""
    return math.floor(steps / round_steps + HAIR)


def round_ends(step: int, round_steps: float) -> bool:
    """Whether a round ends with this step."""
    return rounds_in(step + 1, round_steps) > rounds_in(step, round_steps)


def copied(values: dict[str, Any]) -> dict[str, Any]:
    """The same values with tensors of their own, on the CPU, for a snapshot."""
    return {
        name: value.to(CPU, copy=True) if isinstance(value, torch.Tensor) else value for name, value in values.items()
    }
