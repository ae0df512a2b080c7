"""Sums over the masks of a step, by which its losses tell of units: all work that grows with masks times units.

Masks are kept as bits for the length of a step or, by kernels that can, drawn once more for every sum.

Letters: B windows of text, K masks a window, C chunks of a window, M = B K C, R some of the windows, T tokens, U units,
F channels of a layer.
"""

from collections.abc import Iterator

import torch

from bernprune.kernels.masks import BITS, DrawnMasks, PackedMasks
from bernprune.kernels.reference import SumKernels, activity_sums, kept_sums, score_sums
from bernprune.policy.masks import CPU, Masks, row_slices
from bernprune.units import MaskRows

_NUMBERS = 2**18  # of masks in float64 at once, which stay in the caches


class MaskSums:
    """Sums over the masks of one step, ``[B, K, C, U]``, on their device.

    Args:
        kernels: None sums up in plain torch, in float64 but for activities.
    """

    def __init__(self, masks_BKCU: MaskRows, kernels: SumKernels | None = None) -> None:
        self._shape, self._kernels = masks_BKCU.shape, kernels
        self._masks: PackedMasks | DrawnMasks
        if kernels is not None and isinstance(masks_BKCU, Masks) and masks_BKCU.drawable:
            self._masks, self.device = masks_BKCU.drawn(), masks_BKCU.device
        else:
            parts = [PackedMasks.of(masks_BKCU[windows].flatten(0, 2)) for windows in row_slices(self._shape)]
            self._masks = PackedMasks(torch.cat([part.words_MW for part in parts]), self._shape[-1])
            self.device = self._masks.words_MW.device

    def kept(self, values_U: torch.Tensor) -> torch.Tensor:
        """For each mask, the sum of the values of the units it keeps, float64 ``[B, K, C]`` on the CPU."""
        values_U = values_U.to(self.device)
        if self._kernels is not None:
            sums_M = self._kernels.kept_sums(values_U.float(), self._masks)
        else:
            parts = [kept_sums(values_U[units], masks_MU) for units, masks_MU in self._unpacked()]
            sums_M = torch.stack(parts).sum(0)
        return torch.as_tensor(sums_M, dtype=torch.float64, device=CPU).view(self._shape[:3])

    def scores(self, weights_BKC: torch.Tensor) -> torch.Tensor:
        """For each unit, the sum of the weights of the masks that keep it, ``[B, U]``."""
        weights_BR = weights_BKC.flatten(1).to(self.device)
        nothing_U = torch.zeros(self._shape[-1], dtype=weights_BR.dtype, device=self.device)
        if self._kernels is not None:
            return self._kernels.score_sums(weights_BR, self._masks, nothing_U)
        parts = [
            score_sums(weights_BR, masks_MU.unflatten(0, weights_BR.shape), nothing_U[units])
            for units, masks_MU in self._unpacked()
        ]
        return torch.cat(parts, dim=1)

    def active(self, units: slice, windows: slice, active_RTF: torch.Tensor, weights_RKT: torch.Tensor) -> torch.Tensor:
        """Three sums over the tokens of each of some windows, float32 ``[3, R, F]``, with r = ``|active_RTF|``.

        They are of weight times mask times r, over masks too; of r^2; and of r.

        Args:
            units: those of the layer's channels.
        """
        masks = self._of(windows).units(units.start, units.stop)
        weights_RKT = weights_RKT.to(self.device, torch.float32)
        if self._kernels is not None:
            return torch.stack(self._kernels.activity_sums(active_RTF, weights_RKT, masks))
        assert isinstance(masks, PackedMasks), "only kernels draw masks once more"
        masks_RKCF = masks.unpack().view(-1, *self._shape[1:3], masks.size)
        return torch.stack(activity_sums(active_RTF.float(), weights_RKT, masks_RKCF))

    def _of(self, windows: slice) -> PackedMasks | DrawnMasks:
        per_window = self._shape[1] * self._shape[2]
        return self._masks.masks(windows.start * per_window, windows.stop * per_window)

    def _unpacked(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some units after the other, and all masks of them as numbers, ``[M, U]``."""
        assert isinstance(self._masks, PackedMasks), "only kernels draw masks once more"
        width = max(1, _NUMBERS // len(self._masks) // BITS) * BITS
        for first in range(0, self._shape[-1], width):
            units = slice(first, min(first + width, self._shape[-1]))
            yield units, self._masks.units(units.start, units.stop).unpack().double()
