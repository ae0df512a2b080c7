"""Losses of tokens from last hidden states, a few tokens at a time: the logits of a batch never exist.

What is live of them at once fits in two and a half times ``LOGIT_BYTES``, and twice that where gradients go back
through them: for those, the logits of the same few tokens are computed again (checkpointing, Chen et al., 2016).

Letters: R rows, T tokens, N tokens of all rows, D hidden size.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bernprune.backends import TORCH, MaskedOps
from bernprune.errors import ConfigError
from bernprune.names import ObjectiveName, check_name

# Of float32 logits at once, by type of device. A GPU must not read the output embedding for too few tokens; a
# processor does best with about the size of its caches.
LOGIT_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
LossFunction = Callable[..., torch.Tensor]  # of logits and next tokens, and maybe the dense model's logits
_ROWS = 256  # a product has a multiple of these rows if it leaves no part of a GPU idle


_OF_A_TOKEN = 64.0  # what gradients of one token's loss are multiplied by on their way back


def scale_of_mean(tokens_RT: torch.Tensor) -> float:
    """What to multiply a mean loss of these tokens by before gradients go back, and to divide them by afterwards.

    Float16 has no numbers so small as gradients of a mean over many tokens. It is a power of two, so that in other
    formats nothing changes.
    """
    return power_of_two(_OF_A_TOKEN * tokens_RT.numel())


def power_of_two(size: float) -> float:
    """The least one that is larger than a size; one if that is zero or not finite."""
    return 2.0 ** math.frexp(size)[1] if 0 < size < math.inf else 1.0


def token_losses(
    head: nn.Linear, hidden_RTD: torch.Tensor, tokens_RT: torch.Tensor, ops: MaskedOps = TORCH
) -> torch.Tensor:
    """Next-token cross-entropy in nats, at least float32, ``[R, T - 1]``; a few tokens at a time."""
    hidden_ND, targets_N = hidden_RTD[:, :-1].flatten(0, 1), tokens_RT[:, 1:].flatten()

    def losses(hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return ops.cross_entropy(head(hidden_ND), targets_N)

    return _in_parts(losses, _tokens_at_once(head), hidden_ND, targets_N).view(tokens_RT.shape[0], -1)


def token_divergences(
    head: nn.Linear,
    hidden_RTD: torch.Tensor,
    dense_RTD: torch.Tensor,
    ops: MaskedOps = TORCH,
    *,
    dense_head: nn.Linear | None = None,
) -> torch.Tensor:
    """KL(dense || ours) of the next-token distributions in nats, ``[R, T]``; a few tokens at a time.

    Args:
        dense_head: the output embedding of the dense model, if it is another one.
    """
    theirs = head if dense_head is None else dense_head

    def divergences(hidden_ND: torch.Tensor, dense_ND: torch.Tensor) -> torch.Tensor:
        return ops.divergence(head(hidden_ND), theirs(dense_ND))

    size = max(1, _tokens_at_once(head) // 2)
    parts = _in_parts(divergences, size, hidden_RTD.flatten(0, 1), dense_RTD.flatten(0, 1))
    return parts.view(hidden_RTD.shape[:2])


@dataclass(frozen=True)
class TokenLoss:
    """What a mask loses at each token of a window.

    Attributes:
        needs_dense: whether that depends on what the dense model predicts, too.
        at_last: whether it loses anything at the last token, whose next one lies beyond the window.
        run: losses ``[R, P]`` at those tokens, from the output embedding, last hidden states ``[R, T, D]``, tokens
            ``[R, T]``, the dense model's hidden states if it needs them, and what runs masked operations.
    """

    needs_dense: bool
    at_last: bool
    run: Callable[[nn.Linear, torch.Tensor, torch.Tensor, torch.Tensor | None, MaskedOps], torch.Tensor]


def _divergences(
    head: nn.Linear, hidden_RTD: torch.Tensor, tokens_RT: torch.Tensor, dense_RTD: torch.Tensor | None, ops: MaskedOps
) -> torch.Tensor:
    assert dense_RTD is not None, "it is needed"
    return token_divergences(head, hidden_RTD, dense_RTD, ops)


LOSSES: dict[str, TokenLoss] = {
    "cross-entropy": TokenLoss(
        False, False, lambda head, hidden, tokens, _, ops: token_losses(head, hidden, tokens, ops)
    ),
    "kl": TokenLoss(True, True, _divergences),
}


def token_loss(given: ObjectiveName | LossFunction | TokenLoss) -> TokenLoss:
    """By name, or that of a custom function. Raises ``ConfigError`` for neither."""
    if isinstance(given, TokenLoss):
        return given
    if callable(given):
        return custom_loss(given, str(getattr(given, "__name__", type(given).__name__)))
    check_name("objective", given, ObjectiveName)
    return LOSSES[given]


def custom_loss(function: LossFunction, name: str) -> TokenLoss:
    """What a function gives, at all tokens whose next one is in the window.

    Args:
        function: of float32 logits ``[N, V]`` and next tokens ``[N]`` and, if it takes a third, of the dense model's
            logits. It gives losses ``[N]``, a few tokens of some rows at a time.

    Raises:
        ConfigError: it takes fewer or more; or gives something else, once it is run.
    """
    takes, count = _takes(function)
    if count not in (2, 3):
        raise ConfigError(
            f"objective {name} must take logits, next tokens and, if it needs them, the dense model's logits, but "
            f"takes {takes}"
        )

    def losses(
        head: nn.Linear,
        hidden_RTD: torch.Tensor,
        tokens_RT: torch.Tensor,
        dense_RTD: torch.Tensor | None,
        ops: MaskedOps,
    ) -> torch.Tensor:
        def of_part(targets_N: torch.Tensor, *hidden: torch.Tensor) -> torch.Tensor:
            logits, *dense = (head(each_ND).float() for each_ND in hidden)
            return _checked(name, function(logits, targets_N, *dense), targets_N)

        hidden = [hidden_RTD] if dense_RTD is None else [hidden_RTD, dense_RTD]
        size = max(1, _tokens_at_once(head) // len(hidden))
        targets_N, rows = tokens_RT[:, 1:].flatten(), tokens_RT.shape[0]
        return _in_parts(of_part, size, targets_N, *(each[:, :-1].flatten(0, 1) for each in hidden)).view(rows, -1)

    return TokenLoss(count == 3, False, losses)


def _takes(function: LossFunction) -> tuple[str, int]:
    """What a function must be given, in words; and how many values by their place, 0 if it must be given others."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of what is not written in Python
        return "what cannot be told", 0
    needed = [each for each in parameters if each.default is each.empty]
    count = sum(each.kind <= each.POSITIONAL_OR_KEYWORD for each in needed)
    if named := [each.name for each in needed if each.kind == each.KEYWORD_ONLY]:
        return f"{', '.join(named)} by name", 0
    any_number = not count and any(each.kind == each.VAR_POSITIONAL for each in needed)
    return "what cannot be told" if any_number else str(count), count


def _checked(name: str, found: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    if not isinstance(found, torch.Tensor):
        raise ConfigError(f"objective {name} must give a tensor, but gave {found!r:.100}")
    if found.shape != targets_N.shape or not found.is_floating_point():
        given = f"{list(found.shape)} of {str(found.dtype).removeprefix('torch.')}"
        raise ConfigError(f"objective {name} must give a loss for each of {len(targets_N)} tokens, but gave {given}")
    return found


def _in_parts(losses: Callable[..., torch.Tensor], size: int, *values: torch.Tensor) -> torch.Tensor:
    """Losses of so many tokens at a time, ``[N]``, of values that have one for each token."""
    parts = zip(*(each.split(size) for each in values), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
    return torch.cat([losses(*part) for part in parts])


def _tokens_at_once(head: nn.Linear) -> int:
    size = max(1, LOGIT_BYTES["cuda" if head.weight.is_cuda else "cpu"] // (4 * head.weight.shape[0]))
    return size // _ROWS * _ROWS or size
