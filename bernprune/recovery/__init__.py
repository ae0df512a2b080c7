"""A little training of what a plan keeps: low-rank adapters, merged into plain weights afterwards.

It needs gradients, and the extra ``recover``; nothing else in the package needs either.
"""

from bernprune.recovery.masks import SampledMasks
from bernprune.recovery.ranks import whole_ranks
from bernprune.recovery.training import Training

__all__ = ["SampledMasks", "Training", "whole_ranks"]
