"""The one table of tolerances of the whole test suite, on the relative RMS error, and the comparison that uses it."""

from collections.abc import Sequence

import torch

EXACT = 1e-12  # float64 mathematics, same formula in another order
BUDGET = 1e-9  # what a projection may miss its limit by
GUARDED = 1e-4  # a regression with a guard of 1e-6 of its information against singular features
SAMPLED = 3e-2  # a statistic of 300,000 draws against its expectation
STEP = 1e-9  # the move of a small step, over its rate

LOGITS: dict[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
CHAIN: dict[torch.dtype, float] = {  # of a few products in turn, each rounded, with little to average over
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}

Numbers = torch.Tensor | Sequence[float] | float


def assert_close(actual: Numbers, expected: Numbers, tolerance: float) -> None:
    """Same shape, nothing but finite numbers, and an RMS error of at most ``tolerance`` times the RMS of ``expected``.

    Where all that is expected is zero, nothing but zero passes.
    """
    actual, expected = (_double(values) for values in (actual, expected))
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert expected.isfinite().all(), "the expected values are not all finite"
    assert actual.isfinite().all(), f"{int((~actual.isfinite()).sum())} of {actual.numel()} values are not finite"
    error, scale = (actual - expected).norm().item(), expected.norm().item()
    assert error <= tolerance * scale, f"relative RMS error {error / scale if scale else error:.3g} > {tolerance:g}"


def _double(values: Numbers) -> torch.Tensor:
    """Float64; a Python number must not go through float32 on its way."""
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.float64)
    return tensor.detach().double().cpu()
