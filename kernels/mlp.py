"""Triton: the parts of an MLP that are not a plain matrix product.

- ``masked_activation`` makes the input of the down projection out of what gate and up projection give, and masks it:
  a few operations on each entry, in one pass, so that the three products are left to the library that knows the card.
- ``hidden_of_kept`` computes those entries that each mask keeps, side by side, from the weights of these alone; what
  ``linear_from_kept`` then makes of them is the output of the MLP, all in work proportional to what is kept.

Letters: R rows, T tokens a row, D hidden size, F channels, M masks. For prefixes see ``draw.py``.
"""

from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from bernprune.kernels.draw import arguments, kept
from bernprune.kernels.linear import (
    add_product,
    biased,
    check,
    linear_from_kept,
    store,
    tile_under,
)
from bernprune.kernels.masks import DrawnMasks, KeptUnits, PackedMasks, rows_per_mask
from bernprune.kernels.tiles import Tiles, precision

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
HIDDEN = Tiles(products=2, buffers=4)


@triton.jit
def activated(b_x, ACTIVATION: tl.constexpr):
    """The activation of a block in float32."""
    if ACTIVATION == "silu":
        return b_x * tl.sigmoid(b_x)
    elif ACTIVATION == "gelu":
        return 0.5 * b_x * (1.0 + tl.erf(b_x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # tanh(z) = 2 sigmoid(2 z) - 1
        return b_x * tl.sigmoid(1.5957691216057308 * (b_x + 0.044715 * b_x * b_x * b_x))
    else:
        return tl.maximum(b_x, 0.0)


@triton.jit
def _activation_kernel(
    p_gate, p_up, p_hidden, p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
    tokens, F, per_mask, W, U, G, first,
    BM: tl.constexpr, BF: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr,
    DRAWN: tl.constexpr, ORDERS: tl.constexpr,
):  # fmt: skip
    o_m, o_f = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = (o_m < tokens)[:, None] & (o_f < F)[None, :]
    o_h = o_m[:, None] * F + o_f[None, :]
    b_hidden = activated(tl.load(p_gate + o_h, mask=m_f, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        # As torch does it: what is activated has its dtype's precision before it is multiplied.
        b_hidden = b_hidden.to(p_hidden.dtype.element_ty).to(tl.float32)
        b_hidden *= tl.load(p_up + o_h, mask=m_f, other=0.0).to(tl.float32)
    if MASKED:
        b_kept = kept(
            p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
            tl.where(o_m < tokens, o_m // per_mask, 0)[:, None], first + o_f[None, :], m_f, W, U, G, DRAWN, ORDERS,
        )  # fmt: skip
        b_hidden = tl.where(b_kept, b_hidden, 0.0)
    tl.store(p_hidden + o_h, b_hidden.to(p_hidden.dtype.element_ty), mask=m_f)


def masked_activation(
    gate_RTF: torch.Tensor,
    up_RTF: torch.Tensor | None,
    masks: PackedMasks | DrawnMasks | None,
    activation: Activation,
) -> torch.Tensor:
    """``act(gate) * up * mask``, ``[R, T, F]``, written over ``gate_RTF``; what is masked may be NaN.

    Args:
        up_RTF: None for an MLP without gate.
        masks: of F channels, R a multiple of their number; None keeps everything.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    rows, tokens, channels = gate_RTF.shape
    if not gate_RTF.is_contiguous() or (up_RTF is not None and not up_RTF.is_contiguous()):
        raise ValueError("gate and up must be contiguous, as projections leave them")
    if (up_RTF is not None and up_RTF.shape != gate_RTF.shape) or (masks is not None and masks.size != channels):
        other = None if up_RTF is None else tuple(up_RTF.shape)
        units = "" if masks is None else f", with masks of {masks.size} channels"
        raise ValueError(f"gate {tuple(gate_RTF.shape)} and up {other}{units} do not fit each other")
    given = PackedMasks(torch.empty(1, 1, dtype=torch.int32, device=gate_RTF.device), 1) if masks is None else masks
    per_mask = 1 if masks is None else rows_per_mask(rows, masks) * tokens
    block = min(512, triton.next_power_of_2(channels))
    height = 2048 // block
    _activation_kernel[(triton.cdiv(rows * tokens, height), triton.cdiv(channels, block))](
        gate_RTF, gate_RTF if up_RTF is None else up_RTF, gate_RTF, **arguments(given), tokens=rows * tokens,
        F=channels, per_mask=per_mask, BM=height, BF=block,
        ACTIVATION=activation, GATED=up_RTF is not None, MASKED=masks is not None,
    )  # fmt: skip
    return gate_RTF


@triton.jit
def _hidden_kernel(
    p_x, p_gate, p_up, p_gate_bias, p_up_bias, p_hidden, p_index, p_count,
    M, per_mask, D, F, s_gf, s_gd, s_uf, s_ud,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, GATE_BIASED: tl.constexpr, UP_BIASED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_mask, i_m, i_n = tile_under(tl.program_id(0), M, tl.cdiv(per_mask, BM), tl.cdiv(F, BN), GROUP)
    count = tl.load(p_count + i_mask)
    if i_n * BN < count:
        o_t, o_j = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN)
        m_m, m_n = o_t < per_mask, o_j < count
        o_m = i_mask * per_mask + o_t
        o_f = tl.load(p_index + i_mask * F + o_j, mask=m_n, other=0).to(tl.int64)
        b_gate, b_up = tl.zeros((BM, BN), dtype=tl.float32), tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, D, BK):
            o_k = start + tl.arange(0, BK)
            m_k = o_k < D
            m_w = m_k[:, None] & m_n[None, :]
            b_x = tl.load(p_x + o_m[:, None] * D + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_gate + o_f[None, :] * s_gf + o_k[:, None] * s_gd, mask=m_w, other=0.0)
            b_gate = add_product(b_gate, b_x, b_w, PRECISION)
            if GATED:
                b_w = tl.load(p_up + o_f[None, :] * s_uf + o_k[:, None] * s_ud, mask=m_w, other=0.0)
                b_up = add_product(b_up, b_x, b_w, PRECISION)
        b_hidden = activated(biased(p_gate_bias, b_gate, o_f, m_n, GATE_BIASED), ACTIVATION)
        if GATED:
            b_hidden *= biased(p_up_bias, b_up, o_f, m_n, UP_BIASED)
        store(p_hidden, b_hidden, o_m, o_j, m_m, m_n, F)


def hidden_of_kept(
    x_RTD: torch.Tensor,
    kept: KeptUnits,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor | None,
    *,
    activation: Activation,
    gate_bias_F: torch.Tensor | None = None,
    up_bias_F: torch.Tensor | None = None,
) -> torch.Tensor:
    """``act(x G') * (x U')`` of the kept channels, ``[R, T, F]``: entry j is that of a mask's j-th kept one.

    What lies behind a mask's last one is not written.

    Args:
        kept: of F channels; R is a multiple of the number of masks.
        up_FD: None for an MLP without gate.

    Raises:
        ValueError: sizes that do not fit each other, or a dtype that kernels do not take.
    """
    check(x_RTD, gate_FD, gate_bias_F)
    if up_FD is not None:
        check(x_RTD, up_FD, up_bias_F)
    (rows, tokens, width), channels = x_RTD.shape, len(gate_FD)
    if kept.size != channels or (up_FD is not None and up_FD.shape != gate_FD.shape):
        raise ValueError(f"masks of {kept.size} channels, or up, do not fit a gate {tuple(gate_FD.shape)}")
    per_mask = rows_per_mask(rows, kept) * tokens
    x_RTD = x_RTD.contiguous()
    hidden_RTF = x_RTD.new_empty(rows, tokens, channels)
    up = gate_FD if up_FD is None else up_FD
    options = HIDDEN.options(x_RTD, per_mask, channels, width)
    grid = (len(kept) * triton.cdiv(per_mask, options["BM"]) * triton.cdiv(channels, options["BN"]),)
    _hidden_kernel[grid](
        x_RTD, gate_FD, up, gate_bias_F, up_bias_F, hidden_RTF, kept.index_MN, kept.count_M,
        M=len(kept), per_mask=per_mask, D=width, F=channels,
        s_gf=gate_FD.stride(0), s_gd=gate_FD.stride(1), s_uf=up.stride(0), s_ud=up.stride(1),
        ACTIVATION=activation, GATED=up_FD is not None, GATE_BIASED=gate_bias_F is not None,
        UP_BIASED=up_bias_F is not None, PRECISION=precision(x_RTD), **options,
    )  # fmt: skip
    return hidden_RTF


def masked_mlp(
    x_RTD: torch.Tensor,
    masks: PackedMasks | DrawnMasks | KeptUnits | None,
    gate_FD: torch.Tensor,
    up_FD: torch.Tensor | None,
    down_DF: torch.Tensor,
    *,
    activation: Activation = "silu",
    gate_bias_F: torch.Tensor | None = None,
    up_bias_F: torch.Tensor | None = None,
    down_bias_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(act(x G') * (x U') * mask) D'``, ``[R, T, D]``; of masks given as lists only what is kept is computed.

    Args:
        masks: of F channels, R a multiple of their number; None keeps everything.
        up_FD: None for an MLP without gate.

    Raises:
        ValueError: sizes that do not fit each other, an unknown activation, or a dtype that kernels do not take.
    """
    if activation not in get_args(Activation):
        raise ValueError(f"activation {activation!r} has no kernel; known are {', '.join(get_args(Activation))}")
    biases = {"gate_bias_F": gate_bias_F, "up_bias_F": up_bias_F}
    if isinstance(masks, KeptUnits):
        hidden_RTF = hidden_of_kept(x_RTD, masks, gate_FD, up_FD, activation=activation, **biases)
        return linear_from_kept(hidden_RTF, masks, down_DF, down_bias_D, compact=True)
    gate_RTF = torch.nn.functional.linear(x_RTD, gate_FD, gate_bias_F)
    up_RTF = None if up_FD is None else torch.nn.functional.linear(x_RTD, up_FD, up_bias_F)
    hidden_RTF = masked_activation(gate_RTF, up_RTF, masks, activation)
    return torch.nn.functional.linear(hidden_RTF, down_DF, down_bias_D)
