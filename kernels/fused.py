"""The operations that masking needs, by kernels: masks say whether these had better go by lists of what is kept.

Otherwise all is computed, by the library's products, which are faster than ours, with what is masked cut in one pass
before them. Gates, and no masks at all, are left to plain torch. Letters as in ``reference.py``.
"""

from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F
from bernprune.kernels.draw import draw, list_kept
from bernprune.kernels.linear import DTYPES
from bernprune.kernels.losses import cross_entropy, divergence
from bernprune.kernels.masks import PackedMasks
from bernprune.kernels.rotary import rotary

from bernprune.kernels import attention, linear, mlp, reference

__all__ = [
    "DTYPES", "activation_of", "attention_of_kept", "cross_entropy", "divergence", "draw", "linear_to_kept",
    "masked_linear", "masked_mlp", "masked_units", "rotary",
]  # fmt: skip

_WIDE = 16  # entries from which on a unit fills tiles of its own
_TORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
assert _TORCH.keys() == set(get_args(mlp.Activation))


def activation_of(module: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """The kernels' activation that computes what the module does. Raises ``ValueError`` if none does."""
    x = torch.linspace(-6, 6, 97)
    for name, function in _TORCH.items():
        if torch.allclose(module(x), function(x), atol=1e-6):
            return name
    raise ValueError(f"{module} has no kernel; those of {', '.join(_TORCH)} have one")


def _check_no_gradient(*tensors: torch.Tensor | None) -> None:
    """Raises ``ValueError`` where kernels would lose a gradient, which they do not take."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError("kernels take no gradients: run masks under torch.no_grad(), by backend 'torch', or as gates")


def masked_linear(
    x_RTE: torch.Tensor,
    masks: PackedMasks | torch.Tensor | None,
    weight_DE: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    unit_width: int = 1,
) -> torch.Tensor:
    """As ``reference.masked_linear``; each packed mask serves equally many rows in turn."""
    if not isinstance(masks, PackedMasks):
        return reference.masked_linear(x_RTE, masks, weight_DE, bias_D, unit_width=unit_width)
    _check_no_gradient(x_RTE, weight_DE, bias_D)
    if unit_width >= _WIDE and masks.listed:
        return linear.linear_from_kept(x_RTE, list_kept(masks), weight_DE, bias_D, unit_width=unit_width)
    linear.check(x_RTE, weight_DE, bias_D)
    return F.linear(linear.cut(x_RTE, masks, unit_width=unit_width), weight_DE, bias_D)


def attention_of_kept(
    q_RHTC: torch.Tensor, k_RGTC: torch.Tensor, v_RGTC: torch.Tensor, masks: PackedMasks, *, scale: float | None = None
) -> torch.Tensor:
    """Causal attention, ``[R, T, H, C]``; of removed kv groups nothing is read, and zeros are written."""
    _check_no_gradient(q_RHTC, k_RGTC, v_RGTC)
    return attention.attention_of_kept(q_RHTC, k_RGTC, v_RGTC, masks, scale=scale)


def masked_units(x_RTE: torch.Tensor, masks: PackedMasks | torch.Tensor | None, *, unit_width: int = 1) -> torch.Tensor:
    """As ``reference.masked_units``; each packed mask serves equally many rows in turn."""
    if not isinstance(masks, PackedMasks):
        return reference.masked_units(x_RTE, masks, unit_width=unit_width)
    _check_no_gradient(x_RTE)
    return linear.cut(x_RTE, masks, unit_width=unit_width)


def linear_to_kept(
    x_RTD: torch.Tensor,
    masks: PackedMasks | torch.Tensor | None,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor | None = None,
    *,
    unit_width: int,
) -> torch.Tensor:
    """A linear layer; what its masks remove of the output is zero, or computed all the same."""
    if isinstance(masks, PackedMasks) and unit_width >= _WIDE and masks.listed:
        _check_no_gradient(x_RTD, weight_ED, bias_E)
        return linear.linear_to_kept(x_RTD, masks, weight_ED, bias_E, unit_width=unit_width)
    return F.linear(x_RTD, weight_ED, bias_E)


def masked_mlp(
    x_RTD: torch.Tensor,
    masks: PackedMasks | torch.Tensor | None,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor | None,
    down_DF: torch.Tensor,
    *,
    activation: mlp.Activation,
    **biases: torch.Tensor | None,
) -> torch.Tensor:
    """As ``reference.masked_mlp``; each packed mask serves equally many rows in turn."""
    if not isinstance(masks, PackedMasks):
        function = _TORCH[activation]
        return reference.masked_mlp(x_RTD, masks, gate_FD, up_FD, down_DF, activation=function, **biases)
    _check_no_gradient(x_RTD, gate_FD, up_FD, down_DF, *biases.values())
    kept = list_kept(masks) if masks.listed else masks
    return mlp.masked_mlp(x_RTD, kept, gate_FD, up_FD, down_DF, activation=activation, **biases)
