"""FLAP: how much an input fluctuates around its mean, weighted by what reads it (An et al., 2023, arXiv 2312.11983, and
its released code). Standardised within each projection, so that scores compare across layers and kinds.

Its modes are allocations: UL-UM is ``uniform``, UL-MM that with ``initial.kv_sparsity``, AL-MM ``global`` with it, and
AL-AM, the published one, ``pooled``.
"""

import torch

from bernprune.scores.base import PARTS, Metric
from bernprune.scores.stream import Projection, Score, by_column
from bernprune.scores.wanda_sp import wanda_sp


def wifv(projection: Projection) -> torch.Tensor:
    """Fluctuation times weight, Var[x_j] * sum_i W_ij^2, ``[E]``."""
    return projection.inputs.variance_E * projection.weight_DE.double().square().sum(0)


def ifv(projection: Projection) -> torch.Tensor:
    """Fluctuation alone, Var[x_j], ``[E]``."""
    return projection.inputs.variance_E


def _standardised(score: Score) -> Score:
    def standardised(projection: Projection) -> torch.Tensor:
        """Standardised scores; at the attention output they are squared before that, as released."""
        scores_E = score(projection)
        if projection.kind == "kv_group":
            scores_E = scores_E.square()
        return (scores_E - scores_E.mean()) / scores_E.std(correction=min(1, len(scores_E) - 1)).clamp(min=1e-300)

    return standardised


def _metric(name: str, about: str, score: Score) -> Metric:
    about = f"{about}, standardised"
    run = by_column(_standardised(score))
    # Sums of standard scores are zero, so whole blocks cannot be ranked.
    return Metric(
        name, about, "An et al., 2023", run, kinds=PARTS, allocation="pooled", layerwise=True, standardised=True
    )


FLAP = _metric("flap", "WIFV: variance of what a unit hands on, times the squared weights that read it", wifv)
FLAP_WIFN = _metric("flap-wifn", "WIFN: norm of what a unit hands on, times the mean size of the weights", wanda_sp)
FLAP_IFV = _metric("flap-ifv", "IFV: variance of what a unit hands on", ifv)
