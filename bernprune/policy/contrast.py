"""How much the difference between masks on the same text tells of each unit.

Letters: K masks on a text, U units.
"""

from collections.abc import Iterator

import torch

from bernprune.policy.masks import Design


def contrast(probs_U: torch.Tensor, design: Design, amplitude_U: torch.Tensor | float = 0.0) -> torch.Tensor:
    """E[A (m - s)] of a unit over its effect, for advantages that leave one out; s is its probability at its level.

    Without levels that is how likely it is that of two masks on the same text the first keeps a unit and the second
    cuts it: s (1 - s) if they are independent, as ``exact`` ones are taken to be, and s (1 - s) (1 - rho) for a
    correlation rho, because the other masks, too, tell of the unit. With levels it is the mean over those of two masks
    of s (1 - s) - (P - s s'), with P the probability that both keep the unit.
    """
    contrast_U = torch.zeros_like(probs_U)
    for level, other, share in _level_pairs(design.masks) if design.swing else [(0, 0, 1.0)]:
        own_U = probs_U + level * amplitude_U
        told_U = own_U - own_U.square()
        if design.sampling == "antithetic":
            other_U = probs_U + other * amplitude_U
            told_U += own_U * other_U - _both_keep(own_U, other_U, design.masks)
        contrast_U += share * told_U
    return contrast_U.clamp(min=0)  # where a unit is settled, rounding may leave a trace


def _both_keep(first_U: torch.Tensor, second_U: torch.Tensor, masks: int) -> torch.Tensor:
    """How likely two of K antithetic masks keep a unit that they keep with these probabilities, ``[U]``.

    The words v and v + d / K, d = 1 to K - 1 equally likely, must lie below a and b. Of all K words v + d / K, either
    floor(K b) lie below b or, where the fraction of K v is below that of K b, one more; v itself lies below both with
    min(a, b). The shifts are whole multiples of 2^-32, so a K that does not divide 2^32 adds an error of 2^-32 at most.
    """
    least_U, others_U = (masks * first_U).floor(), (masks * second_U).floor()
    more_U, more_others_U = masks * first_U - least_U, masks * second_U - others_U
    below_U = first_U * others_U + (least_U * more_others_U + torch.minimum(more_U, more_others_U)) / masks
    return (below_U - torch.minimum(first_U, second_U)) / (masks - 1)


def _level_pairs(masks: int) -> Iterator[tuple[int, int, float]]:
    """The levels of two of K masks, and how likely they are."""
    counts = {-1: masks // 2, 0: masks % 2, 1: masks // 2}
    for level, count in counts.items():
        for other, others in counts.items():
            pairs = count * (others - (level == other))
            if pairs:
                yield level, other, pairs / (masks * (masks - 1))
