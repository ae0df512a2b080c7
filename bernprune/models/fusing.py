"""What a layer does apart from its products, in one pass over memory each, for the length of a block.

A model's own norms and rotary embeddings are operations one after the other, and each of them reads and writes all
hidden states: on a GPU, where products are fast, that takes longer than attention. What takes their place is known by
what it computes, and not by its name: where it differs, the model's own stays.

Letters: R rows, H heads, T tokens, C entries of a head, D hidden size.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bernprune.models.view import ModelView

_Rotary = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_FUNCTION = "apply_rotary_pos_emb"  # of the modules of transformers that define models
_NEAR = 2e-2  # relative RMS error up to which functions are the same: rounding to bfloat16 gives a fifth of that


class _Norm(nn.Module):
    """The RMS norm (Zhang and Sennrich, 2019, eq. 4) that a module of a model computes."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self._dense = (dense,)  # in a tuple, so that the model's parameters keep their names
        self._epsilon: float = getattr(dense, "variance_epsilon", getattr(dense, "eps", 0.0))

    @property
    def weight(self) -> Any:
        return self._dense[0].weight

    def forward(self, x_RTD: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_RTD, x_RTD.shape[-1:], self.weight, self._epsilon)


@contextmanager
def fusing(view: ModelView, rotary: _Rotary, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let norms of some layers, and the last one, be torch's own, and rotary embeddings be ``rotary``; for the block.

    The function that rotates belongs to all models of the family: it does as ever where a gradient is asked for, or
    where queries are of another device or dtype than this model's. Blocks of several models may end in any order.
    """
    family, owners = view.family, [view.decoder, *layers]
    with ExitStack() as swapped:
        for owner in owners:
            for name in (family.final_norm, family.attention_norm, family.ffn_norm):
                norm = getattr(owner, name, None)
                if isinstance(norm, nn.Module) and _is_rms_norm(norm):
                    swapped.callback(setattr, owner, name, norm)
                    setattr(owner, name, _Norm(norm))
        for module in {sys.modules[type(layer.attention).__module__] for layer in view.layers}:
            own = getattr(module, _FUNCTION, None)
            if own is not None and _rotates(own, rotary, view):
                swapped.enter_context(_rotating(module, rotary, next(view.model.parameters())))
        yield


class _Rotation:
    """A family's function that rotates, in one pass for each model of it that asks for that.

    Attributes:
        own: the function itself.
        ours: what rotates in one pass, and a parameter of the model that it is for.
    """

    def __init__(self, own: Callable[..., Any], *ours: tuple[_Rotary, torch.Tensor]) -> None:
        self.own, self.ours = own, list(ours)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **options: Any
    ) -> Any:
        plain = not (args or options or q.requires_grad or k.requires_grad) and (q.ndim, cos.ndim) == (4, 3)
        for rotary, like in self.ours:
            if plain and (q.device, q.dtype) == (like.device, like.dtype):
                return rotary(q, cos, sin), rotary(k, cos, sin)
        return self.own(q, k, cos, sin, *args, **options)


@contextmanager
def _rotating(module: ModuleType, rotary: _Rotary, like: torch.Tensor) -> Iterator[None]:
    """Let a family's function be ``rotary`` for a model, for the block."""
    rotation, ours = getattr(module, _FUNCTION), (rotary, like)
    if not isinstance(rotation, _Rotation):
        rotation = _Rotation(rotation)
        setattr(module, _FUNCTION, rotation)
    rotation.ours.append(ours)
    try:
        yield
    finally:
        rotation.ours[:] = [other for other in rotation.ours if other is not ours]
        if not rotation.ours:
            setattr(module, _FUNCTION, rotation.own)


@torch.no_grad()
def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether a module of a layer computes what ``_Norm`` in its place would."""
    weight = getattr(norm, "weight", None)
    if isinstance(norm, _Norm) or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return False
    x_1TD = 0.5 + _numbers(weight, 1, 3, len(weight))  # not of mean zero, so that layer norms differ
    return all(_near(norm(x), _Norm(norm)(x)) for x in (x_1TD, 1e-3 * x_1TD))  # small ones show what epsilon is


@torch.no_grad()
def _rotates(own: Callable[..., Any], rotary: _Rotary, view: ModelView) -> bool:
    """Whether a model's function computes what ``rotary`` does."""
    own = own.own if isinstance(own, _Rotation) else own
    weight, size = next(view.model.parameters()), view.architecture.head_dim
    q_RHTC, k_RHTC = _numbers(weight, 2, 3, 5, size), _numbers(weight, 2, 1, 5, size)
    cos_RTC, sin_RTC = _numbers(weight, 1, 5, size), _numbers(weight, 1, 5, size).flip(1)
    found = _Rotation(own, (rotary, weight))(q_RHTC, k_RHTC, cos_RTC, sin_RTC)
    return all(map(_near, own(q_RHTC, k_RHTC, cos_RTC, sin_RTC), found))


def _numbers(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Different numbers from -1 to 1, the same in every run."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 0.754877666
    return (2 * (numbers % 1) - 1).view(shape).to(like.device, like.dtype)


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return found.shape == expected.shape and bool(error <= _NEAR)
