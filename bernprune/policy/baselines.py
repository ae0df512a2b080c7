"""What is subtracted from a loss before it may move the policy.

A baseline that does not depend on the mask it is subtracted for leaves the expected gradient alone and only lowers its
variance (Williams, 1992). Each class here turns the losses of a step into advantages; the estimator averages them over
masks. ``tests/test_estimators.py`` checks each against exact enumeration.

Letters: B windows of text, K masks that compete on one, C chunks of it.
"""

from typing import Any, Protocol

import torch

from bernprune.errors import ConfigError
from bernprune.names import BaselineName, check_name


class Baseline(Protocol):
    """Losses of one step to advantages; state is what the next steps need to know.

    A custom class is made with the memory that is asked for, in steps, and the number of masks, as those below
    are, and has its first two attributes itself, not its instances alone.

    ``min_masks``: fewest masks that a step may ask for; of those some may be dropped, but not all.
    """

    needs_reference: bool
    min_masks: int

    def advantages(self, losses_BKC: torch.Tensor, reference_BC: torch.Tensor | None) -> torch.Tensor:
        """Advantages, ``[B, K, C]`` nats per token; ``reference_BC``: losses of the reference mask on the same text."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Average:
    """A running mean for each chunk of a window, with the memory of about ``window`` steps; the first step starts it.

    What the masks of a window's chunks answer for differs: earlier ones for later ones too.
    """

    def __init__(self, window: int, num_masks: int) -> None:
        self.weight, self.num_masks = 1 / window, num_masks
        self.value_C: torch.Tensor | None = None

    def update(self, values_BKC: torch.Tensor) -> torch.Tensor:
        """Add a step; returns the mean with it, ``[C]``."""
        now_C, past_C = values_BKC.mean((0, 1)), self.value_C
        self.value_C = now_C if past_C is None else (1 - self.weight) * past_C + self.weight * now_C
        return self.value_C

    def state_dict(self) -> dict[str, Any]:
        return {"average": None if self.value_C is None else self.value_C.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        average = state["average"]
        self.value_C = None if average is None else torch.tensor(average, dtype=torch.float64)


def less_the_others(losses_BKC: torch.Tensor) -> torch.Tensor:
    """Each loss less the mean of the other masks' on the same text; zero for a mask that has no others."""
    num_masks = losses_BKC.shape[1]
    if num_masks == 1:
        return torch.zeros_like(losses_BKC)
    return (losses_BKC - losses_BKC.mean(1, keepdim=True)) * (num_masks / (num_masks - 1))


class NoBaseline:
    """The plain estimator. Unbiased."""

    needs_reference, min_masks = False, 1

    def __init__(self, window: int, num_masks: int) -> None:
        del window, num_masks

    def advantages(self, losses_BKC: torch.Tensor, reference_BC: torch.Tensor | None) -> torch.Tensor:
        return losses_BKC

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class LeaveOneOut(NoBaseline):
    """Each loss less the mean of the step's others (Kool et al., 2019). Unbiased; blind to the text's difficulty.

    Chunk by chunk that is what leaving one out token by token would be: a mask's advantage in a chunk is linear in the
    losses of its tokens, so the sum of theirs less the others' means is the sum less the mean of the others' sums.
    """

    min_masks = 2

    def advantages(self, losses_BKC: torch.Tensor, reference_BC: torch.Tensor | None) -> torch.Tensor:
        return less_the_others(losses_BKC)


class MovingAverage(_Average):
    """Each loss less a running mean of *earlier* steps. Unbiased. The first step, without a past, leaves one out."""

    needs_reference, min_masks = False, 1

    def advantages(self, losses_BKC: torch.Tensor, reference_BC: torch.Tensor | None) -> torch.Tensor:
        past_C = self.value_C
        self.update(losses_BKC)
        return less_the_others(losses_BKC) if past_C is None else losses_BKC - past_C


class Matched(_Average):
    """Each loss less a reference mask's on the same text, and less a running mean of that gap over earlier steps.

    The reference removes the difficulty of the text, the gap's mean what is left (MaskPro, 2025, arXiv 2506.12876).
    Unbiased, as neither depends on the step's masks: a reference may change from step to step, as long as it follows
    from the past. The first step, without a past, leaves one out.
    """

    needs_reference, min_masks = True, 1

    def advantages(self, losses_BKC: torch.Tensor, reference_BC: torch.Tensor | None) -> torch.Tensor:
        assert reference_BC is not None, "the search asks for it"
        gaps_BKC, past_C = losses_BKC - reference_BC[:, None], self.value_C
        self.update(gaps_BKC)
        return less_the_others(gaps_BKC) if past_C is None else gaps_BKC - past_C


class Published(_Average):
    """The published method as released (Gao et al., 2024): a running mean that already contains the step's losses,
    and a sum divided by K - 1.

    With B groups of K masks a step, its expectation is the true gradient times K/(K-1) (1 - 1/(B K T)) for a window of
    T steps; at step 0, where the running mean is the step's own, T is 1. K is the number asked for: dropped masks
    merely shorten the sum.
    """

    needs_reference, min_masks = False, 2

    def advantages(self, losses_BKC: torch.Tensor, reference_BC: torch.Tensor | None) -> torch.Tensor:
        given = losses_BKC.shape[1]
        return (losses_BKC - self.update(losses_BKC)) * (given / (self.num_masks - 1))


BASELINES: dict[str, type[Any]] = {
    "none": NoBaseline,
    "moving-average": MovingAverage,
    "leave-one-out": LeaveOneOut,
    "matched": Matched,
    "published": Published,
}


def make_baseline(name: BaselineName, *, window: int, num_masks: int) -> Baseline:
    """A fresh baseline with the memory of ``window`` steps.

    Raises:
        ConfigError: unknown name, or more masks a step are needed than given.
    """
    check_name("baseline", name, BaselineName)
    if window < 1:
        raise ConfigError(f"a baseline remembers 1 step or more, but is to remember {window}")
    baseline: Baseline = BASELINES[name](window, num_masks)
    check_masks(name, baseline, num_masks)
    return baseline


def check_masks(name: str, baseline: Baseline, num_masks: int) -> None:
    """Raises ``ConfigError`` if a baseline needs more masks a step than there are, or does not say how many."""
    if not isinstance(baseline.min_masks, int):
        raise ConfigError(f"baseline {name!r} must have an integer min_masks, but has {baseline.min_masks!r:.100}")
    if num_masks < baseline.min_masks:
        raise ConfigError(f"baseline {name!r} needs at least {baseline.min_masks} masks a step, but got {num_masks}")
