"""Every kernel computes what its twin in plain torch does in float64, within the rounding of its dtype.

Interpreted where there is no GPU, compiled where there is one. Fresh memory holds NaN, and so does all that must not be
read.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    MASKS,
    SIZES,
    Numbers,
    Sizes,
    assert_matches,
    each_dtype,
    each_mask_and_dtype,
    each_size,
    listed,
    packed,
)
from tolerances import LOGITS

from bernprune.kernels import attention, fused, linear, losses, mlp, reference, rotary, tiles

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]
biased = pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
ACTIVATIONS: dict[mlp.Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def spoilt(x_RTE: torch.Tensor, masks_RU: torch.Tensor) -> torch.Tensor:
    """NaN where an input is masked."""
    entries_RE = masks_RU.repeat_interleave(x_RTE.shape[-1] // masks_RU.shape[1], dim=1).to(x_RTE.device)
    return x_RTE.masked_fill(~entries_RE[:, None], math.nan)


@each_size
@each_mask_and_dtype
@biased
def test_linear_layers_with_masked_inputs(
    sizes: Sizes, make_masks: Callable, dtype: torch.dtype, biased: bool, device: torch.device
) -> None:
    """By bits and by lists; compact or not; whichever way the weight lies in memory."""
    numbers, masks_MN = Numbers(dtype, device), make_masks(sizes.masks, sizes.units)
    x_RTE, weight_DE = numbers(*sizes.batch, sizes.width), numbers(sizes.outputs, sizes.width)
    bias_D, masks_RN = numbers(sizes.outputs) if biased else None, sizes.spread(masks_MN).to(device)
    expected = (reference.masked_linear, x_RTE, masks_RN, weight_DE, bias_D)
    given, width = spoilt(x_RTE, masks_RN), sizes.unit_width
    assert_matches(
        linear.masked_linear(given, packed(masks_MN, device), weight_DE, bias_D, unit_width=width),
        *expected,
        unit_width=width,
    )
    cut_RTE = linear.cut(given, packed(masks_MN, device), unit_width=width)
    assert cut_RTE.equal(reference.masked_units(x_RTE, masks_RN, unit_width=width))
    kept, lying_DE = listed(masks_MN, device), weight_DE.T.contiguous().T
    for weight in (weight_DE, lying_DE):
        assert_matches(
            linear.linear_from_kept(given, kept, weight, bias_D, unit_width=width), *expected, unit_width=width
        )
    compact = torch.full_like(x_RTE, math.nan)
    for row, mask_N in enumerate(masks_RN):
        entries = x_RTE[row][:, mask_N.repeat_interleave(width)]
        compact[row, :, : entries.shape[1]] = entries
    found = linear.linear_from_kept(compact, kept, lying_DE, bias_D, unit_width=width, compact=True)
    assert_matches(found, *expected, unit_width=width)


@each_size
@each_mask_and_dtype
@biased
def test_linear_layers_with_masked_outputs(
    sizes: Sizes, make_masks: Callable, dtype: torch.dtype, biased: bool, device: torch.device
) -> None:
    """What is not kept is zero, whatever its weights are."""
    numbers, masks_MN = Numbers(dtype, device), make_masks(sizes.masks, sizes.units)
    x_RTD, weight_ED = numbers(*sizes.batch, sizes.outputs), numbers(sizes.width, sizes.outputs)
    bias_E = numbers(sizes.width) if biased else None
    masks_RE = sizes.spread(masks_MN).repeat_interleave(sizes.unit_width, dim=1).to(device)

    def twin(x_RTD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x_RTD, weight_ED, bias_E) * masks_RE[:, None]

    found = linear.linear_to_kept(x_RTD, packed(masks_MN, device), weight_ED, bias_E, unit_width=sizes.unit_width)
    assert_matches(found, twin, x_RTD, weight_ED, bias_E)


@each_size
@each_mask_and_dtype
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, True)])
def test_mlps(
    sizes: Sizes, make_masks: Callable, dtype: torch.dtype, gated: bool, biased: bool, device: torch.device
) -> None:
    """Dense and by lists; with and without a gate."""
    numbers, masks_MF = Numbers(dtype, device), make_masks(sizes.masks, sizes.units)
    channels, width = sizes.units, sizes.outputs
    x_RTD, down_DF = numbers(*sizes.batch, width), numbers(width, channels)
    gate_FD, up_FD = numbers(channels, width), numbers(channels, width) if gated else None
    biases = {"gate_bias_F": numbers(channels), "up_bias_F": numbers(channels), "down_bias_D": numbers(width)}
    biases = biases if biased else {}
    options = {"chain": True, **biases}
    expected = (reference.masked_mlp, x_RTD, sizes.spread(masks_MF).to(device), gate_FD, up_FD, down_DF)
    assert_matches(
        mlp.masked_mlp(x_RTD, packed(masks_MF, device), gate_FD, up_FD, down_DF, **biases), *expected, **options
    )
    lying_DF, kept = down_DF.T.contiguous().T, listed(masks_MF, device)
    assert_matches(mlp.masked_mlp(x_RTD, kept, gate_FD, up_FD, lying_DF, **biases), *expected, **options)


@pytest.mark.parametrize("activation", get_args(mlp.Activation))
@each_dtype
def test_activations(activation: mlp.Activation, dtype: torch.dtype, device: torch.device) -> None:
    """Each by itself, far out too; masked NaN are zeros; without masks all is kept."""
    numbers, sizes = Numbers(dtype, device), SIZES[0]
    gate_RTF, up_RTF = 3 * numbers(6, 5, 141), numbers(6, 5, 141)
    gate_RTF[0, 0, :4] = torch.tensor([60.0, -60.0, 0.0, 1e-3])
    masks_MF = MASKS["random"](3, 141)
    masks_RF = sizes.spread(masks_MF).to(device)

    def twin(gate_RTF: torch.Tensor, up_RTF: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[activation](gate_RTF) * up_RTF

    everything = mlp.masked_activation(gate_RTF.clone(), up_RTF, None, activation)
    assert_matches(everything, twin, gate_RTF, up_RTF)
    given = (spoilt(gate_RTF, masks_RF), spoilt(up_RTF, masks_RF))
    found = mlp.masked_activation(*given, packed(masks_MF, device), activation)
    assert torch.equal(found, everything * masks_RF[:, None])


@each_mask_and_dtype
@pytest.mark.parametrize(("tokens", "groups", "queries", "size"), [(63, 3, 2, 60), (1, 5, 1, 16), (70, 1, 3, 9)])
def test_attention(
    tokens: int, groups: int, queries: int, size: int, make_masks: Callable, dtype: torch.dtype, device: torch.device
) -> None:
    """Of kept groups alone: what belongs to the others may be NaN, and comes out as zeros."""
    numbers, masks_MG = Numbers(dtype, device), make_masks(2, groups)
    masks_RG = masks_MG.repeat_interleave(2, dim=0).to(device)
    q_RHTC, k_RGTC, v_RGTC = (
        numbers(4, tokens, heads, size).transpose(1, 2) for heads in (groups * queries, groups, groups)
    )
    cut_RG = ~masks_RG[:, :, None, None]
    given = (q_RHTC, k_RGTC.masked_fill(cut_RG, math.nan), v_RGTC.masked_fill(cut_RG, math.nan))
    for scale in (None, 0.3):
        found = attention.attention_of_kept(*given, packed(masks_MG, device), scale=scale)
        assert_matches(found, reference.attention_of_kept, q_RHTC, k_RGTC, v_RGTC, masks_RG, scale=scale)


@each_dtype
@pytest.mark.parametrize("own_angles", [False, True], ids=["for_all_rows", "of_each_row"])
@pytest.mark.parametrize(("tokens", "size"), [(63, 60), (1, 2), (33, 16)])
def test_rotary_embeddings(tokens: int, size: int, own_angles: bool, dtype: torch.dtype, device: torch.device) -> None:
    """Of heads as a projection leaves them, whose strides are kept."""
    numbers = Numbers(dtype, device)
    x_RHTC = numbers(3, tokens, 5, size).transpose(1, 2)
    cos_RTC, sin_RTC = numbers(3 if own_angles else 1, tokens, size), numbers(3 if own_angles else 1, tokens, size)
    found = rotary.rotary(x_RHTC, cos_RTC, sin_RTC)
    assert_matches(found, reference.rotary, x_RHTC, cos_RTC, sin_RTC)
    assert found.stride() == x_RHTC.stride()


@each_dtype
@pytest.mark.parametrize(("predictions", "vocabulary"), [(7, 5003), (1, 1), (3, 31)])
def test_losses_of_logits(predictions: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
    """Taken in float32 whatever the logits' dtype; also of a certain prediction and of huge logits."""
    numbers = Numbers(dtype, device)
    ours_PV, theirs_PV = 4 * numbers(predictions, vocabulary), 4 * numbers(predictions, vocabulary)
    ours_PV[0, 0] += 1000
    targets_P = torch.arange(predictions, device=device) * 3 % vocabulary
    assert_matches(losses.cross_entropy(ours_PV, targets_P), reference.cross_entropy, ours_PV, targets_P)
    assert_matches(losses.divergence(ours_PV, theirs_PV), reference.divergence, ours_PV, theirs_PV)
    assert losses.divergence(ours_PV, ours_PV).abs().max() <= LOGITS[torch.float32]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_of_logits_that_are_not_finite_is_not_finite(bad: float, device: torch.device) -> None:
    """It must not pass for a loss."""
    logits_PV = Numbers(torch.float32, device)(2, 33)
    logits_PV[1, 5] = bad
    found = losses.cross_entropy(logits_PV, torch.tensor([0, 3], device=device))
    assert found.isfinite().tolist() == [True, False]


LINEAR = (torch.ones(6, 2, 15), torch.ones(3, 5), torch.ones(7, 15))  # input, masks of width 3, weight
MISFITS = {
    "rows_not_shared": ((torch.ones(7, 2, 15), *LINEAR[1:]), "7 rows cannot be shared out equally among 3 masks"),
    "units": ((LINEAR[0], torch.ones(3, 4), LINEAR[2]), "4 units of width 3 do not fill a width of 15"),
    "weight": ((*LINEAR[:2], torch.ones(7, 14)), r"a weight \(7, 14\) does not fit an input \(6, 2, 15\)"),
    "dtypes": ((LINEAR[0].half(), *LINEAR[1:]), "one dtype of .* got torch.float16, torch.float32"),
    "dtype": (tuple(part.double() for part in LINEAR), "one dtype of .* got torch.float64"),
}


@pytest.mark.parametrize(("given", "reason"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused(given: tuple[torch.Tensor, ...], reason: str, device: torch.device) -> None:
    """In one sentence with the sizes; what fits is taken."""
    x_RTE, masks_MU, weight_DE = (part.to(device) for part in given)
    right = tuple(part.to(device) for part in LINEAR)
    assert linear.masked_linear(right[0], packed(right[1].cpu(), device), right[2], unit_width=3).shape == (6, 2, 7)
    for operation, masks in (
        (linear.masked_linear, packed), (linear.linear_from_kept, listed), (fused.masked_linear, packed),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            operation(x_RTE, masks(masks_MU.cpu(), device), weight_DE, unit_width=3)


def test_a_bias_with_gaps_is_refused(device: torch.device) -> None:
    """Kernels read it number by number; without gaps it is taken."""
    x_RTE, weight_DE, bias_D = (part.to(device) for part in (LINEAR[0], LINEAR[2], torch.ones(14)))
    masks = packed(LINEAR[1].cpu(), device)
    linear.masked_linear(x_RTE, masks, weight_DE, bias_D[:7], unit_width=3)
    with pytest.raises(ValueError, match="must lie in memory as it is read, but has stride 2"):
        linear.masked_linear(x_RTE, masks, weight_DE, bias_D[::2], unit_width=3)


@pytest.mark.parametrize(("told", "expected"), [("ieee", "ieee"), ("tf32", "tf32")])
def test_precision_follows_either_way_of_setting_it(told: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was set by its newer name cannot be asked for by the older one; it is of numbers of 32 bits alone."""
    numbers = torch.ones(2)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest" if told == "ieee" else "high")
    assert (tiles.precision(numbers), tiles.precision(numbers.half())) == (expected, "ieee")

    def refuse() -> str:
        raise RuntimeError("set by its newer name")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=told))
    assert (tiles.precision(numbers), tiles.precision(numbers.half())) == (expected, "ieee")


def test_angles_that_do_not_fit_heads_are_refused(device: torch.device) -> None:
    """And heads without halves."""
    x_RHTC, angles_RTC = torch.ones(3, 2, 5, 4, device=device), torch.ones(1, 5, 4, device=device)
    assert rotary.rotary(x_RHTC, angles_RTC, angles_RTC).shape == x_RHTC.shape
    for heads, angles in ((x_RHTC, angles_RTC[:, 1:]), (x_RHTC, angles_RTC.expand(2, 5, 4)), (x_RHTC[..., 1:],) * 2):
        with pytest.raises(ValueError, match="do not fit heads"):
            rotary.rotary(heads, angles, angles)


def test_an_activation_without_a_kernel_is_refused(device: torch.device) -> None:
    """The sentence names those there are."""
    weight = torch.ones(5, 5, device=device)
    with pytest.raises(ValueError, match="'tanh' has no kernel; known are silu, gelu, gelu_tanh, relu"):
        mlp.masked_mlp(weight[None], None, weight, weight, weight, activation="tanh")
