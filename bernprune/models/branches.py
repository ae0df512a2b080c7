"""What one residual branch of one layer sees of the masks of the next passes, and what all branches share.

Letters: R rows of the batch, C chunks of a row, M masks, U units, W units at work, N units of one branch, T tokens, P
pieces = R * C.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bernprune.kernels.masks import PackedMasks


@dataclass(frozen=True)
class CurrentMasks:
    """The masks of the next passes, by what they leave alive.

    Attributes:
        numbers_MU: masks as numbers; None where they are given as bits from the start, and all units are at work.
        numbers_MW: those of the units at work.
        bits: masks of the units at work as bits, if kernels take such.
        working_U: which units are at work, on the CPU; None: all.
        index_W: indices of the units at work; None: all.
        alone_U: the mask, on the CPU, if there is but one.
    """

    numbers_MU: torch.Tensor | None
    numbers_MW: torch.Tensor | None
    bits: PackedMasks | None
    working_U: torch.Tensor | None = None
    index_W: torch.Tensor | None = None
    alone_U: torch.Tensor | None = None

    def alive_MN(self, units: slice) -> torch.Tensor:
        """What masks leave alive of some adjacent units, at work or not."""
        if self.numbers_MU is not None:
            return self.numbers_MU[:, units]
        assert self.bits is not None, "masks are numbers or bits"
        return self.bits.units(units.start, units.stop).unpack()

    @functools.cached_property
    def _places_U(self) -> Any:
        """For each unit, how many units up to and including it are at work."""
        assert self.working_U is not None
        return self.working_U.cumsum(0).numpy()

    def at_work(self, units: slice) -> slice:
        """The slice that the working ones among these adjacent units take among all working units."""
        if self.working_U is None:
            return units
        places = self._places_U
        return slice(int(places[units.start - 1]) if units.start else 0, int(places[units.stop - 1]))

    def is_all_that_works(self, units: slice) -> bool:
        """Whether these units need no mask, as there is but one, and it keeps all of them that are at work."""
        if self.alone_U is None or self.working_U is None:
            return False
        return torch.equal(self.alone_U[units], self.working_U[units])


class Branch:
    """What one residual branch of one layer sees of the current masks.

    Args:
        last: the projection that its units are the input of.
    """

    masks: torch.Tensor | PackedMasks | None = None  # each for equally many pieces in turn; None keeps all
    open_M11: torch.Tensor | None = None  # whether the same masks leave the branch open; None: they all do
    kept_N: torch.Tensor | None = None  # the units to gather; None: all are computed, and may be masked
    chunks = 1
    _strides: tuple[int, ...] | None = None  # how the last projection's weight lay in memory, if that was changed
    watch: Callable[[torch.Tensor], None] | None = None  # told what the last projection takes in, before it is masked

    def __init__(self, num_units: int, last: nn.Linear) -> None:
        self.num_units, self._last = num_units, last
        self.biased = last.bias is not None  # so that something comes out even if nothing goes into its product

    def gather(self, weights: torch.Tensor) -> torch.Tensor:
        """What belongs to the kept units in a weight or bias that holds all units in turn."""
        if self.kept_N is None:
            return weights
        by_unit: torch.Tensor = weights.unflatten(0, (self.num_units, -1))
        return by_unit.index_select(0, self.kept_N).flatten(0, 1)

    def gather_last(self) -> torch.Tensor:
        """The columns of the last projection's weight that belong to the kept units."""
        weight_DE = self._last.weight
        if self.kept_N is None:
            return weight_DE
        if weight_DE.stride(0) == 1:
            return self.gather(weight_DE.T).T
        return weight_DE.unflatten(1, (self.num_units, -1)).index_select(1, self.kept_N).flatten(1, 2)

    def lay_columns(self) -> None:
        """Let a column of the last projection's weight lie together, so that those of some units can be read fast.

        Not in the midst of work: products of a weight that lies otherwise are rounded otherwise.
        """
        if self._last.weight.stride(0) != 1:
            strides = self._last.weight.stride()
            self._lay((1, self._last.out_features))
            self._strides = strides  # or a GPU without room for it would be asked for as much to go back

    def restore(self) -> None:
        """Let the last projection's weight lie in memory as it did."""
        if self._strides is not None:
            self._lay(self._strides)

    @torch.inference_mode(False)  # or nothing that asks for a gradient could use the weight afterwards
    def _lay(self, strides: tuple[int, ...]) -> None:
        weight = self._last.weight.data
        self._last.weight.data = weight.new_empty_strided(weight.shape, strides).copy_(weight)

    def run(self, operation: Callable[[torch.Tensor, Any], torch.Tensor], x_RTE: torch.Tensor) -> torch.Tensor:
        """``operation`` on the input and the units' masks, piece by piece; zero where the branch is closed."""
        rows, tokens = x_RTE.shape[:2]
        x_PTE = x_RTE.reshape(rows * self.chunks, tokens // self.chunks, -1)
        masks, open_M11 = self.masks, self.open_M11
        output_PTD = operation(x_PTE, self._spread(masks, len(x_PTE)) if isinstance(masks, torch.Tensor) else masks)
        if open_M11 is not None:
            output_PTD = output_PTD * self._spread(open_M11, len(x_PTE))
        return output_PTD.view(rows, tokens, -1)

    def _spread(self, values_M: torch.Tensor, pieces: int) -> torch.Tensor:
        """Repeat values given per mask so that there is one per piece; a count that does not divide is left to the
        operation to refuse."""
        count = len(values_M)
        if count == 1:
            return values_M.expand(pieces, *values_M.shape[1:])
        return values_M.repeat_interleave(pieces // count, dim=0) if self.chunks == 1 else values_M
