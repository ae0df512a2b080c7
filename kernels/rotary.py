"""Triton: rotary embedding in one pass (Su et al., 2021, eq. 34, with the halves of a head as pairs, as in Llama).

Letters: R rows, H heads, T tokens, C entries of a head. For prefixes see ``draw.py``.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _rotary_kernel(
    p_x, p_cos, p_sin, p_y, T, s_xr, s_xh, s_xt, s_yr, s_yh, s_yt, s_ar, s_at,
    HALF: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_head, i_row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t, o_c = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BC)
    m_c = (o_t < T)[:, None] & (o_c < HALF)[None, :]
    o_x = i_row * s_xr + i_head * s_xh + o_t[:, None] * s_xt + o_c[None, :]
    o_y = i_row * s_yr + i_head * s_yh + o_t[:, None] * s_yt + o_c[None, :]
    o_a = i_row * s_ar + o_t[:, None] * s_at + o_c[None, :]
    b_low = tl.load(p_x + o_x, mask=m_c, other=0.0).to(tl.float32)
    b_high = tl.load(p_x + o_x + HALF, mask=m_c, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + o_a, mask=m_c, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_a, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, (b_low * b_cos - b_high * b_sin).to(p_y.dtype.element_ty), mask=m_c)
    b_cos = tl.load(p_cos + o_a + HALF, mask=m_c, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_a + HALF, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_y + o_y + HALF, (b_high * b_cos + b_low * b_sin).to(p_y.dtype.element_ty), mask=m_c)


def rotary(x_RHTC: torch.Tensor, cos_RTC: torch.Tensor, sin_RTC: torch.Tensor) -> torch.Tensor:
    """``x * cos + [-high, low] * sin`` of the halves ``[low, high]`` of each head, ``[R, H, T, C]``, with x's strides.

    Args:
        cos_RTC, sin_RTC: of equally many rows, or of one for all.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    rows, heads, tokens, size = x_RHTC.shape
    if size % 2 or cos_RTC.shape != sin_RTC.shape or cos_RTC.shape not in ((rows, tokens, size), (1, tokens, size)):
        raise ValueError(
            f"cosines {tuple(cos_RTC.shape)} and sines {tuple(sin_RTC.shape)} do not fit heads {tuple(x_RHTC.shape)}"
        )
    x_RHTC = x_RHTC if x_RHTC.stride(-1) == 1 else x_RHTC.contiguous()
    cos_RTC, sin_RTC = cos_RTC.contiguous(), sin_RTC.contiguous()
    y_RHTC = torch.empty_like(x_RHTC)
    block = min(32, triton.next_power_of_2(tokens))
    with torch.cuda.device_of(x_RHTC):  # which is where Triton launches a kernel
        _rotary_kernel[(triton.cdiv(tokens, block), heads, rows)](
            x_RHTC, cos_RTC, sin_RTC, y_RHTC, tokens, *x_RHTC.stride()[:3], *y_RHTC.stride()[:3],
            0 if len(cos_RTC) == 1 else cos_RTC.stride(0), size, HALF=size // 2, BT=block,
            BC=triton.next_power_of_2(size // 2),
        )  # fmt: skip
    return y_RHTC
