"""Linear layers whose weight is a matrix like any other, and those with which only their module can multiply.

Quantised layers are of the second kind: tensors of a class of their own in the place of the weight (torchao), or a
class of their own in the place of the layer (bitsandbytes).

Letters: D, E output and input width of a linear layer, N of its inputs at a time.
"""

import torch
from torch import nn

_AT_ONCE = 1024  # inputs


def is_plain(linear: nn.Linear) -> bool:
    """Whether the layer does nothing but multiply with its weight, of which rows and columns can be taken."""
    return type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, torch.Tensor)


def kind_of(linear: nn.Module) -> str:
    """What a layer is, by its class and that of its weight."""
    weight = getattr(linear, "weight", None)
    own = type(linear).__name__
    return own if weight is None or type(weight) is nn.Parameter else f"{own} with a weight of {type(weight).__name__}"


@torch.inference_mode()
def weight_of(linear: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """The weight ``[D, E]`` on its device; for a layer that is not plain, what comes out for each unit vector.

    Args:
        dtype: of the layer's inputs.
    """
    if is_plain(linear):
        return linear.weight.detach()
    each_E = torch.arange(linear.in_features, device=linear.weight.device)
    bias_1D = linear.forward(torch.zeros(1, linear.in_features, dtype=dtype, device=each_E.device))
    parts = [linear.forward((some_N[:, None] == each_E).to(dtype)) - bias_1D for some_N in each_E.split(_AT_ONCE)]
    return torch.cat(parts).T
