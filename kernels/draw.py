"""Triton: bits of masks, read or drawn, for the other kernels; and masks in one form from another.

Prefixes: p_ pointer, b_ block in registers, o_ offsets, m_ mask of a block, i_ index of a program or a row; capitals
are sizes, B* those of blocks.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from bernprune.kernels.masks import BITS, ORDERS, DrawnMasks, KeptUnits, PackedMasks


@triton.jit
def _below(
    b_word, p_levels, p_groups, p_thresholds, p_shifts, b_mask, b_which, o_unit, m_unit, U, G, ORDERS: tl.constexpr
):  # fmt: skip
    """Whether words of random bits, uint32, are below their units' thresholds."""
    b_group = tl.load(p_groups + o_unit, mask=m_unit, other=0)
    b_level = tl.load(p_levels + b_mask * G + b_group).to(tl.int64)
    b_threshold = tl.load(p_thresholds + b_level * U + o_unit, mask=m_unit, other=0)
    b_shift = tl.load(p_shifts + b_which * ORDERS + o_unit % ORDERS)
    return (b_word + b_shift.to(tl.uint32)).to(tl.int64) < b_threshold


@triton.jit
def _random_words(p_header, b_row, b_four):
    """Four words of each four of units, uint32."""
    low, high = tl.load(p_header + 1).to(tl.uint32), tl.load(p_header + 2).to(tl.uint32)
    b_zero = (b_row * 0 + b_four * 0).to(tl.uint32)
    b_four, b_row = b_zero + b_four.to(tl.uint32), b_zero + b_row.to(tl.uint32)
    return tl.philox(tl.load(p_header), b_four, b_row, b_zero + low, b_zero + high)


@triton.jit
def kept(
    p_bits, p_rows, p_levels, p_groups, p_thresholds, p_shifts, b_mask, o_unit, m_unit, W, U, G,
    DRAWN: tl.constexpr, ORDERS: tl.constexpr,
):  # fmt: skip
    """Whether masks keep units, both blocks that broadcast; units that ``m_unit`` leaves out are not kept.

    ``p_bits`` is where the words of stored masks lie, W a mask, or the header of drawn ones.
    """
    if DRAWN:
        b_row, b_which = tl.load(p_rows + 2 * b_mask), tl.load(p_rows + 2 * b_mask + 1)
        word_0, word_1, word_2, word_3 = _random_words(p_bits, b_row, o_unit // 4)
        b_part = o_unit % 4
        b_word = tl.where(b_part < 2, tl.where(b_part == 0, word_0, word_1), tl.where(b_part == 2, word_2, word_3))
        return _below(b_word, p_levels, p_groups, p_thresholds, p_shifts, b_mask, b_which, o_unit, m_unit, U, G, ORDERS)
    b_bits = tl.load(p_bits + b_mask * W + o_unit // 32, mask=m_unit, other=0)
    return ((b_bits >> (o_unit % 32)) & 1) != 0


@triton.jit
def kept_in_words(p_words, first, o_unit, W, SIZE: tl.constexpr):
    """Whether stored masks keep units, ``[BM, SIZE]``, from the few words that hold these, of those at ``p_words``.

    Args:
        first: the lowest of the units, of which there are at most SIZE side by side.
    """
    b_bits = tl.zeros((p_words.shape[0], SIZE), dtype=tl.int32)
    for i_word in tl.static_range((SIZE + 30) // 32 + 1):
        word = first // 32 + i_word
        b_word = tl.load(p_words + tl.minimum(word, W - 1))
        b_bits = tl.where((o_unit // 32 == word)[None, :], b_word[:, None], b_bits)
    return ((b_bits >> (o_unit % 32)[None, :]) & 1) != 0


def _of_drawn(masks: DrawnMasks) -> dict[str, Any]:
    return {
        "p_rows": masks.rows_M2,
        "p_levels": masks.levels_MG,
        "p_groups": masks.groups_U,
        "p_thresholds": masks.thresholds_3U,
        "p_shifts": masks.shifts_KO,
        "U": masks.thresholds_3U.shape[1],
        "G": masks.levels_MG.shape[1],
        "ORDERS": ORDERS,
    }


def arguments(masks: PackedMasks | DrawnMasks) -> dict[str, Any]:
    """What ``kept`` takes of masks, by name, for a kernel that hands it on; and ``first``, from which units count."""
    if isinstance(masks, DrawnMasks):
        return {"p_bits": masks.header, **_of_drawn(masks), "W": 0, "first": masks.first, "DRAWN": True}
    words = masks.words_MW
    unused = dict.fromkeys(("p_rows", "p_levels", "p_groups", "p_thresholds", "p_shifts"), words)
    sizes = {"W": words.shape[1], "U": 0, "G": 0, "ORDERS": ORDERS}
    return {"p_bits": words, **unused, **sizes, "first": masks.first, "DRAWN": False}


@triton.jit
def _draw_kernel(
    p_words, p_header, p_rows, p_levels, p_groups, p_thresholds, p_shifts, W, U, G,
    BW: tl.constexpr, ORDERS: tl.constexpr,
):  # fmt: skip
    i_mask, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_row, b_which = tl.load(p_rows + 2 * i_mask), tl.load(p_rows + 2 * i_mask + 1)
    o_four = i_block * BW * 8 + tl.arange(0, BW * 8)
    word_0, word_1, word_2, word_3 = _random_words(p_header, b_row, o_four)
    b_word = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))  # [BW * 8, 2, 2]: 0, 1 and 2, 3 side by side
    b_word = tl.reshape(b_word, (BW, 32))
    o_word = i_block * BW + tl.arange(0, BW)
    o_unit = o_word[:, None] * 32 + tl.arange(0, 32)[None, :]
    b_kept = _below(
        b_word, p_levels, p_groups, p_thresholds, p_shifts, i_mask, b_which, o_unit, o_unit < U, U, G, ORDERS
    )
    b_bits = tl.sum(b_kept.to(tl.int32) << tl.arange(0, 32)[None, :], axis=1)
    tl.store(p_words + i_mask * W + o_word, b_bits, mask=o_word < W)


def draw(masks: DrawnMasks) -> PackedMasks:
    """The bits of all units of masks that are not stored; a view of the same units."""
    count, size = len(masks), len(masks.groups_U)
    width, block = -(-size // BITS), 16
    words_MW = torch.empty(count, width, dtype=torch.int32, device=masks.rows_M2.device)
    grid = count, triton.cdiv(width, block)
    _draw_kernel[grid](words_MW, masks.header, W=width, BW=block, **_of_drawn(masks))
    return PackedMasks(words_MW, masks.size, masks.first)


@triton.jit
def _list_kernel(p_bits, p_index, p_count, W, first, N, BN: tl.constexpr):
    i_mask = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, N, BN):
        o_unit = start + tl.arange(0, BN)
        m_unit = o_unit < N
        b_bits = tl.load(p_bits + i_mask * W + (first + o_unit) // 32, mask=m_unit, other=0)
        b_kept = (b_bits >> ((first + o_unit) % 32)) & 1
        o_place = count + tl.cumsum(b_kept, axis=0) - 1
        tl.store(p_index + i_mask * N + o_place, o_unit, mask=m_unit & (b_kept != 0))
        count += tl.sum(b_kept)
    tl.store(p_count + i_mask, count)


def list_kept(masks: PackedMasks) -> KeptUnits:
    """Lists of what each mask keeps of the view's units."""
    words_MW, size = masks.words_MW, masks.size
    index_MN = torch.empty(len(masks), size, dtype=torch.int32, device=words_MW.device)
    count_M = torch.empty(len(masks), dtype=torch.int32, device=words_MW.device)
    _list_kernel[(len(masks),)](words_MW, index_MN, count_M, words_MW.shape[1], masks.first, size, BN=1024)
    return KeptUnits(index_MN, count_M)
