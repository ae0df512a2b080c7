"""Losses of tokens from last hidden states, a few tokens at a time: the logits of a batch never exist.

What is live of them at once fits in two and a half times ``LOGIT_BYTES``.

Letters: R rows, T tokens, N tokens of all rows, D hidden size.
"""

import torch
from torch import nn

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
    size = _tokens_at_once(head)
    pairs = zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    parts = [ops.cross_entropy(head(hidden), targets) for hidden, targets in pairs]
    return torch.cat(parts).view(tokens_RT.shape[0], -1)


def token_divergences(
    head: nn.Linear, hidden_RTD: torch.Tensor, dense_RTD: torch.Tensor, ops: MaskedOps = TORCH
) -> torch.Tensor:
    """KL(dense || masked) of the next-token distributions in nats, ``[R, T]``; a few tokens at a time."""
    size = max(1, _tokens_at_once(head) // 2)
    pairs = zip(hidden_RTD.flatten(0, 1).split(size), dense_RTD.flatten(0, 1).split(size), strict=True)
    parts = [ops.divergence(head(hidden), head(dense)) for hidden, dense in pairs]
    return torch.cat(parts).view(hidden_RTD.shape[:2])


def _tokens_at_once(head: nn.Linear) -> int:
    size = max(1, LOGIT_BYTES[head.weight.device.type] // (4 * head.weight.shape[0]))
    return size // _ROWS * _ROWS or size
