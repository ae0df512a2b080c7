"""Masks as kernels take them: bits, lists and draws say the same as a tensor; and sums over masks that are not stored.

Letters: B windows of text, R masks a window, M masks, U units.
"""

from collections.abc import Callable

import pytest
import torch
from bernprune.kernels.masks import DrawnMasks, KeptUnits, PackedMasks
from kernel_cases import MASKS, SIZES, Numbers, assert_matches, listed, packed
from spaces import FLAT, NESTED
from test_masks import make_masks
from tolerances import LOGITS, assert_close

from bernprune.errors import ConfigError
from bernprune.kernels import draw, linear, mlp, reference, sums
from bernprune.policy.masks import Design, Masks, with_reference

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
each_mask = pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
each_size = pytest.mark.parametrize("units", [1, 31, 32, 33, 100, 1025])
DESIGNS = {
    "independent": Design(2, 3, 2),
    "antithetic": Design(2, 3, 2, "antithetic"),
    "swinging": Design(2, 3, 2, "antithetic", swing=0.7),
    "one": Design(1, 1),
}
each_design = pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)


def policy(size: int) -> torch.Tensor:
    """Probabilities, certain ones among them."""
    probs_U = torch.rand(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    probs_U[0], probs_U[-1] = 0.0, 1.0
    return probs_U


def drawn(design: Design, device: torch.device, *, step: int = 7) -> tuple[torch.Tensor, DrawnMasks]:
    """The masks of a step, bool ``[M, U]``, and what a kernel draws them from."""
    masks = make_masks(policy(FLAT.size), design, step=step)
    return masks[:].flatten(0, 2).to(device), masks.to(device).drawn()


@each_mask
@each_size
def test_bits_and_lists_hold_masks(make: Callable, units: int, device: torch.device) -> None:
    """Of all units and of some, whatever lies beside them."""
    masks_MU = make(3, units).to(device)
    assert (len(PackedMasks.of(masks_MU[:, :0])), PackedMasks.of(masks_MU[:, :0]).size) == (3, 0)
    bits = PackedMasks.of(masks_MU)
    assert (len(bits), bits.size) == (3, units)
    assert bits.unpack().equal(masks_MU)
    assert packed(masks_MU.cpu(), device).unpack().equal(masks_MU)
    for start, stop in ((0, units), (units // 3, units), (units // 2, units // 2 + 1)):
        assert bits.units(start, stop).unpack().equal(masks_MU[:, start:stop])
        for kept in (draw.list_kept(bits.units(start, stop)), KeptUnits.of(masks_MU[:, start:stop])):
            assert kept.unpack().equal(masks_MU[:, start:stop])
            for index_N, count, mask_N in zip(kept.index_MN, kept.count_M, masks_MU[:, start:stop], strict=True):
                assert index_N[:count].tolist() == mask_N.nonzero()[:, 0].tolist()


@each_design
@pytest.mark.parametrize("step", [0, 2**32 + 9])
def test_a_kernel_draws_the_masks_of_the_policy(design: Design, step: int, device: torch.device) -> None:
    """To the bit, at any step."""
    masks_MU, draws = drawn(design, device, step=step)
    bits = draw.draw(draws)
    assert bits.unpack().equal(masks_MU)
    assert bits.units(3, 20).unpack().equal(masks_MU[:, 3:20])


def test_some_of_the_masks_are_drawn_by_themselves(device: torch.device) -> None:
    """Any of a step's rows, in any order, with more units than a block has."""
    probs_U = policy(NESTED.size)
    masks = make_masks(probs_U, DESIGNS["swinging"], space=NESTED)
    index = torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]), torch.tensor([0, 1, 1])
    assert draw.draw(masks.to(device).drawn(index)).unpack().equal(masks[index].to(device))


def test_what_is_not_made_bit_by_bit_cannot_be_drawn() -> None:
    """Exact masks, and a reference among others."""
    probs_U = policy(FLAT.size)
    others = make_masks(probs_U, DESIGNS["independent"])
    reference_among = with_reference(others, torch.ones(FLAT.size, dtype=torch.bool))
    assert isinstance(reference_among, Masks)
    for masks in (make_masks(probs_U, Design(1, 2, sampling="exact")), reference_among):
        with pytest.raises(ConfigError, match="cannot be drawn bit by bit"):
            masks.drawn()
    assert len(others.drawn()) == 12


@each_design
def test_masks_drawn_inside_a_kernel(design: Design, device: torch.device) -> None:
    """A linear layer and an activation mask by them as by bits, of all units and of some."""
    masks_MU, draws = drawn(design, device)
    numbers = Numbers(torch.float32, device)
    for start, stop in ((0, FLAT.size), (5, 18)):
        size = stop - start
        x_RTE, weight_DE = numbers(len(masks_MU), 3, 2 * size), numbers(7, 2 * size)
        found = linear.masked_linear(x_RTE, draws.units(start, stop), weight_DE, unit_width=2)
        assert_matches(found, reference.masked_linear, x_RTE, masks_MU[:, start:stop], weight_DE, unit_width=2)
        gate_RTF = numbers(len(masks_MU), 3, size)
        found = mlp.masked_activation(gate_RTF.clone(), None, draws.units(start, stop), "relu")
        assert_close(found, gate_RTF.relu() * masks_MU[:, None, start:stop], LOGITS[torch.float32])


@each_design
def test_sums_over_masks(design: Design, device: torch.device) -> None:
    """Of scores, of what is kept, and of activities; by bits and by draws alike to the bit."""
    masks_MU, draws = drawn(design, device)
    windows, count, chunks = design.groups, design.masks, design.chunks
    numbers, probs_U = Numbers(torch.float32, device), policy(FLAT.size).float().to(device)
    for start, stop in ((0, FLAT.size), (5, 18)):
        bits_MU, probs = masks_MU[:, start:stop], probs_U[start:stop]
        masks = {"drawn": draws.units(start, stop), "packed": packed(bits_MU.cpu(), device)}
        weights_BR, values_U = numbers(windows, count * chunks), numbers(stop - start)
        active_BTF, advantages_BKT = numbers(windows, 12, stop - start), numbers(windows, count, 12)
        found = [
            (
                sums.score_sums(weights_BR, each, probs),
                sums.kept_sums(values_U, each),
                *sums.activity_sums(active_BTF, advantages_BKT, each),
            )
            for each in masks.values()
        ]
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        assert_matches(found[0][0], reference.score_sums, weights_BR, bits_MU.unflatten(0, (windows, -1)), probs)
        assert_matches(found[0][1], reference.kept_sums, values_U, bits_MU)
        expected = reference.activity_sums(
            active_BTF.double(), advantages_BKT.double(), bits_MU.unflatten(0, (windows, count, chunks))
        )
        for one, other in zip(found[0][2:], expected, strict=True):
            assert_close(one, other, LOGITS[torch.float32])


@pytest.mark.parametrize("tokens", [4, 12, 128, 172])
def test_activities_of_any_chunks(tokens: int, device: torch.device) -> None:
    """As long as chunks divide the tokens."""
    numbers, masks_MF = Numbers(torch.bfloat16, device), MASKS["random"](2 * 3 * 4, 131)
    active_BTF, advantages_BKT = numbers(2, tokens, 131), Numbers(torch.float32, device)(2, 3, tokens)
    found = sums.activity_sums(active_BTF, advantages_BKT, packed(masks_MF, device))
    expected = reference.activity_sums(
        active_BTF.double(), advantages_BKT.double(), masks_MF.view(2, 3, 4, -1).to(device)
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, LOGITS[torch.float32])


MISFITS: dict[str, tuple[Callable, str]] = {
    "score_masks": (lambda p: sums.score_sums(torch.ones(2, 4), p, torch.ones(5)), "6 masks of 5 units do not fit"),
    "score_units": (lambda p: sums.score_sums(torch.ones(2, 3), p, torch.ones(4)), "6 masks of 5 units do not fit"),
    "values": (lambda p: sums.kept_sums(torch.ones(4), p), r"5 units do not fit values \(4,\)"),
    "chunks": (lambda p: sums.activity_sums(torch.ones(1, 5, 5), torch.ones(1, 3, 5), p), "do not fit each other"),
    "windows": (lambda p: sums.activity_sums(torch.ones(4, 6, 5), torch.ones(4, 3, 6), p), "do not fit each other"),
    "channels": (lambda p: sums.activity_sums(torch.ones(1, 6, 4), torch.ones(1, 3, 6), p), "do not fit each other"),
}


@pytest.mark.parametrize(("call", "reason"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused(call: Callable, reason: str) -> None:
    """In one sentence with the sizes."""
    with pytest.raises(ValueError, match=reason):
        call(packed(MASKS["random"](6, 5), torch.device("cpu")))


def test_lists_and_bits_share_sizes(device: torch.device) -> None:
    """The helpers of these tests give what they say."""
    masks_MN = MASKS["random"](3, SIZES[0].units)
    assert listed(masks_MN, device).unpack().equal(packed(masks_MN, device).unpack())
