"""What a step's losses say of units: sums over masks against their definitions, in plain torch and by kernels."""

from typing import Any, get_args

import pytest
import torch
from searches import CHUNKS, SPACE, WINDOW, read, reading_of, reading_search
from spaces import normal_numbers, random_numbers
from tolerances import EXACT, LOGITS, assert_close

from bernprune.backends import load_backend
from bernprune.names import Scaling
from bernprune.policy import masks as module
from bernprune.policy.activity import ActiveTokens
from bernprune.policy.baselines import less_the_others
from bernprune.policy.budget import Budget
from bernprune.policy.estimators import reinforce
from bernprune.policy.masks import Design, Masks, amplitude, with_reference
from bernprune.policy.sums import MaskSums

pytestmark = pytest.mark.gpu
DESIGNS = {
    "chunks": Design(4, 3, CHUNKS, "antithetic", 1.0),
    "sequences": Design(5, 2, 1),
    "batch": Design(1, 4),
    "exact": Design(2, 3, 2, "exact"),
}
each_design = pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)


def some_masks(design: Design, device: torch.device) -> Masks:
    probs_U = random_numbers(SPACE.size, 0)
    return Masks(design.rows_BKC, probs_U, design, Budget(SPACE, 0.4), 1, 2).to(device)


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest, device: torch.device) -> Any:
    return load_backend(request.param, device).sums


@each_design
@pytest.mark.parametrize("entries", [1, 2**20], ids=["window_by_window", "at_once"])
def test_sums_are_what_they_say(
    monkeypatch: pytest.MonkeyPatch, design: Design, entries: int, kernels: Any, device: torch.device
) -> None:
    monkeypatch.setattr(module, "_ENTRIES", entries)
    masks, exact = some_masks(design, device), EXACT if kernels is None else LOGITS[torch.float32]
    kept_BKCU = masks[:].cpu().double()
    values_U, weights_BKC = random_numbers(SPACE.size, 3), normal_numbers(*masks.shape[:3], seed=4)
    sums = MaskSums(masks, kernels)
    assert_close(sums.kept(values_U), (kept_BKCU * values_U).sum(-1), exact)
    assert_close(sums.scores(weights_BKC), (weights_BKC[..., None] * kept_BKCU).sum((1, 2)), exact)
    units, windows = SPACE.span("channel", 1), slice(design.groups // 2, design.groups)
    assert units is not None
    count = windows.stop - windows.start
    active_RTF = normal_numbers(count, WINDOW, units.stop - units.start, seed=5).float()
    weights_RKT = normal_numbers(count, design.masks, WINDOW, seed=6)
    by_token_RKTF = kept_BKCU[windows][..., units].repeat_interleave(WINDOW // design.chunks, dim=2)
    size_RTF = active_RTF.abs().double()
    expected = [
        (weights_RKT[..., None] * by_token_RKTF * size_RTF[:, None]).sum((1, 2)),
        size_RTF.square().sum(1),
        size_RTF.sum(1),
    ]
    found = sums.active(units, windows, active_RTF.to(device), weights_RKT)
    assert_close(found, torch.stack(expected), LOGITS[torch.float32])


def test_masks_that_no_kernel_can_draw_are_summed_all_the_same(kernels: Any, device: torch.device) -> None:
    """Such as those of a tensor, and those with a reference among them."""
    masks = some_masks(DESIGNS["sequences"], device)
    reference_U, values_U = random_numbers(SPACE.size, 7) < 0.5, random_numbers(SPACE.size, 3)
    tolerance = EXACT if kernels is None else LOGITS[torch.float32]
    for others in (masks[:], with_reference(masks, reference_U)):
        expected = others[:].cpu().double() @ values_U
        assert_close(MaskSums(others, kernels).kept(values_U), expected, tolerance)


@pytest.mark.parametrize("design", [DESIGNS["chunks"], DESIGNS["sequences"]], ids=["swinging", "independent"])
def test_a_search_learns_the_same_by_kernels(design: Design, device: torch.device) -> None:
    """All that it believes, up to rounding."""
    found = []
    for backend in ("torch", "triton"):
        search = reading_search(design=design, round_steps=3, kernels=load_backend(backend, device).sums)
        read(search, range(3), device=device)
        assert search.rounds == 1
        found.append(search)
    assert found[0].worth_U.abs().max() > 0
    assert_close(found[1].worth_U, found[0].worth_U, 1e-4)
    assert_close(found[1].deviation_U, found[0].deviation_U, 1e-4)


@pytest.mark.parametrize("scaling", get_args(Scaling))
def test_gradients_are_the_same_wherever_masks_are_made(scaling: Scaling, device: torch.device) -> None:
    """Of masks on a GPU, for a policy on the processor."""
    masks_MU = some_masks(DESIGNS["batch"], device).flatten(0, 2)
    probs_U, advantages_M = random_numbers(SPACE.size, 0), normal_numbers(len(masks_MU), seed=1)
    found = reinforce(probs_U, masks_MU, advantages_M, scaling=scaling)
    assert_close(found, reinforce(probs_U, masks_MU[:].cpu(), advantages_M, scaling=scaling), EXACT)


def test_what_swings_of_masks_is_taken_out_of_what_active_tokens_tell() -> None:
    """Of every window, token by token: masks count less their probabilities at the level of their layer."""
    search = reading_search(design=DESIGNS["chunks"])
    masks_BKCU, channels_U = search.ask(0), SPACE.of_kind("channel")
    assert isinstance(masks_BKCU, Masks)
    reading, predicted_BKC = reading_of(search, masks_BKCU, 0), normal_numbers(*masks_BKCU.shape[:3], seed=2)
    levels_BKCG = masks_BKCU.levels().double()
    tokens, amplitude_U = ActiveTokens(SPACE), amplitude(search.probs_U, search.design, SPACE)
    tokens.add(MaskSums(masks_BKCU), reading, predicted_BKC, levels_BKCG=levels_BKCG, amplitude_U=amplitude_U)
    size = WINDOW // CHUNKS
    centred_BKCU = masks_BKCU[:].double() - levels_BKCG[..., SPACE.group_U] * amplitude_U
    left_BKT = reading.losses_BKT - predicted_BKC.repeat_interleave(size, dim=2) / WINDOW
    advantages_BKT = less_the_others(left_BKT) / masks_BKCU.shape[1]
    active_BTN = torch.zeros(len(masks_BKCU), WINDOW, int(channels_U.sum()), dtype=torch.float64)
    starts = [0, len(SPACE.by_layer("channel")[0])]

    def see(layer: int, windows: slice, active_RTF: torch.Tensor) -> None:
        active_BTN[windows, :, starts[layer] : starts[layer] + active_RTF.shape[-1]] = active_RTF.double()

    reading.look(see)
    centred_BKTN = centred_BKCU[..., channels_U].repeat_interleave(size, dim=2)
    expected_BN = (advantages_BKT[..., None] * centred_BKTN * active_BTN[:, None]).sum((1, 2))
    assert_close(tokens._sums._products_2N, torch.stack([expected_BN[::2].sum(0), expected_BN[1::2].sum(0)]), 1e-5)
