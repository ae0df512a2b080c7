"""What the tests of kernels share: sizes that fit no block, masks at their extremes, and rounded random numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from bernprune.kernels.masks import KeptUnits, PackedMasks
from tolerances import CHAIN, LOGITS, assert_close

DTYPES = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Sizes:
    """Of one call: K masks of N units of some width, each for some rows of T tokens; an output width D."""

    masks: int
    rows: int  # under each mask
    tokens: int
    units: int
    unit_width: int
    outputs: int

    def __str__(self) -> str:
        return f"K{self.masks}x{self.rows}-T{self.tokens}-N{self.units}x{self.unit_width}-D{self.outputs}"

    @property
    def batch(self) -> tuple[int, int]:
        return self.masks * self.rows, self.tokens

    @property
    def width(self) -> int:
        return self.units * self.unit_width

    def spread(self, masks_MN: torch.Tensor) -> torch.Tensor:
        """The mask of each row."""
        return masks_MN.repeat_interleave(self.rows, dim=0)


# Wide units, narrow ones, a unit over several blocks of columns, blocks of rows over several masks, and a single one.
SIZES = [Sizes(3, 2, 63, 5, 12, 60), Sizes(1, 1, 7, 141, 1, 33), Sizes(2, 1, 5, 3, 160, 17), Sizes(3, 4, 1, 1, 1, 5)]
MASKS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "random": lambda masks, units: torch.rand(masks, units, generator=torch.Generator().manual_seed(5)) > 0.4,
    "zeros": lambda masks, units: torch.zeros(masks, units, dtype=torch.bool),
    "ones": lambda masks, units: torch.ones(masks, units, dtype=torch.bool),
    "one_unit": lambda masks, units: torch.arange(units) == (7 * torch.arange(masks)[:, None] + units - 1) % units,
    "last_mask_empty": lambda masks, units: (torch.arange(masks) < masks - 1)[:, None].expand(masks, units).clone(),
}
each_size = pytest.mark.parametrize("sizes", SIZES, ids=str)
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=_NAMES.values())
each_mask_and_dtype = pytest.mark.parametrize(  # each mask in float32, and a random one in the others
    ("make_masks", "dtype"),
    [pytest.param(make, torch.float32, id=f"{name}-float32") for name, make in MASKS.items()]
    + [pytest.param(MASKS["random"], dtype, id=f"random-{_NAMES[dtype]}") for dtype in DTYPES[1:]],
)


class Numbers:
    """Normal numbers of one dtype on one device, different at every call, the same in every run."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self._random = dtype, device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._random).to(self.device, self.dtype)


def assert_matches(
    found: torch.Tensor, twin: Callable[..., torch.Tensor], *given: Any, chain: bool = False, **options: Any
) -> None:
    """Against the twin in float64, at the tolerance of the dtype that was found."""
    expected = twin(*map(_wide, given), **{name: _wide(value) for name, value in options.items()})
    assert_close(found, expected, (CHAIN if chain else LOGITS)[found.dtype])


def _wide(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.double() if floating else value


def packed(masks_MN: torch.Tensor, device: torch.device) -> PackedMasks:
    """As a view into words of more units than those."""
    before, after = torch.ones(len(masks_MN), 37), torch.ones(len(masks_MN), 3)
    every = PackedMasks.of(torch.cat([before, masks_MN.float(), after], dim=1).to(device))
    return every.units(37, 37 + masks_MN.shape[1])


def listed(masks_MN: torch.Tensor, device: torch.device) -> KeptUnits:
    """What stands behind a mask's kept units is out of range."""
    kept = KeptUnits.of(masks_MN.to(device))
    behind_MN = torch.arange(kept.size, device=device) >= kept.count_M[:, None]
    return KeptUnits(kept.index_MN.masked_fill(behind_MN, 2**30), kept.count_M)
