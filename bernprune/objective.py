"""Masks and text to losses: the only place where the search meets a model.

Many rows go through in one forward pass, each under its own mask, or under one for each of its chunks of tokens.
Cross-entropy is taken from the last hidden states a few tokens at a time, so the logits of the whole batch never
exist: what is live of them at once fits in two and a half times ``LOGIT_BYTES``.

Letters: K masks, U units, R rows, B windows, C chunks of a window, T tokens, P predictions, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from bernprune.backends import MaskedOps, load_backend
from bernprune.errors import ConfigError
from bernprune.models.masking import LiveMasks, masked
from bernprune.models.view import ModelView
from bernprune.names import ObjectiveName, check_name
from bernprune.units import MaskRows

# Of the logits in float32 at once, by type of device. A GPU must not read the output embedding for too few tokens; a
# processor does best with about the size of its caches.
LOGIT_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
GATHER_TOKENS = 1024  # of one mask, from which on gathering its weights costs less than it saves, or as much


def _tokens_at_once(head: nn.Linear) -> int:
    return max(1, LOGIT_BYTES[head.weight.device.type] // (4 * head.weight.shape[0]))


def _logits(head: nn.Linear, hidden_ND: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = head(hidden_ND)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def token_losses(head: nn.Linear, hidden_RTD: torch.Tensor, tokens_RT: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy in nats, at least float32, ``[R, T - 1]``; a few tokens at a time."""
    hidden_ND, targets_N = hidden_RTD[:, :-1].flatten(0, 1), tokens_RT[:, 1:].flatten()
    size = _tokens_at_once(head)
    parts = [
        F.cross_entropy(_logits(head, hidden), targets, reduction="none")
        for hidden, targets in zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    ]
    return torch.cat(parts).view(tokens_RT.shape[0], -1)


def token_divergences(head: nn.Linear, hidden_RTD: torch.Tensor, dense_RTD: torch.Tensor) -> torch.Tensor:
    """KL(dense || masked) of the next-token distributions in nats, ``[R, T]``; a few tokens at a time."""
    size = max(1, _tokens_at_once(head) // 2)
    parts = []
    for hidden, dense in zip(hidden_RTD.flatten(0, 1).split(size), dense_RTD.flatten(0, 1).split(size), strict=True):
        ours, theirs = _logits(head, hidden).log_softmax(-1), _logits(head, dense).log_softmax(-1)
        parts.append(F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1))
    return torch.cat(parts).view(hidden_RTD.shape[:2])


class MaskedObjective:
    """Losses of masks on windows of text; made by ``masked_objective``.

    Masks are bool, or gates from 0 to 1 in floating point: a tensor, or what makes those of any rows when asked.

    Args:
        kind: ``cross-entropy``, or ``kl`` to the dense model's predictions (one more forward of B windows a call).
        rows_per_forward: most rows in one forward pass; a smaller number saves memory and changes nothing else.
        before_pass: called before every forward pass with the number of its rows; what it raises ends the call.
    """

    def __init__(
        self,
        view: ModelView,
        live: LiveMasks,
        kind: ObjectiveName,
        rows_per_forward: int,
        before_pass: Callable[[int], object] | None = None,
    ) -> None:
        self._view, self._live, self._kind, self._rows = view, live, kind, rows_per_forward
        self._before_pass = before_pass
        self._head: nn.Linear = view.model.get_output_embeddings()
        self._device = next(view.model.parameters()).device

    def losses(self, masks_KU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Mean loss of each mask over all windows, float64 ``[K]`` on the CPU, nats per token.

        Raises:
            ConfigError: masks or windows of another shape.
        """
        return self.window_losses(masks_KU, tokens_BT).mean(1)

    def window_losses(self, masks_KU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """As ``losses``, on each window: ``[K, B]``."""
        self._check(masks_KU, tokens_BT, "[K, {}]", len(masks_KU.shape) == 2)
        num_masks, num_windows = len(masks_KU), len(tokens_BT)
        rows = torch.arange(num_masks * num_windows)
        losses_RP = self._token_losses(masks_KU, rows // num_windows, tokens_BT, rows % num_windows)
        return losses_RP.mean(1).view(num_masks, num_windows)

    def token_losses(self, masks_BKCU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Losses of K masks of each window's own, one for each of its C chunks, float64 ``[B, K, T]`` on the CPU.

        Position t holds the loss of what is predicted from the tokens up to t: it depends on the masks of its own
        chunk and of those before. The last one, whose next token lies beyond the window, is zero in cross-entropy.

        Raises:
            ConfigError: masks or windows of another shape, or chunks that do not divide the window.
        """
        fits = len(masks_BKCU.shape) == 4 and len(masks_BKCU) == len(tokens_BT) and masks_BKCU.shape[1] > 0
        self._check(masks_BKCU, tokens_BT, "[B, K, C, {}] for B windows", fits)
        (num_windows, num_masks, chunks, _), window = masks_BKCU.shape, tokens_BT.shape[1]
        if window % max(chunks, 1):
            raise ConfigError(f"{chunks} chunks do not divide a window of {window} tokens")
        rows = torch.arange(num_windows * num_masks)
        losses_RP = self._token_losses(masks_BKCU.flatten(0, 1), rows, tokens_BT, rows // num_masks)
        return F.pad(losses_RP, (0, window - losses_RP.shape[1])).view(num_windows, num_masks, window)

    def chunk_losses(self, masks_BKCU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """As ``token_losses``, each chunk's share of the mean over all predictions of its window: ``[B, K, C]``."""
        losses_BKT = self.token_shares(masks_BKCU, tokens_BT)
        return losses_BKT.view(*masks_BKCU.shape[:3], -1).sum(-1)

    def token_shares(self, masks_BKCU: MaskRows, tokens_BT: torch.Tensor) -> torch.Tensor:
        """As ``token_losses``, each token's share of the mean over all predictions of its window: ``[B, K, T]``."""
        losses_BKT = self.token_losses(masks_BKCU, tokens_BT)
        return losses_BKT / (losses_BKT.shape[-1] - (self._kind == "cross-entropy"))

    @torch.inference_mode()
    def activities(self, mask_U: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        """How active each of the model's N channels is at each token, float32 ``[B, T, N]`` on the CPU.

        That is the size of its entry in the input of the down projection, under one mask; removed ones too, as they
        would be. Channels are those of all layers in turn.

        Raises:
            ConfigError: a mask or windows of another shape.
        """
        self._check(mask_U, tokens_BT, "[{}]", mask_U.ndim == 1)
        widths = [layer.shape.channels for layer in self._view.layers]
        # Filled in place: of a large model it is gigabytes.
        found_BTN = torch.empty(*tokens_BT.shape, sum(widths), dtype=torch.float32)

        def note(layer: int, hidden_RTF: torch.Tensor) -> None:
            by_layer[layer].copy_(hidden_RTF).abs_()

        with self._live.watching(note):
            self._live.set(mask_U[None])
            for found_RTN, tokens_RT in zip(found_BTN.split(self._rows), tokens_BT.split(self._rows), strict=True):
                by_layer = found_RTN.split(widths, dim=-1)
                self._hidden(tokens_RT.to(self._device))
        return found_BTN

    def _check(self, masks: MaskRows, tokens_BT: torch.Tensor, wanted: str, fits: bool) -> None:
        size = self._view.space.size
        if not fits or masks.shape[-1] != size or not masks.shape.numel():
            raise ConfigError(f"masks must be {wanted.format(size)} for this model, but are {list(masks.shape)}")
        if tokens_BT.ndim != 2 or not len(tokens_BT) or tokens_BT.shape[1] < 2:
            raise ConfigError(f"windows must be [B, T] of at least 2 tokens, but are {list(tokens_BT.shape)}")

    @torch.inference_mode()
    def _token_losses(
        self, masks: MaskRows, mask_R: torch.Tensor, tokens_BT: torch.Tensor, window_R: torch.Tensor
    ) -> torch.Tensor:
        """Float64 ``[R, P]`` of the P predictions of each row, whose mask and window are given by their indices."""
        masks, tokens_BT, window_R = masks.to(self._device), tokens_BT.to(self._device), window_R.to(self._device)
        dense_BTD = self._dense_hidden(tokens_BT) if self._kind == "kl" else None
        parts = []
        for rows, masks_of_rows in self._passes(masks, mask_R, tokens_BT.shape[1]):
            self._live.set(masks_of_rows, gather=True)
            tokens_RT = tokens_BT[window_R[rows]]
            hidden_RTD = self._hidden(tokens_RT)
            if dense_BTD is None:
                losses_RP = token_losses(self._head, hidden_RTD, tokens_RT)
            else:
                losses_RP = token_divergences(self._head, hidden_RTD, dense_BTD[window_R[rows]])
            parts.append(losses_RP.double().cpu())
        return torch.cat(parts)

    def _passes(self, masks: MaskRows, mask_R: torch.Tensor, tokens: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows that go through together, and their masks.

        Rows of the same mask go by themselves if they hold enough tokens, so that what it removes is not computed.
        """
        together = len(mask_R)
        shared = len(mask_R) // len(masks) if len(masks.shape) == 2 else 1  # one for each chunk cannot be gathered
        if len(masks.shape) == 2 and shared * tokens >= GATHER_TOKENS and not masks[:1].is_floating_point():
            together, masks = shared, masks[:]
        for start in range(0, len(mask_R), together):
            for first in range(start, start + together, self._rows):
                rows = slice(first, min(first + self._rows, start + together))
                which = mask_R[rows] if together > shared else mask_R[first : first + 1]
                yield rows, masks[which]

    def _dense_hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        self._live.set(torch.ones(1, self._view.space.size, dtype=torch.bool))
        return torch.cat([self._hidden(tokens) for tokens in tokens_BT.split(self._rows)])

    def _hidden(self, tokens_RT: torch.Tensor) -> torch.Tensor:
        if self._before_pass is not None:
            self._before_pass(len(tokens_RT))
        hidden: torch.Tensor = self._view.decoder(input_ids=tokens_RT, use_cache=False).last_hidden_state
        return hidden


@contextmanager
def masked_objective(
    view: ModelView,
    ops: MaskedOps | None = None,
    *,
    kind: ObjectiveName = "cross-entropy",
    rows_per_forward: int = 64,
    before_pass: Callable[[int], object] | None = None,
) -> Iterator[MaskedObjective]:
    """The objective for the length of a ``with`` block; the model is restored on leaving it.

    ``ops`` are by default those of plain torch; for the others see ``MaskedObjective``. Raises ``ConfigError`` for an
    unknown kind.
    """
    check_name("objective", kind, ObjectiveName)
    ops = ops or load_backend("auto", next(view.model.parameters()).device)
    with masked(view, ops) as live:
        yield MaskedObjective(view, live, kind, rows_per_forward, before_pass)
