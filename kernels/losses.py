"""Triton: losses of tokens from a few rows of logits at a time, each read once, in float32 from whatever dtype it has.

The product with the output embedding is left to the library that knows the card; its result for a few hundred tokens
stays in the cache until it is read here.

Letters: P predictions, V vocabulary. For prefixes see ``draw.py``.
"""

import torch
import triton
import triton.language as tl

_LEAST = tl.constexpr(-3e38)  # below any logit, and finite: from -inf itself it could not be subtracted


@triton.jit
def _cross_entropy_kernel(p_logits, p_targets, p_losses, V, BV: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    p_logits += i_row * V
    b_most, b_total = tl.full((BV,), _LEAST, dtype=tl.float32), tl.zeros((BV,), dtype=tl.float32)
    for start in range(0, V, BV):
        o_v = start + tl.arange(0, BV)
        b_logit = tl.load(p_logits + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        b_new = tl.maximum(b_most, b_logit)
        b_total = b_total * tl.exp(b_most - b_new) + tl.exp(b_logit - b_new)
        b_most = b_new
    most = tl.max(b_most)
    total = tl.sum(b_total * tl.exp(b_most - most))
    target = tl.load(p_logits + tl.load(p_targets + i_row)).to(tl.float32)
    tl.store(p_losses + i_row, most - target + tl.log(total))


@triton.jit
def _divergence_kernel(p_ours, p_theirs, p_losses, V, BV: tl.constexpr):
    i_row = tl.program_id(0).to(tl.int64)
    p_ours, p_theirs = p_ours + i_row * V, p_theirs + i_row * V
    our_most, our_total = tl.full((), _LEAST, dtype=tl.float32), tl.zeros((), dtype=tl.float32)
    their_most, their_total = tl.full((), _LEAST, dtype=tl.float32), tl.zeros((), dtype=tl.float32)
    apart = tl.zeros((), dtype=tl.float32)  # sum of exp(theirs - their most) (theirs - ours)
    for start in range(0, V, BV):
        o_v = start + tl.arange(0, BV)
        m_v = o_v < V
        b_ours = tl.load(p_ours + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        b_theirs = tl.load(p_theirs + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        our_new, their_new = tl.maximum(our_most, tl.max(b_ours)), tl.maximum(their_most, tl.max(b_theirs))
        their_scale, b_weight = tl.exp(their_most - their_new), tl.exp(b_theirs - their_new)
        our_total = our_total * tl.exp(our_most - our_new) + tl.sum(tl.exp(b_ours - our_new))
        their_total = their_total * their_scale + tl.sum(b_weight)
        b_apart = b_weight * (tl.where(m_v, b_theirs, 0.0) - tl.where(m_v, b_ours, 0.0))
        apart = apart * their_scale + tl.sum(b_apart)
        our_most, their_most = our_new, their_new
    ours, theirs = our_most + tl.log(our_total), their_most + tl.log(their_total)
    tl.store(p_losses + i_row, apart / their_total - theirs + ours)


def _block(vocabulary: int) -> int:
    return min(4096, triton.next_power_of_2(vocabulary))


def cross_entropy(logits_PV: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, float32 ``[P]``. Raises ``ValueError`` for sizes that do not fit each other."""
    if logits_PV.ndim != 2 or targets_P.shape != logits_PV.shape[:1]:
        raise ValueError(f"logits {tuple(logits_PV.shape)} do not fit targets {tuple(targets_P.shape)}")
    logits_PV = logits_PV.contiguous()
    losses_P = torch.empty(len(logits_PV), dtype=torch.float32, device=logits_PV.device)
    size = logits_PV.shape[1]
    _cross_entropy_kernel[(len(logits_PV),)](logits_PV, targets_P.contiguous(), losses_P, V=size, BV=_block(size))
    return losses_P


def divergence(ours_PV: torch.Tensor, theirs_PV: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) of the distributions of two sets of logits in nats, float32 ``[P]``.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if ours_PV.ndim != 2 or ours_PV.shape != theirs_PV.shape:
        raise ValueError(f"logits {tuple(ours_PV.shape)} and {tuple(theirs_PV.shape)} do not fit each other")
    ours_PV, theirs_PV = ours_PV.contiguous(), theirs_PV.contiguous()
    losses_P = torch.empty(len(ours_PV), dtype=torch.float32, device=ours_PV.device)
    size = ours_PV.shape[1]
    _divergence_kernel[(len(ours_PV),)](ours_PV, theirs_PV, losses_P, V=size, BV=_block(size))
    return losses_P
