"""Triton: causal attention of the kv groups that each row keeps (after Dao, 2023, FlashAttention-2, forward only).

Letters: R rows, T tokens a row, H query heads, G kv groups, Q query heads of a group, C entries of a head. For prefixes
see ``draw.py``.
"""

import torch
import triton
import triton.language as tl
from bernprune.kernels.linear import DTYPES, add_product
from bernprune.kernels.masks import PackedMasks, rows_per_mask
from bernprune.kernels.tiles import block_of, card_of, precision

_STAGES = 2  # keys and values of a block are read while those of the one before are multiplied


@triton.jit
def _attention_kernel(
    p_q, p_k, p_v, p_y, p_words,
    T, H, W, first, per_mask, scale,
    s_qr, s_qh, s_qt, s_kr, s_kg, s_kt, s_vr, s_vg, s_vt,
    Q: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_head, i_row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_group = i_head // Q
    unit = first + i_group
    o_m, o_c = i_m * BM + tl.arange(0, BM), tl.arange(0, BC)
    m_m, m_c = o_m < T, o_c < C
    b_sum = tl.zeros((BM, BC), dtype=tl.float32)
    if ((tl.load(p_words + i_row // per_mask * W + unit // 32) >> (unit % 32)) & 1) != 0:
        o_q = i_row * s_qr + i_head * s_qh + o_m[:, None] * s_qt + o_c[None, :]
        b_q = tl.load(p_q + o_q, mask=m_m[:, None] & m_c[None, :], other=0.0)
        b_most = tl.full((BM,), float("-inf"), dtype=tl.float32)
        b_total = tl.zeros((BM,), dtype=tl.float32)
        for start in range(0, tl.minimum(T, (i_m + 1) * BM), BN):
            o_n = start + tl.arange(0, BN)
            m_n = o_n < T
            o_k = i_row * s_kr + i_group * s_kg + o_n[None, :] * s_kt + o_c[:, None]
            b_k = tl.load(p_k + o_k, mask=m_n[None, :] & m_c[:, None], other=0.0)
            b_score = add_product(tl.zeros((BM, BN), dtype=tl.float32), b_q, b_k, PRECISION) * scale
            b_score = tl.where(o_n[None, :] <= o_m[:, None], b_score, float("-inf"))
            b_new = tl.maximum(b_most, tl.max(b_score, axis=1))  # finite, as every token sees the first one
            b_weight, b_past = tl.exp2(b_score - b_new[:, None]), tl.exp2(b_most - b_new)
            b_total = b_total * b_past + tl.sum(b_weight, axis=1)
            o_v = i_row * s_vr + i_group * s_vg + o_n[:, None] * s_vt + o_c[None, :]
            b_v = tl.load(p_v + o_v, mask=m_n[:, None] & m_c[None, :], other=0.0)
            b_sum = add_product(b_sum * b_past[:, None], b_weight.to(b_v.dtype), b_v, PRECISION)
            b_most = b_new
        b_sum = b_sum / b_total[:, None]
    o_y = ((i_row * T + o_m[:, None]) * H + i_head) * C + o_c[None, :]
    tl.store(p_y + o_y, b_sum.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_c[None, :])


def attention_of_kept(
    q_RHTC: torch.Tensor, k_RGTC: torch.Tensor, v_RGTC: torch.Tensor, masks: PackedMasks, *, scale: float | None = None
) -> torch.Tensor:
    """Causal attention, ``[R, T, H, C]``; of removed kv groups nothing is read, and zeros are written.

    Args:
        masks: of G kv groups, R a multiple of their number; H is a multiple of G.
        scale: of the products of queries and keys; C^-1/2 by default.

    Raises:
        ValueError: sizes that do not fit each other, or a dtype that kernels do not take.
    """
    (rows, heads, tokens, size), groups = q_RHTC.shape, k_RGTC.shape[1]
    if k_RGTC.shape != v_RGTC.shape or k_RGTC.shape != (rows, groups, tokens, size) or heads % groups:
        shapes = ", ".join(str(tuple(part.shape)) for part in (q_RHTC, k_RGTC, v_RGTC))
        raise ValueError(f"queries, keys and values {shapes} do not fit each other")
    if masks.size != groups:
        raise ValueError(f"masks of {masks.size} kv groups do not fit {groups} of them")
    if q_RHTC.dtype not in DTYPES or {k_RGTC.dtype, v_RGTC.dtype} != {q_RHTC.dtype}:
        given = ", ".join(str(part.dtype) for part in (q_RHTC, k_RGTC, v_RGTC))
        raise ValueError(f"one dtype of {', '.join(map(str, DTYPES))} is needed, but got {given}")
    q_RHTC, k_RGTC, v_RGTC = (part if part.stride(-1) == 1 else part.contiguous() for part in (q_RHTC, k_RGTC, v_RGTC))
    y_RTHC = q_RHTC.new_empty(rows, tokens, heads, size)
    wide, itemsize = max(16, triton.next_power_of_2(size)), q_RHTC.element_size()
    block = card_of(q_RHTC.device).fitting(
        block_of(tokens, 128 // itemsize), lambda block: ((1 + 2 * _STAGES) * wide + block) * block * itemsize
    )
    log2_e = 1.4426950408889634  # so that exponentials are powers of two
    _attention_kernel[(triton.cdiv(tokens, block), heads, rows)](
        q_RHTC, k_RGTC, v_RGTC, y_RTHC, masks.words_MW, T=tokens, H=heads, W=masks.words_MW.shape[1],
        first=masks.first, per_mask=rows_per_mask(rows, masks), scale=(scale or size**-0.5) * log2_e,
        s_qr=q_RHTC.stride(0), s_qh=q_RHTC.stride(1), s_qt=q_RHTC.stride(2),
        s_kr=k_RGTC.stride(0), s_kg=k_RGTC.stride(1), s_kt=k_RGTC.stride(2),
        s_vr=v_RGTC.stride(0), s_vg=v_RGTC.stride(1), s_vt=v_RGTC.stride(2),
        Q=heads // groups, C=size, BC=wide, BM=block, BN=block,
        PRECISION=precision(q_RHTC), num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
    return y_RTHC
