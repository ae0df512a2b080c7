"""What is alive, what a mask keeps in terms of a model, and plans that survive JSON or are refused."""

import copy
import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from spaces import (
    BLOCKS,
    COSTS,
    FLAT,
    LAYERED_BLOCKS,
    NESTED,
    ONE_A_LAYER,
    SPACES,
    TINY_NESTED,
    alive_by_hand,
    all_masks,
    make_space,
    of_kind,
    random_numbers,
)
from tiny_models import random_plan

from bernprune.errors import ConfigError, ModelError
from bernprune.names import Kind
from bernprune.units import ANCESTORS, KINDS, Architecture, KeepPlan, LayerPlan, LayerShape, UnitGroup, UnitSpace

SHAPES = [(2, 5), (3, 9), (1, 8)]
GRANULARITIES = [kinds for num in range(1, 6) for kinds in itertools.combinations(KINDS, num)]
ARCHITECTURE = make_space(["channel"], SHAPES).architecture

all_spaces = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
all_granularities = pytest.mark.parametrize("kinds", GRANULARITIES, ids="-".join)


def random_masks(space: UnitSpace, num_masks: int = 20) -> torch.Tensor:
    return torch.rand(num_masks, space.size, generator=torch.Generator().manual_seed(0)) < 0.7


def kept_by_hand(space: UnitSpace, mask: list[bool]) -> list[tuple[list[int], list[int]]]:
    """Kv groups and channels of each layer that are on, together with every block around them that the space has."""
    units, on = iter(mask), dict[tuple[str, int], list[bool]]()
    for group in space.groups:
        on[group.kind, group.layer] = [next(units) for _ in range(group.count)]

    def kept(kind: Kind, layer: int, count: int) -> list[int]:
        around = [on[block, layer][0] for block in ANCESTORS[kind] if (block, layer) in on]
        return [i for i in range(count) if all(around) and on.get((kind, layer), [True] * count)[i]]

    shapes = enumerate(space.architecture.layers)
    return [(kept("kv_group", i, shape.kv_groups), kept("channel", i, shape.channels)) for i, shape in shapes]


def lists(plan: KeepPlan) -> list[tuple[list[int], list[int]]]:
    return [(list(layer.kv_groups), list(layer.channels)) for layer in plan.layers]


# Spaces


@all_spaces
def test_alive_means_kept_with_all_around_it(space: UnitSpace) -> None:
    """For one mask, for rows of masks and for masks in any more dimensions."""
    masks = random_masks(space, 24)
    expected = torch.tensor([alive_by_hand(space, mask) for mask in masks.tolist()])
    assert torch.equal(space.alive(masks), expected)
    assert torch.equal(space.alive(masks[3]), expected[3])
    assert torch.equal(space.alive(masks.view(2, 3, 4, -1)), expected.view(2, 3, 4, -1))
    assert torch.equal(expected, masks) == (not space.nested)


def test_alive_for_every_mask() -> None:
    """All masks of a space with five kinds."""
    masks = all_masks(TINY_NESTED.size)
    assert TINY_NESTED.alive(masks).tolist() == [alive_by_hand(TINY_NESTED, mask) for mask in masks.tolist()]


@all_spaces
@pytest.mark.parametrize("combine", [torch.minimum, torch.mul, torch.maximum], ids=["minimum", "mul", "maximum"])
def test_values_are_inherited_once_from_every_ancestor(
    space: UnitSpace, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """A channel takes in its FFN block and its layer, each once."""
    values = random_numbers(space.size, 0)
    found = space.inherit(values, combine)
    for unit, parent in enumerate(space.parents_U.tolist()):
        expected = values[unit]
        while parent >= 0:
            expected, parent = combine(expected, values[parent]), int(space.parents_U[parent])
        assert abs(found[unit] - expected) <= 1e-15


@all_granularities
def test_parents_are_the_finest_block_around(kinds: tuple[Kind, ...]) -> None:
    """In the same layer, before their children."""
    space = make_space(kinds, SHAPES)
    kind_of = [group.kind for group in space.groups for _ in range(group.count)]
    layer_of = [group.layer for group in space.groups for _ in range(group.count)]
    for unit, parent in enumerate(space.parents_U.tolist()):
        around = [kind for kind in ANCESTORS[kind_of[unit]] if space.span(kind, layer_of[unit])]
        assert parent < unit
        assert (kind_of[parent] == around[0] and layer_of[parent] == layer_of[unit]) if around else parent == -1
    assert space.nested == bool((space.parents_U >= 0).any())


@all_spaces
def test_spans_costs_and_groups_agree(space: UnitSpace) -> None:
    """Every unit lies in one span, and has its group's costs."""
    seen = torch.zeros(space.size, dtype=torch.int64)
    for index, group in enumerate(space.groups):
        span = space.span(group.kind, group.layer)
        assert span is not None
        seen[span] += 1
        assert span.stop - span.start == group.count
        assert (space.group_U[span] == index).all()
        assert (space.costs_U()[span] == group.parameters).all()
        assert (space.costs_U("flops")[span] == group.flops).all()
    assert (seen == 1).all()
    assert space.span("layer", 0) is None
    assert space.kinds == tuple(kind for kind in KINDS if of_kind(space, kind).any())


def changed_spaces() -> dict[str, UnitSpace]:
    """Spaces that differ from one another in one thing each."""
    groups, architecture = list(FLAT.groups), FLAT.architecture
    shapes = architecture.layers
    first: dict[str, dict[str, Any]] = {
        "count": {"count": 4},
        "parameters": {"parameters": 12},
        "flops": {"flops": 29.5},
        "kind": {"kind": "attention"},
        "layer": {"layer": 7},
    }
    spaces = {
        name: UnitSpace(architecture, [replace(groups[0], **change), *groups[1:]]) for name, change in first.items()
    }
    whole: dict[str, dict[str, Any]] = {
        "family": {"model_type": "qwen2"},
        "hidden_size": {"hidden_size": 37},
        "head_dim": {"head_dim": 4},
        "num_layers": {"layers": (*shapes, shapes[0])},
        "query_heads": {"layers": (replace(shapes[0], query_heads=3), *shapes[1:])},
        "channels": {"layers": (replace(shapes[0], channels=12), *shapes[1:])},
        "kv_groups": {"layers": (replace(shapes[0], kv_groups=1), *shapes[1:])},
    }
    spaces |= {name: UnitSpace(replace(architecture, **change), groups) for name, change in whole.items()}
    return spaces | {
        "same": FLAT,
        "order": UnitSpace(architecture, groups[::-1]),
        "fewer": UnitSpace(architecture, groups[1:]),
    }


def test_fingerprints_tell_all_spaces_apart() -> None:
    """Whatever the difference; equal spaces made twice have equal ones."""
    fingerprints = {name: space.fingerprint for name, space in changed_spaces().items()}
    assert len(set(fingerprints.values())) == len(fingerprints) == 15
    assert make_space(FLAT.kinds, [(3, 11), (2, 7), (1, 5)]).fingerprint == FLAT.fingerprint


def test_two_groups_of_one_kind_in_a_layer_are_our_own_fault() -> None:
    """They could not be told apart."""
    group = UnitGroup("channel", 0, 5, *COSTS["channel"])
    with pytest.raises(AssertionError, match="two groups"):
        UnitSpace(ARCHITECTURE, [group, group])


def test_architectures_name_their_first_difference() -> None:
    """None between equals; otherwise what differs, with both values."""
    shapes = ARCHITECTURE.layers
    changes: dict[str, Architecture] = {
        "model_type 'llama' against 'opt'": replace(ARCHITECTURE, model_type="opt"),
        "hidden_size 36 against 37": replace(ARCHITECTURE, hidden_size=37),
        "head_dim 8 against 4": replace(ARCHITECTURE, head_dim=4),
        "3 layers against 2": replace(ARCHITECTURE, layers=shapes[:2]),
        "layer 1: ": replace(ARCHITECTURE, layers=(shapes[0], LayerShape(6, 3, 10), shapes[2])),
    }
    assert ARCHITECTURE.difference(Architecture.from_dict(ARCHITECTURE.to_dict())) is None
    for words, other in changes.items():
        assert (ARCHITECTURE.difference(other) or "").startswith(words)


# Plans of masks


@all_granularities
def test_plans_of_every_granularity(kinds: tuple[Kind, ...]) -> None:
    """A plan keeps what is on with all around it; what is no unit stays with the finest block around it."""
    space = make_space(kinds, SHAPES)
    for mask in random_masks(space):
        assert lists(space.plan(mask)) == kept_by_hand(space, mask.tolist())


def test_plans_of_all_and_nothing() -> None:
    """Everything that can be removed is, and only that."""
    for space in (FLAT, NESTED, BLOCKS, LAYERED_BLOCKS):
        full = space.plan(torch.ones(space.size, dtype=torch.bool))
        assert full.architecture == space.architecture
        assert lists(full) == [(list(range(s.kv_groups)), list(range(s.channels))) for s in space.architecture.layers]
        empty = space.plan(torch.zeros(space.size))
        assert all(layer.is_empty for layer in empty.layers[1:])
        assert empty.layers[0].is_empty == (space in (FLAT, NESTED))
    assert set(LAYERED_BLOCKS.kinds) == set(ONE_A_LAYER)


# Plans as data


@pytest.mark.parametrize("seed", range(20))
def test_plans_survive_json(seed: int) -> None:
    """Of any sizes, blocks and layers missing too."""
    rng = random.Random(seed)
    shapes = [(rng.randint(1, 9), rng.randint(1, 70)) for _ in range(rng.randint(1, 6))]
    architecture = make_space(["channel"], shapes).architecture
    gone = [[i for i in range(len(shapes)) if rng.random() < 0.3] for _ in range(3)]
    plan = random_plan(architecture, seed, without_attention=gone[0], without_ffn=gone[1], dropped=gone[2])
    data = json.loads(json.dumps(plan.to_dict()))
    assert KeepPlan.from_dict(data) == plan
    assert KeepPlan.from_dict(data).to_dict() == plan.to_dict()


def test_a_plan_of_seven_billion_parameters_is_small() -> None:
    """32 layers of 32 groups and 11008 channels in less than 150 kB."""
    shape = LayerShape(32, 32, 11008)
    plan = random_plan(Architecture("llama", 4096, 128, (shape,) * 32), 0)
    text = json.dumps(plan.to_dict(), indent=1)
    assert 80_000 < len(text) < 150_000
    assert KeepPlan.from_dict(json.loads(text)) == plan


def plan_data() -> dict[str, Any]:
    layers = (LayerPlan((0, 1), (0, 2, 4)), LayerPlan((), (1, 8)), LayerPlan((0,), ()))
    return KeepPlan(ARCHITECTURE, layers).to_dict()


# One change each: where, and what is put there. ``None`` as a key takes the place away.
CORRUPTIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "no_format": (("format",), None),
    "other_format": (("format",), 2),
    "text_format": (("format",), "1"),
    "no_architecture": (("architecture",), None),
    "architecture_list": (("architecture",), []),
    "no_hidden_size": (("architecture", "hidden_size"), None),
    "no_shapes": (("architecture", "layers"), None),
    "unknown_shape_field": (("architecture", "layers", 0, "width"), 5),
    "shape_without_channels": (("architecture", "layers", 0, "channels"), None),
    "text_channels": (("architecture", "layers", 0, "channels"), "5"),
    "more_channels": (("architecture", "layers", 0, "channels"), 13),
    "negative_channels": (("architecture", "layers", 0, "channels"), -5),
    "infinite_channels": (("architecture", "layers", 0, "channels"), math.inf),
    "fewer_kv_groups": (("architecture", "layers", 0, "kv_groups"), 1),
    "no_layers": (("layers",), None),
    "layer_missing": (("layers", 2), None),
    "layer_is_number": (("layers", 1), 7),
    "no_kv_groups": (("layers", 0, "kv_groups"), None),
    "kv_group_too_high": (("layers", 0, "kv_groups"), [0, 2]),
    "kv_group_negative": (("layers", 0, "kv_groups"), [-1, 0]),
    "kv_groups_twice": (("layers", 0, "kv_groups"), [0, 0]),
    "kv_groups_unsorted": (("layers", 0, "kv_groups"), [1, 0]),
    "kv_groups_text": (("layers", 0, "kv_groups"), ["0"]),
    "kv_groups_not_a_list": (("layers", 0, "kv_groups"), 1),
    "kv_group_float": (("layers", 0, "kv_groups"), [0.0, 1.0]),
    "kv_group_bool": (("layers", 0, "kv_groups"), [True]),
    "no_count": (("layers", 0, "num_channels"), None),
    "wrong_count": (("layers", 0, "num_channels"), 2),
    "no_bitmap": (("layers", 0, "channels_bitmap"), None),
    "bitmap_not_text": (("layers", 0, "channels_bitmap"), [1, 0]),
    "bitmap_not_hex": (("layers", 0, "channels_bitmap"), "zz"),
    "bitmap_half_a_byte": (("layers", 0, "channels_bitmap"), "a"),
    "bitmap_empty": (("layers", 0, "channels_bitmap"), ""),
    "bitmap_too_long": (("layers", 0, "channels_bitmap"), "a800"),
    "bitmap_of_other_channels": (("layers", 0, "channels_bitmap"), "f8"),
    "bitmap_beyond_the_last_channel": (("layers", 0, "channels_bitmap"), "a9"),
}


@pytest.mark.parametrize(("path", "value"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupted_plans_are_refused(path: tuple[Any, ...], value: Any) -> None:
    """One wrong place is enough, and the error is ours."""
    data = copy.deepcopy(plan_data())
    assert KeepPlan.from_dict(data).to_dict() == data
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(ModelError, match="plan"):
        KeepPlan.from_dict(data)


@pytest.mark.parametrize("data", [None, [], {}, "plan", 3, [1, 2]], ids=repr)
def test_what_is_no_plan_is_refused(data: Any) -> None:
    """Any other JSON."""
    with pytest.raises(ModelError, match="not a plan"):
        KeepPlan.from_dict(data)


def test_channels_that_do_not_exist_are_refused_even_if_counted() -> None:
    """The padding of a bitmap is empty."""
    data = plan_data()
    data["layers"][0] |= {"channels_bitmap": "a9", "num_channels": 4}
    with pytest.raises(ModelError, match="beyond the 5"):
        KeepPlan.from_dict(data)


def test_every_flipped_bit_of_a_bitmap_is_noticed() -> None:
    """The stated number of channels guards the map, its padding included."""
    data = plan_data()
    for layer, bitmap in enumerate([layer["channels_bitmap"] for layer in data["layers"]]):
        for bit in range(4 * len(bitmap)):
            flipped = copy.deepcopy(data)
            flipped["layers"][layer]["channels_bitmap"] = f"{int(bitmap, 16) ^ (1 << bit):0{len(bitmap)}x}"
            with pytest.raises(ModelError, match="bitmap"):
                KeepPlan.from_dict(flipped)


def test_a_plan_is_of_a_mask() -> None:
    """Whole, of 0 and 1: probabilities would keep all that has one."""
    mask_U = torch.rand(FLAT.size, generator=torch.Generator().manual_seed(0)) < 0.5
    assert FLAT.plan(mask_U) == FLAT.plan(mask_U.double()) == FLAT.plan(mask_U.int())
    for bad in (mask_U[1:], mask_U[None], torch.cat([mask_U, mask_U]), 0.5 * mask_U, mask_U * math.nan):
        with pytest.raises(ConfigError, match=rf"a mask must be \[{FLAT.size}\] of 0 and 1"):
            FLAT.plan(bad)
