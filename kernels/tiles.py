"""How kernels cut their work, by what the GPU has room for, and how precisely they multiply."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton


def precision(x: torch.Tensor) -> str:
    """Precision of products: float32 ones are not rounded to fewer bits, unless torch was told that they may be."""
    if x.dtype != torch.float32:
        return "ieee"  # it means nothing for those, but not every compiler takes another
    try:
        rounded = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # it was set for each kind of device by itself
        rounded = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if rounded else "ieee"


def block_of(size: int, most: int) -> int:
    """The power of two that holds ``size``, up to ``most``; at least what a matrix product takes."""
    return max(16, min(most, triton.next_power_of_2(size)))


_READING_SHARED = (9, 10, 11)  # generations of cards


@dataclass(frozen=True)
class Card:
    """What a launch must know of a GPU.

    Attributes:
        shared: bytes of shared memory that a block of threads may have.
        idle_stages: of a loop's stages, how many have no buffer: one, but for products that read shared memory
            themselves (Hopper, and Blackwell in data centres).
    """

    shared: int
    idle_stages: int = 1

    def fitting(self, block: int, needed: Callable[[int], int]) -> int:
        """The block, halved until the bytes that it needs are there, or products take no smaller one."""
        while block > 16 and needed(block) > self.shared:
            block //= 2
        return block


@functools.cache
def card_of(device: torch.device) -> Card:
    """That of the device, as Triton sees it; for interpreted kernels one on which everything fits."""
    if device.type != "cuda":
        return Card(2**20)
    index = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return Card(int(shared), idle_stages(torch.cuda.get_device_capability(device)[0]))


def idle_stages(generation: int) -> int:
    """Those of a card by its compute capability."""
    return int(generation not in _READING_SHARED)


@dataclass(frozen=True)
class Tiles:
    """How a kernel of matrix products cuts its work.

    Attributes:
        rows, columns: size of a tile, at most.
        group: rows of tiles that go together, column by column, so that weights that they share are in the cache.
        products: how many of a tile are summed at the same time.
        buffers: blocks of what is summed over that are on their way at once, at most.
        listed: whether what is read stands in a list, which must be read before it.
        masked: whether rows are masked between being read and multiplied, for which some cards need room once more.
    """

    rows: int = 128
    columns: int = 128
    group: int = 16
    products: int = 1
    warps: int = 8
    buffers: int = 3
    listed: bool = False
    masked: bool = False

    def options(self, x: torch.Tensor, rows: int, columns: int, inner: int) -> dict[str, int]:
        """Options of a launch: blocks not much larger than the work, 128 bytes of what is summed over at a time."""
        high, wide = block_of(rows, self.rows), block_of(columns, self.columns)
        card = card_of(x.device)
        deep = block_of(inner, 128 // x.element_size())
        room = card.shared - 4096 - self.masked * card.idle_stages * high * deep * x.element_size()
        buffers = room // ((high + self.products * wide) * deep * x.element_size())
        if buffers < 2 and wide > 64:  # one at a time would have to be waited for
            wide //= 2
            buffers = room // ((high + self.products * wide) * deep * x.element_size())
        buffers = max(1, min(self.buffers, buffers))
        stages = card.idle_stages + (2 * buffers - 1 if self.listed else buffers)  # the list has some, too
        return {
            "BM": high, "BN": wide, "BK": deep, "GROUP": self.group, "num_warps": self.warps, "num_stages": stages,
        }  # fmt: skip
