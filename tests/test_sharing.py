"""Masks on the same text share what they agree on, and how masks are run is chosen by what it costs.

Letters: K masks, U units, B windows, L layers.
"""

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from searches import activities
from test_masking import GRANULARITIES, Stop, all_granularities, random_masks, trace
from tiny_models import VARIANTS, Variant, random_tokens, tiny_model
from tolerances import EXACT, assert_close
from torch.utils.flop_counter import FlopCounterMode

from bernprune.backends import load_backend
from bernprune.costs import NEVER as COSTLY
from bernprune.costs import Costs, Planner, Way, measure
from bernprune.errors import BackendError
from bernprune.models.sharing import Branching
from bernprune.models.view import ModelView, describe
from bernprune.names import Kind, ObjectiveName
from bernprune.objective import MaskedObjective, masked_objective
from bernprune.units import UnitSpace

OPS = load_backend("torch", torch.device("cpu"))
APART, TOGETHER = Costs(passing=0.0, copying=0.0, blocks=1.0), Costs(passing=1e9, copying=math.inf, blocks=0.5)


def neighbours(space: UnitSpace, *, seed: int = 0) -> torch.Tensor:
    """A mask, masks that differ from it in one unit of one layer each, the first again, and one of its own."""
    base_U, other_U = random_masks(space, 2, seed=seed)
    units = [int((space.layer_U == layer).nonzero()[-1]) for layer in (3, 1, 3, 2)]
    masks_KU = torch.stack([base_U, *(base_U.clone() for _ in units), base_U, other_U])
    for mask_U, unit in zip(masks_KU[1:], units, strict=False):
        mask_U[unit] = ~mask_U[unit]
    return masks_KU


@all_granularities
def test_masks_part_where_they_first_differ(granularity: tuple[Kind, ...]) -> None:
    """By brute force: two are of one class of a layer if they agree on it and on all before."""
    space = describe(tiny_model("llama"), granularity).space
    alive_KU = space.alive(neighbours(space))
    branching, before_K = Branching.of(space, alive_KU), torch.zeros(len(alive_KU), dtype=torch.int64)
    for layer, (masks, parents) in enumerate(zip(branching.masks_of_layers, branching.parents_of_layers, strict=True)):
        upto_KU = alive_KU[:, space.layer_U <= layer]
        class_K = torch.tensor([[mask_U.equal(upto_KU[first]) for first in masks].index(True) for mask_U in upto_KU])
        assert class_K.unique().tolist() == list(range(len(masks)))
        for first, parent, found in zip(masks, parents, class_K.unique(), strict=True):
            assert class_K[first] == found and before_K[first] == parent
        before_K = class_K
    assert branching.class_K.equal(before_K)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["cross-entropy", "kl"])
def test_sharing_changes_nothing(variant: Variant, kind: ObjectiveName) -> None:
    """Whatever the family, and however few rows go together: the losses of each mask by itself."""
    view, tokens_BT = describe(variant.model(), ("kv_group", "channel", "ffn")), random_tokens(3, 9)
    masks_KU = neighbours(view.space)
    with masked_objective(view, OPS, kind=kind) as objective:
        expected = torch.cat([objective.window_losses(mask_1U, tokens_BT) for mask_1U in masks_KU.split(1)])
    for rows, costs in ((2, APART), (5, TOGETHER), (64, TOGETHER)):
        with masked_objective(view, OPS, kind=kind, rows_per_forward=rows, costs=costs) as objective:
            assert_close(objective.window_losses(masks_KU, tokens_BT), expected, EXACT)
            assert_close(objective.window_losses(masks_KU, tokens_BT[:1]), expected[:, :1], EXACT)


def block_flops(view: ModelView, masks_KU: torch.Tensor, costs: Costs) -> int:
    """Of all matrix products but those of the head."""
    tokens_BT = random_tokens(2, 9)
    with FlopCounterMode(display=False) as counter, masked_objective(view, OPS, costs=costs) as objective:
        objective.window_losses(masks_KU, tokens_BT)
    counts = counter.get_flop_counts()["Global"]
    head = 2 * 2 * 8 * view.model.lm_head.weight.numel() * len(masks_KU.unique(dim=0))
    return sum(counts[name] for name in counts if name.__name__ in ("mm", "addmm")) - head


def test_what_masks_agree_on_is_computed_once() -> None:
    """A layer runs each class of masks once; equal masks cost as much as one."""
    view = describe(tiny_model("llama"))
    masks_KU = neighbours(view.space)[:5]  # these part in the layers 1, 2 and 3; two are equal
    dense = block_flops(view, masks_KU[:1], TOGETHER)
    assert block_flops(view, masks_KU[:1].expand(7, -1), TOGETHER) == dense
    assert block_flops(view, masks_KU, TOGETHER) == dense * (1 + 2 + 3 + 4) / 4


def test_what_none_of_several_masks_keeps_is_not_computed() -> None:
    """Together, they take the weights that any of them keeps."""
    view = describe(tiny_model("llama"))
    masks_KU = neighbours(view.space)[[0, 2]]
    costs = Costs(passing=1e9, copying=0.0, blocks=1.0)
    weights = view.space.costs_U() * masks_KU.any(0)
    rows_U = torch.tensor([1, 2, 2, 2])[view.space.layer_U]  # one unit of layer 1 differs
    assert block_flops(view, masks_KU, costs) == 2 * 2 * 9 * int((rows_U * weights).sum())


@pytest.mark.parametrize("leave", ["normally", "by an error"])
def test_sharing_leaves_no_trace(leave: str) -> None:
    """No hook, whatever happens in the middle of a pass."""
    view, tokens_BT = describe(tiny_model("qwen3")), random_tokens(2, 9)
    before = trace(view.model, tokens_BT)

    def stop(rows: int) -> None:
        if leave != "normally":
            raise Stop

    masks_KU = neighbours(view.space)
    with masked_objective(view, OPS, before_pass=stop, costs=TOGETHER) as objective:
        if leave == "normally":
            objective.window_losses(masks_KU, tokens_BT)
        else:
            with pytest.raises(Stop):
                objective.window_losses(masks_KU, tokens_BT)
    assert trace(view.model, tokens_BT) == before


# Costs


def test_gathering_pays_for_many_tokens_and_few_units() -> None:
    """More tokens and a smaller share can only make it pay, and the cheaper way is taken."""
    costs = Costs(passing=8.0, copying=64.0, blocks=0.5)
    shares, numbers = [0.0, 0.1, 0.5, 0.9, 1.0], [1, 32, 128, 1024, 10**6]
    pays = [[costs.gathers(tokens, share) for share in shares] for tokens in numbers]
    assert all(row == sorted(row, reverse=True) for row in pays)
    assert all(list(column) == sorted(column) for column in zip(*pays, strict=True))
    assert not any(row[-1] for row in pays) and all(row[0] for row in pays)
    for tokens, share in itertools.product(numbers, shares):
        dense, gathered = 0.5 * tokens, 0.5 * tokens * share + 64 * share
        assert costs.of_weights(tokens, share) == min(dense, gathered)


@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=GRANULARITIES)
def test_what_is_at_work(granularity: tuple[Kind, ...]) -> None:
    """All that masks may keep, and of a layer in which gathering does not pay everything."""
    space = describe(tiny_model("llama"), granularity).space
    possible_U = space.alive(random_masks(space, 1)[0]) & (space.layer_U != 2) | (space.layer_U == 3)
    planner = Planner(space, Costs(passing=0.0, copying=10.0, blocks=1.0))
    assert planner.working(torch.ones_like(possible_U), 100) is None
    assert planner.working(possible_U, 0) is None
    assert planner.working(possible_U, 10**9).equal(possible_U)
    found = planner.working(possible_U, [0, 10**9, 10**9, 0])
    assert found.equal(possible_U | (space.layer_U == 0))


def test_masks_go_together_where_that_is_cheaper() -> None:
    """Equal ones, or where a pass is dear; those with little in common by themselves, if gathering costs little."""
    space = describe(tiny_model("llama")).space
    apart_KU, equal_KU = random_masks(space, 4, keep=0.3), random_masks(space, 1).expand(4, -1)
    for costs, masks_KU, expected in [
        (APART, apart_KU, False),
        (APART, equal_KU, True),
        (TOGETHER, apart_KU, True),
        (APART, apart_KU[:1], True),
    ]:
        planner = Planner(space, costs)
        assert planner.together(masks_KU, 4, 16, rows=64) == expected


def test_costs_are_found_from_the_time_of_passes() -> None:
    """Those of a machine that works as they say, to the nearest power of 2; and none where time tells nothing."""
    for costs in (Costs(64.0, 512.0, 0.75), Costs(1.0, 4096.0, 0.5), Costs(64.0, 512.0, 0.75, 1.375)):

        def seconds(tokens: int, way: Way, costs: Costs = costs) -> float:
            blocks = {"dense": 1.0, "gathered": 0.5, "listed": (costs.listing - 0.05) / 2}[way]  # rounded up
            copying = costs.copying / 2 if way == "gathered" else 0.0
            return 1e-6 * (costs.passing + copying + tokens * (1 - costs.blocks + costs.blocks * blocks))

        ways: list[Way] = ["gathered", "listed"] if costs.listing < COSTLY else ["gathered"]
        assert Costs.measured(seconds, 256, 4096, ways) == costs
    flat = Costs.measured(lambda tokens, way: 1e-3, 256, 4096, ["gathered", "listed"])
    assert not flat.gathers(10**9, 0.5) and flat.listing == COSTLY
    ungathered = Costs.measured(seconds, 256, 4096)
    assert not ungathered.gathers(10**9, 0.5)


def flops(run: Callable[[int], object], *_: Any) -> list[float]:
    """In the place of seconds."""
    with FlopCounterMode(display=False) as counter:
        run(0)
    return [float(counter.get_total_flops())]


@pytest.mark.parametrize(
    "granularity", [("layer",), ("attention", "ffn"), ("layer", "kv_group"), ("channel",)], ids=str
)
def test_costs_are_measured_whatever_may_go(granularity: tuple[Kind, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a layer has one unit of a kind, and half of them is none or all."""
    monkeypatch.setattr("bernprune.costs.timed", flops)
    view = describe(tiny_model("llama"), granularity)
    found = measure(view, OPS, 8)
    assert found.gathers(64, 0.0) and found.gathers(10**6, 0.5)
    assert found.blocks > 0.5 * view.space.costs_U().sum().item() / view.num_parameters


def test_a_gpu_that_is_full_is_measured_with_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to two; if they do not fit, neither does a run."""
    view, rows, most = describe(tiny_model("llama")), list[int](), 5

    def refused(_: Any, __: Any, given: dict[str, Any]) -> None:
        rows.append(len(given["input_ids"]))
        if rows[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    view.decoder.register_forward_pre_hook(refused, with_kwargs=True)
    monkeypatch.setattr("bernprune.costs.timed", flops)
    measure(view, OPS, 4)
    assert max(rows) > most and set(rows[-2:]) == {2, 4}
    most = 1
    with pytest.raises(torch.OutOfMemoryError):
        measure(view, OPS, 4)


def test_lists_pay_where_little_is_kept() -> None:
    """In each layer by itself, unless gathering costs less; and not for few tokens, or without kernels."""
    space = describe(tiny_model("llama")).space
    kept_U, layer_U = torch.full((space.size,), 0.8, dtype=torch.float64), space.layer_U == 1
    kept_U[layer_U], all_U = 0.4, torch.ones(space.size, dtype=torch.bool)
    dear, free = Planner(space, Costs(copying=COSTLY, listing=1.5)), Planner(space, Costs(copying=0.0, listing=1.5))
    assert dear.listed(all_U, kept_U, 640, each=64).equal(layer_U)
    assert dear.listed(all_U, kept_U, 640, each=63) is None
    assert Planner(space, Costs()).listed(all_U, kept_U, 640, each=64) is None
    few_U = ~layer_U | (torch.arange(space.size) % 2 == 0)  # of the layer's units that masks may keep
    assert dear.listed(few_U, kept_U * few_U, 640, each=64).equal(layer_U)
    always_U = kept_U.where(~layer_U, 1.0) * few_U  # all masks keep the same, so lists save nothing more
    assert free.listed(few_U, always_U, 640, each=64) is None
    assert free.working(few_U, 640).equal(few_U)
    listed_U = dear.listed(few_U, always_U, 640, each=64)
    assert listed_U.equal(layer_U)
    assert free.working(few_U, 640, listed_U) is None, "what goes by lists is not gathered"
    cheap = Planner(space, Costs(copying=0.0, listing=0.5))
    working_U, listed_U = cheap.ways(few_U, always_U, 640, each=64)
    assert working_U is None and listed_U.all()
    working_U, listed_U = cheap.ways(few_U, None, 640, each=64)
    assert working_U.equal(few_U) and listed_U is None
    blocks = describe(tiny_model("llama"), ("attention", "ffn")).space
    few_blocks_U = torch.full((blocks.size,), 0.4, dtype=torch.float64)
    planner = Planner(blocks, Costs(listing=0.5))
    assert planner.listed(few_blocks_U > 0, few_blocks_U, 640, each=64) is None, "blocks have no lists"
    assert not planner.may_list


def test_lists_count_where_masks_go_together() -> None:
    """Masks that differ go through together if kernels go by lists of them, and it costs more to gather for each."""
    space = describe(tiny_model("llama")).space
    masks_KU = random_masks(space, 4, keep=0.3)
    for listing, expected in ((1.0, True), (3.0, False)):
        planner = Planner(space, Costs(passing=64.0, copying=64.0, blocks=1.0, listing=listing))
        assert planner.together(masks_KU, 4, 64, rows=64) == expected
    blocks, without = describe(tiny_model("llama"), ("attention", "ffn")).space, Costs(64.0, 64.0, 1.0)
    masks_KU = random_masks(blocks, 4, keep=0.5)
    told = [Planner(blocks, each)._of_pass(masks_KU, [4] * 4, 640) for each in (without, replace(without, listing=0.5))]
    assert told[0] == told[1], "of blocks there are no lists"


# Memory


class Small:
    """A decoder for which the memory of a GPU is too small if there are more than so many rows."""

    def __init__(self, objective: MaskedObjective, most: int) -> None:
        self.rows, self._most, self._run = list[int](), most, objective._hidden

    def __call__(self, tokens_RT: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        if (rows or len(tokens_RT)) > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        self.rows.append(rows or len(tokens_RT))
        return self._run(tokens_RT, rows)


CALLS = {
    "window_losses": MaskedObjective.window_losses,
    "window_losses of many masks": MaskedObjective.window_losses,
    "token_losses": MaskedObjective.token_losses,
    "look": activities,
}


@pytest.mark.parametrize("call", CALLS)
def test_less_goes_together_where_memory_is_small(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """Half as much, until it fits, for good; said each time it halves."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(8, 8)
    masks_KU, close_KU = random_masks(view.space, 8), torch.ones(8, view.space.size, dtype=torch.bool)
    close_KU[:, view.space.span("channel", 3)][torch.arange(8), torch.arange(8)] = False
    given = {
        "window_losses": masks_KU[:1],
        "window_losses of many masks": close_KU,
        "token_losses": masks_KU.view(8, 1, 1, -1),
        "look": masks_KU[0],
    }[call]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with masked_objective(view, OPS) as objective:
        expected = CALLS[call](objective, given, tokens_BT)
    with caplog.at_level(logging.WARNING), masked_objective(view, OPS, rows_per_forward=8) as objective:
        small = Small(objective, 3)
        monkeypatch.setattr(objective, "_hidden", small)
        for _ in range(2):
            assert_close(CALLS[call](objective, given, tokens_BT), expected, EXACT)
    assert small.rows == [2] * (64 if call.endswith("many masks") else 8)
    assert [record.getMessage() for record in caplog.records] == [
        f"the GPU's memory is full: going on with {rows} rows in a forward pass" for rows in (4, 2)
    ]


def test_one_row_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence with the figures."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(2, 8)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with masked_objective(view, OPS) as objective:
        monkeypatch.setattr(objective, "_hidden", Small(objective, 0))
        with pytest.raises(BackendError, match=r"not one row fits in the GPU's memory: CUDA out of memory\. Tried"):
            objective.losses(random_masks(view.space, 1), tokens_BT)
