"""Unit spaces made by hand: sizes and costs are chosen, every one different, so that a mix-up shows.

As for real models, the units of the first layer lie in no block: its attention and the layer itself always stay.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from bernprune.names import Kind
from bernprune.units import ANCESTORS, KINDS, Architecture, LayerShape, UnitGroup, UnitSpace

# What one unit owns: parameters, FLOPs. A layer owns nothing beside its blocks, a block no FLOPs beside its parts.
COSTS: Mapping[Kind, tuple[int, float]] = {
    "layer": (0, 0.0),
    "attention": (2, 0.0),
    "kv_group": (11, 29.0),
    "ffn": (1, 0.0),
    "channel": (3, 6.0),
}
BLOCK_COSTS: Mapping[Kind, tuple[int, float]] = {"layer": (1, 0.5), "attention": (31, 83.0), "ffn": (47, 90.0)}
ONE_A_LAYER: tuple[Kind, ...] = ("layer", "attention", "ffn")
FLAT_KINDS: tuple[Kind, ...] = ("kv_group", "channel")


def make_space(
    kinds: Sequence[Kind], shapes: Sequence[tuple[int, int]], costs: Mapping[Kind, tuple[int, float]] = COSTS
) -> UnitSpace:
    """The units of these kinds in layers of ``(kv_groups, channels)``."""
    layers = tuple(LayerShape(2 * groups, groups, channels) for groups, channels in shapes)
    return UnitSpace(Architecture("llama", 36, 8, layers), list(_groups(kinds, shapes, costs)))


def _groups(
    kinds: Sequence[Kind], shapes: Sequence[tuple[int, int]], costs: Mapping[Kind, tuple[int, float]]
) -> Iterator[UnitGroup]:
    for layer, (groups, channels) in enumerate(shapes):
        counts = dict.fromkeys(ONE_A_LAYER, 1) | {"kv_group": groups, "channel": channels}
        for kind in KINDS:
            if kind in kinds and (layer > 0 or kind not in ("layer", "attention")):
                yield UnitGroup(kind, layer, counts[kind], *costs[kind])


def alive_by_hand(space: UnitSpace, mask: Sequence[bool]) -> list[bool]:
    """Whether each unit and every unit it lies in are kept, by loops."""
    kept: dict[tuple[str, int], list[bool]] = {}
    units = iter(mask)
    for group in space.groups:
        kept[group.kind, group.layer] = [next(units) for _ in range(group.count)]
    alive = []
    for group in space.groups:
        blocks = [kept[kind, group.layer][0] for kind in ANCESTORS[group.kind] if (kind, group.layer) in kept]
        alive += [unit and all(blocks) for unit in kept[group.kind, group.layer]]
    return alive


def all_masks(num_units: int) -> torch.Tensor:
    """Every mask of so many units, bool ``[2^U, U]``."""
    return torch.cartesian_prod(*[torch.tensor([False, True])] * num_units).reshape(-1, num_units)


def random_numbers(count: int, seed: int) -> torch.Tensor:
    """Uniform in [0, 1), float64."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_kind(space: UnitSpace, kind: Kind) -> torch.Tensor:
    """Which units are of this kind, bool ``[U]``."""
    return torch.tensor([group.kind == kind for group in space.groups for _ in range(group.count)])


FLAT = make_space(FLAT_KINDS, [(3, 11), (2, 7), (1, 5)])
NESTED = make_space(KINDS, [(2, 5), (3, 7), (2, 4)])
BLOCKS = make_space(("attention", "ffn"), [(3, 11)] * 5, BLOCK_COSTS)
LAYERED_BLOCKS = make_space(ONE_A_LAYER, [(3, 11)] * 4, BLOCK_COSTS)
TINY_NESTED = make_space(KINDS, [(1, 2), (2, 3)])  # 12 units, few enough for every mask
SPACES = {"flat": FLAT, "nested": NESTED, "blocks": BLOCKS, "layered_blocks": LAYERED_BLOCKS}
