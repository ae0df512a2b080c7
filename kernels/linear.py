"""Triton: linear layers whose input or output units are masked, every row of the batch by its own mask.

For units of any width (a channel has 1 entry, a kv group the entries of its heads):

- ``masked_linear`` computes all, and masks the input while it loads it, also by masks that are drawn meanwhile;
- ``cut`` masks it in a pass of its own, for a product of the library's to follow, which takes half as long (H200);
- ``linear_from_kept`` reads only what each mask keeps of its input, and the weights that belong to that;
- ``linear_to_kept`` computes only the outputs that each mask keeps, and writes zeros for the others.

All sum in float32. Letters: R rows, T tokens a row, E input width, D output width, M masks, N units. For prefixes see
``draw.py``; offsets of rows and of masks have 64 bits, those within a row or a weight 32.
"""

import os

import torch
import triton
import triton.language as tl
from bernprune.kernels.draw import arguments, kept, kept_in_words
from bernprune.kernels.masks import DrawnMasks, KeptUnits, Masks, PackedMasks, rows_per_mask
from bernprune.kernels.tiles import Tiles, precision

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
DTYPES = torch.float32, torch.bfloat16, torch.float16


def prepare(
    x_RTE: torch.Tensor, masks: Masks, weight_DE: torch.Tensor, bias_D: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The input as a kernel reads it, the output that it is to fill, ``[R, T, D]``, and tokens under each mask.

    Raises:
        ValueError: sizes that do not fit each other, or a dtype that kernels do not take.
    """
    check(x_RTE, weight_DE, bias_D)
    rows, tokens, _ = x_RTE.shape
    return x_RTE.contiguous(), x_RTE.new_empty(rows, tokens, len(weight_DE)), rows_per_mask(rows, masks) * tokens


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises ``ValueError`` for sizes that do not fit each other, and a dtype that no kernel takes, or several."""
    dtypes = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"one dtype of {', '.join(map(str, DTYPES))} is needed, but got {names}")
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"a weight {tuple(weight.shape)} does not fit an input {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a bias {tuple(bias.shape)} does not fit a weight {tuple(weight.shape)}")
    if bias is not None and not bias.is_contiguous():
        raise ValueError(f"a bias must lie in memory as it is read, but has stride {bias.stride(0)}")


MASKED, TO_KEPT = Tiles(columns=256, group=8, masked=True), Tiles()
FROM_KEPT = Tiles(columns=256, listed=True)


@triton.jit
def tile_of(i_tile, tiles_M, tiles_N, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows go together, so that what they share stays in the cache."""
    in_group = GROUP * tiles_N
    first = i_tile // in_group * GROUP
    rows = min(tiles_M - first, GROUP)
    return first + i_tile % in_group % rows, i_tile % in_group // rows


@triton.jit
def tile_under(i_tile, M, tiles_T, tiles_N, GROUP: tl.constexpr):
    """Mask of a tile, which of its tiles of tokens, and column; tiles of different masks go together, too."""
    i_row, i_n = tile_of(i_tile, M * tiles_T, tiles_N, GROUP)
    return (i_row // tiles_T).to(tl.int64), i_row % tiles_T, i_n


@triton.jit
def add_product(b_sum, b_a, b_b, PRECISION: tl.constexpr):
    """``b_sum + b_a @ b_b`` in float32."""
    if INTERPRETED:  # Triton's interpreter would multiply the bits of bfloat16 numbers
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision=PRECISION)


@triton.jit
def biased(p_bias, b_sum, o_n, m_n, BIASED: tl.constexpr):
    """A block of sums, with the bias of its columns if there is one."""
    if BIASED:
        b_sum += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    return b_sum


@triton.jit
def store(p_y, b_sum, o_m, o_n, m_m, m_n, D):
    """A block of sums to rows and columns of an output of width D, in its dtype."""
    o_y = o_m[:, None] * D + o_n[None, :]
    tl.store(p_y + o_y, b_sum.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def _masked_kernel(
    p_x, p_w, p_bias, p_y, p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
    tokens, D, E, per_mask, s_x, s_wd, s_we, W, U, G, first,
    UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    BIASED: tl.constexpr, DRAWN: tl.constexpr, ORDERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of(tl.program_id(0), tl.cdiv(tokens, BM), tl.cdiv(D, BN), GROUP)
    o_m, o_n = i_m.to(tl.int64) * BM + tl.arange(0, BM), i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_m, m_n = o_m < tokens, o_n < D
    b_mask = tl.where(m_m, o_m // per_mask, 0)
    b_sum = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, E, BK):
        o_k = start + tl.arange(0, BK)
        m_k = o_k < E
        if DRAWN:
            b_kept = kept(
                p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts,
                b_mask[:, None], first + o_k[None, :] // UNIT, m_k[None, :], W, U, G, DRAWN, ORDERS,
            )  # fmt: skip
        else:
            b_kept = kept_in_words(p_bits + b_mask * W, first + start // UNIT, first + o_k // UNIT, W, BK)
        b_x = tl.load(p_x + o_m[:, None] * s_x + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_x = tl.where(b_kept, b_x, 0.0)  # and not a mask of the load, which would then go entry by entry
        b_w = tl.load(p_w + o_n[None, :] * s_wd + o_k[:, None] * s_we, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_sum = add_product(b_sum, b_x, b_w, PRECISION)
    b_sum = biased(p_bias, b_sum, o_n, m_n, BIASED)
    store(p_y, b_sum, o_m, o_n, m_m, m_n, D)


def masked_linear(
    x_RTE: torch.Tensor,
    masks: PackedMasks | DrawnMasks,
    weight_DE: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    unit_width: int = 1,
) -> torch.Tensor:
    """``(x * mask) W' + b``, ``[R, T, D]``; what is masked may be NaN.

    Args:
        masks: of ``E / unit_width`` units; R is a multiple of their number.

    Raises:
        ValueError: sizes that do not fit each other, or a dtype that kernels do not take.
    """
    outputs, width = weight_DE.shape
    x_RTE, y_RTD, per_mask = prepare(x_RTE, masks, weight_DE, bias_D)
    check_units(masks.size, unit_width, width)
    tokens = per_mask * len(masks)
    options = MASKED.options(x_RTE, tokens, outputs, width)
    grid = (triton.cdiv(tokens, options["BM"]) * triton.cdiv(outputs, options["BN"]),)
    _masked_kernel[grid](
        x_RTE, weight_DE, bias_D, y_RTD, **arguments(masks), tokens=tokens, D=outputs, E=width,
        per_mask=per_mask, s_x=width, s_wd=weight_DE.stride(0), s_we=weight_DE.stride(1), UNIT=unit_width,
        BIASED=bias_D is not None, PRECISION=precision(x_RTE), **options,
    )  # fmt: skip
    return y_RTD


@triton.jit
def _cut_kernel(
    p_x, p_y, p_bits, tokens, E, per_mask, W, first, UNIT: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    o_m, o_e = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.program_id(1) * BE + tl.arange(0, BE)
    m_e = (o_m < tokens)[:, None] & (o_e < E)[None, :]
    o_x = o_m[:, None] * E + o_e[None, :]
    o_unit = first + o_e[None, :] // UNIT
    b_mask = tl.where(o_m < tokens, o_m // per_mask, 0)[:, None]
    b_bits = tl.load(p_bits + b_mask * W + o_unit // 32, mask=m_e, other=0)
    b_x = tl.load(p_x + o_x, mask=m_e, other=0.0)
    tl.store(p_y + o_x, tl.where(((b_bits >> (o_unit % 32)) & 1) != 0, b_x, 0.0), mask=m_e)


def cut(x_RTE: torch.Tensor, masks: PackedMasks, *, unit_width: int = 1) -> torch.Tensor:
    """``x * mask``, ``[R, T, E]``; what is masked may be NaN.

    Args:
        masks: of ``E / unit_width`` units; R is a multiple of their number.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    rows, tokens, width = x_RTE.shape
    check_units(masks.size, unit_width, width)
    per_mask = rows_per_mask(rows, masks) * tokens
    x_RTE = x_RTE.contiguous()
    y_RTE = torch.empty_like(x_RTE)
    block = min(512, triton.next_power_of_2(width))
    height = 2048 // block
    _cut_kernel[(triton.cdiv(rows * tokens, height), triton.cdiv(width, block))](
        x_RTE, y_RTE, masks.words_MW, rows * tokens, width, per_mask, masks.words_MW.shape[1], masks.first,
        UNIT=unit_width, BM=height, BE=block,
    )  # fmt: skip
    return y_RTE


@triton.jit
def _add_kept(
    b_sum, p_x, p_w, p_index, start, entries, s_w,
    UNIT: tl.constexpr, COMPACT: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    m_m, m_n,
):  # fmt: skip
    """``b_sum`` plus the products of BK kept entries from ``start`` on; a WHOLE block of them needs no mask.

    With a mask whose last place is not known to be a multiple of anything, entries would be read one by one.
    """
    o_j = start + tl.arange(0, BK)
    m_k = o_j < entries
    o_unit = tl.load(p_index + o_j // UNIT) if WHOLE else tl.load(p_index + o_j // UNIT, mask=m_k, other=0)
    o_k = o_unit * UNIT + o_j % UNIT
    if UNIT % BK == 0:  # of one unit, so they lie side by side
        o_k = tl.max_contiguous(tl.multiple_of(o_k, BK), BK)
    o_x = o_j if COMPACT else o_k
    if WHOLE:
        b_x = tl.load(p_x[:, None] + o_x[None, :], mask=m_m[:, None], other=0.0)
        b_w = tl.load(p_w[None, :] + o_k.to(tl.int64)[:, None] * s_w, mask=m_n[None, :], other=0.0)
    else:
        b_x = tl.load(p_x[:, None] + o_x[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        m_w = m_k[:, None] & m_n[None, :]
        b_w = tl.load(p_w[None, :] + o_k.to(tl.int64)[:, None] * s_w, mask=m_w, other=0.0)
    return add_product(b_sum, b_x, b_w, PRECISION)


@triton.jit
def _from_kept_kernel(
    p_x, p_w, p_bias, p_y, p_index, p_count,
    M, per_mask, D, N, s_x, s_wd, s_we,
    UNIT: tl.constexpr, COMPACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_mask, i_m, i_n = tile_under(tl.program_id(0), M, tl.cdiv(per_mask, BM), tl.cdiv(D, BN), GROUP)
    o_t, o_n = i_m * BM + tl.arange(0, BM), i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_m, m_n = o_t < per_mask, o_n < D
    o_m = i_mask * per_mask + o_t
    p_index += i_mask * N
    entries = tl.load(p_count + i_mask) * UNIT
    b_sum = tl.zeros((BM, BN), dtype=tl.float32)
    p_x += o_m * s_x
    p_w += o_n * s_wd
    whole = entries // BK * BK
    for start in range(0, whole, BK):
        b_sum = _add_kept(b_sum, p_x, p_w, p_index, start, entries, s_we, UNIT, COMPACT, BK, True, PRECISION, m_m, m_n)
    if UNIT % BK != 0:  # noqa: SIM102 - known when it is compiled
        if whole < entries:
            b_sum = _add_kept(
                b_sum, p_x, p_w, p_index, whole, entries, s_we, UNIT, COMPACT, BK, False, PRECISION, m_m, m_n
            )
    b_sum = biased(p_bias, b_sum, o_n, m_n, BIASED)
    store(p_y, b_sum, o_m, o_n, m_m, m_n, D)


def linear_from_kept(
    x_RTE: torch.Tensor,
    kept: KeptUnits,
    weight_DE: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    unit_width: int = 1,
    compact: bool = False,
) -> torch.Tensor:
    """``masked_linear`` in work proportional to what is kept.

    A column of the weight should lie side by side in memory (``weight_DE.stride(0) == 1``) where units are narrow.

    Args:
        kept: of ``E / unit_width`` units; R is a multiple of the number of masks.
        compact: entry j of an x holds its mask's j-th kept entry, and not entry j.

    Raises:
        ValueError: sizes that do not fit each other, or a dtype that kernels do not take.
    """
    outputs, width = weight_DE.shape
    x_RTE, y_RTD, per_mask = prepare(x_RTE, kept, weight_DE, bias_D)
    check_units(kept.size, unit_width, width)
    options = FROM_KEPT.options(x_RTE, per_mask, outputs, width)
    grid = (len(kept) * triton.cdiv(per_mask, options["BM"]) * triton.cdiv(outputs, options["BN"]),)
    _from_kept_kernel[grid](
        x_RTE, weight_DE, bias_D, y_RTD, kept.index_MN, kept.count_M, M=len(kept), per_mask=per_mask, D=outputs,
        N=kept.size, s_x=width, s_wd=weight_DE.stride(0), s_we=weight_DE.stride(1), UNIT=unit_width, COMPACT=compact,
        BIASED=bias_D is not None, PRECISION=precision(x_RTE), **options,
    )  # fmt: skip
    return y_RTD


@triton.jit
def _to_kept_kernel(
    p_x, p_w, p_bias, p_y, p_words,
    M, N, per_mask, D, E, W, first, s_wd, s_we,
    UNIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (UNIT + BN - 1) // BN  # of columns, each within one unit, which is computed or not
    i_mask, i_m, i_n = tile_under(tl.program_id(0), M, tl.cdiv(per_mask, BM), N * TILES, GROUP)
    i_unit, i_part = i_n // TILES, i_n % TILES
    o_part = i_part * BN + tl.arange(0, BN)
    m_n = o_part < UNIT
    o_n = (i_unit * UNIT + o_part).to(tl.int64)
    o_t = i_m * BM + tl.arange(0, BM)
    m_m = o_t < per_mask
    o_m = i_mask * per_mask + o_t
    unit = first + i_unit
    b_sum = tl.zeros((BM, BN), dtype=tl.float32)
    if ((tl.load(p_words + i_mask * W + unit // 32) >> (unit % 32)) & 1) != 0:
        for start in range(0, E, BK):
            o_k = start + tl.arange(0, BK)
            m_k = o_k < E
            b_x = tl.load(p_x + o_m[:, None] * E + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w + o_n[None, :] * s_wd + o_k[:, None] * s_we, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_sum = add_product(b_sum, b_x, b_w, PRECISION)
        b_sum = biased(p_bias, b_sum, o_n, m_n, BIASED)
    store(p_y, b_sum, o_m, o_n, m_m, m_n, D)


def linear_to_kept(
    x_RTD: torch.Tensor,
    masks: PackedMasks,
    weight_DE: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    unit_width: int,
) -> torch.Tensor:
    """``(x W' + b) * mask``, ``[R, T, D]``, in work proportional to what is kept; for units of many entries.

    Args:
        masks: of ``D / unit_width`` units; R is a multiple of their number.

    Raises:
        ValueError: sizes that do not fit each other, or a dtype that kernels do not take.
    """
    outputs, width = weight_DE.shape
    x_RTD, y_RTD, per_mask = prepare(x_RTD, masks, weight_DE, bias_D)
    check_units(masks.size, unit_width, outputs)
    options = TO_KEPT.options(x_RTD, per_mask, unit_width, width)
    columns = masks.size * triton.cdiv(unit_width, options["BN"])
    grid = (len(masks) * triton.cdiv(per_mask, options["BM"]) * columns,)
    _to_kept_kernel[grid](
        x_RTD, weight_DE, bias_D, y_RTD, masks.words_MW, M=len(masks), N=masks.size, per_mask=per_mask, D=outputs,
        E=width, W=masks.words_MW.shape[1], first=masks.first, s_wd=weight_DE.stride(0), s_we=weight_DE.stride(1),
        UNIT=unit_width, BIASED=bias_D is not None, PRECISION=precision(x_RTD), **options,
    )  # fmt: skip
    return y_RTD


def check_units(units: int, unit_width: int, width: int) -> None:
    """Raises ``ValueError`` if units do not fill a width."""
    if units * unit_width != width:
        raise ValueError(f"{units} units of width {unit_width} do not fill a width of {width}")
