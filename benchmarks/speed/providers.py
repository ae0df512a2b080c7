"""Ways to evaluate masks, side by side; each is given masks and windows and returns a loss for each pair.

- ``published``: one forward pass a mask over all windows, masks multiplied into the inputs of the output and the down
  projection, float32 logits of the whole batch with a shifted copy, as the released code of the published method does.
- ``batched``: all masks in one batch, everything computed and masked, losses a few tokens at a time; plain torch.
- ``ours``: what a run does, by the costs that it measured; ``ours-triton`` by its kernels.

Letters: B windows, T tokens, K masks, C chunks, U units.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bernprune.backends import MaskedOps, load_backend
from bernprune.costs import Costs, measure
from bernprune.models.view import ModelView
from bernprune.objective import masked_objective

Evaluate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # masks [K, U] or [B, K, C, U], and windows [B, T]
DENSE = Costs(passing=0.0, copying=2.0**40, blocks=0.5)


@contextmanager
def published(view: ModelView) -> Iterator[Evaluate]:
    """Masks ``[K, U]`` of a whole batch, or ``[B, K, 1, U]`` of single sequences, one after the other."""
    device, space = view.device, view.space
    current: dict[str, torch.Tensor] = {}

    def multiply(span: slice, width: int, module: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return args[0] * current["mask"][span].repeat_interleave(width)

    def one(mask_U: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        current["mask"] = mask_U.to(device, view.model.dtype)
        logits = view.model(input_ids=tokens_BT, use_cache=False).logits.float()
        shifted = logits[:, :-1].contiguous()
        losses = F.cross_entropy(shifted.flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens_BT), -1).mean(1)

    def evaluate(masks: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        tokens_BT = tokens_BT.to(device)
        if masks.ndim == 2:
            return torch.stack([one(mask_U, tokens_BT) for mask_U in masks], dim=1)
        rows = [[one(mask_U, tokens_1T)[0] for mask_U in masks_KU[:, 0]] for masks_KU, tokens_1T in zip(
            masks, tokens_BT.split(1), strict=True
        )]  # fmt: skip
        return torch.stack([torch.stack(row) for row in rows])

    with ExitStack() as hooks:
        for index, layer in enumerate(view.layers):
            for kind, module, count in (
                ("kv_group", layer.output, layer.shape.kv_groups),
                ("channel", layer.down, layer.shape.channels),
            ):
                hook = partial(multiply, space.span(kind, index), module.in_features // count)
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        yield evaluate


@contextmanager
def _objective(view: ModelView, ops: MaskedOps, costs: Costs, rows: int) -> Iterator[Evaluate]:
    with masked_objective(view, ops, rows_per_forward=rows, costs=costs) as objective:

        def evaluate(masks: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
            if masks.ndim == 2:
                return objective.window_losses(masks, tokens_BT).T
            return objective.token_shares(masks, tokens_BT).sum(-1)

        yield evaluate


@contextmanager
def provider(name: str, view: ModelView, *, rows: int, window: int) -> Iterator[Evaluate]:
    """One of the above by name. Raises ``ConfigError`` for others."""
    device = view.device
    with torch.inference_mode(), ExitStack() as opened:
        if name == "published":
            yield opened.enter_context(published(view))
        elif name == "batched":
            yield opened.enter_context(_objective(view, load_backend("torch", device), DENSE, rows))
        else:
            ops = load_backend("triton" if name == "ours-triton" else "torch", device)
            yield opened.enter_context(_objective(view, ops, measure(view, ops, window), rows))


NAMES = ["published", "batched", "ours", "ours-triton"]
