"""The masked operations in plain torch: what every kernel must compute, and the torch backend itself.

Letters: R rows of a batch, each with its own mask; T tokens a row; D, E widths of a linear layer; F channels; U units
that own ``unit_width`` adjacent entries each; H query heads, G kv groups, C entries of a head; P predictions, V
vocabulary; B windows of text, K masks and chunks S of each.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


def masked_linear(
    x_RTE: torch.Tensor,
    masks_RU: torch.Tensor | None,
    weight_DE: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    unit_width: int = 1,
) -> torch.Tensor:
    """Linear layer whose input units are masked row by row: ``(x * mask) W' + b``, ``[R, T, D]``.

    Args:
        x_RTE: input, E = U * ``unit_width``.
        masks_RU: 1 keeps; None keeps everything.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if weight_DE.shape[-1] != x_RTE.shape[-1]:
        raise ValueError(f"a weight {tuple(weight_DE.shape)} does not fit an input of width {x_RTE.shape[-1]}")
    return F.linear(masked_units(x_RTE, masks_RU, unit_width=unit_width), weight_DE, bias_D)


def masked_units(x_RTE: torch.Tensor, masks_RU: torch.Tensor | None, *, unit_width: int = 1) -> torch.Tensor:
    """What masks leave of units, row by row: ``x * mask``, ``[R, T, E]``.

    So ``x`` must be finite, also where it is masked, as it need not be for kernels. Arguments and errors as
    ``masked_linear``.
    """
    if masks_RU is None:
        return x_RTE
    rows, width = x_RTE.shape[0], x_RTE.shape[-1]
    if masks_RU.ndim != 2 or masks_RU.shape[0] != rows or masks_RU.shape[1] * unit_width != width:
        raise ValueError(
            f"masks {tuple(masks_RU.shape)} with units of width {unit_width} do not fit an input of {rows} rows "
            f"and width {width}"
        )
    return x_RTE * masks_RU.to(x_RTE.dtype).repeat_interleave(unit_width, dim=1)[:, None, :]


def masked_mlp(
    x_RTD: torch.Tensor,
    masks_RF: torch.Tensor | None,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor | None,
    down_DF: torch.Tensor,
    *,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
    gate_bias_F: torch.Tensor | None = None,
    up_bias_F: torch.Tensor | None = None,
    down_bias_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gated MLP whose channels are masked row by row: ``(act(x G') * (x U') * mask) D'``, ``[R, T, D]``.

    Args:
        masks_RF: 1 keeps; None keeps everything.
        up_FD: None for an MLP without gate: ``(act(x G') * mask) D'``.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    hidden_RTF = activation(F.linear(x_RTD, gate_FD, gate_bias_F))
    if up_FD is not None:
        hidden_RTF = hidden_RTF * F.linear(x_RTD, up_FD, up_bias_F)
    return masked_linear(hidden_RTF, masks_RF, down_DF, down_bias_D)


def linear_to_kept(
    x_RTD: torch.Tensor,
    masks_RU: torch.Tensor | None,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor | None = None,
    *,
    unit_width: int = 1,
) -> torch.Tensor:
    """A linear layer of which only the kept output units are used; here, all are computed."""
    return F.linear(x_RTD, weight_ED, bias_E)


def attention_of_kept(
    q_RHTC: torch.Tensor,
    k_RGTC: torch.Tensor,
    v_RGTC: torch.Tensor,
    masks_RG: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention, ``[R, T, H, C]``, zero for the query heads of removed kv groups."""
    y_RHTC = F.scaled_dot_product_attention(q_RHTC, k_RGTC, v_RGTC, is_causal=True, scale=scale, enable_gqa=True)
    kept_RH = masks_RG.bool().repeat_interleave(q_RHTC.shape[1] // k_RGTC.shape[1], dim=1)
    return y_RHTC.where(kept_RH[..., None, None], 0.0).transpose(1, 2)


def rotary(x_RHTC: torch.Tensor, cos_RTC: torch.Tensor, sin_RTC: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of heads whose halves are pairs: ``x * cos + [-high, low] * sin``, ``[R, H, T, C]``."""
    low, high = x_RHTC.chunk(2, dim=-1)
    return x_RHTC * cos_RTC[:, None] + torch.cat([-high, low], dim=-1) * sin_RTC[:, None]


def cross_entropy(logits_PV: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, at least float32, ``[P]``."""
    return F.cross_entropy(_wide(logits_PV), targets_P, reduction="none")


def divergence(ours_PV: torch.Tensor, theirs_PV: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) of the distributions of two sets of logits in nats, at least float32, ``[P]``."""
    ours_PV, theirs_PV = _wide(ours_PV).log_softmax(-1), _wide(theirs_PV).log_softmax(-1)
    return F.kl_div(ours_PV, theirs_PV, log_target=True, reduction="none").sum(-1)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class SumKernels(NamedTuple):
    """What sums over masks in every step of a search; signatures as in ``sums.py``."""

    kept_sums: Callable[..., torch.Tensor]
    score_sums: Callable[..., torch.Tensor]
    activity_sums: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def score_sums(weights_BR: torch.Tensor, masks_BRU: torch.Tensor, probs_U: torch.Tensor) -> torch.Tensor:
    """Sum over the R masks of each window of weight times (mask - probability), ``[B, U]``."""
    kept_BU = torch.einsum("br,bru->bu", weights_BR, masks_BRU.to(weights_BR.dtype))
    return kept_BU - weights_BR.sum(1, keepdim=True) * probs_U  # so that masks are not copied


def kept_sums(values_U: torch.Tensor, masks_MU: torch.Tensor) -> torch.Tensor:
    """Sum of the values of what each mask keeps, ``[M]``."""
    return masks_MU.to(values_U.dtype) @ values_U


def activity_sums(
    active_BTF: torch.Tensor, advantages_BKT: torch.Tensor, masks_BKSF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over the tokens of each window, ``[B, F]``, with r = ``|active_BTF|``: of advantage times mask times r, over
    masks too; of r^2; and of r."""
    r_BTF = active_BTF.abs()
    r_BSTF = r_BTF.unflatten(1, (masks_BKSF.shape[2], -1))
    told_BKSF = torch.einsum("bkst,bstf->bksf", advantages_BKT.unflatten(2, r_BSTF.shape[1:3]), r_BSTF)
    return (told_BKSF * masks_BKSF).sum((1, 2)), r_BTF.square().sum(1), r_BTF.sum(1)
