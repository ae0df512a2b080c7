"""Attention that leaves out what masks remove, in the place of a model's own for the length of a block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bernprune.kernels.masks import PackedMasks

_NAME = "bernprune"
_Kept = Callable[..., torch.Tensor]
_at_work: list[tuple[Mapping[nn.Module, Any], _Kept]] = []  # of blocks within blocks, the innermost with a module


@contextmanager
def attending(model: Any, branches: Mapping[nn.Module, Any], attention_of_kept: _Kept) -> Iterator[None]:
    """Let attention go through ``attention_of_kept`` where a branch's masks are bits and each holds for whole rows.

    Otherwise, and where attention is not plainly causal, it is torch's; also where a stream of single layers brings
    what flash attention is told: no mask, but the window in which a layer attends.
    """
    before, ours = model.config._attn_implementation, (branches, attention_of_kept)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    _at_work.append(ours)
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _at_work[:] = [other for other in _at_work if other is not ours]  # others may have begun meanwhile


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it; see ``attending``."""
    window, tokens = given.get("sliding_window"), key.shape[2]
    if attention_mask is None and window is not None and window < tokens:
        attention_mask = _within(window, query.shape[2], tokens, query.device)
    for branches, attention_of_kept in reversed(_at_work):
        if branch := branches.get(module):
            masks = branch.masks if branch.chunks == 1 else None
            if isinstance(masks, PackedMasks) and attention_mask is None and tokens == query.shape[2]:
                return attention_of_kept(query, key, value, masks, scale=scaling), None
            break
    found: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **given)[0]
    return found, None


def _within(window: int, queries: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Whether each of the last tokens attends to each of them, bool ``[1, 1, queries, tokens]``: to so many, itself the
    last."""
    back = torch.arange(tokens - queries, tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return ((back >= 0) & (back < window))[None, None]
