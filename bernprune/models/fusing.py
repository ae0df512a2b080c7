"""What a layer does apart from its products, in one pass over memory each, for the length of a block.

A model's own norms and rotary embeddings are operations one after the other, and each of them reads and writes all
hidden states: on a GPU, where products are fast, that takes longer than attention. What takes their place is known by
what it computes, and not by its name: where it differs, the model's own stays.

Letters: R rows, H heads, T tokens, C entries of a head, D hidden size.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    where queries are of another device or dtype than this model's.
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
                swapped.callback(setattr, module, _FUNCTION, own)
                setattr(module, _FUNCTION, _in_one_pass(own, rotary, next(view.model.parameters())))
        yield


def _in_one_pass(
    own: Callable[..., Any], rotary: _Rotary, like: torch.Tensor
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def rotated(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ours = (q.device, q.dtype) == (like.device, like.dtype) and not (q.requires_grad or k.requires_grad)
        if args or options or q.ndim != 4 or cos.ndim != 3 or not ours:
            return own(q, k, cos, sin, *args, **options)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    return rotated


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
    weight, size = next(view.model.parameters()), view.architecture.head_dim
    q_RHTC, k_RHTC = _numbers(weight, 2, 3, 5, size), _numbers(weight, 2, 1, 5, size)
    cos_RTC, sin_RTC = _numbers(weight, 1, 5, size), _numbers(weight, 1, 5, size).flip(1)
    found = _in_one_pass(own, rotary, weight)(q_RHTC, k_RHTC, cos_RTC, sin_RTC)
    return all(map(_near, own(q_RHTC, k_RHTC, cos_RTC, sin_RTC), found))


def _numbers(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Different numbers from -1 to 1, the same in every run."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 0.754877666
    return (2 * (numbers % 1) - 1).view(shape).to(like.device, like.dtype)


def _near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return found.shape == expected.shape and bool(error <= _NEAR)
