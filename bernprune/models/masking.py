"""K masks on a live model: every row of the batch, or every chunk of tokens of every row, runs under its own.

Masking the inputs of the attention output projection and of the FFN down projection, and switching off the residual
branch of a block that has no unit left, equals physical slicing. For the length of a ``with`` block those modules are
swapped for masked twins that hold no parameters; leaving it puts the very same objects back.

Instead of being kept or cut, a unit may be scaled by a gate between: a gate is multiplied by those of all that its
unit lies in, and a branch is open as long as any of its gates is.

What none of the rows keeps need not be computed: each layer gathers the weights of the *working set* for the length of
its own pass. Where nothing of a branch is at work, a single unit of it is computed, and switched off.

Projections that are not plain linear layers, such as quantised ones, are not gathered: they are called as they
are, and only what enters them is masked.

A mask of a chunk says what its tokens may pass through; what earlier tokens left in the keys and values was made under
their own masks.

Letters: R rows of the batch, C chunks of a row, M masks, U units, N units of one branch, T tokens, P pieces = R * C.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bernprune.backends import MaskedOps, load_backend
from bernprune.errors import BackendError, ConfigError
from bernprune.kernels.masks import PackedMasks
from bernprune.models.attending import attending
from bernprune.models.branches import Branch, CurrentMasks
from bernprune.models.families import Family
from bernprune.models.fusing import fusing
from bernprune.models.view import LayerView, ModelView
from bernprune.names import BackendName, Kind

logger = logging.getLogger(__name__)
_ALIGNED = {"cuda": 16}  # channels at work are a multiple of this, by type of device


class _Gathered(nn.Module):
    """A query, key or value projection, of the kept kv groups alone."""

    def __init__(self, projection: "nn.Linear | _Gathered", branch: Branch, ops: MaskedOps) -> None:
        super().__init__()
        dense = projection._dense[0] if isinstance(projection, _Gathered) else projection  # put here by a block around
        self._dense: tuple[nn.Linear] = (dense,)
        self._branch, self._ops = branch, ops

    @property
    def weight(self) -> torch.Tensor:
        return self._dense[0].weight

    def forward(self, x_RTD: torch.Tensor) -> torch.Tensor:
        dense, branch = self._dense[0], self._branch
        bias_E = None if dense.bias is None else branch.gather(dense.bias)
        # A chunk's keys and values are read by later ones, which may keep what it removes.
        masks = branch.masks if isinstance(branch.masks, PackedMasks) and branch.chunks == 1 else None
        width = dense.out_features // branch.num_units
        return self._ops.linear_to_kept(x_RTD, masks, branch.gather(self.weight), bias_E, unit_width=width)


class _MaskedOutput(nn.Module):
    """The attention output projection, masked by kv group."""

    def __init__(self, dense: nn.Linear, branch: Branch, ops: MaskedOps, unit_width: int) -> None:
        super().__init__()
        # In a tuple, the dense module is hidden from torch, so that the model's parameters keep their names.
        self._dense, self._branch, self._ops, self._unit_width = (dense,), branch, ops, unit_width

    @property
    def weight(self) -> torch.Tensor:
        return self._dense[0].weight

    def forward(self, x_RTE: torch.Tensor) -> torch.Tensor:
        return self._branch.run(self._piece, x_RTE)

    def _piece(self, x_PTE: torch.Tensor, masks: Any) -> torch.Tensor:
        weight_DE = self._branch.gather_last()
        return self._ops.masked_linear(x_PTE, masks, weight_DE, self._dense[0].bias, unit_width=self._unit_width)


class _MaskedFFN(nn.Module):
    """The gated FFN, masked by channel."""

    def __init__(self, dense: nn.Module, parts: dict[str, Any], branch: Branch, ops: MaskedOps) -> None:
        super().__init__()
        self._dense, self._parts, self._branch, self._ops = (dense,), (parts,), branch, ops
        self._activation = ops.activation(parts["activation"])

    def forward(self, x_RTD: torch.Tensor) -> torch.Tensor:
        return self._branch.run(self._piece, x_RTD)

    def _piece(self, x_PTD: torch.Tensor, masks: Any) -> torch.Tensor:
        gate, up, down, activation = (self._parts[0][name] for name in ("gate", "up", "down", "activation"))
        if self._branch.watch is not None:
            hidden_PTF = activation(F.linear(x_PTD, gate.weight, gate.bias)) * F.linear(x_PTD, up.weight, up.bias)
            self._branch.watch(hidden_PTF)
            return self._ops.masked_linear(hidden_PTF, masks, down.weight, down.bias)
        gather = self._branch.gather
        return self._ops.masked_mlp(
            x_PTD,
            masks,
            gather(gate.weight),
            gather(up.weight),
            self._branch.gather_last(),
            activation=self._activation,
            gate_bias_F=None if gate.bias is None else gather(gate.bias),
            up_bias_F=None if up.bias is None else gather(up.bias),
            down_bias_D=down.bias,
        )


class _MaskedInput(nn.Module):
    """A last projection that is called as it is, with its input masked by unit."""

    def __init__(self, dense: nn.Linear, branch: Branch, ops: MaskedOps) -> None:
        super().__init__()
        self._dense, self._branch, self._ops = (dense,), branch, ops

    def forward(self, x_RTE: torch.Tensor) -> torch.Tensor:
        return self._branch.run(self._piece, x_RTE)

    def _piece(self, x_PTE: torch.Tensor, masks: Any) -> torch.Tensor:
        if self._branch.watch is not None:
            self._branch.watch(x_PTE)
        unit_width = x_PTE.shape[-1] // self._branch.num_units
        # Bypasses the module's hooks, which see nothing under masks where weights are plain, either.
        return self._dense[0].forward(self._ops.masked_units(x_PTE, masks, unit_width=unit_width))


class LiveMasks:
    """Sets the masks of the next forward passes; made by ``masked``."""

    def __init__(self, view: ModelView, branches: dict[int, dict[Kind, Branch]], ops: MaskedOps) -> None:
        self.view, self.ops, self._branches = view, ops, branches
        self._dtype, self._gathers = view.model.dtype, view.opaque is None
        self._device = view.device

    def set(
        self,
        masks: torch.Tensor | PackedMasks,
        *,
        chunks: int = 1,
        working_U: torch.Tensor | None = None,
        listed_U: torch.Tensor | None = None,
        masks_of_layers: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Set one mask a row, bool ``[R, U]``, or each for equally many rows, or one a chunk, ``[R, C, U]``; 1 keeps.

        Floating-point numbers are gates, from 0 to 1. The tokens of a row must divide into C equal chunks.

        Args:
            chunks: C, for masks given as bits, of which there are R times C.
            working_U: units that some mask may keep, bool; only they are computed, and where a single mask
                keeps them all nothing is masked. Keys and values of other groups are then missing too, so nothing may
                be read on from a cache under other masks. None: all units; so too if not all projections are plain.
            listed_U: units of layers in which kernels had better go by lists of what masks of whole rows keep, bool.
            masks_of_layers: for each layer of the model, which of the masks its rows are under, if layers have
                different numbers of rows; see ``bernprune.models.sharing``.

        Raises:
            ConfigError: the block of these masks is over, or there is another one of the same layers within it.
        """
        self._check_in_place()
        space = self.view.space
        if isinstance(masks, torch.Tensor) and masks.ndim == 3:
            chunks = masks.shape[1]
        now = self._current(masks, working_U)
        for layer, branches in self._branches.items():
            rows = None if masks_of_layers is None else masks_of_layers[layer].to(self._device)
            for kind, branch in branches.items():
                span, own = space.span(kind, layer), space.ancestor(kind, layer)
                branch.chunks = chunks
                units = span or (None if own is None else slice(own, own + 1))
                if units is not None:
                    self._set_branch(branch, now, units, rows, whole=span is None)
                    if isinstance(branch.masks, PackedMasks) and listed_U is not None:
                        branch.masks = replace(branch.masks, listed=bool(listed_U[units.start]))

    def _check_in_place(self) -> None:
        """Raises ``ConfigError`` where masks would change nothing: behind the block, or in another one within it."""
        outputs = (getattr(self.view.layers[layer].attention, self.view.family.output) for layer in self._branches)
        of_ours = {id(branches["kv_group"]) for branches in self._branches.values()}
        if self._branches and not any(id(getattr(output, "_branch", None)) in of_ours for output in outputs):
            raise ConfigError("masks are set where they do not hold: behind their with block, or in another within it")

    def _current(self, masks: torch.Tensor | PackedMasks, working_U: torch.Tensor | None) -> CurrentMasks:
        """What takes an operation on all units, worked out once for all branches."""
        space = self.view.space
        working_U = None if working_U is None or not self._gathers else space.alive(working_U.cpu())
        working_U = None if working_U is None or working_U.all() else self._aligned(working_U)
        if isinstance(masks, PackedMasks):
            if self.ops.packs and working_U is None and not space.nested:
                return CurrentMasks(None, None, masks)
            masks = masks.unpack()
        gates = masks.to(self._device, masks.dtype if masks.is_floating_point() else torch.bool)
        alive_MU = space.inherit(gates, torch.mul).flatten(0, -2)
        index_W = None if working_U is None else working_U.nonzero()[:, 0].to(self._device)
        alive_MW = alive_MU if index_W is None else alive_MU[:, index_W]
        exact = not alive_MU.is_floating_point()
        bits = PackedMasks.of(alive_MW) if self.ops.packs and exact else None
        alone_U = alive_MU[0].cpu() if exact and len(alive_MU) == 1 and working_U is not None else None
        return CurrentMasks(alive_MU, alive_MW, bits, working_U, index_W, alone_U)

    def _aligned(self, working_U: torch.Tensor) -> torch.Tensor:
        """The same with a few more channels, which all masks cut: a GPU reads rows of other widths entry by entry."""
        multiple = _ALIGNED.get(self._device.type, 1)
        working_U = working_U.clone()
        for layer in self._branches if multiple > 1 else ():
            span = self.view.space.span("channel", layer)
            if span is not None and working_U[span].any():
                idle_N = (~working_U[span]).nonzero()[:, 0]
                more = -int(working_U[span].sum()) % multiple
                working_U[span] = working_U[span].index_fill(0, idle_N[:more], True)
        return working_U

    @contextmanager
    def watching(self, see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
        """For the length of the block, ``see`` gets each masked layer and what its channels hand on, ``[P, T, F]``.

        Removed channels are shown too, as they would be if they were kept: nothing may be gathered meanwhile.
        """
        try:
            for layer, branches in self._branches.items():
                branches["channel"].watch = functools.partial(see, layer)
            yield
        finally:
            for branches in self._branches.values():
                branches["channel"].watch = None

    def _set_branch(
        self, branch: Branch, now: CurrentMasks, units: slice, rows: torch.Tensor | None, *, whole: bool
    ) -> None:
        """Set a branch by its units or, if it stays or goes as a ``whole``, by the unit that it lies in."""
        branch.masks = branch.open_M11 = branch.kept_N = None
        at_work = now.at_work(units)
        nothing = at_work.start == at_work.stop
        if nothing or whole:
            if nothing:
                branch.kept_N = torch.zeros(1, dtype=torch.int64, device=self._device)  # the least that modules can run
            branch.open_M11 = self._opening(now.alive_MN(units)[:, 0], rows)
            return
        if now.index_W is not None and at_work.stop - at_work.start < units.stop - units.start:
            branch.kept_N = now.index_W[at_work] - units.start
        if now.is_all_that_works(units):
            return
        if now.bits is not None:
            bits = now.bits.units(at_work.start, at_work.stop)
            branch.masks = bits if rows is None else bits.chosen(rows)
        else:
            assert now.numbers_MW is not None, "masks are numbers or bits"
            numbers_MN = now.numbers_MW[:, at_work]
            branch.masks = (numbers_MN if rows is None else numbers_MN[rows]).to(self._dtype)
        if branch.biased:  # one without a bias gives nothing anyway if it has no unit
            branch.open_M11 = self._opening(now.alive_MN(units).any(dim=1), rows)

    def _opening(self, open_M: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        return (open_M if rows is None else open_M[rows]).to(self._dtype)[:, None, None]


@contextmanager
def masked(view: ModelView, ops: MaskedOps, *, layers: Sequence[int] | None = None) -> Iterator[LiveMasks]:
    """Let the model obey masks inside the block; afterwards, also after an exception, it is what it was.

    Every batch run inside must hold equally many rows for each of the masks last set. Nothing is masked before the
    first ``set``.
    ``layers`` limits masking to some layers; the others stay what they were: dense, or masked by a block around this.
    A rotary embedding that kernels bring is used by all layers.

    Raises:
        BackendError: ``ops`` cannot run this model.
    """
    family, branches = view.family, dict[int, dict[Kind, Branch]]()
    chosen = range(len(view.layers)) if layers is None else layers
    _check(view, ops)
    swap = _swap_gathering if view.opaque is None else _swap_inputs
    with ExitStack() as swapped:
        if view.device.type == "cuda":
            swapped.enter_context(torch.cuda.device(view.device))  # which is where Triton launches its kernels
        for index in chosen:
            layer = view.layers[index]
            attention, ffn = Branch(layer.shape.kv_groups, layer.output), Branch(layer.shape.channels, layer.down)
            branches[index] = {"kv_group": attention, "channel": ffn}
            if ops.packs and view.opaque is None:  # kernels read the columns of what a mask keeps
                swapped.callback(ffn.restore)
                ffn.lay_columns()
            swap(swapped, layer, family, attention, ffn, ops)
        if ops.attention_of_kept is not None:
            attentions = {view.layers[index].attention: of_layer["kv_group"] for index, of_layer in branches.items()}
            swapped.enter_context(attending(view.model, attentions, ops.attention_of_kept))
        if ops.rotary is not None:
            swapped.enter_context(fusing(view, ops.rotary, [view.layers[index].layer for index in chosen]))
        yield LiveMasks(view, branches, ops)


def choose_ops(name: BackendName, view: ModelView) -> MaskedOps:
    """The operations by which a model is masked: ``auto`` takes kernels on a GPU that can run them and this model.

    Raises:
        ConfigError: an unknown name.
        BackendError: it cannot run here.
    """
    device = view.device
    if name == "auto" and device.type == "cuda":
        try:
            ops = load_backend("triton", device)
            _check(view, ops)
            return ops
        except BackendError as error:
            logger.info("masked operations run in plain torch: %s", error)
    return load_backend(name, device)


def _check(view: ModelView, ops: MaskedOps) -> None:
    """Raises ``BackendError`` unless the operations run on this model."""
    dtype, layer = view.model.dtype, view.layers[0]
    if ops.dtypes and dtype not in ops.dtypes:
        raise BackendError(
            f"backend {ops.name!r} runs in {', '.join(map(str, ops.dtypes))}, but the model is in {dtype}; give "
            "another model.dtype, or use backend 'torch'"
        )
    if view.opaque is not None:  # then the FFN is called as it is
        return
    try:
        ops.activation(getattr(layer.ffn, view.family.activation))
    except ValueError as error:
        raise BackendError(f"backend {ops.name!r} cannot run this model: activation {error}; use 'torch'") from None


def _swap_inputs(
    swapped: ExitStack, layer: LayerView, family: Family, attention: Branch, ffn: Branch, ops: MaskedOps
) -> None:
    """Swap the last projections of a layer whose projections must be called as they are."""
    _swap(swapped, layer.attention, family.output, _MaskedInput(layer.output, attention, ops))
    _swap(swapped, layer.ffn, family.down, _MaskedInput(layer.down, ffn, ops))


def _swap_gathering(
    swapped: ExitStack, layer: LayerView, family: Family, attention: Branch, ffn: Branch, ops: MaskedOps
) -> None:
    """Swap the modules of a layer whose weights can be gathered."""
    for name in (family.query, family.key, family.value):
        _swap(swapped, layer.attention, name, _Gathered(getattr(layer.attention, name), attention, ops))
    _swap(swapped, layer.attention, family.output, _masked_output(layer, attention, ops))
    parts = {name: getattr(layer.ffn, getattr(family, name)) for name in ("gate", "up", "down", "activation")}
    _swap(swapped, layer.layer, family.ffn, _MaskedFFN(layer.ffn, parts, ffn, ops))


def _swap(swapped: ExitStack, owner: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in its place until the stack is closed."""
    swapped.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, module)


def _masked_output(layer: LayerView, branch: Branch, ops: MaskedOps) -> _MaskedOutput:
    return _MaskedOutput(layer.output, branch, ops, layer.output.in_features // layer.shape.kv_groups)
