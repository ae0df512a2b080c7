"""K masks on a live model: every row of the batch, or every chunk of tokens of every row, runs under its own.

Masking the inputs of the attention output projection and of the FFN down projection, and switching off the residual
branch of a block that has no unit left, equals physical slicing. For the length of a ``with`` block those modules are
swapped for masked twins that hold no parameters; leaving it puts the very same objects back.

Instead of being kept or cut, a unit may be scaled by a gate between: gates multiply those of all it lies in, and a
branch is open as long as any of its gates is.

Where all rows are under one mask, what it removes need not be computed: each layer gathers the weights of what it keeps
for the length of its own pass. Of a branch that keeps nothing a single unit is computed, and switched off.

A mask of a chunk says what its tokens may pass through; what earlier tokens left in the keys and values was made under
their own masks.

Letters: R rows of the batch, C chunks of a row, U units, N units of one branch, T tokens, P pieces = R * C.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bernprune.backends import MaskedOps
from bernprune.models.view import LayerView, ModelView
from bernprune.names import Kind


class _Branch:
    """What one residual branch of one layer sees of the current masks."""

    units_PN: torch.Tensor | None = None  # None: every unit is kept in every piece
    open_P11: torch.Tensor | None = None  # None: the branch is open in every piece
    kept_N: torch.Tensor | None = None  # the units to gather; None: all are computed, and masked if they are
    chunks = 1
    watch: Callable[[torch.Tensor], None] | None = None  # told what the last projection takes in, before it is masked

    def __init__(self, num_units: int, *, biased: bool) -> None:
        self.num_units = num_units
        self.biased = biased  # so that something comes out even if nothing goes into its product

    def gather(self, weights: torch.Tensor, *, dim: int = 0) -> torch.Tensor:
        """Of a weight or bias whose ``dim`` holds all units in turn, what belongs to the kept ones."""
        if self.kept_N is None:
            return weights
        by_unit: torch.Tensor = weights.unflatten(dim, (self.num_units, -1))
        return by_unit.index_select(dim, self.kept_N).flatten(dim, dim + 1)

    def run(
        self, operation: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor], x_RTE: torch.Tensor
    ) -> torch.Tensor:
        """``operation`` on the input and the units' mask, piece by piece, and closed where the branch is."""
        rows, tokens = x_RTE.shape[:2]
        x_PTE = x_RTE.reshape(rows * self.chunks, tokens // self.chunks, -1)
        masks_PN = self.units_PN
        if masks_PN is not None and len(masks_PN) == 1:  # a single one serves them all
            masks_PN = masks_PN.expand(len(x_PTE), -1)
        output_PTD = operation(x_PTE, masks_PN)
        if self.open_P11 is not None:
            output_PTD = output_PTD * self.open_P11
        return output_PTD.view(rows, tokens, -1)


class _Gathered(nn.Module):
    """A query, key or value projection, of the kept kv groups alone."""

    def __init__(self, projection: "nn.Linear | _Gathered", branch: _Branch) -> None:
        super().__init__()
        dense = projection._dense[0] if isinstance(projection, _Gathered) else projection  # of a block around this one
        self._dense: tuple[nn.Linear] = (dense,)
        self._branch = branch

    @property
    def weight(self) -> torch.Tensor:
        return self._dense[0].weight

    def forward(self, x_RTD: torch.Tensor) -> torch.Tensor:
        bias = self._dense[0].bias
        return F.linear(x_RTD, self._branch.gather(self.weight), None if bias is None else self._branch.gather(bias))


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
        return self._branch.run(self._piece, x_RTE)

    def _piece(self, x_PTE: torch.Tensor, masks_PN: torch.Tensor | None) -> torch.Tensor:
        weight_DE = self._branch.gather(self.weight, dim=1)
        return self._ops.masked_linear(x_PTE, masks_PN, weight_DE, self._dense[0].bias, unit_width=self._unit_width)


class _MaskedFFN(nn.Module):
    """The gated FFN, masked by channel."""

    def __init__(self, dense: nn.Module, parts: dict[str, Any], branch: _Branch, ops: MaskedOps) -> None:
        super().__init__()
        self._dense, self._parts, self._branch, self._ops = (dense,), (parts,), branch, ops

    def forward(self, x_RTD: torch.Tensor) -> torch.Tensor:
        return self._branch.run(self._piece, x_RTD)

    def _piece(self, x_PTD: torch.Tensor, masks_PN: torch.Tensor | None) -> torch.Tensor:
        gate, up, down, activation = (self._parts[0][name] for name in ("gate", "up", "down", "activation"))
        gather = self._branch.gather
        if self._branch.watch is not None:
            hidden_PTF = activation(F.linear(x_PTD, gate.weight, gate.bias)) * F.linear(x_PTD, up.weight, up.bias)
            self._branch.watch(hidden_PTF)
            return self._ops.masked_linear(hidden_PTF, masks_PN, down.weight, down.bias)
        return self._ops.masked_mlp(
            x_PTD,
            masks_PN,
            gather(gate.weight),
            gather(up.weight),
            gather(down.weight, dim=1),
            activation=activation,
            gate_bias_F=None if gate.bias is None else gather(gate.bias),
            up_bias_F=None if up.bias is None else gather(up.bias),
            down_bias_D=down.bias,
        )


class LiveMasks:
    """Sets the masks of the next forward passes; made by ``masked``."""

    def __init__(self, view: ModelView, branches: dict[int, dict[Kind, _Branch]], dtype: torch.dtype) -> None:
        self.view, self._branches, self._dtype = view, branches, dtype

    def set(self, masks: torch.Tensor, *, gather: bool = False) -> None:
        """One mask a row, bool ``[R, U]``, one for all rows, ``[1, U]``, or one a chunk, ``[R, C, U]``; 1 keeps.

        Floating-point numbers are gates, from 0 to 1. The tokens of a row must divide into C equal chunks.

        Args:
            gather: under one mask for all rows, compute only what it keeps. Keys and values of removed groups are then
                missing too, so nothing may be read on from a cache under another mask.
        """
        device = next(self.view.model.parameters()).device
        chunks = masks.shape[1] if masks.ndim == 3 else 1
        gates = masks.to(device, masks.dtype if masks.is_floating_point() else torch.bool)
        alive_PU = self.view.space.inherit(gates, torch.mul).flatten(0, -2)
        gather = gather and len(alive_PU) == 1 and alive_PU.dtype == torch.bool
        for layer, branches in self._branches.items():
            for kind, branch in branches.items():
                branch.chunks = chunks
                self._set_branch(branch, alive_PU, kind, layer, gather=gather)

    @contextmanager
    def watching(self, told: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
        """For the length of the block, ``told`` gets each masked layer and what its channels hand on, ``[P, T, F]``.

        Removed channels are shown too, as they would be if they were kept: nothing may be gathered meanwhile.
        """
        try:
            for layer, branches in self._branches.items():
                branches["channel"].watch = functools.partial(told, layer)
            yield
        finally:
            for branches in self._branches.values():
                branches["channel"].watch = None

    def _set_branch(self, branch: _Branch, alive_PU: torch.Tensor, kind: Kind, layer: int, *, gather: bool) -> None:
        span = self.view.space.span(kind, layer)
        branch.units_PN = branch.open_P11 = branch.kept_N = None
        if span is not None:
            alive_PN = alive_PU[:, span]
            if not gather:
                branch.units_PN = alive_PN.to(self._dtype)
                if not branch.biased:
                    return  # without a unit it is closed as it is
            elif not alive_PN.all():
                branch.kept_N = alive_PN[0].nonzero()[:, 0]
            open_P = alive_PN.any(dim=1)
        else:
            own = self.view.space.ancestor(kind, layer)
            if own is None:
                return
            open_P = alive_PU[:, own]
        if gather and not open_P[0]:
            branch.kept_N = torch.zeros(1, dtype=torch.int64, device=alive_PU.device)  # the least that modules can run
        if not gather or not open_P[0]:
            branch.open_P11 = self._opening(open_P)

    def _opening(self, open_P: torch.Tensor) -> torch.Tensor:
        return open_P.to(self._dtype)[:, None, None]


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
            layer = view.layers[index]
            attention = _Branch(layer.shape.kv_groups, biased=layer.output.bias is not None)
            ffn = _Branch(layer.shape.channels, biased=layer.down.bias is not None)
            branches[index] = {"kv_group": attention, "channel": ffn}
            for name in (family.query, family.key, family.value):
                _swap(swapped, layer.attention, name, _Gathered(getattr(layer.attention, name), attention))
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
