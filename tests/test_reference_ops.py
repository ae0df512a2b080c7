"""The masked operations agree, row by row, with layers from which the masked units are cut away."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tolerances import EXACT, LOGITS, assert_close

from bernprune.backends import find_device, load_backend
from bernprune.errors import BackendError, BernpruneError, ConfigError
from bernprune.kernels import reference


@dataclass(frozen=True)
class Sizes:
    """Of one call; every one different, so that a mix-up shows."""

    rows: int
    tokens: int
    units: int
    unit_width: int
    outputs: int

    def __str__(self) -> str:
        return f"R{self.rows}-T{self.tokens}-U{self.units}x{self.unit_width}-D{self.outputs}"


SIZES = [Sizes(1, 7, 5, 3, 11), Sizes(4, 3, 13, 1, 2), Sizes(3, 5, 2, 8, 7), Sizes(6, 1, 9, 5, 3), Sizes(5, 2, 1, 1, 1)]
MASKS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "random": lambda rows, units: numbers(rows, units, seed=9) > 0,
    "zeros": lambda rows, units: torch.zeros(rows, units, dtype=torch.bool),
    "ones": lambda rows, units: torch.ones(rows, units, dtype=torch.bool),
    "row_by_row": lambda rows, units: torch.arange(rows)[:, None] % 3 == torch.arange(units) % 3,
}
all_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
all_masks = pytest.mark.parametrize("make_masks", MASKS.values(), ids=MASKS)
with_biases = pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Linear:
    """Input and weights of a masked linear layer."""

    x_RTE: torch.Tensor
    weight_DE: torch.Tensor
    bias_D: torch.Tensor | None

    @classmethod
    def random(cls, sizes: Sizes, *, biased: bool) -> "Linear":
        width = sizes.units * sizes.unit_width
        bias_D = numbers(sizes.outputs, seed=3) if biased else None
        return cls(numbers(sizes.rows, sizes.tokens, width), numbers(sizes.outputs, width, seed=2), bias_D)

    def cut(self, masks_RU: torch.Tensor, unit_width: int) -> torch.Tensor:
        """The output by one smaller layer a row."""
        rows = []
        for x_TE, mask_U in zip(self.x_RTE, masks_RU.tolist(), strict=True):
            kept = [u * unit_width + entry for u, keeps in enumerate(mask_U) if keeps for entry in range(unit_width)]
            y_TD = x_TE[:, kept] @ self.weight_DE[:, kept].T
            rows.append(y_TD if self.bias_D is None else y_TD + self.bias_D)
        return torch.stack(rows)


@dataclass(frozen=True)
class MLP:
    """Input, weights and biases of a masked gated MLP."""

    x_RTD: torch.Tensor
    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor
    biases: dict[str, torch.Tensor]

    @classmethod
    def random(cls, sizes: Sizes, *, biased: bool) -> "MLP":
        channels, width = sizes.units, sizes.outputs
        names = {"gate_bias_F": channels, "up_bias_F": channels, "down_bias_D": width}
        biases = {name: numbers(size, seed=7 + len(name)) for name, size in names.items()} if biased else {}
        gate_FD, up_FD = numbers(channels, width, seed=4), numbers(channels, width, seed=5)
        x_RTD, down_DF = numbers(sizes.rows, sizes.tokens, width), numbers(width, channels, seed=6)
        return cls(x_RTD, gate_FD, up_FD, down_DF, biases)

    def run(self, masks_RF: torch.Tensor | None, **options: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return reference.masked_mlp(
            self.x_RTD, masks_RF, self.gate_FD, self.up_FD, self.down_DF, **options, **self.biases
        )

    def cut(self, masks_RF: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The output by one narrower MLP a row, channel after channel."""
        gate_bias_F = self.biases.get("gate_bias_F", torch.zeros(len(self.gate_FD), dtype=torch.float64))
        up_bias_F = self.biases.get("up_bias_F", torch.zeros(len(self.up_FD), dtype=torch.float64))
        y_RTD = torch.zeros_like(self.x_RTD)
        for row, x_TD in enumerate(self.x_RTD):
            for channel in masks_RF[row].nonzero().flatten().tolist():
                gate_T = activation(x_TD @ self.gate_FD[channel] + gate_bias_F[channel])
                up_T = x_TD @ self.up_FD[channel] + up_bias_F[channel]
                y_RTD[row] += torch.outer(gate_T * up_T, self.down_DF[:, channel])
        return y_RTD + self.biases.get("down_bias_D", 0.0)


@all_sizes
@all_masks
@with_biases
def test_masked_linear_equals_a_smaller_layer_a_row(sizes: Sizes, make_masks: Callable, biased: bool) -> None:
    """Masking units is cutting their columns; the bias always stays."""
    linear, masks_RU = Linear.random(sizes, biased=biased), make_masks(sizes.rows, sizes.units)
    found = reference.masked_linear(
        linear.x_RTE, masks_RU, linear.weight_DE, linear.bias_D, unit_width=sizes.unit_width
    )
    assert_close(found, linear.cut(masks_RU, sizes.unit_width), EXACT)


@all_sizes
@all_masks
@with_biases
def test_masked_mlp_equals_a_narrower_mlp_a_row(sizes: Sizes, make_masks: Callable, biased: bool) -> None:
    """Masking a channel is cutting its row of gate and up and its column of down; SiLU is the default."""
    mlp, masks_RF = MLP.random(sizes, biased=biased), make_masks(sizes.rows, sizes.units)
    assert_close(mlp.run(masks_RF), mlp.cut(masks_RF, lambda x: x * torch.sigmoid(x)), EXACT)


def test_masked_mlp_takes_any_activation() -> None:
    """The activation given is the one applied, and to the gate alone."""
    mlp, masks_RF = MLP.random(SIZES[1], biased=True), MASKS["random"](4, 13)
    assert_close(mlp.run(masks_RF, activation=torch.tanh), mlp.cut(masks_RF, torch.tanh), EXACT)


@all_sizes
@with_biases
def test_no_mask_keeps_everything(sizes: Sizes, biased: bool) -> None:
    """None is the mask of ones, to the bit."""
    linear, mlp = Linear.random(sizes, biased=biased), MLP.random(sizes, biased=biased)
    ones_RU = MASKS["ones"](sizes.rows, sizes.units)
    operands = (linear.weight_DE, linear.bias_D)
    found = reference.masked_linear(linear.x_RTE, None, *operands, unit_width=sizes.unit_width)
    assert torch.equal(found, reference.masked_linear(linear.x_RTE, ones_RU, *operands, unit_width=sizes.unit_width))
    assert torch.equal(mlp.run(None), mlp.run(ones_RU))


@pytest.mark.parametrize("dtype", [dtype for dtype in LOGITS if dtype != torch.float64], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, None], ids=["bool", "same"])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, mask_dtype: torch.dtype | None) -> None:
    """The result has the input's dtype and its rounding only, whatever the mask's dtype."""
    sizes = SIZES[2]
    exact, masks_RU = Linear.random(sizes, biased=True), MASKS["random"](sizes.rows, sizes.units)
    rounded = [tensor.to(dtype) for tensor in (exact.x_RTE, exact.weight_DE, exact.bias_D)]
    found = reference.masked_linear(
        rounded[0], masks_RU.to(mask_dtype or dtype), *rounded[1:], unit_width=sizes.unit_width
    )
    assert found.dtype == dtype
    expected = Linear(*(tensor.double() for tensor in rounded)).cut(masks_RU, sizes.unit_width)
    assert_close(found, expected, LOGITS[dtype])


def test_nothing_given_is_written_to() -> None:
    """Inputs, masks and weights are as before."""
    linear, masks_RU = Linear.random(SIZES[0], biased=True), MASKS["random"](1, 5)
    before = [tensor.clone() for tensor in (linear.x_RTE, masks_RU, linear.weight_DE, linear.bias_D)]
    reference.masked_linear(linear.x_RTE, masks_RU, linear.weight_DE, linear.bias_D, unit_width=3)
    after = (linear.x_RTE, masks_RU, linear.weight_DE, linear.bias_D)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


MISFITS = {  # shape of the masks and unit width, against 4 rows of width 15
    "too_few_rows": ((3, 5), 3),
    "too_many_rows": ((5, 5), 3),
    "one_row_for_all": ((1, 5), 3),
    "too_few_units": ((4, 4), 3),
    "too_many_units": ((4, 6), 3),
    "entries_as_units": ((4, 15), 3),
    "units_as_entries": ((4, 5), 1),
}


@pytest.mark.parametrize(("shape", "unit_width"), MISFITS.values(), ids=MISFITS)
def test_masks_that_do_not_fit_are_refused(shape: tuple[int, int], unit_width: int) -> None:
    """Nothing is broadcast: the error names both shapes. The right one is taken."""
    x_RTE, weight_DE = numbers(4, 2, 15), numbers(7, 15)
    assert reference.masked_linear(x_RTE, torch.ones(4, 5), weight_DE, unit_width=3).shape == (4, 2, 7)
    with pytest.raises(ValueError, match=rf"masks \({shape[0]}, {shape[1]}\).* 4 rows and width 15"):
        reference.masked_linear(x_RTE, torch.ones(shape), weight_DE, unit_width=unit_width)


@pytest.mark.parametrize("shape", [(3, 13), (4, 12), (4, 14), (1, 13)], ids=str)
def test_channel_masks_that_do_not_fit_are_refused(shape: tuple[int, int]) -> None:
    """The MLP refuses what its down projection would."""
    mlp = MLP.random(SIZES[1], biased=False)
    assert mlp.run(torch.ones(4, 13)).shape == mlp.x_RTD.shape
    with pytest.raises(ValueError, match="do not fit"):
        mlp.run(torch.ones(shape))


# Backends


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_the_torch_backend_is_the_reference(name: str) -> None:
    """Which is what there is unless Triton is asked for."""
    ops = load_backend(name, torch.device("cpu"))
    assert ops.name == "torch"
    assert (ops.masked_linear, ops.masked_mlp) == (reference.masked_linear, reference.masked_mlp)


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("triton", BackendError, "it needs a GPU, or TRITON_INTERPRET=1"),
        ("cutlass", ConfigError, "is unknown"),
        ("", ConfigError, "is unknown"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, error: type[BernpruneError], reason: str
) -> None:
    """In one sentence that names what was asked for and what to use; never another one silently."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match=reason) as caught:
        load_backend(name, torch.device("cpu"))
    assert repr(name) in str(caught.value)
    assert "torch" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kernels_are_not_for_old_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if they are asked for by name."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(BackendError, match=r"'triton' .* compute capability 8\.0 or more, but got 7\.5; use 'torch'"):
        load_backend("triton", torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "gpus", "reason"),
    [
        ("cuda", 0, "this machine has 0 GPUs"),
        ("cuda:0", 0, "this machine has 0 GPUs"),
        ("cuda:2", 2, "this machine has 2 GPUs"),
        ("gpu", 1, "is unknown"),
        ("meta", 1, "is not supported"),
    ],
)
def test_a_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, reason: str) -> None:
    """An absent GPU and a device of another kind are errors, never a silent fallback to the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(BackendError, match=reason) as caught:
        find_device(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("cpu", 0, "cpu"), ("auto", 0, "cpu"), ("auto", 1, "cuda"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_a_device_that_is_there_is_found(monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, expected: str) -> None:
    """``auto`` is the GPU if there is one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert find_device(name) == torch.device(expected)
