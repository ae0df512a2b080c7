"""Models whose projections are no plain linear layers: quantised by torchao, or of a class of their own."""

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bernprune.models.architecture import projections
from bernprune.models.families import family_of
from bernprune.models.shortening import shorten

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
all_ways = pytest.mark.parametrize("way", [pytest.param("torchao", marks=needs_torchao), "packed"])
DTYPES = {"torchao": torch.float32, "packed": torch.float64}  # in which they compute; torchao takes no float64


class Packed(nn.Linear):
    """As in bitsandbytes: a weight that no one else can read, in another shape, and a forward of its own."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, device="meta")
        self.scale_D1 = dense.weight.data.abs().amax(1, keepdim=True) / 127
        packed = (dense.weight.data / self.scale_D1).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(packed.view(-1, 1), requires_grad=False), dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight_DE = self.weight.view(self.out_features, self.in_features) * self.scale_D1
        return F.linear(x, weight_DE, self.bias)


def quantise(model: Any, way: str) -> Any:
    """The model itself, with its projections quantised; it computes in ``DTYPES[way]``."""
    if way == "torchao":
        shorten(model.float(), "int8")
    else:
        for block, name in each_projection(model):
            setattr(block, name, Packed(getattr(block, name)))
    return model


def each_projection(model: Any) -> list[tuple[nn.Module, str]]:
    """The block and the name of every projection of every layer."""
    names = projections(family_of(model.config.model_type)).values()
    return [(getattr(layer, block), name) for layer in model.model.layers for block, name in names]
