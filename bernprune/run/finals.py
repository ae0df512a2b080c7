"""What is kept: finalists, then changes to the best of them, raced on text that was not learned from.

All of it is inside the run's budget. Where the search knows what units save, single changes to the selection are tried
on a few windows, and steps that follow from them are raced against it; else random challengers are.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from threading import Event
from typing import Any

import torch

from bernprune.data import TokenWindows
from bernprune.errors import RunError
from bernprune.objective import MaskedObjective
from bernprune.policy.bernoulli import reordered
from bernprune.policy.looks import STEPS, changed_masks, changes, look_sequences, look_windows, moves
from bernprune.policy.race import CHALLENGERS, Heat, challengers, consistent_with_mask, heat_sequences, race
from bernprune.policy.search import MaskSearch
from bernprune.policy.selection import select
from bernprune.progress import bar
from bernprune.run.checkpoint import read_state, write_state
from bernprune.run.folder import RunFolder
from bernprune.run.methods import loss_of
from bernprune.run.signals import Interrupted, signals
from bernprune.run.stage import Stage
from bernprune.run.workload import ASKED_TO_FINISH, Work
from bernprune.seeding import generator

logger = logging.getLogger(__name__)

_TO_BEAT = "widths"  # if it is a finalist: single channels have been learned only if that clearly shows
_NOTHING_LEFT = "sequences: too few were left for more"
_READINGS = 4  # of what was kept back, at most
_MARGIN = 1.0  # standard errors by which what is new must win: the best of several looks better than it is


@dataclass
class Finals:
    """The mask that is kept, and what it took to choose it.

    ``kept`` names the finalist it comes from, ``heats`` say what has changed since, ``ended`` why there are no more.
    ``priorities_U`` are those that steps have led to; None where those of the finalist still hold.
    ``sequences`` were run forward, over ``windows_read`` windows of text, in ``seconds``.
    """

    kept: str
    mask_U: torch.Tensor
    priorities_U: torch.Tensor | None = None
    sequences: int = 0
    windows_read: int = 0
    seconds: float = 0.0
    ended: str = ""
    heats: list[dict[str, Any]] = field(default_factory=list)

    def take(self, masks: Sequence[torch.Tensor], heat: Heat) -> None:
        """Keep the winner of a heat whose mask 0 is the one that was kept so far."""
        self.heats.append({**asdict(heat), "changed_units": int((masks[heat.winner] != self.mask_U).sum())})
        self.mask_U = masks[heat.winner]


def run_finals(
    stage: Stage,
    folder: RunFolder,
    search: MaskSearch,
    finalists: dict[str, torch.Tensor],
    graded_U: torch.Tensor,
    work: Work,
    *,
    finish: bool = False,
) -> Finals:
    """Race the finalists, then what may be better than the winner, until the sequences for it are spent.

    The first finalist, what was learned, is kept if there is nothing to spend. Else the others have to beat the learned
    widths in the metric's order by a standard error.

    Args:
        finish: end it where it stands, after the race of the finalists at least.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, also in the middle of a heat; those before it are saved.
    """
    budget = stage.workload.selection_sequences(work)
    names = list(finalists)
    finals = _restore(folder, work) or Finals(names[0], finalists[names[0]])
    if not budget:
        finals.ended = _NOTHING_LEFT
        return finals
    with (
        bar("finals", total=budget, unit="seq", done=finals.sequences) as shown,
        signals() as stopping,
        stage.objective(loss_of(stage.config.search), lambda rows: _go_on(stopping, shown, rows)) as objective,
    ):
        text = _Text.of(stage, objective, work, finals)
        started = time.monotonic() - finals.seconds

        def settle() -> None:
            finals.seconds = time.monotonic() - started
            if finals.sequences:
                _save(folder, work, finals)

        if not finals.sequences:
            windows = _affordable(text, len(names), budget)
            if len(names) > 1 and windows:
                names.sort(key=lambda name: name != _TO_BEAT)
                heat = race(torch.stack([finalists[name] for name in names]), windows, text.losses, margin=_MARGIN)
                finals.kept = names[heat.winner]
                finals.mask_U = finalists[finals.kept]
                settle()
        while not finals.ended and not stopping.is_set():
            if finish:
                finals.ended = ASKED_TO_FINISH
            elif search.priced:
                finals.ended = _by_looks(stage, search, text, graded_U, budget)
            else:
                finals.ended = _by_challengers(stage, search, text, budget)
            settle()
    logger.info("%s was kept, after %d heats; %s", finals.kept, len(finals.heats), finals.ended)
    return finals


def _go_on(stopping: Event, shown: Any, rows: int) -> None:
    """Stop here, before so many rows, if asked to: a look at a large model takes long. What it has found is lost."""
    if stopping.is_set():
        raise Interrupted
    shown.update(rows)


def _by_challengers(stage: Stage, search: MaskSearch, text: "_Text", budget: int) -> str:
    """Run a heat of random changes; returns why there was none, or an empty string."""
    finals, windows = text.finals, text.heat_windows
    refusal = text.refuses(heat_sequences(1 + CHALLENGERS, windows), windows, budget)
    if refusal:
        return refusal
    random = generator(stage.config.seed, "challengers", len(finals.heats))
    found_NU = challengers(search, finals.mask_U, stage.limits, random, CHALLENGERS)
    if not len(found_NU):
        return "changes: none was left to try"
    masks_NU = torch.cat([finals.mask_U[None], found_NU])
    finals.take(list(masks_NU), race(masks_NU, windows, text.losses, margin=_MARGIN))
    return ""


def _by_looks(stage: Stage, search: MaskSearch, text: "_Text", graded_U: torch.Tensor, budget: int) -> str:
    """Look at single changes, and run a heat of the steps that follow; returns why not, or an empty string."""
    finals, mask_U, priorities_U = text.finals, text.finals.mask_U, text.finals.priorities_U
    if priorities_U is None:
        by_search_U = search.priorities_U
        if finals.kept != "learned":
            by_search_U = reordered(stage.view.space, by_search_U, graded_U)
        priorities_U = consistent_with_mask(by_search_U, mask_U, search.budget, stage.limits)
    changed = changes(mask_U, priorities_U, search.budget, stage.limits)
    if not changed:
        return "changes: none was left to try"
    windows, raced = look_windows(stage.config.search.look_windows, text.heat_windows)
    refusal = text.refuses(look_sequences(len(changed), windows, raced), windows + raced, budget)
    if refusal:
        return refusal
    moves_U = moves(priorities_U, changed, text.losses(changed_masks(mask_U, changed), windows), stage.view.space)
    masks, ways = [mask_U], [priorities_U]
    first_U = graded_U + (graded_U.max() - graded_U.min() + 1) * mask_U  # ties: what is kept, then the metric's
    for step in STEPS:
        way_U = priorities_U + step * moves_U
        stepped_U = select(way_U, search.budget, limits=stage.limits, tie_break_U=first_U)
        if not any(stepped_U.equal(other_U) for other_U in masks):
            masks.append(stepped_U)
            ways.append(way_U)
    if len(masks) > 1:  # else other text may say more
        heat = race(torch.stack(masks), raced, text.losses, margin=_MARGIN)
        finals.take(masks, heat)
        if heat.winner:
            finals.priorities_U = ways[heat.winner]
    return ""


@dataclass
class _Text:
    """Windows in turn from number ``first``, ``heat_windows`` a heat and ``most_read`` in all; counted here.

    They are what the search would have read next or, where it may read its text more than once, what was kept back
    from it. Of that there may be less than a heat wants, and it is not read for ever: what is chosen on the same few
    windows again and again is good on those alone.
    """

    stage: Stage
    objective: MaskedObjective
    source: TokenWindows
    first: int
    heat_windows: int
    most_read: float
    finals: Finals

    @classmethod
    def of(cls, stage: Stage, objective: MaskedObjective, work: Work, finals: Finals) -> "_Text":
        settings = stage.config.search
        if stage.kept_back is None:
            first = work.step * settings.windows
            return cls(stage, objective, stage.train, first, settings.final_windows, math.inf, finals)
        count = stage.kept_back.num_windows
        return cls(stage, objective, stage.kept_back, 0, min(settings.final_windows, count), _READINGS * count, finals)

    def losses(self, masks_NU: torch.Tensor, count: int) -> torch.Tensor:
        """Losses of each mask on each of the next windows, ``[N, W]``; infinite where one is not finite."""
        start = self.first + self.finals.windows_read
        self.finals.windows_read += count
        self.finals.sequences += (len(masks_NU) + self._dense) * count
        losses_NW = self.objective.window_losses(masks_NU, self.source.windows(start, count))
        return losses_NW.masked_fill(~losses_NW.isfinite(), math.inf)

    def refuses(self, sequences: int, windows: int, budget: int) -> str:
        """Why so many more do not fit, by what is left of the sequences or of the text; empty if they do.

        Passes of the dense model, one for each window, come on top.
        """
        if self.finals.sequences + sequences + self._dense * windows > budget:
            return _NOTHING_LEFT
        if self.finals.windows_read + windows > self.most_read:
            return f"text: what was kept back for this had been read {_READINGS} times"
        return ""

    @property
    def _dense(self) -> int:
        """Passes of the dense model for each window, from which the divergence is taken."""
        return int(loss_of(self.stage.config.search).needs_dense)


def _affordable(text: _Text, num_masks: int, budget: int) -> int:
    """Windows of a heat: as many as are wanted, or can be paid; none if that is one, which has no error to go by."""
    windows = text.heat_windows
    while windows and text.refuses(heat_sequences(num_masks, windows), windows, budget):
        windows -= 1
    return windows if windows > 1 else 0


def _save(folder: RunFolder, work: Work, finals: Finals) -> None:
    write_state(folder.finals, {"step": work.step, **vars(finals)})


def _restore(folder: RunFolder, work: Work) -> Finals | None:
    """The heats run before an interruption; None without any."""
    if not folder.finals.is_file():
        return None
    try:
        state = read_state(folder.finals)
    except RunError as error:
        logger.warning("%s; racing the finalists again", error)
        return None
    if state.keys() != {"step", *Finals.__dataclass_fields__}:
        return None  # it is not in this form
    step = state.pop("step")
    return Finals(**state) if step == work.step else None
