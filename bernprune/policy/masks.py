"""The masks of a step, each made when it is asked for: what it holds is a function of (seed, step, row, unit).

How the masks that compete on the same text hang together is their coupling, ``Design.sampling``:

- ``independent``: every mask has uniform numbers of its own.
- ``antithetic``: the K masks share one uniform number for each unit, shifted by 1/K from mask to mask (systematic
  sampling). As many of them keep a unit as can be expected, up to one, so that they differ as much as they can; for
  K = 2 they are antithetic pairs, at any probability (Yin and Zhou, 2019; Dong, Mnih and Tucker, 2020; Dimitriev and
  Zhou, 2021). Only one row of random numbers is needed for all of them. The order in which masks are shifted differs
  from unit to unit: in the same order, neighbours would resemble each other in all units at once, and so would their
  losses (for undecided units of a real model, that gave a third more variance than independent masks).
- ``exact``: every mask meets the budget. Units are kept in falling order of logit(s) - logit(uniform), which is above
  zero where an independent mask keeps them, until the limit of their pool is reached (as in Gumbel top-k sampling;
  Kool, van Hoof and Welling, 2019). Biased: a unit is kept with a probability that is not quite s, and the units of a
  mask depend on one another, which the estimators do not know. Of 8 equal units, half at 0.05 and half at 0.95, with
  4 to keep, a unit is kept with 0.032 or 0.968; of 16 with 0.0415 or 0.9585; the bias falls as they become more. Needs
  units that do not nest, and sorts each mask, which takes ten to twenty times as long as drawing it.

Masks may also *swing* (``Design.swing``): each keeps more or fewer channels of a layer together. Half of the masks on
the same text, drawn by lot, keep a channel with probability s + a, half with s - a, where a = swing s (1 - s); of an
odd number one does with s. So a channel is kept with probability s as before, and units are independent at given
levels. Why: one by one, n channels vary in number by sqrt(n s (1 - s)) only, and from so little it is hard to tell how
many of them a layer should keep. By swing they vary by n a: with 0.5, of 500 undecided channels by 62 instead of 11.

Letters: B windows of text, K masks a window, C chunks of a window, U units, G groups (units of one kind in one layer),
L levels, N rows asked for, D rows of random numbers, V units filled up to a multiple of the O orders.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from bernprune.errors import ConfigError
from bernprune.kernels.masks import ORDERS, DrawnMasks
from bernprune.names import Sampling, check_name
from bernprune.policy.budget import Budget
from bernprune.policy.counters import WORDS, mask_words, philox
from bernprune.seeding import counter_key
from bernprune.units import MaskRows, UnitSpace

CPU = torch.device("cpu")
_Made = TypeVar("_Made")
_BLOCK = 2**18  # random words at once, which stay in the caches; a multiple of ORDERS
_ENTRIES = 2**23  # of masks that are numbers at once, 64 MiB in float64


@dataclass(frozen=True)
class Design:
    """How the masks of a step are laid out over its text, and how those on the same text hang together.

    In each of ``groups`` groups, ``masks`` compete on the same text, each of them ``chunks`` masks in turn. Masks for a
    whole batch are one group; otherwise there is a group for each window. ``swing``, from 0 to 1, is how far the
    channels of a layer are kept more, or fewer, together.

    Raises:
        ConfigError: an unknown sampling, a number below 1, or a swing out of range or without what it needs.
    """

    groups: int
    masks: int
    chunks: int = 1
    sampling: Sampling = "independent"
    swing: float = 0.0

    def __post_init__(self) -> None:
        check_name("sampling", self.sampling, Sampling)
        if min(self.groups, self.masks, self.chunks) < 1:
            raise ConfigError(
                f"groups, masks and chunks must be 1 or more, not {self.groups}, {self.masks}, {self.chunks}"
            )
        if not 0 <= self.swing <= 1:
            raise ConfigError(f"swing must lie between 0 and 1, but is {self.swing:g}")
        if self.swing and (self.masks < 2 or self.sampling == "exact"):
            raise ConfigError(
                f"swing needs 2 masks or more on the same text, which do not meet the budget one by one, but got "
                f"{self.masks} with sampling {self.sampling!r}"
            )

    @property
    def rows_BKC(self) -> torch.Tensor:
        """The number of each mask of a step, int64."""
        shape = self.groups, self.masks, self.chunks
        return torch.arange(self.groups * self.masks * self.chunks).view(shape)


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks as if they were a tensor, bool ``[B, K, C, U]``: an index into all but U gives the tensor of those.

    They never exist together unless asked for together, ``masks[:]``, and do not depend on what is asked for with
    them, nor on the device.

    Attributes:
        rows: which masks of the step, of any shape, int64 on the CPU; -1 is the reference.
        probs_U: keep probabilities, which are rounded to multiples of 2^-32; 0 and 1 are exact.
        reference_U: a fixed mask, or gates from 0 to 1, in which case all that is asked for with it is in float.
        device: where masks are made; all that they are made of stays on the CPU.
    """

    rows: torch.Tensor
    probs_U: torch.Tensor
    design: Design
    budget: Budget
    seed: int
    step: int
    reference_U: torch.Tensor | None = None
    device: torch.device = CPU
    _of_policy: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False)  # what its masks share, by device
    _of_step: dict[str, Any] = field(default_factory=dict, repr=False)  # and those of a step, on this device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.rows.shape, len(self.probs_U)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def possible_U(self) -> torch.Tensor:
        """Units that some mask of this policy may keep, bool on the CPU."""
        possible_U = self.probs_U > 0
        return possible_U if self.reference_U is None else possible_U | (self.reference_U > 0)

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows = self.rows[index]
        rows_N = rows.flatten()
        masks_NU = self._draw(rows_N.clamp(min=0))
        if self.reference_U is not None:
            reference_U = self.reference_U.to(self.device)
            masks_NU = torch.where((rows_N < 0)[:, None].to(self.device), reference_U, masks_NU)
        return masks_NU.view(*rows.shape, len(self.probs_U))

    def flatten(self, start_dim: int, end_dim: int) -> "Masks":
        """The same masks with some leading dimensions made one."""
        return replace(self, rows=self.rows.flatten(start_dim, end_dim))

    def to(self, device: torch.device) -> "Masks":
        """The same masks, made on another device."""
        return self if device == self.device else replace(self, device=device, _of_step={})

    def levels(self, index: Any = slice(None)) -> torch.Tensor:
        """Whether masks keep more of each group (1), less (-1) or neither (0), int64 ``[B, K, C, G]``; ``index`` is
        into all but U. It means something for channels alone."""
        rows = self.rows[index]
        return self._levels(rows.flatten()).view(*rows.shape, -1)

    @property
    def drawable(self) -> bool:
        """Whether they are made bit by bit, so that a kernel can make them."""
        return self.design.sampling != "exact" and self.reference_U is None

    def drawn(self, index: Any = slice(None)) -> DrawnMasks:
        """What a kernel needs to make the masks of an index into all but U for itself.

        Raises:
            ConfigError: masks that are not made bit by bit: exact ones, and a reference among them.
        """
        rows_N = self.rows[index].flatten()
        if not self.drawable:
            raise ConfigError("exact masks, and references, cannot be drawn bit by bit")
        return self._of_rows("drawn", rows_N, self._drawn)

    def _of_rows(self, name: str, rows_N: torch.Tensor, make: Callable[[torch.Tensor], _Made]) -> _Made:
        """What ``make`` gives, once for the rows last asked for: a step asks for all of its own several times."""
        if name not in self._of_step or not torch.equal(self._of_step[name][0], rows_N):
            self._of_step[name] = rows_N, make(rows_N)
        return self._of_step[name][1]

    def _shared(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``make`` gives, on this device, once for all masks of the policy."""
        key = name, self.device
        if key not in self._of_policy:
            self._of_policy[key] = make().to(self.device)
        return self._of_policy[key]

    def _drawn(self, rows_N: torch.Tensor) -> DrawnMasks:
        device, group_U = self.device, self.budget.space.group_U
        levels_NG = (
            self._levels(rows_N) if self.design.swing else torch.zeros(len(rows_N), len(self.budget.space.groups))
        )
        shifts_KO = self._shifts_KO if self.design.sampling == "antithetic" else torch.zeros(1, ORDERS).long()
        key, low_high = counter_key(self.seed, "masks"), (self.step % WORDS, self.step // WORDS)
        return DrawnMasks(
            torch.tensor([_signed(key[0] | key[1] << 32), *low_high]).to(device),
            torch.stack(self._coupled(rows_N), dim=1).to(device),
            (levels_NG + 1).to(torch.int8).to(device),
            self._shared("groups", group_U.int),
            self._thresholds_LU,
            shifts_KO.to(device).contiguous(),
            len(self.probs_U),
        )

    def _levels(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Levels ``[N, G]``, by lot, from random words that lie behind those of the units."""
        return self._of_rows("levels", rows_N, self._drawn_levels)

    def _drawn_levels(self, rows_N: torch.Tensor) -> torch.Tensor:
        masks = self.design.masks
        chunks = self.design.chunks
        groups = len(self.budget.space.groups)
        first = len(self.probs_U) + -len(self.probs_U) % ORDERS
        texts_N = rows_N // (masks * chunks) * (masks * chunks) + rows_N % chunks
        texts_D, which_N = texts_N.unique(return_inverse=True)
        rows_DK = texts_D[:, None] + torch.arange(masks) * chunks
        words = mask_words(self.seed, self.step, rows_DK.flatten(), range(first, first + groups))
        places_DKG = words.view(*rows_DK.shape, groups).argsort(dim=1, stable=True).argsort(dim=1)
        return (2 * places_DKG - (masks - 1)).sign()[which_N, rows_N // chunks % masks]

    @property
    def _thresholds_LU(self) -> torch.Tensor:
        """Thresholds of levels -1, 0 and 1; without swing, they are alike."""

        def make() -> torch.Tensor:
            amplitude_U = amplitude(self.probs_U, self.design, self.budget.space)
            probs_LU = self.probs_U + amplitude_U * torch.tensor([[-1], [0], [1]])
            return (probs_LU * WORDS).round().long()

        return self._shared("thresholds", make)

    @property
    def _shifts_KO(self) -> torch.Tensor:
        return self._shared("shifts", lambda: orders(self.design.masks).T * (WORDS // self.design.masks))

    def _draw(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Masks, bool ``[N, U]``, made from one block of random numbers after the other."""
        draws_N, masks_N = self._coupled(rows_N)
        draws_D, which_N = draws_N.unique(return_inverse=True)
        levels_NG = self._levels(rows_N) if self.design.swing else None
        kept_NU = torch.empty(len(rows_N), len(self.probs_U), dtype=torch.bool, device=self.device)
        for draws, units in self._tiles(len(draws_D)):
            whole = range(units.start, units.stop + -units.stop % ORDERS)
            words_DV = mask_words(self.seed, self.step, draws_D[draws].to(kept_NU.device), whole)
            here_N = (which_N >= draws.start) & (which_N < draws.stop)
            for mask in masks_N.unique().tolist():
                at = (here_N & (masks_N == mask)).nonzero()[:, 0]
                words_NU = self._shifted(words_DV, mask)[which_N[at] - draws.start, : len(units)]
                levels_HG = None if levels_NG is None else levels_NG[at]
                kept_NU[at, units.start : units.stop] = self._kept(words_NU, units, levels_HG)
        return kept_NU

    def _coupled(self, rows_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The row of random numbers that each mask takes, and its place among the masks that share it."""
        if self.design.sampling != "antithetic":
            return rows_N, torch.zeros_like(rows_N)
        masks, chunks = self.design.masks, self.design.chunks
        return rows_N // (masks * chunks) * chunks + rows_N % chunks, rows_N // chunks % masks

    def _tiles(self, num_draws: int) -> Iterator[tuple[slice, range]]:
        """Blocks of rows of random numbers and of units, in turn; an exact mask needs all units at once."""
        size = len(self.probs_U)
        width = size if self.design.sampling == "exact" else min(size, _BLOCK)
        height = max(1, _BLOCK // width)
        for draw in range(0, num_draws, height):
            for unit in range(0, size, width):
                yield slice(draw, draw + height), range(unit, min(unit + width, size))

    def _shifted(self, words_DV: torch.Tensor, mask: int) -> torch.Tensor:
        """Words that masks share, shifted for one of them."""
        if self.design.sampling != "antithetic":
            return words_DV
        words_DOV: torch.Tensor = words_DV.unflatten(1, (-1, ORDERS)) + self._shifts_KO[mask]
        return words_DOV.bitwise_and_(WORDS - 1).flatten(1)

    def _kept(self, words_NU: torch.Tensor, units: range, levels_NG: torch.Tensor | None) -> torch.Tensor:
        """What masks with these words keep of these units, bool ``[N, U]``."""
        if self.design.sampling == "exact":
            return _within_budget(words_NU, self.probs_U, self.budget)
        thresholds_LU = self._thresholds_LU[:, units.start : units.stop]
        if levels_NG is None:
            return words_NU < thresholds_LU[1]
        kept_NU = torch.empty(words_NU.shape, dtype=torch.bool, device=words_NU.device)
        levels_NG, starts = levels_NG.to(words_NU.device) + 1, self.budget.space.starts
        for group in range(bisect_right(starts, units.start) - 1, bisect_left(starts, units.stop)):
            here = slice(max(starts[group] - units.start, 0), starts[group + 1] - units.start)
            thresholds_NU = thresholds_LU[:, here].index_select(0, levels_NG[:, group])
            torch.lt(words_NU[:, here], thresholds_NU, out=kept_NU[:, here])
        return kept_NU


def _signed(bits: int) -> int:
    """The number that 64 bits are if the highest is a sign."""
    return bits - (bits >> 63 << 64)


def orders(num_masks: int) -> torch.Tensor:
    """How many times floor(2^32 / K) each of K antithetic masks adds for unit u, in row u % ``ORDERS``: ``[O, K]``.

    Arbitrary permutations, the same in every run: the order of random words, by counter k and row.
    """
    counter = torch.arange(num_masks), torch.arange(ORDERS)[:, None], torch.tensor(0), torch.tensor(0)
    return philox(counter, counter_key(0, "orders"))[0].argsort(dim=1, stable=True)


def with_reference(masks_BKCU: MaskRows, reference_U: torch.Tensor) -> MaskRows:
    """The masks and, after them, one more on every text and chunk: a fixed one, or gates from 0 to 1."""
    if isinstance(masks_BKCU, Masks):
        rows = torch.cat([masks_BKCU.rows, torch.full_like(masks_BKCU.rows[:, :1], -1)], dim=1)
        return replace(masks_BKCU, rows=rows, reference_U=reference_U)
    masks = masks_BKCU[:]
    return torch.cat([masks, reference_U.expand_as(masks[:, :1])], dim=1)


def some_rows(masks: MaskRows, index: Any) -> MaskRows:
    """The masks at an index into all dimensions but U; what is made when looked at stays so."""
    return replace(masks, rows=masks.rows[index]) if isinstance(masks, Masks) else masks[index]


def amplitude(probs_U: torch.Tensor, design: Design, space: UnitSpace) -> torch.Tensor:
    """By how much keep probabilities differ from s where a group is kept more or less, ``[U]``; 0 but for channels."""
    if not design.swing:
        return torch.zeros_like(probs_U)
    return design.swing * probs_U * (1 - probs_U) * space.of_kind("channel")


def row_slices(shape: torch.Size) -> Iterator[slice]:
    """Slices of the first dimension, for turning masks into numbers: of few entries, or of one window's masks."""
    size = max(1, _ENTRIES // math.prod(shape[1:]))
    for first in range(0, shape[0], size):
        yield slice(first, min(first + size, shape[0]))


def _within_budget(words_NU: torch.Tensor, probs_U: torch.Tensor, budget: Budget) -> torch.Tensor:
    """The masks that keep units in falling order of their keys; on the CPU, as logarithms differ between devices."""
    uniform_NU = (words_NU.cpu().double() + 0.5) / WORDS
    keys_NU = probs_U.cpu().logit() - uniform_NU.logit()
    kept_NU = keys_NU > -torch.inf  # what is settled at 0 stays out
    for pool in budget.pools:
        members = pool.members_U.nonzero()[:, 0]
        order_NM = keys_NU[:, members].argsort(dim=1, descending=True, stable=True)
        fits_NM = budget.costs_U[members][order_NM].cumsum(1) <= pool.most
        kept_NU[:, members] &= torch.empty_like(fits_NM).scatter_(1, order_NM, fits_NM)
    return kept_NU.to(words_NU.device)
