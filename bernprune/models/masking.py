"""K masks on a live model: every row of the batch runs under its own.

Masking the inputs of the attention output projection and of the FFN down projection, and switching off the residual
branch of a block that has no unit left, equals physical slicing. For the length of a ``with`` block those modules are
swapped for masked twins that hold no parameters; leaving it puts the very same objects back.

Letters: R rows of the batch, U units.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from bernprune.backends import MaskedOps
from bernprune.models.view import LayerView, ModelView
from bernprune.names import Kind
from bernprune.units import ANCESTORS


class _Branch:
    """What one residual branch of one layer sees of the current masks."""

    units_RN: torch.Tensor | None = None  # None: every unit is kept in every row
    open_R11: torch.Tensor | None = None  # None: the branch is open in every row

    def units(self, num_rows: int) -> torch.Tensor | None:
        """The units' mask for a batch of so many rows; a single mask serves them all."""
        masks_RN = self.units_RN
        return masks_RN.expand(num_rows, -1) if masks_RN is not None and len(masks_RN) == 1 else masks_RN

    def close(self, output_RTD: torch.Tensor) -> torch.Tensor:
        return output_RTD if self.open_R11 is None else output_RTD * self.open_R11


class _MaskedOutput(nn.Module):
    """The attention output projection, masked by kv group."""

    def __init__(self, dense: nn.Linear, branch: _Branch, ops: MaskedOps, unit_width: int) -> None:
        super().__init__()
        # In a tuple, the dense module is hidden from torch, so that the model's parameters keep their names.
        self._dense, self._branch, self._ops, self._unit_width = (dense,), branch, ops, unit_width

    @property
    def weight(self) -> torch.Tensor:
        return self._dense[0].weight

    def forward(self, x_RTE: torch.Tensor) -> torch.Tensor:
        dense = self._dense[0]
        output_RTD = self._ops.masked_linear(
            x_RTE, self._branch.units(len(x_RTE)), dense.weight, dense.bias, unit_width=self._unit_width
        )
        return self._branch.close(output_RTD)


class _MaskedFFN(nn.Module):
    """The gated FFN, masked by channel."""

    def __init__(self, dense: nn.Module, parts: dict[str, Any], branch: _Branch, ops: MaskedOps) -> None:
        super().__init__()
        self._dense, self._parts, self._branch, self._ops = (dense,), (parts,), branch, ops

    def forward(self, x_RTD: torch.Tensor) -> torch.Tensor:
        gate, up, down, activation = (self._parts[0][name] for name in ("gate", "up", "down", "activation"))
        output_RTD = self._ops.masked_mlp(
            x_RTD,
            self._branch.units(len(x_RTD)),
            gate.weight,
            up.weight,
            down.weight,
            activation=activation,
            gate_bias_F=gate.bias,
            up_bias_F=up.bias,
            down_bias_D=down.bias,
        )
        return self._branch.close(output_RTD)


class LiveMasks:
    """Sets the masks of the next forward passes; made by ``masked``."""

    def __init__(self, view: ModelView, branches: dict[int, dict[Kind, _Branch]], dtype: torch.dtype) -> None:
        self.view, self._branches, self._dtype = view, branches, dtype

    def set(self, masks_RU: torch.Tensor) -> None:
        """One mask a row, bool ``[R, U]``, or one for all rows, ``[1, U]``; 1 keeps."""
        device = next(self.view.model.parameters()).device
        alive_RU = self.view.space.alive(masks_RU.bool().cpu()).to(device)
        for layer, branches in self._branches.items():
            for kind, branch in branches.items():
                self._set_branch(branch, alive_RU, kind, layer)

    def _set_branch(self, branch: _Branch, alive_RU: torch.Tensor, kind: Kind, layer: int) -> None:
        span = self.view.space.span(kind, layer)
        if span is not None:
            alive_RN = alive_RU[:, span]
            branch.units_RN = alive_RN.to(self._dtype)
            branch.open_R11 = self._opening(alive_RN.any(dim=1))
            return
        for ancestor in ANCESTORS[kind]:
            span = self.view.space.span(ancestor, layer)
            if span is not None:
                branch.open_R11 = self._opening(alive_RU[:, span.start])
                return

    def _opening(self, open_R: torch.Tensor) -> torch.Tensor:
        return open_R.to(self._dtype)[:, None, None]


@contextmanager
def masked(view: ModelView, ops: MaskedOps, *, layers: Sequence[int] | None = None) -> Iterator[LiveMasks]:
    """Let the model obey masks inside the block; afterwards, also after an exception, it is what it was.

    The batches run inside have as many rows as the masks last set, or those have one row. Nothing is masked before
    the first ``set``.
    ``layers`` limits masking to some layers; the others stay what they were: dense, or masked by a block around this.
    """
    family, branches = view.family, dict[int, dict[Kind, _Branch]]()
    chosen = range(len(view.layers)) if layers is None else layers
    dtype = view.layers[0].down.weight.dtype
    with ExitStack() as swapped:
        for index in chosen:
            layer, attention, ffn = view.layers[index], _Branch(), _Branch()
            branches[index] = {"kv_group": attention, "channel": ffn}
            _swap(swapped, layer.attention, family.output, _masked_output(layer, attention, ops))
            parts = {name: getattr(layer.ffn, getattr(family, name)) for name in ("gate", "up", "down", "activation")}
            _swap(swapped, layer.layer, family.ffn, _MaskedFFN(layer.ffn, parts, ffn, ops))
        yield LiveMasks(view, branches, dtype)


def _swap(swapped: ExitStack, owner: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in its place until the stack is closed."""
    swapped.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, module)


def _masked_output(layer: LayerView, branch: _Branch, ops: MaskedOps) -> _MaskedOutput:
    return _MaskedOutput(layer.output, branch, ops, layer.output.in_features // layer.shape.kv_groups)
