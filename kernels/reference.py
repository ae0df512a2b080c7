"""The masked operations in plain torch: what every kernel must compute, and the torch backend itself.

Letters: R rows of a batch, each with its own mask; T tokens a row; D, E widths of a linear layer; F channels; U units
that own ``unit_width`` adjacent entries each.
"""

from collections.abc import Callable

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
    rows, width = x_RTE.shape[0], x_RTE.shape[-1]
    if weight_DE.shape[-1] != width:
        raise ValueError(f"a weight {tuple(weight_DE.shape)} does not fit an input of width {width}")
    if masks_RU is not None:
        if masks_RU.ndim != 2 or masks_RU.shape[0] != rows or masks_RU.shape[1] * unit_width != width:
            raise ValueError(
                f"masks {tuple(masks_RU.shape)} with units of width {unit_width} do not fit an input of {rows} rows "
                f"and width {width}"
            )
        x_RTE = x_RTE * masks_RU.to(x_RTE.dtype).repeat_interleave(unit_width, dim=1)[:, None, :]
    return F.linear(x_RTE, weight_DE, bias_D)


def masked_mlp(
    x_RTD: torch.Tensor,
    masks_RF: torch.Tensor | None,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor,
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

    Raises:
        ValueError: sizes that do not fit each other.
    """
    hidden_RTF = activation(F.linear(x_RTD, gate_FD, gate_bias_F)) * F.linear(x_RTD, up_FD, up_bias_F)
    return masked_linear(hidden_RTF, masks_RF, down_DF, down_bias_D)
