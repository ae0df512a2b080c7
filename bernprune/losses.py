"""Losses of tokens from last hidden states, a few tokens at a time: the logits of a batch never exist.

What is live of them at once fits in two and a half times ``LOGIT_BYTES``, and twice that where gradients go back
through them: for those, the logits of the same few tokens are computed again (checkpointing, Chen et al., 2016).

Letters: R rows, T tokens, N tokens of all rows, D hidden size.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bernprune.backends import TORCH, MaskedOps

# Of float32 logits at once, by type of device. A GPU must not read the output embedding for too few tokens; a
# processor does best with about the size of its caches.
LOGIT_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
_ROWS = 256  # a product has a multiple of these rows if it leaves no part of a GPU idle


def token_losses(
    head: nn.Linear, hidden_RTD: torch.Tensor, tokens_RT: torch.Tensor, ops: MaskedOps = TORCH
) -> torch.Tensor:
    """Next-token cross-entropy in nats, at least float32, ``[R, T - 1]``; a few tokens at a time."""
    hidden_ND, targets_N = hidden_RTD[:, :-1].flatten(0, 1), tokens_RT[:, 1:].flatten()

    def losses(hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return ops.cross_entropy(head(hidden_ND), targets_N)

    return _in_parts(losses, _tokens_at_once(head), hidden_ND, targets_N).view(tokens_RT.shape[0], -1)


def token_divergences(
    head: nn.Linear,
    hidden_RTD: torch.Tensor,
    dense_RTD: torch.Tensor,
    ops: MaskedOps = TORCH,
    *,
    dense_head: nn.Linear | None = None,
) -> torch.Tensor:
    """KL(dense || ours) of the next-token distributions in nats, ``[R, T]``; a few tokens at a time.

    Args:
        dense_head: the output embedding of the dense model, if it is another one.
    """
    theirs = head if dense_head is None else dense_head

    def divergences(hidden_ND: torch.Tensor, dense_ND: torch.Tensor) -> torch.Tensor:
        return ops.divergence(head(hidden_ND), theirs(dense_ND))

    size = max(1, _tokens_at_once(head) // 2)
    parts = _in_parts(divergences, size, hidden_RTD.flatten(0, 1), dense_RTD.flatten(0, 1))
    return parts.view(hidden_RTD.shape[:2])


def _in_parts(losses: Callable[..., torch.Tensor], size: int, *values: torch.Tensor) -> torch.Tensor:
    """Losses of so many tokens at a time, ``[N]``, of values that have one for each token."""
    parts = zip(*(each.split(size) for each in values), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
    return torch.cat([losses(*part) for part in parts])


def _tokens_at_once(head: nn.Linear) -> int:
    size = max(1, LOGIT_BYTES[head.weight.device.type] // (4 * head.weight.shape[0]))
    return size // _ROWS * _ROWS or size
