"""A model's weights in a shorter number format, one weight at a time, so that they are never all held twice."""

from typing import Any

import torch
from torch import nn

from bernprune.errors import ModelError
from bernprune.models.architecture import part, projections
from bernprune.models.families import family_of
from bernprune.names import ShortDtype


def shorten(model: Any, dtype: ShortDtype) -> None:
    """All weights to bfloat16, or those of the projections to int8, with a scale for each output (torchao).

    With int8 the model computes in the format that it has, and must be described anew.

    Raises:
        ModelError: torchao is missing, or cannot quantise this model.
    """
    if dtype == "int8":
        _to_int8(model)
        return
    for parameter in model.parameters():  # buffers keep their precision, as when a model is loaded
        parameter.data = parameter.data.to(torch.bfloat16)


def int8_quantiser() -> Any:
    """What quantises a linear layer in place. Raises ``ModelError`` if torchao cannot be imported."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelError(
            f'int8 weights need torchao, which cannot be imported ({error}); install it: pip install ".[quantised]"'
        ) from None
    return lambda module: quantize_(module, Int8WeightOnlyConfig())


def _to_int8(model: Any) -> None:
    quantise, family = int8_quantiser(), family_of(model.config.model_type)
    for layer in part(model, family.decoder, family.layers):
        for names in projections(family).values():
            try:
                quantise(part(layer, *names))
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ModelError(f"torchao cannot quantise a model in {model.dtype} to int8: {error}") from error


def release(module: nn.Module) -> None:
    """Free the parameters, even where someone, such as a ``ModelView``, still holds the modules."""
    for inner in module.modules():
        for name in [name for name, _ in inner.named_parameters(recurse=False)]:
            delattr(inner, name)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, as they lie in memory."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)  # of a class that holds other tensors, as torchao's
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])
