"""Masks that training meets before the cut: of a policy at first, of its plan in the end.

Letters: U units, R rows.
"""

import torch

from bernprune.models.masking import LiveMasks
from bernprune.seeding import generator

_SETTLED = 0.75  # share of the training; the rest of it is under the plan alone


class SampledMasks:
    """Sets the masks of a model that is trained before it is sliced, one a row (after Dinsdale et al., 2022, STAMP).

    Keep probabilities move from the policy's to the plan's, 0 or 1, in equal steps. Every draw is a function of seed
    and step.
    """

    def __init__(self, live: LiveMasks, probs_U: torch.Tensor, plan_U: torch.Tensor, *, seed: int) -> None:
        self._live = live
        self._probs_U = probs_U.double().cpu()
        self._plan_U = plan_U.cpu()
        self._seed = seed

    def draw(self, step: int, progress: float, rows: int) -> torch.Tensor:
        """Masks of a step, bool ``[R, U]``, when a share ``progress`` of the training is done."""
        settled = min(1.0, progress / _SETTLED)
        probs_U = torch.lerp(self._probs_U, self._plan_U.double(), settled)
        random = generator(self._seed, "recovery", step)
        return torch.rand(rows, len(probs_U), generator=random, dtype=torch.float64) < probs_U

    def set(self, masks_RU: torch.Tensor | None = None) -> None:
        """Set the masks of the rows of the next pass; by default what the plan keeps."""
        self._live.set(self._plan_U[None] if masks_RU is None else masks_RU)
