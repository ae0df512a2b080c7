"""How large a rank each layer's adapters get.

Letters: L layers.
"""

import torch


def whole_ranks(shares_L: torch.Tensor, rank: int) -> list[int]:
    """Ranks in proportion to shares, with the mean ``rank``, at least 1 each.

    With shares by the influence of layers this is the capacity of IG-LoRA (Wang et al., 2024, CFSP, section 3.4).

    Args:
        shares_L: non-negative, not all zero.
    """
    spare = (rank - 1) * len(shares_L)
    exact_L = spare * shares_L.double() / shares_L.double().sum()
    ranks_L = exact_L.floor()
    rest = spare - int(ranks_L.sum())
    ranks_L[(exact_L - ranks_L).argsort(descending=True, stable=True)[:rest]] += 1
    return [1 + int(extra) for extra in ranks_L]
