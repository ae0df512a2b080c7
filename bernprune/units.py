"""The vocabulary: what may be removed, what it costs, and what is kept.

A ``UnitSpace`` is one flat vector of U units in groups. Levels nest: a channel lies in an FFN block, a block in a
layer. A unit is *alive* under a mask when it and everything it lies in are kept. Each unit owns the cost that no
finer unit of the same space owns, so the cost of what is alive is a plain sum and nothing is counted twice.

Letters: U units, R rows of masks. A mask's 1 keeps.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from bernprune.errors import ConfigError, ModelError
from bernprune.names import CapName, Kind

# Coarse before fine: the order of the groups within a layer, so that a parent always precedes its children.
KINDS: tuple[Kind, ...] = ("layer", "attention", "kv_group", "ffn", "channel")
ANCESTORS: dict[Kind, tuple[Kind, ...]] = {
    "layer": (),
    "attention": ("layer",),
    "ffn": ("layer",),
    "kv_group": ("attention", "layer"),
    "channel": ("ffn", "layer"),
}


def finest(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Those of some kinds that no other of them refines."""
    return tuple(kind for kind in kinds if not any(kind in ANCESTORS[other] for other in kinds))


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer; ``query_heads`` are those of all its kv groups together."""

    query_heads: int
    kv_groups: int
    channels: int

    @property
    def queries_per_group(self) -> int:
        """Query heads that share a key/value head."""
        return self.query_heads // self.kv_groups


@dataclass(frozen=True)
class Architecture:
    """What a plan must agree with: the family and every size that slicing depends on."""

    model_type: str
    hidden_size: int
    head_dim: int
    layers: tuple[LayerShape, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Architecture":
        """Raises ``ValueError`` for sizes that are none."""
        layers = tuple(LayerShape(**layer) for layer in data["layers"])
        sizes = [data["hidden_size"], data["head_dim"], *(size for layer in layers for size in astuple(layer))]
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError("sizes of an architecture must be whole numbers")
        return cls(data["model_type"], data["hidden_size"], data["head_dim"], layers)

    def difference(self, other: "Architecture") -> str | None:
        """The first disagreement in words, or None."""
        for name in ("model_type", "hidden_size", "head_dim"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r} against {theirs!r}"
        if len(self.layers) != len(other.layers):
            return f"{len(self.layers)} layers against {len(other.layers)}"
        for index, (mine, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            if mine != theirs:
                return f"layer {index}: {mine} against {theirs}"
        return None


@dataclass(frozen=True)
class UnitGroup:
    """``count`` units of one kind in one layer.

    ``parameters`` and ``flops`` are what one unit owns: parameters, and forward FLOPs per token at the sequence
    length the space was described for.
    """

    kind: Kind
    layer: int
    count: int
    parameters: int
    flops: float

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"


@dataclass(frozen=True)
class LayerPlan:
    """Indices kept in one layer, sorted. No kv group: no attention. No channel: no FFN. Neither: no layer."""

    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return not self.kv_groups and not self.channels


class MasksToMake(Protocol):
    """Masks ``[..., U]`` that are made when they are looked at: those of the rows that it is indexed for.

    Attributes:
        probs_U: with which probability they keep a unit, on the CPU.
        reference_U: what the last mask of each text is, if that is not a made one: a mask, or gates from 0 to 1.
        possible_U: units that some of them may keep, bool on the CPU.
        drawable: whether ``drawn`` gives what a kernel makes them of.
    """

    @property
    def probs_U(self) -> torch.Tensor: ...

    @property
    def reference_U(self) -> torch.Tensor | None: ...

    @property
    def possible_U(self) -> torch.Tensor: ...

    @property
    def drawable(self) -> bool: ...

    def drawn(self) -> Any: ...

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> torch.Tensor: ...

    def flatten(self, start_dim: int, end_dim: int) -> "MasksToMake": ...

    def to(self, device: torch.device) -> "MasksToMake": ...


MaskRows = torch.Tensor | MasksToMake


class UnitSpace:
    """All units of a model, flat, with what each costs and what it lies in."""

    def __init__(self, architecture: Architecture, groups: Sequence[UnitGroup]) -> None:
        self.architecture = architecture
        self.groups = tuple(groups)
        counts = [group.count for group in self.groups]
        self.starts = [0, *np.cumsum(counts).tolist()]
        self.size: int = self.starts[-1]
        self._index = {(group.kind, group.layer): i for i, group in enumerate(self.groups)}
        assert len(self._index) == len(self.groups), "two groups of one kind in one layer"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for spaces whose vectors may be exchanged."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` takes."""
        return {"architecture": self.architecture.to_dict(), "groups": [asdict(group) for group in self.groups]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "UnitSpace":
        return cls(Architecture.from_dict(data["architecture"]), [UnitGroup(**group) for group in data["groups"]])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(kind for kind in KINDS if any(group.kind == kind for group in self.groups))

    @property
    def finest(self) -> tuple[Kind, ...]:
        """Kinds whose units no others lie in: those whose scores decide."""
        return finest(self.kinds)

    @functools.cached_property
    def within_U(self) -> torch.Tensor:
        """Parameters of each unit with all that lies in it, float64 ``[U]``."""
        return self.marginal(self.costs_U(), torch.ones(self.size, dtype=torch.float64))

    @functools.cached_property
    def nested(self) -> bool:
        """Whether some unit lies in another."""
        return bool((self.parents_U >= 0).any())

    @functools.cached_property
    def spans(self) -> list[slice]:
        """Where the units of each group lie in a flat vector."""
        return [slice(start, end) for start, end in itertools.pairwise(self.starts)]

    def span(self, kind: Kind, layer: int) -> slice | None:
        """Where the units of this kind and layer lie in a flat vector; None if the space has none."""
        index = self._index.get((kind, layer))
        return None if index is None else self.spans[index]

    def of_kind(self, kind: Kind) -> torch.Tensor:
        """Which units are of a kind, bool ``[U]``."""
        return self._spread(torch.tensor([group.kind == kind for group in self.groups], dtype=torch.bool))

    def by_layer(self, kind: Kind) -> list[torch.Tensor]:
        """Indices of the units of a kind, for one layer after the other that has some."""
        spans = (self.spans[index] for index in self.of_groups(kind))
        return [torch.arange(span.start, span.stop) for span in spans]

    def of_groups(self, kind: Kind) -> list[int]:
        """Indices of the groups of a kind, in the order of ``by_layer``."""
        return [index for index, group in enumerate(self.groups) if group.kind == kind]

    def ancestor(self, kind: Kind, layer: int) -> int | None:
        """The finest unit that those of a kind lie in, or would, in a layer; None if there is none."""
        spans = (self.span(ancestor, layer) for ancestor in ANCESTORS[kind])
        return next((span.start for span in spans if span is not None), None)

    def costs_U(self, measure: CapName = "parameters") -> torch.Tensor:
        """What each unit owns, float64 ``[U]``; for ``kv_cache`` in numbers that a token adds to it."""
        values = [
            self._cached(group) if measure == "kv_cache" else float(getattr(group, measure)) for group in self.groups
        ]
        return self._spread(torch.tensor(values, dtype=torch.float64))

    def _cached(self, group: UnitGroup) -> float:
        """What a unit adds to the cache: keys and values are owned by the finest level that holds them."""
        holders = [kind for kind in ("kv_group", *ANCESTORS["kv_group"]) if (kind, group.layer) in self._index]
        if not holders or group.kind != holders[0]:
            return 0.0
        groups = self.architecture.layers[group.layer].kv_groups
        return 2.0 * self.architecture.head_dim * groups / group.count

    @functools.cached_property
    def group_U(self) -> torch.Tensor:
        """Index of each unit's group, int64 ``[U]``."""
        return self._spread(torch.arange(len(self.groups)))

    @functools.cached_property
    def layer_spans(self) -> list[slice]:
        """Where the units of each layer lie in a flat vector; layers follow one another."""
        assert all(one.layer <= next_.layer for one, next_ in itertools.pairwise(self.groups)), "layers out of order"
        layers = len(self.architecture.layers)
        ends = np.searchsorted(self.layer_U.numpy(), np.arange(layers), side="right").tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    @functools.cached_property
    def layer_U(self) -> torch.Tensor:
        """Each unit's layer, int64 ``[U]``."""
        return self._spread(torch.tensor([group.layer for group in self.groups], dtype=torch.int64))

    @functools.cached_property
    def parents_U(self) -> torch.Tensor:
        """Index of the unit that each unit lies in, -1 for none, int64 ``[U]``."""
        parents = (self.ancestor(group.kind, group.layer) for group in self.groups)
        return self._spread(torch.tensor([-1 if parent is None else parent for parent in parents], dtype=torch.int64))

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(torch.tensor([group.count for group in self.groups]))

    def inherit(self, values_RU: torch.Tensor, combine: Any) -> torch.Tensor:
        """Each unit's value combined with those of everything it lies in, e.g. ``torch.minimum``; ``[..., U]``."""
        if not self.nested:
            return values_RU
        parents_U = self.parents_U.to(values_RU.device)
        parents, root = parents_U.clamp(min=0), parents_U < 0
        inherited = values_RU
        for _ in range(2):  # channel -> ffn -> layer: two steps reach every ancestor
            inherited = torch.where(root, values_RU, combine(values_RU, inherited[..., parents]))
        return inherited

    def marginal(self, values_U: torch.Tensor, probs_U: torch.Tensor) -> torch.Tensor:
        """How the expected sum of the values of all that is alive changes with each keep probability, ``[U]``."""
        if not self.nested:
            return values_U
        parents_U, within_U = self.parents_U, values_U
        inner_U = parents_U >= 0
        blocks_U = torch.ones_like(within_U)  # the probability that all that a unit lies in is kept
        blocks_U[inner_U] = self.inherit(probs_U, torch.mul)[parents_U[inner_U]]
        for _ in range(2):  # channel -> ffn -> layer: two steps reach every ancestor
            within_U = values_U.index_add(0, parents_U[inner_U], (probs_U * within_U)[inner_U])
        return blocks_U * within_U

    def alive(self, masks_RU: torch.Tensor) -> torch.Tensor:
        """Which units are kept together with everything they lie in; bool ``[..., U]``."""
        return self.inherit(masks_RU, torch.logical_and)

    def plan(self, mask_U: torch.Tensor) -> "KeepPlan":
        """What one mask keeps, in terms of kv groups and channels. Raises ``ConfigError`` for what is no mask."""
        if mask_U.shape != (self.size,) or not ((mask_U == 0) | (mask_U == 1)).all():
            raise ConfigError(f"a mask must be [{self.size}] of 0 and 1, but is {list(mask_U.shape)} or holds others")
        alive = self.alive(mask_U.bool().cpu())
        layers = (
            LayerPlan(
                self._kept(alive, layer, "kv_group", shape.kv_groups),
                self._kept(alive, layer, "channel", shape.channels),
            )
            for layer, shape in enumerate(self.architecture.layers)
        )
        return KeepPlan(self.architecture, tuple(layers))

    def mask(self, plan: "KeepPlan") -> torch.Tensor:
        """A mask that keeps what a plan keeps, bool ``[U]``; a block is kept if any part of it stays."""
        mask_U = torch.zeros(self.size, dtype=torch.bool)
        for group, span in zip(self.groups, self.spans, strict=True):
            kept = plan.layers[group.layer]
            parts = {"kv_group": kept.kv_groups, "channel": kept.channels}
            whole = {"attention": bool(kept.kv_groups), "ffn": bool(kept.channels), "layer": not kept.is_empty}
            if group.kind in parts:
                mask_U[[span.start + index for index in parts[group.kind]]] = True
            else:
                mask_U[span] = whole[group.kind]
        return mask_U

    def _kept(self, alive_U: torch.Tensor, layer: int, kind: Kind, count: int) -> tuple[int, ...]:
        """Indices alive in one layer; where the space has no such units, their finest ancestor speaks for all."""
        span = self.span(kind, layer)
        if span is not None:
            return tuple(alive_U[span].nonzero().flatten().tolist())
        speaker = self.ancestor(kind, layer)
        kept = speaker is None or bool(alive_U[speaker].item())
        return tuple(range(count)) if kept else ()


@dataclass(frozen=True)
class KeepPlan:
    """What is kept of a model, layer by layer; a few kilobytes of JSON that can be applied to any copy of it."""

    architecture: Architecture
    layers: tuple[LayerPlan, ...]

    FORMAT = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in ``plan.json``, that ``from_dict`` takes."""
        layers = [
            {
                "kv_groups": list(layer.kv_groups),
                "num_channels": len(layer.channels),
                "channels_bitmap": _to_bitmap(layer.channels, shape.channels),
            }
            for layer, shape in zip(self.layers, self.architecture.layers, strict=True)
        ]
        return {"format": self.FORMAT, "architecture": self.architecture.to_dict(), "layers": layers}

    @classmethod
    def from_dict(cls, data: Any) -> "KeepPlan":
        """Raises ``ModelError`` if ``data`` is not a plan of this format or contradicts itself."""
        try:
            if data["format"] != cls.FORMAT:
                raise ModelError(f"the plan has format {data['format']!r}, but this version reads {cls.FORMAT}")
            architecture = Architecture.from_dict(data["architecture"])
            pairs = zip(data["layers"], architecture.layers, strict=True)
            layers = tuple(
                LayerPlan(_checked(layer["kv_groups"], shape.kv_groups), _from_bitmap(layer, shape.channels))
                for layer, shape in pairs
            )
        except KeyError as error:
            raise ModelError(f"this is not a plan written by bernprune: it has no {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"this is not a plan written by bernprune: {error}") from None
        return cls(architecture, layers)


def _checked(indices: list[int], count: int) -> tuple[int, ...]:
    whole = all(type(index) is int for index in indices)  # true and 1.0 compare like indices, but do not slice like one
    if not whole or sorted(set(indices)) != indices or any(not 0 <= index < count for index in indices):
        raise ValueError(f"kept kv groups {indices} are not increasing indices below {count}")
    return tuple(indices)


def _to_bitmap(indices: tuple[int, ...], count: int) -> str:
    kept = np.zeros(count, dtype=bool)
    kept[list(indices)] = True
    return np.packbits(kept).tobytes().hex()


def _from_bitmap(layer: dict[str, Any], count: int) -> tuple[int, ...]:
    packed = np.frombuffer(bytes.fromhex(layer["channels_bitmap"]), dtype=np.uint8)
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"a bitmap of {len(packed)} bytes does not describe {count} channels")
    bits = np.unpackbits(packed)
    if bits[count:].any():
        raise ValueError(f"a bitmap keeps channels beyond the {count} there are")
    kept = np.flatnonzero(bits).tolist()
    if len(kept) != layer["num_channels"]:
        raise ValueError(f"a bitmap keeps {len(kept)} channels where {layer['num_channels']} are stated")
    return tuple(kept)
