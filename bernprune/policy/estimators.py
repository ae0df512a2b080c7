"""The score-function gradient of the expected loss of a Bernoulli policy (Williams, 1992), and that of a pull back.

    dJ/ds = E[ A(m) (m - s) / (s (1 - s)) ],   m ~ Bernoulli(s)

Letters: K masks, U units.
"""

import torch

from bernprune.names import Scaling
from bernprune.policy.masks import row_slices
from bernprune.units import MaskRows


def reinforce(
    probs_U: torch.Tensor,
    masks_KU: MaskRows,
    advantages_K: torch.Tensor,
    *,
    scaling: Scaling = "raw",
    epsilon: float = 0.0,
) -> torch.Tensor:
    """Mean over masks of advantage times score, ``[U]`` in the dtype of ``probs_U``.

    Args:
        probs_U: keep probabilities in [0, 1].
        masks_KU: sampled masks, bool; gone through block by block.
        advantages_K: losses less a baseline, nats per token.
        scaling: with the Fisher information 1 / (s (1 - s)) of a unit, ``raw`` is the gradient in s; ``sqrt-fisher``
            (published) multiplies it by sqrt(s (1 - s)), which gives every unit a score of variance 1; ``natural``
            multiplies it by s (1 - s) and so is the natural gradient (Amari, 1998).
        epsilon: added to s and to 1 - s under the root of ``sqrt-fisher``; 1e-7 in the released code of the published
            method. At 0, a settled unit (s = 0 or 1) has gradient 0.
    """
    weights_K = advantages_K.to(probs_U.dtype) / len(masks_KU)
    deviations_U = torch.zeros_like(probs_U)
    for rows in row_slices(masks_KU.shape):
        masks_RU = masks_KU[rows]
        deviations_RU = masks_RU.to(probs_U.dtype) - probs_U.to(masks_RU.device)
        told_U = (weights_K[rows].to(masks_RU.device) @ deviations_RU).to(probs_U.device)
        deviations_U = deviations_U + told_U
    if scaling == "natural":
        return deviations_U
    epsilon = epsilon if scaling == "sqrt-fisher" else 0.0
    variance_U = (probs_U + epsilon) * (1 - probs_U + epsilon)
    variance_U = torch.where(variance_U > 0, variance_U, torch.ones_like(variance_U))
    return deviations_U / (variance_U if scaling == "raw" else variance_U.sqrt())


def kl_gradient(
    probs_U: torch.Tensor, start_U: torch.Tensor, *, scaling: Scaling = "raw", epsilon: float = 0.0
) -> torch.Tensor:
    """Gradient of KL(policy || start), summed over units: logit(s) - logit(s0), ``[U]``, scaled as in ``reinforce``.

    All probabilities must lie inside 0 and 1.
    """
    gradient_U = probs_U.logit() - start_U.logit()
    if scaling == "natural":
        return gradient_U * probs_U * (1 - probs_U)
    if scaling == "sqrt-fisher":
        return gradient_U * ((probs_U + epsilon) * (1 - probs_U + epsilon)).sqrt()
    return gradient_U
