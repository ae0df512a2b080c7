"""The comparison of the test suite refuses what it must refuse."""

import math

import pytest
import torch
from tolerances import BUDGET, CHAIN, EXACT, LOGITS, STEP, assert_close

TOLERANCES = {"exact": EXACT, "budget": BUDGET, "step": STEP} | {
    f"{name}-{str(dtype).removeprefix('torch.')}": tolerance
    for name, table in (("logits", LOGITS), ("chain", CHAIN))
    for dtype, tolerance in table.items()
}


def values(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(7, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("tolerance", TOLERANCES.values(), ids=TOLERANCES)
@pytest.mark.parametrize("factor", [1.05, 0.95, -1.0, 0.0])
def test_a_wrong_scale_is_refused(tolerance: float, factor: float) -> None:
    """Five percent on every value is an error at every tolerance."""
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close(factor * values(), values(), tolerance)


@pytest.mark.parametrize("tolerance", TOLERANCES.values(), ids=TOLERANCES)
def test_random_noise_of_five_percent_is_refused(tolerance: float) -> None:
    """Errors that cancel in the mean do not pass."""
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close(values() + 0.05 * values().flip(0), values(), tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_one_value_that_is_not_finite_is_refused(bad: float) -> None:
    """On either side, even where both agree."""
    spoilt = values()
    spoilt[3, 4] = bad
    for actual, expected in ((spoilt, values()), (values(), spoilt), (spoilt, spoilt)):
        with pytest.raises(AssertionError, match="finite"):
            assert_close(actual, expected, max(TOLERANCES.values()))


@pytest.mark.parametrize("shape", [(13, 7), (91,), (1, 7, 13), (7, 1)], ids=str)
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    """Nothing is broadcast."""
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(shape), torch.ones(7, 13), 1.0)


def test_where_zero_is_expected_only_zero_passes() -> None:
    """There is no absolute tolerance."""
    assert_close(torch.zeros(3), torch.zeros(3), EXACT)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close(torch.tensor([0.0, 1e-30, 0.0]), torch.zeros(3), 1.0)


@pytest.mark.parametrize("dtype", LOGITS, ids=str)
def test_rounding_to_the_dtype_passes(dtype: torch.dtype) -> None:
    """Each tolerance leaves room for the rounding it is named after, and is tight enough to notice a coarser dtype."""
    assert_close(values(dtype), values(), LOGITS[dtype])
    coarser = torch.bfloat16 if dtype == torch.float32 else torch.float32
    if dtype in (torch.float32, torch.float64):
        with pytest.raises(AssertionError, match="relative RMS error"):
            assert_close(values(coarser), values(), LOGITS[dtype])


def test_numbers_and_lists_are_compared_too() -> None:
    """Plain Python numbers need no wrapping."""
    assert_close(0.1 + 0.2, 0.3, EXACT)
    assert_close([1, 2], torch.tensor([1.0, 2.0]), EXACT)
    for actual in (0.31, 0.3 + 1e-10):  # a float32 would not tell the second from 0.3
        with pytest.raises(AssertionError, match="relative RMS error"):
            assert_close(actual, 0.3, EXACT)
