"""Triton: what losses say of units, summed over rows of masks that are read as bits or drawn once more, never stored.

Letters: B windows of text, R masks a window, C chunks of a window, K masks a chunk (R = K C, masks before chunks), T
tokens, U units, F channels of a layer. For prefixes see ``draw.py``.
"""

import torch
import triton
import triton.language as tl
from bernprune.kernels.draw import arguments, kept
from bernprune.kernels.masks import DrawnMasks, PackedMasks

_UNITS = 512  # of a block


@triton.jit
def _score_kernel(
    p_weights, p_probs, p_sums, p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
    R, N, W, U, G, first, BU: tl.constexpr, DRAWN: tl.constexpr, ORDERS: tl.constexpr,
):  # fmt: skip
    i_window, o_u = tl.program_id(0).to(tl.int64), tl.program_id(1) * BU + tl.arange(0, BU)
    m_u = o_u < N
    b_prob = tl.load(p_probs + o_u, mask=m_u, other=0.0).to(tl.float32)
    b_sum = tl.zeros((BU,), dtype=tl.float32)
    for i_mask in range(0, R):
        b_kept = kept(
            p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
            i_window * R + i_mask, first + o_u, m_u, W, U, G, DRAWN, ORDERS,
        )  # fmt: skip
        b_sum += tl.load(p_weights + i_window * R + i_mask) * (b_kept.to(tl.float32) - b_prob)
    tl.store(p_sums + i_window * N + o_u, b_sum, mask=m_u)


def score_sums(weights_BR: torch.Tensor, masks: PackedMasks | DrawnMasks, probs_U: torch.Tensor) -> torch.Tensor:
    """Sum over the R masks of each window of weight times (mask - probability), float32 ``[B, U]``.

    Args:
        masks: B * R of U units.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    windows, count = weights_BR.shape
    if len(masks) != windows * count or probs_U.shape != (masks.size,):
        raise ValueError(
            f"{len(masks)} masks of {masks.size} units do not fit weights {tuple(weights_BR.shape)} and probabilities "
            f"{tuple(probs_U.shape)}"
        )
    sums_BU = torch.empty(windows, masks.size, dtype=torch.float32, device=weights_BR.device)
    with torch.cuda.device_of(sums_BU):  # which is where Triton launches a kernel
        _score_kernel[(windows, triton.cdiv(masks.size, _UNITS))](
            weights_BR.float().contiguous(), probs_U.contiguous(), sums_BU, **arguments(masks), R=count, N=masks.size,
            BU=_UNITS,
        )  # fmt: skip
    return sums_BU


@triton.jit
def _dot_kernel(
    p_values, p_sums, p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
    N, W, U, G, first, BU: tl.constexpr, DRAWN: tl.constexpr, ORDERS: tl.constexpr,
):  # fmt: skip
    i_mask = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros((BU,), dtype=tl.float32)
    for start in range(0, N, BU):
        o_u = start + tl.arange(0, BU)
        m_u = o_u < N
        b_kept = kept(
            p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
            i_mask, first + o_u, m_u, W, U, G, DRAWN, ORDERS,
        )  # fmt: skip
        b_sum += tl.where(b_kept, tl.load(p_values + o_u, mask=m_u, other=0.0).to(tl.float32), 0.0)
    tl.store(p_sums + i_mask, tl.sum(b_sum))


def kept_sums(values_U: torch.Tensor, masks: PackedMasks | DrawnMasks) -> torch.Tensor:
    """Sum of the values of what each mask keeps, float32 ``[M]``. Raises ``ValueError`` if sizes do not fit."""
    if values_U.shape != (masks.size,):
        raise ValueError(f"masks of {masks.size} units do not fit values {tuple(values_U.shape)}")
    sums_M = torch.empty(len(masks), dtype=torch.float32, device=values_U.device)
    with torch.cuda.device_of(sums_M):
        _dot_kernel[(len(masks),)](values_U.contiguous(), sums_M, **arguments(masks), N=masks.size, BU=_UNITS)
    return sums_M


@triton.jit
def _activity_kernel(
    p_active, p_advantages, p_products, p_squares, p_sums,
    p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
    K, C, T, F, W, U, G, first,
    BT: tl.constexpr, BF: tl.constexpr, DRAWN: tl.constexpr, ORDERS: tl.constexpr,
):  # fmt: skip
    i_window, o_f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_product, b_square = tl.zeros((BF,), dtype=tl.float32), tl.zeros((BF,), dtype=tl.float32)
    b_sum = tl.zeros((BF,), dtype=tl.float32)
    size = T // C
    blocks = tl.cdiv(size, BT)  # of tokens, each within one chunk
    for i_block in range(0, C * blocks):
        i_chunk, o_inner = i_block // blocks, i_block % blocks * BT + tl.arange(0, BT)
        o_t, m_t = i_chunk * size + o_inner, o_inner < size
        o_active = (i_window * T + o_t)[:, None] * F + o_f[None, :]
        b_active = tl.load(p_active + o_active, mask=m_t[:, None] & m_f[None, :], other=0.0)
        b_active = tl.abs(b_active.to(tl.float32))
        b_square += tl.sum(b_active * b_active, axis=0)
        b_sum += tl.sum(b_active, axis=0)
        for i_k in range(0, K):
            b_advantage = tl.load(p_advantages + (i_window * K + i_k) * T + o_t, mask=m_t, other=0.0)
            b_kept = kept(
                p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
                (i_window * K + i_k) * C + i_chunk, first + o_f, m_f, W, U, G, DRAWN, ORDERS,
            )  # fmt: skip
            b_product += tl.where(b_kept, tl.sum(b_advantage[:, None] * b_active, axis=0), 0.0)
    o_out = i_window * F + o_f
    tl.store(p_products + o_out, b_product, mask=m_f)
    tl.store(p_squares + o_out, b_square, mask=m_f)
    tl.store(p_sums + o_out, b_sum, mask=m_f)


def activity_sums(
    active_BTF: torch.Tensor, advantages_BKT: torch.Tensor, masks: PackedMasks | DrawnMasks
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums over the tokens of each window, float32 ``[B, F]``, with r = ``|active_BTF|``, what channels hand on.

    They are of advantage times mask times r, over masks too; of r^2; and of r.

    Args:
        masks: B * K * C of F channels, with C chunks that divide the tokens.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    (windows, tokens, channels), num_masks = active_BTF.shape, advantages_BKT.shape[1]
    chunks, left = divmod(len(masks), max(1, windows * num_masks))
    fits = advantages_BKT.shape == (windows, num_masks, tokens) and masks.size == channels
    if not fits or left or not chunks or tokens % chunks:
        raise ValueError(
            f"activities {tuple(active_BTF.shape)}, advantages {tuple(advantages_BKT.shape)} and {len(masks)} masks of "
            f"{masks.size} channels do not fit each other"
        )
    products_BF, squares_BF, sums_BF = torch.empty(3, windows, channels, dtype=torch.float32, device=active_BTF.device)
    block = min(32, triton.next_power_of_2(tokens // chunks))
    with torch.cuda.device_of(active_BTF):
        _activity_kernel[(windows, triton.cdiv(channels, 128))](
            active_BTF.contiguous(), advantages_BKT.float().contiguous(), products_BF, squares_BF, sums_BF,
            **arguments(masks), K=num_masks, C=chunks, T=tokens, F=channels, BT=block, BF=128,
        )  # fmt: skip
    return products_BF, squares_BF, sums_BF
