"""Masks and text to losses: the only place where the search meets a model.

Many rows go through in one forward pass, each under its own mask, or under one for each of its chunks of tokens. What
no mask of a pass keeps is not computed where that pays, and what masks on the same windows agree on is computed once
(``bernprune.costs``).

Letters: K masks, U units, R rows, B windows, C chunks of a window, T tokens, P predictions, D hidden size.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from bernprune.backends import MaskedOps
from bernprune.costs import NEVER, Costs, Planner
from bernprune.errors import BackendError, ConfigError
from bernprune.kernels.masks import PackedMasks
from bernprune.losses import LossFunction, TokenLoss, token_loss
from bernprune.models.hooks import evaluating
from bernprune.models.masking import LiveMasks, choose_ops, masked
from bernprune.models.sharing import Branching
from bernprune.models.view import ModelView
from bernprune.names import ObjectiveName
from bernprune.units import MaskRows

logger = logging.getLogger(__name__)


class MaskedObjective:
    """Losses of masks on windows of text; made by ``masked_objective``.

    Masks are bool, or gates from 0 to 1 in floating point: a tensor, or what makes those of any rows when asked.

    Args:
        loss: what a mask loses at a token; what depends on the dense model takes one more forward of B windows a call.
        rows_per_forward: most rows in one forward pass; a smaller number saves memory and changes nothing else. Where
            a GPU's memory is too small for so many, it is halved.
        before_pass: called before every forward pass with the number of sequences that it counts for; what it raises
            ends the call.
        costs: those by which the way of running masks is chosen.
    """

    def __init__(
        self,
        view: ModelView,
        live: LiveMasks,
        loss: TokenLoss,
        rows_per_forward: int,
        before_pass: Callable[[int], object] | None = None,
        costs: Costs | None = None,
    ) -> None:
        self._view, self._live, self._loss = view, live, loss
        self.rows = rows_per_forward  # halved whenever a GPU is full
        costs = costs or Costs()
        if view.opaque is not None:
            costs = replace(costs, copying=NEVER)
        if view.opaque is not None or not live.ops.packs:
            costs = replace(costs, listing=NEVER)
        self._before_pass, self._planner = before_pass, Planner(view.space, costs)
        self._head: nn.Linear = view.model.get_output_embeddings()
        self.device = view.device

    def losses(self, masks_KU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Mean loss of each mask over all windows, float64 ``[K]`` on the CPU, nats per token.

        Raises:
            ConfigError: masks or windows of another shape.
        """
        return self.window_losses(masks_KU, tokens_BT).mean(1)

    def window_losses(self, masks_KU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """As ``losses``, on each window: ``[K, B]``."""
        self._check(masks_KU, tokens_BT, "[K, {}]", len(masks_KU.shape) == 2)
        masks = masks_KU[:].cpu()
        if masks.is_floating_point():
            rows = torch.arange(len(masks) * len(tokens_BT))
            window_R = rows % len(tokens_BT)
            losses_RP = self._losses_of_rows(masks, rows // len(tokens_BT), tokens_BT, window_R)
            return losses_RP.mean(1).view(len(masks), -1)
        alive_KU, tokens_BT = self._view.space.alive(masks.bool()), tokens_BT.to(self.device)
        dense_BTD = self._dense_hidden(tokens_BT) if self._loss.needs_dense else None
        together = self._planner.together(alive_KU, *tokens_BT.shape, rows=self.rows)
        parts = alive_KU.split(len(alive_KU) if together else 1)
        return torch.cat([self._losses_of_windows(part_KU, tokens_BT, dense_BTD) for part_KU in parts]).cpu()

    def token_losses(self, masks_BKCU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Losses of K masks of each window's own, one for each of its C chunks, float64 ``[B, K, T]`` on the CPU.

        Position t holds the loss of what is predicted from the tokens up to t: it depends on the masks of its own
        chunk and of those before. The last one, whose next token lies beyond the window, is zero but in ``kl``.

        Raises:
            ConfigError: masks or windows of another shape, or chunks that do not divide the window.
        """
        fits = len(masks_BKCU.shape) == 4 and len(masks_BKCU) == len(tokens_BT) and masks_BKCU.shape[1] > 0
        self._check(masks_BKCU, tokens_BT, "[B, K, C, {}] for B windows", fits)
        (num_windows, num_masks, chunks, _), window = masks_BKCU.shape, tokens_BT.shape[1]
        if window % max(chunks, 1):
            raise ConfigError(f"{chunks} chunks do not divide a window of {window} tokens")
        rows = torch.arange(num_windows * num_masks)
        losses_RP = self._losses_of_rows(masks_BKCU.flatten(0, 1), rows, tokens_BT, rows // num_masks)
        return F.pad(losses_RP, (0, window - losses_RP.shape[1])).view(num_windows, num_masks, window)

    def chunk_shares(self, masks_BKCU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """As ``token_losses``, each chunk's share of the mean over all predictions of its window: ``[B, K, C]``."""
        losses_BKT = self.token_shares(masks_BKCU, tokens_BT)
        return losses_BKT.view(*masks_BKCU.shape[:3], -1).sum(-1)

    def token_shares(self, masks_BKCU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """As ``token_losses``, each token's share of the mean over all predictions of its window: ``[B, K, T]``."""
        losses_BKT = self.token_losses(masks_BKCU, tokens_BT)
        return losses_BKT / (losses_BKT.shape[-1] - (not self._loss.at_last))

    @torch.inference_mode()
    def look(
        self, mask_U: torch.Tensor, tokens_BT: torch.Tensor, see: Callable[[int, slice, torch.Tensor], None]
    ) -> None:
        """Show how active each layer's F channels are at each token, under one mask; nothing is kept.

        ``see`` is called for each layer and some of the windows in turn, again where a GPU's memory was too small for
        so many, with the layer, the windows, and ``[R, T, F]`` of what enters the down projection, on the model's
        device; removed channels are shown too, as they would be if kept.

        Raises:
            ConfigError: a mask or windows of another shape.
        """
        self._check(mask_U, tokens_BT, "[{}]", mask_U.ndim == 1)

        def run(windows: slice) -> torch.Tensor:
            with self._live.watching(lambda layer, hidden_RTF: see(layer, windows, hidden_RTF)):
                self._hidden(tokens_BT[windows].to(self.device))
            return torch.empty(0)

        self._live.set(mask_U[None])
        self._in_passes(run, len(tokens_BT), lambda: self.rows)

    def _check(self, masks: MaskRows, tokens_BT: torch.Tensor, wanted: str, fits: bool) -> None:
        size = self._view.space.size
        if not fits or masks.shape[-1] != size or not masks.shape.numel():
            raise ConfigError(f"masks must be {wanted.format(size)} for this model, but are {list(masks.shape)}")
        if tokens_BT.ndim != 2 or not len(tokens_BT) or tokens_BT.shape[1] < 2:
            raise ConfigError(f"windows must be [B, T] of at least 2 tokens, but are {list(tokens_BT.shape)}")
        if tokens_BT.device.type == "cpu":  # elsewhere it would have to wait
            self._view.check_windows(tokens_BT)

    @torch.inference_mode()
    def _losses_of_rows(
        self, masks: MaskRows, mask_R: torch.Tensor, tokens_BT: torch.Tensor, window_R: torch.Tensor
    ) -> torch.Tensor:
        """Losses of each row's P predictions, float64 ``[R, P]``; its mask and window are given by their indices."""
        possible_U = self._view.space.alive(_possible(masks))
        masks = masks.to(self.device)
        tokens_BT = tokens_BT.to(self.device)
        window_R = window_R.to(self.device)
        dense_BTD = self._dense_hidden(tokens_BT) if self._loss.needs_dense else None

        bits, chunks = self._bits(masks, mask_R), masks.shape[1] if len(masks.shape) == 3 else 1
        kept_U = self._kept_shares(masks) if chunks == 1 and self._planner.may_list else None

        def run(rows: slice) -> torch.Tensor:
            tokens_RT = tokens_BT[window_R[rows]]
            working_U, listed_U = self._planner.ways(possible_U, kept_U, tokens_RT.numel(), each=tokens_RT.shape[1])
            these = masks[mask_R[rows]] if bits is None else bits(slice(rows.start * chunks, rows.stop * chunks))
            self._live.set(these, chunks=chunks, working_U=working_U, listed_U=listed_U)
            hidden_RTD = self._hidden(tokens_RT)
            return self._losses(hidden_RTD, tokens_RT, None if dense_BTD is None else dense_BTD[window_R[rows]])

        return self._in_passes(run, len(mask_R), lambda: self.rows).double().cpu()

    def _kept_shares(self, masks: MaskRows) -> torch.Tensor | None:
        """For each unit the share of masks under which it is alive (the expected share, for masks not made yet),
        float64 ``[U]`` on the CPU; None for gates, which keep all."""
        space, numbers = self._view.space, masks if isinstance(masks, torch.Tensor) else masks.reference_U
        if numbers is not None and numbers.is_floating_point():
            return None
        if isinstance(masks, torch.Tensor):
            return space.alive(masks.flatten(0, -2)).mean(0, dtype=torch.float64).cpu()
        return space.inherit(masks.probs_U[None], torch.mul)[0]

    def _bits(self, masks: MaskRows, mask_R: torch.Tensor) -> Callable[[slice], PackedMasks] | None:
        """What lets a kernel make some of the masks as bits; None where they are numbers, or have not one row each."""
        draw = self._live.ops.draw
        if draw is None or isinstance(masks, torch.Tensor) or not masks.drawable:
            return None
        if not torch.equal(mask_R, torch.arange(len(masks))):
            return None
        drawn = masks.drawn()
        return lambda some: draw(drawn.masks(some.start, some.stop))

    @torch.inference_mode()
    def _losses_of_windows(
        self, alive_KU: torch.Tensor, tokens_BT: torch.Tensor, dense_BTD: torch.Tensor | None
    ) -> torch.Tensor:
        """Means over predictions, float64 ``[K, B]``; masks, on the CPU, are given by what they leave alive."""

        def run_masks(masks: slice) -> torch.Tensor:
            branching = Branching.of(self._view.space, alive_KU[masks])

            def run(windows: slice) -> torch.Tensor:
                tokens = tokens_BT[windows]
                hidden = self._hidden_branching(alive_KU[masks], branching, tokens)
                repeats = len(branching.masks_of_layers[-1])
                dense = None if dense_BTD is None else dense_BTD[windows].repeat(repeats, 1, 1)
                losses = self._losses(hidden, tokens.repeat(repeats, 1), dense).double().mean(1)
                return losses.view(repeats, -1)[branching.class_K].T

            count = len(branching.class_K)
            losses_BK = self._in_passes(
                run, len(tokens_BT), lambda: max(1, self.rows // count), caller_can_split=count > 1
            )
            return losses_BK.T

        return self._in_passes(run_masks, len(alive_KU), lambda: self.rows)

    def _hidden_branching(self, alive_KU: torch.Tensor, branching: Branching, tokens_BT: torch.Tensor) -> torch.Tensor:
        """The last hidden states of each class of masks on each window, ``[classes * B, T, D]``."""
        windows = len(tokens_BT)
        classes_L = [len(masks) for masks in branching.masks_of_layers]
        size = tokens_BT.numel()
        kept_U = alive_KU.mean(0, dtype=torch.float64) if self._planner.may_list else None
        tokens_L = [count * size for count in classes_L]
        working_U, listed_U = self._planner.ways(alive_KU.any(0), kept_U, tokens_L, each=size)
        masks_of_layers = branching.masks_of_layers
        self._live.set(alive_KU, working_U=working_U, listed_U=listed_U, masks_of_layers=masks_of_layers)
        with branching.growing([layer.layer for layer in self._view.layers], windows):
            return self._hidden(tokens_BT, len(alive_KU) * windows)

    def _in_passes(
        self,
        run: Callable[[slice], torch.Tensor],
        total: int,
        most: Callable[[], int],
        *,
        caller_can_split: bool = False,
    ) -> torch.Tensor:
        """Results of ``run`` on one slice of ``total`` after the other, as large as ``most`` and the memory allow.

        Args:
            caller_can_split: if a slice of one is too large, raise, as the caller can split the work further.
        """
        parts, start = list[torch.Tensor](), 0
        while start < total:
            chosen, refusal = slice(start, min(start + most(), total)), ""
            try:
                parts.append(run(chosen))
                start = chosen.stop
            except torch.OutOfMemoryError as error:
                if caller_can_split and chosen.stop - start == 1:
                    raise
                refusal = str(error).splitlines()[0]
            if refusal:  # by now the error has let go of what the pass held
                self._need_less(refusal)
        return torch.cat(parts)

    def _need_less(self, refusal: str) -> None:
        """Take half as many rows in a pass from now on. Raises ``BackendError`` if it is one already."""
        torch.cuda.empty_cache()
        if self.rows == 1:
            raise BackendError(f"not one row fits in the GPU's memory: {refusal}")
        self.rows = max(1, self.rows // 2)
        logger.warning("the GPU's memory is full: going on with %d rows in a forward pass", self.rows)

    def _losses(
        self, hidden_RTD: torch.Tensor, tokens_RT: torch.Tensor, dense_RTD: torch.Tensor | None
    ) -> torch.Tensor:
        """Losses of the P predictions of each row, ``[R, P]``."""
        return self._loss.run(self._head, hidden_RTD, tokens_RT, dense_RTD, self._live.ops)

    @torch.inference_mode()
    def _dense_hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        self._live.set(torch.ones(1, self._view.space.size, dtype=torch.bool))
        return self._in_passes(lambda windows: self._hidden(tokens_BT[windows]), len(tokens_BT), lambda: self.rows)

    def _hidden(self, tokens_RT: torch.Tensor, sequences: int | None = None) -> torch.Tensor:
        if self._before_pass is not None:
            self._before_pass(sequences or len(tokens_RT))
        return self._view.decoder(input_ids=tokens_RT, use_cache=False).last_hidden_state


@contextmanager
def masked_objective(
    view: ModelView,
    ops: MaskedOps | None = None,
    *,
    kind: ObjectiveName | LossFunction | TokenLoss = "cross-entropy",
    rows_per_forward: int = 64,
    before_pass: Callable[[int], object] | None = None,
    costs: Costs | None = None,
) -> Iterator[MaskedObjective]:
    """The objective for the length of a ``with`` block; the model is restored on leaving it.

    Args:
        ops: by default those of backend ``auto``. For the others see ``MaskedObjective``.
        kind: ``cross-entropy``, ``kl`` to the dense model's predictions, or a function; see ``custom_loss``.

    Raises:
        ConfigError: an unknown kind, a function of something else, or no rows.
    """
    loss = token_loss(kind)
    if rows_per_forward < 1:
        raise ConfigError(f"rows_per_forward must be 1 or more, but is {rows_per_forward}")
    ops = ops or choose_ops("auto", view)
    with evaluating(view.model), masked(view, ops) as live:
        yield MaskedObjective(view, live, loss, rows_per_forward, before_pass, costs)


def _possible(masks: MaskRows) -> torch.Tensor:
    """Units that some of the masks may keep, bool on the CPU."""
    if isinstance(masks, torch.Tensor):
        return (masks.flatten(0, -2) != 0).any(0).cpu()
    return masks.possible_U
