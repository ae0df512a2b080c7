"""Masks in the forms that kernels take. Plain torch; M masks of N units, and 1 keeps.

- ``PackedMasks``: bits, 32 units a word: a step's masks of a large model take megabytes instead of gigabytes.
- ``DrawnMasks``: nothing stored; a kernel makes each bit from a random word and a threshold.
- ``KeptUnits``: for each mask the list of what it keeps, for kernels that do no more work than that.

Rows of a batch come in the order of their masks: of R rows under M masks, the first R / M are under the first.
"""

from dataclasses import dataclass, replace

import torch

BITS = 32  # of a word
ORDERS = 64  # rows of shifts; unit u takes row u % ORDERS

# Eight units at a time, a byte each in one number of 64 bits (as in "Bit Twiddling Hacks", Anderson, 2005).
_EVERY = 0x0101010101010101  # times a byte, the byte in all eight places
_OWN = 0x8040201008040201 - 2**64  # of place i, bit i
_GATHER = 0x0102040810204080  # times eight bytes of 0 or 1, byte i as bit i of the highest


@dataclass(frozen=True)
class PackedMasks:
    """Masks as bits, the lowest of a word its first unit's; a view of some units shares the words.

    Attributes:
        words_MW: int32.
        first: the number of the view's first unit.
        size: units in the view.
        listed: whether kernels had better go by lists of what is kept than compute all, as masks keep so little.
    """

    words_MW: torch.Tensor
    size: int
    first: int = 0
    listed: bool = False

    @classmethod
    def of(cls, masks_MN: torch.Tensor) -> "PackedMasks":
        """From masks of any dtype, on their device; what is not zero is kept."""
        count, size = masks_MN.shape
        bits = masks_MN.new_zeros(count, max(1, -(-size // BITS)) * BITS, dtype=torch.uint8)
        bits[:, :size] = masks_MN.bool()
        packed = bits.view(torch.int64).mul_(_GATHER).bitwise_right_shift_(56)
        return cls(packed.to(torch.uint8).view(torch.int32), size)

    def __len__(self) -> int:
        return len(self.words_MW)

    def masks(self, start: int, stop: int) -> "PackedMasks":
        """Some of the masks."""
        return replace(self, words_MW=self.words_MW[start:stop])

    def units(self, start: int, stop: int) -> "PackedMasks":
        """The same masks of some of the units."""
        return replace(self, first=self.first + start, size=stop - start)

    def chosen(self, index_M: torch.Tensor) -> "PackedMasks":
        """Masks by their indices, in words of their own."""
        low, high = self._words()
        return replace(self, words_MW=self.words_MW[index_M, low:high], first=self.first - low * BITS)

    def _words(self) -> tuple[int, int]:
        return self.first // BITS, -(-(self.first + self.size) // BITS)

    def unpack(self) -> torch.Tensor:
        """Bool ``[M, N]``."""
        low, high = self._words()
        bytes_MY = self.words_MW[:, low:high].contiguous().view(torch.uint8).long()
        kept_MU = bytes_MY.mul_(_EVERY).bitwise_and_(_OWN).view(torch.uint8).bool()
        start = self.first - low * BITS
        return kept_MU[:, start : start + self.size]


@dataclass(frozen=True)
class DrawnMasks:
    """Unit u of a mask is kept if ``(word + shift) mod 2^32 < threshold``.

    The word is that of counter (u // 4, row of the mask, low and high half of the step), number u % 4 of the four that
    Philox4x32-10 gives; see ``bernprune.policy.counters`` and ``bernprune.policy.masks``, the twin in plain torch.

    Attributes:
        header: key, low and high half of the step; int64.
        rows_M2: each mask's row of random words, and its place among the masks that share it; int64.
        levels_MG: which of the three rows of thresholds each mask takes for the units of a group; int8.
        groups_U: each unit's group, int32. U counts all units, of the view or not.
        thresholds_3U: int64, from 0 to 2^32.
        shifts_KO: shift of each mask that shares words, for units u % ORDERS; int64.
        first: the number of the view's first unit.
        size: units in the view.
    """

    header: torch.Tensor
    rows_M2: torch.Tensor
    levels_MG: torch.Tensor
    groups_U: torch.Tensor
    thresholds_3U: torch.Tensor
    shifts_KO: torch.Tensor
    size: int
    first: int = 0

    def __len__(self) -> int:
        return len(self.rows_M2)

    def masks(self, start: int, stop: int) -> "DrawnMasks":
        """Some of the masks."""
        return replace(self, rows_M2=self.rows_M2[start:stop], levels_MG=self.levels_MG[start:stop])

    def units(self, start: int, stop: int) -> "DrawnMasks":
        """The same masks of some of the units."""
        return replace(self, first=self.first + start, size=stop - start)


@dataclass(frozen=True)
class KeptUnits:
    """Lists of the units that each mask keeps, in rising order.

    Attributes:
        index_MN: int32; what stands behind a mask's count means nothing.
        count_M: int32.
    """

    index_MN: torch.Tensor
    count_M: torch.Tensor

    @classmethod
    def of(cls, masks_MN: torch.Tensor) -> "KeptUnits":
        """From masks of any dtype, on their device; what is not zero is kept."""
        kept_MN = masks_MN != 0
        index_MN = kept_MN.byte().argsort(dim=1, descending=True, stable=True)
        return cls(index_MN.int(), kept_MN.sum(1, dtype=torch.int32))

    def __len__(self) -> int:
        return len(self.count_M)

    @property
    def size(self) -> int:
        """Units in all, kept or not."""
        return self.index_MN.shape[1]

    def unpack(self) -> torch.Tensor:
        """Bool ``[M, N]``."""
        places_N = torch.arange(self.size, device=self.index_MN.device)
        index_MN = self.index_MN.long().where(places_N < self.count_M[:, None], self.size)
        kept_MN = torch.zeros(len(self), self.size + 1, dtype=torch.bool, device=index_MN.device)
        return kept_MN.scatter_(1, index_MN, True)[:, :-1]


Masks = PackedMasks | DrawnMasks | KeptUnits


def rows_per_mask(rows: int, masks: Masks) -> int:
    """Rows under each mask. Raises ``ValueError`` if not every mask has equally many."""
    if not len(masks) or rows % len(masks):
        raise ValueError(f"{rows} rows cannot be shared out equally among {len(masks)} masks")
    return rows // len(masks)
