"""Losses of tokens from last hidden states, a few tokens at a time: the logits of a batch never exist.

What is live of them at once fits in two and a half times ``LOGIT_BYTES``.

Letters: R rows, T tokens, N tokens of all rows, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import nn

# Of the logits in float32 at once, by type of device. A GPU must not read the output embedding for too few tokens; a
# processor does best with about the size of its caches.
LOGIT_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}


def _tokens_at_once(head: nn.Linear) -> int:
    return max(1, LOGIT_BYTES[head.weight.device.type] // (4 * head.weight.shape[0]))


def _logits(head: nn.Linear, hidden_ND: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = head(hidden_ND)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_losses(head: nn.Linear, hidden_RTD: torch.Tensor, tokens_RT: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy in nats, at least float32, ``[R, T - 1]``; a few tokens at a time."""
    hidden_ND, targets_N = hidden_RTD[:, :-1].flatten(0, 1), tokens_RT[:, 1:].flatten()
    size = _tokens_at_once(head)
    parts = [
        F.cross_entropy(_logits(head, hidden), targets, reduction="none")
        for hidden, targets in zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    ]
    return torch.cat(parts).view(tokens_RT.shape[0], -1)


def token_divergences(head: nn.Linear, hidden_RTD: torch.Tensor, dense_RTD: torch.Tensor) -> torch.Tensor:
    """KL(dense || masked) of the next-token distributions in nats, ``[R, T]``; a few tokens at a time."""
    size = max(1, _tokens_at_once(head) // 2)
    parts = []
    for hidden, dense in zip(hidden_RTD.flatten(0, 1).split(size), dense_RTD.flatten(0, 1).split(size), strict=True):
        ours, theirs = _logits(head, hidden).log_softmax(-1), _logits(head, dense).log_softmax(-1)
        parts.append(F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1))
    return torch.cat(parts).view(hidden_RTD.shape[:2])
