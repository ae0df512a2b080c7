"""Products of matrices in 16 bits, on processors that have no instructions for them.

There torch goes through loops that are some ten times slower than its products in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_KNOWN_BY = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu
_PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATTENTION.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
    # what is made of these unless gradients are taken
    _ATEN.linear.default,
    _ATEN.matmul.default,
    _ATEN.scaled_dot_product_attention.default,
}

_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def quick_products(device: torch.device, *dtypes: torch.dtype) -> Iterator[None]:
    """For the length of the block, such products are taken in float32 and rounded to the format that they would have.

    So do instructions for them, too, which add up in float32: results differ as between two processors. It costs a copy
    of a weight in float32 while it is read. Where the processor has instructions, and on a GPU, nothing changes.

    Args:
        device: where models are run in the block.
        dtypes: their number formats.
    """
    slow = {dtype for dtype in dtypes if dtype in _KNOWN_BY and not _processor_has(_KNOWN_BY[dtype])}
    if slow and device.type == "cpu":
        with _InFloat32(slow):
            yield
    else:
        yield


@contextmanager
def plain_products() -> Iterator[None]:
    """For the length of the block, products are taken as by torch alone, also within ``quick_products``."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)


def _processor_has(name: str) -> bool:
    """What torch's library of products says of the processor; no, where torch is built without it."""
    tell = getattr(torch.ops.mkldnn, name, None)
    return tell is not None and bool(tell())


class _InFloat32(TorchDispatchMode):  # which holds in back-propagation and what that runs forward once more, too
    def __init__(self, slow: set[torch.dtype]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slow = slow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = self._format(args) if func in _PRODUCTS and not _plain.get() else None
        if dtype is None:
            return func(*args, **kwargs)
        found = func(*map(_longer, args), **{name: _longer(value) for name, value in kwargs.items()})
        if func is _ATTENTION.default:  # the other is a logarithm, which is in float32 in any case
            return found[0].to(dtype), found[1]
        return tuple(each.to(dtype) for each in found) if isinstance(found, tuple) else found.to(dtype)

    def _format(self, args: Any) -> torch.dtype | None:
        """The number format of factors that are slow; None for others, and where a class of tensors has its own way."""
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if not tensors or any(type(value) not in (torch.Tensor, nn.Parameter) for value in tensors):
            return None
        first = tensors[0]
        return first.dtype if first.device.type == "cpu" and first.dtype in self._slow else None


def _longer(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
