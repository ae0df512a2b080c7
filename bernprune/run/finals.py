"""What is kept: finalists and challengers, raced on text that was not learned from, inside the run's budget."""

import logging
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from bernprune.data import TokenWindows
from bernprune.errors import RunError
from bernprune.objective import MaskedObjective, masked_objective
from bernprune.policy.race import CHALLENGERS, challengers, heat_sequences, race
from bernprune.policy.search import MaskSearch
from bernprune.run.checkpoint import read_state, write_state
from bernprune.run.folder import RunFolder
from bernprune.run.signals import signals
from bernprune.run.stage import Stage
from bernprune.run.workload import Work
from bernprune.seeding import generator

logger = logging.getLogger(__name__)

_LOST = 1e6  # nats, for a loss that is not finite: its mask loses, and sums stay finite
_READINGS = 4  # of what was kept back, at most
_MARGIN = 1.0  # standard errors by which the best of them must win: the best of several looks better than it is


@dataclass
class Finals:
    """The mask that is kept, and what it took to choose it.

    ``kept`` names the finalist it comes from, ``heats`` say what challengers changed, ``ended`` why there are no more.
    ``sequences`` were run forward, over ``windows_read`` windows of text, in ``seconds``.
    """

    kept: str
    mask_U: torch.Tensor
    sequences: int = 0
    windows_read: int = 0
    seconds: float = 0.0
    ended: str = ""
    heats: list[dict[str, Any]] = field(default_factory=list)


def run_finals(
    stage: Stage,
    folder: RunFolder,
    search: MaskSearch,
    finalists: dict[str, torch.Tensor],
    work: Work,
    *,
    progress: bool | None = None,
) -> Finals:
    """Race the finalists, then challengers to the winner, until the sequences for it are spent.

    The first finalist, what was learned, is kept if there is nothing to spend.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the heats run so far are saved.
    """
    budget, settings = stage.workload.selection_sequences(work), stage.config.search
    names, masks_NU = list(finalists), torch.stack(list(finalists.values()))
    finals = _restore(folder, work) or Finals(names[0], masks_NU[0])
    hidden = None if progress is None else not progress
    with (
        tqdm(total=budget, initial=finals.sequences, unit="seq", desc="finals", disable=hidden) as bar,
        masked_objective(
            stage.view, stage.ops, kind=settings.objective, rows_per_forward=settings.rows_per_forward
        ) as objective,
        signals() as stopping,
    ):
        text = _Text.of(stage, objective, work, finals)
        started = time.monotonic() - finals.seconds

        def settle() -> None:
            finals.seconds = time.monotonic() - started
            bar.update(finals.sequences - bar.n)
            _save(folder, work, finals)

        if not finals.sequences:
            windows = _affordable(text, len(names), budget)
            if len(names) > 1 and windows:
                heat = race(masks_NU, windows, text.losses)
                finals.kept, finals.mask_U = names[heat.winner], masks_NU[heat.winner]
                settle()
        while not stopping.is_set():
            finals.ended = text.refuses(1 + CHALLENGERS, budget)
            if finals.ended:
                break
            random = generator(stage.config.seed, "challengers", len(finals.heats))
            found_NU = challengers(search, finals.mask_U, stage.limits, random, CHALLENGERS)
            if not len(found_NU):
                finals.ended = "challengers: none is left"
                break
            masks_NU = torch.cat([finals.mask_U[None], found_NU])
            heat = race(masks_NU, text.heat_windows, text.losses, margin=_MARGIN)
            finals.heats.append({**asdict(heat), "changed_units": int((masks_NU[heat.winner] != finals.mask_U).sum())})
            finals.mask_U = masks_NU[heat.winner]
            settle()
    logger.info("%s was kept, after %d heats of challengers; %s", finals.kept, len(finals.heats), finals.ended)
    return finals


@dataclass
class _Text:
    """Windows in turn from number ``first``, ``heat_windows`` a heat and ``most_read`` in all; counted here.

    They are what the search would have read next or, where it may read its text more than once, what was kept back
    from it. Of that there may be less than a heat wants, and it is not read for ever: who is chosen on the same few
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
        """Of each mask on each of the next windows, ``[N, W]``; one that is not finite counts as a very large one."""
        start = self.first + self.finals.windows_read
        self.finals.windows_read += count
        self.finals.sequences += (len(masks_NU) + self._dense) * count
        return self.objective.window_losses(masks_NU, self.source.windows(start, count)).nan_to_num(
            nan=_LOST, posinf=_LOST
        )

    def refuses(self, num_masks: int, budget: int) -> str:
        """Why one more heat of so many masks fits no more: what is left of the sequences, or of the text; or empty."""
        if self.finals.sequences + self.cost(num_masks, self.heat_windows) > budget:
            return "sequences: what is left is less than another heat takes"
        if self.finals.windows_read + self.heat_windows > self.most_read:
            return f"text: what was kept back for it has been read {_READINGS} times"
        return ""

    def cost(self, num_masks: int, windows: int) -> int:
        """Sequences of a heat."""
        return heat_sequences(num_masks, windows) + self._dense * windows

    @property
    def _dense(self) -> int:
        """Passes of the dense model beside each row, for its divergence."""
        return int(self.stage.config.search.objective == "kl")


def _affordable(text: _Text, num_masks: int, budget: int) -> int:
    """Windows of a heat: as many as are wanted, or can be paid."""
    windows = text.heat_windows
    while windows and text.cost(num_masks, windows) > budget:
        windows -= 1
    return windows


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
    ours = state.keys() == {"step", *Finals.__dataclass_fields__}  # or it is another version's
    return Finals(**state) if ours and state.pop("step") == work.step else None
