"""A model seen as units: which there are, what each costs, and where its masks bite."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bernprune.errors import ConfigError, ModelError
from bernprune.models.architecture import architecture_of, first_opaque
from bernprune.models.families import Family, attention_window, family_of
from bernprune.models.linear import is_plain
from bernprune.names import Kind
from bernprune.units import KINDS, Architecture, LayerShape, UnitGroup, UnitSpace

_SAMPLED = 64  # numbers of a parameter, by which weights are told apart
_SUMMED = 2**20  # and those of which bits are summed at once


@dataclass(frozen=True)
class LayerView:
    """One decoder layer's parts."""

    layer: nn.Module
    attention: nn.Module
    ffn: nn.Module
    output: nn.Linear
    down: nn.Linear
    shape: LayerShape


@dataclass(frozen=True)
class ModelView:
    """A live model with its units.

    Attributes:
        opaque: in words, the first projection of whose weight no rows and columns can be taken, such as a quantised
            one; None if there is none. With one, the model can be scored and masked, but not sliced.
    """

    model: PreTrainedModel
    family: Family
    architecture: Architecture
    space: UnitSpace
    layers: tuple[LayerView, ...]
    opaque: str | None = None

    @property
    def decoder(self) -> nn.Module:
        """What takes token ids to the last hidden states, without the output embedding."""
        return getattr(self.model, self.family.decoder)

    @property
    def device(self) -> torch.device:
        """Where the model lies. Raises ``ModelError`` if slicing has used it up."""
        first = next(self.model.parameters(), None)
        if first is None:
            raise ModelError("the model was used up when it was sliced; load it again")
        return first.device

    @property
    def num_parameters(self) -> int:
        """All parameters of the model; tied ones count once."""
        return count_parameters(self.model)

    def check_windows(self, windows_WT: torch.Tensor) -> None:
        """Raises ``ConfigError`` unless these are windows of tokens that the model knows, int64 ``[W, T]``."""
        if windows_WT.ndim != 2 or not windows_WT.numel() or windows_WT.dtype != torch.int64:
            raise ConfigError(
                "windows of text must be int64 [W, T] of a token or more, but are "
                f"{str(windows_WT.dtype).removeprefix('torch.')} {list(windows_WT.shape)}"
            )
        least = int(windows_WT.min())
        most = int(windows_WT.max())
        known = self.model.config.vocab_size
        if least < 0 or most >= known:
            odd = least if least < 0 else most
            raise ConfigError(f"windows of text have the token id {odd}, but the model knows 0 to {known - 1}")


def describe(
    model: PreTrainedModel, granularity: Sequence[Kind] = ("kv_group", "channel"), *, sequence_length: int = 2048
) -> ModelView:
    """Find the units of a transformers causal-LM model, once more if its projections were quantised since.

    Args:
        granularity: which levels may be removed.
        sequence_length: tokens at which attention FLOPs are counted; a token attends to half of them on average, to
            fewer in layers that attend to a window.

    Raises:
        ModelError: a family that is not known, modules that do not fit the configuration, or several devices.
        ConfigError: a granularity that is empty, unknown or finds no unit.
    """
    unknown = [kind for kind in granularity if kind not in KINDS]
    if unknown or not granularity:
        raise ConfigError(f"granularity must be some of {', '.join(KINDS)}, but is {list(granularity)}")
    architecture = architecture_of(model)
    if model.get_output_embeddings() is None:
        raise ModelError(f"a {type(model).__name__} has no output embedding; give a causal language model")
    family = family_of(architecture.model_type)
    modules = getattr(getattr(model, family.decoder), family.layers)
    layers = tuple(
        _layer_view(module, family, shape) for module, shape in zip(modules, architecture.layers, strict=True)
    )
    windows = [attention_window(family, model.config, index) for index in range(len(layers))]
    attended = [_attended(window, sequence_length) for window in windows]
    groups = [
        group
        for index, layer in enumerate(layers)
        for group in _groups(index, layer, family, architecture, set(granularity), attended[index])
    ]
    if not groups:
        raise ConfigError(f"granularity {list(granularity)} finds no unit: the first layer's attention always stays")
    return ModelView(model, family, architecture, UnitSpace(architecture, groups), layers, first_opaque(model))


def _layer_view(layer: nn.Module, family: Family, shape: LayerShape) -> LayerView:
    attention, ffn = getattr(layer, family.attention), getattr(layer, family.ffn)
    return LayerView(layer, attention, ffn, getattr(attention, family.output), getattr(ffn, family.down), shape)


@dataclass
class _Cost:
    parameters: int
    flops: float

    def __add__(self, other: "_Cost") -> "_Cost":
        return _Cost(self.parameters + other.parameters, self.flops + other.flops)

    def times(self, count: int) -> "_Cost":
        return _Cost(self.parameters * count, self.flops * count)


def _groups(
    index: int, layer: LayerView, family: Family, architecture: Architecture, kinds: set[Kind], attended: float
) -> Iterator[UnitGroup]:
    """The unit groups of one layer, coarse before fine; a level that is off leaves what it owns to a coarser one."""
    head, channel = _kv_group_cost(layer, architecture, attended), _channel_cost(layer, family)
    attention_rest = _Cost(count_parameters(layer.attention, getattr(layer.layer, family.attention_norm)), 0.0)
    attention_rest.parameters -= head.parameters * layer.shape.kv_groups
    ffn_rest = _Cost(count_parameters(layer.ffn, getattr(layer.layer, family.ffn_norm)), 0.0)
    ffn_rest.parameters -= channel.parameters * layer.shape.channels
    # Without attention in the first layer, caches would take their length from nothing: it is never removed whole.
    removable = kinds - ({"attention", "layer"} if index == 0 else set())
    owned: dict[Kind, _Cost] = {kind: _Cost(0, 0.0) for kind in KINDS}
    for rest, block in ((attention_rest, "attention"), (ffn_rest, "ffn")):
        _give(owned, removable, (block, "layer"), rest)
    if "kv_group" not in removable:
        _give(owned, removable, ("attention", "layer"), head.times(layer.shape.kv_groups))
    if "channel" not in removable:
        _give(owned, removable, ("ffn", "layer"), channel.times(layer.shape.channels))
    owned["kv_group"], owned["channel"] = head, channel
    counts = {"kv_group": layer.shape.kv_groups, "channel": layer.shape.channels}
    for kind in KINDS:
        if kind in removable:
            yield UnitGroup(kind, index, counts.get(kind, 1), owned[kind].parameters, owned[kind].flops)


def _give(owned: dict[Kind, _Cost], removable: set[Kind], candidates: Sequence[Any], cost: _Cost) -> None:
    """Give a cost to the finest level that removes it; to none if it always stays."""
    for kind in candidates:
        if kind in removable:
            owned[kind] += cost
            return


def count_parameters(*modules: nn.Module) -> int:
    """Parameters of all modules together; tied ones count once, and quantised weights as those they stand for."""
    counts = {id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}
    for linear in (inner for module in modules for inner in module.modules() if isinstance(inner, nn.Linear)):
        if id(linear.weight) in counts and not is_plain(linear):
            counts[id(linear.weight)] = linear.in_features * linear.out_features
    return sum(counts.values())


def _attended(window: int | None, sequence_length: int) -> float:
    """Tokens that one attends to on average over so many, in a layer of this window."""
    if window is None:
        return sequence_length / 2
    seen = min(window, sequence_length)
    return float(seen * (1 - seen / (2 * sequence_length)))


def _kv_group_cost(layer: LayerView, architecture: Architecture, attended: float) -> _Cost:
    """One key/value head with its query heads: rows of q, k, v with their biases, columns of o."""
    queries, width, hidden = (
        layer.shape.queries_per_group,
        architecture.head_dim,
        architecture.hidden_size,
    )
    weights = (2 * queries + 2) * width * hidden
    projections = [module for module in layer.attention.children() if isinstance(module, nn.Linear)]
    biases = [module for module in projections if module is not layer.output and module.bias is not None]
    rows = sum(module.out_features for module in biases) // layer.shape.kv_groups
    scores_and_values = 2 * 2 * queries * width * attended
    return _Cost(weights + rows, 2.0 * weights + scores_and_values)


def _channel_cost(layer: LayerView, family: Family) -> _Cost:
    """One row of gate and up with their biases, one column of down."""
    gate, up = getattr(layer.ffn, family.gate), getattr(layer.ffn, family.up)
    weights = gate.in_features + up.in_features + layer.down.out_features
    biases = (gate.bias is not None) + (up.bias is not None)
    return _Cost(weights + biases, 2.0 * weights)


def weights_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that tell weights apart, from those of each parameter that is not quantised: a few of the
    numbers, and the sum of all their bits, which is the same on any device."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        if type(parameter) is nn.Parameter:
            numbers_N = parameter.detach().flatten()
            found.update(numbers_N[:: max(1, len(numbers_N) // _SAMPLED)].double().cpu().numpy().tobytes())
            found.update(str(_sum_of_bits(numbers_N)).encode())
    return found.hexdigest()[:16]


def _sum_of_bits(numbers_N: torch.Tensor) -> int:
    """Of all numbers read as integers; in pieces, as some devices make a copy of 64 bits each."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(numbers_N.element_size(), torch.uint8)
    pieces = numbers_N.contiguous().view(kind).split(_SUMMED)
    return sum(int(piece.sum(dtype=torch.int64)) for piece in pieces)
