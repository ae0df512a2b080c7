"""Repair without training: what is kept of a model is changed so that it makes up for what is removed.

``Repairer`` does it to a live dense model, for a plan and before slicing, so that the repaired model is judged under
masks as ever and sliced as it is. The closed forms stand in ``closed``, what they are computed from in ``moments``.
"""

from bernprune.repair.expected import ExpectedWeights
from bernprune.repair.repairing import Repair, Repairer, clearly_better

__all__ = ["ExpectedWeights", "Repair", "Repairer", "clearly_better"]
