"""EvoPress (Sieberling et al., 2024, arXiv 2410.14649; released code): an evolutionary search with one parent.

Offspring differ from their parent by one to three random switches that keep the cost. They are compared on a few
windows, the survivors on more, and in the last stage with the parent, which is replaced only by better.

``levels`` is the paper's: what evolves is how many units each kind keeps in each layer; which ones, Wanda-sp says. A
switch moves one level of cost from one such count to another. In ``units`` it swaps single units of any rank, drawn
from those nearest to the border between kept and removed.

Departures: the fitness is the loss on text, as everybody's here (the paper: divergence from the dense model), and every
stage reads fresh text.

Letters: U units, K individuals.
"""

import math

import torch

from benchmarks.learning.task import Settings, Task
from bernprune.seeding import generator

_MOST_SWITCHES = 3
_TRIES = 100  # of an offspring, so that a model too small for so many ends all the same


def evopress(task: Task, settings: Settings) -> torch.Tensor:
    """The last parent.

    Args:
        settings: ``offspring``; ``survivors`` and ``windows`` of each stage; ``switch``: ``levels``, of ``channels``
            each, or ``units``, drawn from the share ``band`` of a group's kept or removed ones.
    """
    scores_U = task.scores()
    parent_U = task.select_by(scores_U, "layer")
    switches = Switches(task, scores_U, generator(task.seed, "evopress"))
    while generation_cost(settings) <= task.meter.left:
        masks_KU = switches.offspring(parent_U, settings)
        for survivors, windows in zip(settings["survivors"], settings["windows"], strict=True):
            if survivors == 1:
                masks_KU = torch.cat([masks_KU, parent_U[None]])
            losses_K = task.losses(masks_KU, task.text(windows))
            masks_KU = masks_KU[losses_K.argsort(stable=True)[:survivors]]
        parent_U = masks_KU[0]
    return task.select(parent_U.double(), scores_U)


def generation_cost(settings: Settings) -> int:
    """Windows that a generation runs forward at most."""
    entering = [settings["offspring"], *settings["survivors"][:-1]]
    entering[-1] += 1  # the parent
    return sum(count * windows for count, windows in zip(entering, settings["windows"], strict=True))


class Switches:
    """Random changes of a mask within the budget that leave every group, a kind in a layer, a unit."""

    def __init__(self, task: Task, scores_U: torch.Tensor, random: torch.Generator) -> None:
        self.budget, self.random = task.budget, random
        self.costs_U = self.budget.costs_U
        self.groups = [units[scores_U[units].argsort(descending=True, stable=True)] for units in task.groups]

    def offspring(self, parent_U: torch.Tensor, settings: Settings) -> torch.Tensor:
        """Different ones, bool ``[K, U]``."""
        found: dict[bytes, torch.Tensor] = {}
        for _ in range(_TRIES * settings["offspring"]):
            child_U = parent_U
            for _ in range(1 + min(self._draw(_MOST_SWITCHES), self._draw(_MOST_SWITCHES))):
                if settings["switch"] == "levels":
                    child_U = self._switch_level(child_U, settings["channels"])
                else:
                    child_U = self._swap_units(child_U, settings["band"])
            found[child_U.numpy().tobytes()] = child_U
            if len(found) == settings["offspring"]:
                break
        return torch.stack(list(found.values()))

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.random))

    def _switch_level(self, mask_U: torch.Tensor, channels: int) -> torch.Tensor:
        """The worst kept of one group for the best removed of another; unchanged if they have too few."""
        loser, gainer = (self.groups[self._draw(len(self.groups))] for _ in range(2))
        costs = self.costs_U[loser[0]].item(), self.costs_U[gainer[0]].item()
        level = max(*costs, channels * self.costs_U.min().item())
        lost = math.ceil(level / costs[0])
        gained = math.floor(lost * costs[0] / costs[1])
        kept, removed = loser[mask_U[loser]], gainer[~mask_U[gainer]]
        if loser is gainer or lost >= len(kept) or gained > len(removed):
            return mask_U
        mask_U = mask_U.clone()
        mask_U[kept[-lost:]] = False
        mask_U[removed[:gained]] = True
        return mask_U

    def _swap_units(self, mask_U: torch.Tensor, band: float) -> torch.Tensor:
        """One removed unit comes back, kept ones go until there is room for it, and others come back as they fit."""
        mask_U = mask_U.clone()
        self._move(mask_U, True, band, math.inf)
        while (room := self.budget.most - self.budget.alive_cost(mask_U)) < 0:
            self._move(mask_U, False, band, math.inf)
        while room >= self.costs_U.min() and self._move(mask_U, True, band, room):
            room = self.budget.most - self.budget.alive_cost(mask_U)
        return mask_U

    def _move(self, mask_U: torch.Tensor, back: bool, band: float, room: float) -> bool:
        """Bring a unit that costs at most ``room`` back, or remove one, in place; False if there is none to move."""
        choices = []
        for group in self.groups:
            units = group[~mask_U[group]] if back else group[mask_U[group]].flip(0)[:-1]  # nearest to the border first
            if len(units) and self.costs_U[group[0]] <= room:
                choices.append(units[: math.ceil(band * len(units))])
        if choices:
            units = choices[self._draw(len(choices))]
            mask_U[units[self._draw(len(units))]] = back
        return bool(choices)
