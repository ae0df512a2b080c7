"""The gradient estimators against exact enumeration: 4 units, 16 masks, every tuple of K masks a step may draw.

Letters: T tuples, K masks, U units.

A step's masks are those of a whole batch here: one group, one chunk.
"""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from spaces import FLAT, all_masks, normal_numbers, of_kind, random_numbers
from tolerances import EXACT, assert_close

from bernprune.config import make_config
from bernprune.errors import ConfigError
from bernprune.names import BaselineName, Scaling
from bernprune.policy.baselines import BASELINES, Baseline, make_baseline
from bernprune.policy.estimators import kl_gradient, reinforce
from bernprune.policy.search import MaskSearch, rewards_to_go
from bernprune.run.searches import make_search
from bernprune.run.workload import make_budget

PROBS_U = torch.tensor([0.13, 0.5, 0.72, 0.96], dtype=torch.float64)
MASKS = all_masks(4)
LOSSES = 2 + torch.randn(16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # of each mask, arbitrary
PAST, REFERENCE = 2.7, 1.9
SCALINGS: dict[Scaling, Callable[[torch.Tensor], torch.Tensor]] = {
    "raw": torch.ones_like,
    "sqrt-fisher": lambda probs: (probs * (1 - probs)).sqrt(),
    "natural": lambda probs: probs * (1 - probs),
}


def mask_probability(probs_U: torch.Tensor) -> torch.Tensor:
    """Of each of the 16 masks."""
    return torch.where(MASKS, probs_U, 1 - probs_U).prod(-1)


def exact_gradient() -> torch.Tensor:
    """Of the expected loss in the probabilities, by autograd through the sum over all masks."""
    probs_U = PROBS_U.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((mask_probability(probs_U) * LOSSES).sum(), probs_U)
    return gradient


@functools.cache
def tuples(num_masks: int) -> torch.Tensor:
    """Every tuple of masks a step may draw, as indices ``[T, K]``."""
    return torch.cartesian_prod(*[torch.arange(16)] * num_masks).reshape(-1, num_masks)


def expectation(advantages: Callable[[torch.Tensor], torch.Tensor], num_masks: int, scaling: Scaling) -> torch.Tensor:
    """Of the real estimator under ``advantages(losses_K)``, over all tuples weighted by their probability."""
    drawn_TK = tuples(num_masks)
    advantages_TK = torch.stack([advantages(losses_K) for losses_K in LOSSES[drawn_TK]])
    estimate = functools.partial(reinforce, PROBS_U, scaling=scaling)
    gradients_TU = torch.vmap(estimate)(MASKS[drawn_TK], advantages_TK)
    weights_T = mask_probability(PROBS_U)[drawn_TK].prod(-1)
    assert_close(weights_T.sum(), 1.0, EXACT)
    return weights_T @ gradients_TU


def batch_advantages(baseline: Baseline, losses_K: torch.Tensor, reference: float | None) -> torch.Tensor:
    """``[K]``, of the masks of a whole batch."""
    reference_BC = None if reference is None else torch.full((1, 1), reference, dtype=torch.float64)
    return baseline.advantages(losses_K[None, :, None], reference_BC)[0, :, 0]


def advantages_of(
    name: BaselineName, num_masks: int, past: float | None, window: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a shipped baseline, set back to the same past before each call, makes of a step's losses."""
    baseline = make_baseline(name, window=window, num_masks=num_masks)
    remembers = "average" in baseline.state_dict()

    def advantages(losses_K: torch.Tensor) -> torch.Tensor:
        if remembers:
            baseline.load_state_dict({"average": None if past is None else [past]})
        return batch_advantages(baseline, losses_K, REFERENCE if baseline.needs_reference else None)

    return advantages


def documented_factor(name: BaselineName, num_masks: int, past: float | None, window: int) -> float:
    """1, but for the published baseline after its first step."""
    if name != "published" or past is None:
        return 1.0
    return num_masks / (num_masks - 1) * (1 - 1 / (num_masks * window))


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("past", [None, PAST], ids=["first_step", "later_step"])
@pytest.mark.parametrize("num_masks", [2, 3])
@pytest.mark.parametrize("name", BASELINES)
def test_expectation_is_the_gradient(name: BaselineName, num_masks: int, past: float | None, scaling: Scaling) -> None:
    """Times the factor that scaling and baseline document, and nothing else."""
    window = 5
    found = expectation(advantages_of(name, num_masks, past, window), num_masks, scaling)
    factor = documented_factor(name, num_masks, past, window)
    assert_close(found, factor * SCALINGS[scaling](PROBS_U) * exact_gradient(), EXACT)


@pytest.mark.parametrize("window", [1, 2, 7])
def test_the_published_factor_holds_for_every_window(window: int) -> None:
    """K/(K-1) (1 - 1/(K T)), which is 1 for a memory of one step."""
    found = expectation(advantages_of("published", 2, PAST, window), 2, "raw")
    assert_close(found, 2 * (1 - 1 / (2 * window)) * exact_gradient(), EXACT)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_one_mask_without_baseline(scaling: Scaling) -> None:
    """The plain estimator needs no second mask."""
    found = expectation(advantages_of("none", 1, None, 1), 1, scaling)
    assert_close(found, SCALINGS[scaling](PROBS_U) * exact_gradient(), EXACT)


@pytest.mark.parametrize("num_masks", [2, 3])
def test_bias_is_detected(num_masks: int) -> None:
    """Negative control: the step's own mean as baseline, divided by K, loses a K-th of the gradient."""
    found = expectation(lambda losses_K: losses_K - losses_K.mean(), num_masks, "raw")
    assert_close(found, (num_masks - 1) / num_masks * exact_gradient(), EXACT)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_close(found, exact_gradient(), EXACT)


def test_the_loss_table_has_interactions() -> None:
    """Negative control: an additive table, on which some wrong estimators are right, it is not."""
    design = torch.cat([MASKS.double(), torch.ones(16, 1, dtype=torch.float64)], dim=1)
    fitted = design @ torch.linalg.lstsq(design, LOSSES[:, None]).solution
    assert (fitted[:, 0] - LOSSES).abs().max() > 0.5


# Variance


def test_leave_one_out_is_blind_to_a_constant() -> None:
    """The same advantages, bit for bit, however hard the text; the plain estimator is not blind."""
    losses_K = torch.tensor([2.5, 1.75, 3.0, 2.25], dtype=torch.float64)  # with the shift, exact in binary
    for name, blind in (("leave-one-out", True), ("none", False)):
        advantages = advantages_of(name, 4, None, 1)
        assert torch.equal(advantages(losses_K), advantages(losses_K + 64.0)) is blind


@pytest.mark.parametrize("past", [None, 0.25], ids=["first_step", "later_step"])
def test_matched_removes_what_a_batch_shares(past: float | None) -> None:
    """Advantages and memory are the same, bit for bit, whatever the text adds to all losses and the reference."""
    losses_K = torch.tensor([2.5, 1.75, 3.0, 2.25], dtype=torch.float64)
    results = []
    for difficulty in (0.0, 64.0, -0.5):
        baseline = make_baseline("matched", window=4, num_masks=4)
        baseline.load_state_dict({"average": None if past is None else [past]})
        advantages_K = batch_advantages(baseline, losses_K + difficulty, 2.0 + difficulty)
        results.append((advantages_K.tolist(), baseline.state_dict()))
    assert results[0] == results[1] == results[2]


def test_averages_follow_their_window() -> None:
    """The first value starts the memory, each later one weighs 1/T; matched remembers the gap."""
    for name, reference, offset in (("moving-average", None, 0.0), ("matched", 2.0, 2.0), ("published", None, 0.0)):
        baseline, expected = make_baseline(name, window=5, num_masks=2), None
        for mean in (3.0, 1.0, 2.5):
            batch_advantages(baseline, torch.tensor([mean - 1, mean + 1], dtype=torch.float64), reference)
            gap = mean - offset
            expected = gap if expected is None else 0.8 * expected + 0.2 * gap
            assert_close(baseline.state_dict()["average"], [expected], EXACT)


@pytest.mark.parametrize("name", ["moving-average", "matched", "published"])
def test_averages_are_of_each_chunk(name: BaselineName) -> None:
    """What the masks of one chunk always answer for more than those of another does not move the policy."""
    results = []
    for offsets_C in (torch.zeros(3), torch.tensor([7.0, -2.0, 0.5])):
        baseline, found = make_baseline(name, window=5, num_masks=4), []
        for step in range(3):
            losses_BKC = normal_numbers(2, 4, 3, seed=step) + offsets_C
            reference_BC = normal_numbers(2, 3, seed=step + 10) if baseline.needs_reference else None
            found.append(baseline.advantages(losses_BKC, reference_BC))
        results.append(torch.stack(found))
    assert_close(results[1], results[0], EXACT)


@pytest.mark.parametrize("name", BASELINES)
def test_too_few_masks_are_refused(name: BaselineName) -> None:
    """Every baseline takes the fewest masks it states and refuses fewer, naming itself."""
    fewest = BASELINES[name].min_masks
    losses_K = torch.arange(fewest, dtype=torch.float64)
    assert batch_advantages(make_baseline(name, window=3, num_masks=fewest), losses_K, 1.0).isfinite().all()
    if fewest > 1:
        with pytest.raises(ConfigError, match=f"{name}.*{fewest}"):
            make_baseline(name, window=3, num_masks=fewest - 1)


def test_an_unknown_baseline_is_refused() -> None:
    """With the known ones in the message."""
    with pytest.raises(ConfigError, match="leave-one-out"):
        make_baseline("average", window=3, num_masks=2)  # type: ignore[arg-type]


# Settled units


@pytest.mark.parametrize("scaling", ["raw", "natural"])
def test_epsilon_is_for_the_root_alone(scaling: Scaling) -> None:
    """What has none is not biased by it."""
    masks_KU, advantages_K = all_masks(4), normal_numbers(16, seed=1)
    exact = reinforce(PROBS_U, masks_KU, advantages_K, scaling=scaling)
    assert torch.equal(reinforce(PROBS_U, masks_KU, advantages_K, scaling=scaling, epsilon=0.01), exact)


@pytest.mark.parametrize("epsilon", [0.0, 1e-7])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_settled_units_have_no_gradient(scaling: Scaling, epsilon: float) -> None:
    """Exactly zero at s = 0 and s = 1, and the other units do not notice."""
    probs_U = torch.tensor([0.0, 0.3, 1.0, 0.8], dtype=torch.float64)
    masks_KU = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    advantages_K = torch.tensor([1.5, -0.25, 2.0], dtype=torch.float64)
    found = reinforce(probs_U, masks_KU, advantages_K, scaling=scaling, epsilon=epsilon)
    assert found[0] == 0
    assert found[2] == 0
    others = [1, 3]
    alone = reinforce(probs_U[others], masks_KU[:, others], advantages_K, scaling=scaling, epsilon=epsilon)
    assert_close(found[others], alone, EXACT)
    assert (alone != 0).all()


# The pull


@pytest.mark.parametrize("epsilon", [0.0, 1e-7])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_pull_is_the_gradient_of_the_divergence(scaling: Scaling, epsilon: float) -> None:
    """By autograd through KL(policy || start), summed over all 16 masks; scaled as the rest is."""
    start_U, probs_U = torch.tensor([0.3, 0.5, 0.9, 0.95], dtype=torch.float64), PROBS_U.clone().requires_grad_()
    chances, start_chances = mask_probability(probs_U), mask_probability(start_U)
    (expected,) = torch.autograd.grad((chances * (chances / start_chances).log()).sum(), probs_U)
    found = kl_gradient(PROBS_U, start_U, scaling=scaling, epsilon=epsilon)
    assert_close(found, SCALINGS[scaling](PROBS_U) * expected, EXACT if epsilon == 0 else 1e-5)
    assert kl_gradient(start_U, start_U, scaling=scaling, epsilon=epsilon).tolist() == [0.0] * 4


# The published step


def literal_projection(values: np.ndarray, count: float) -> np.ndarray:
    """s = clip(z - v, 0, 1), v = max(0, v1), v1 solves sum clip(z - v1, 0, 1) = count, by bisection."""
    low, high = values.min() - 1, values.max()
    for _ in range(100):
        v1 = (low + high) / 2
        low, high = (v1, high) if np.clip(values - v1, 0, 1).sum() > count else (low, v1)
    return np.clip(values - max(0.0, v1), 0, 1)


def literal_step(
    s: np.ndarray, delta: float | None, m: np.ndarray, losses: np.ndarray, lr: float
) -> tuple[np.ndarray, float]:
    """methods.md 1.2 item 4 with K = 2 and T = 5: the step before projection, and the running mean."""
    mean = losses.mean()
    delta = mean if delta is None else (1 - 1 / 5) * delta + (1 / 5) * mean
    g = np.zeros_like(s)
    for k in range(2):
        g += (losses[k] - delta) * (m[k] - s) / np.sqrt((s + 1e-7) * (1 - s + 1e-7)) / (2 - 1)
    return s - lr * g, delta


def published_search(start_U: torch.Tensor, sparsity: float) -> MaskSearch:
    """As a run with the preset makes it."""
    config = make_config({"preset": "paper", "budget": {"sparsity": sparsity}, "seed": 3})
    return make_search(config, make_budget(config, FLAT), start_U, start_U[:, None])


@pytest.mark.parametrize("learning_rate", [0.002, 0.4], ids=["small_steps", "large_steps"])
def test_the_published_method_step_by_step(learning_rate: float) -> None:
    """The preset follows a transcription of the description over ten steps, settled units included."""
    sparsity, start_U, values_U = 0.3, 1.4 * random_numbers(FLAT.size, 0).sqrt(), random_numbers(FLAT.size, 1)
    num_settled = 0
    budgets = [(of_kind(FLAT, kind).numpy(), 0.7 * int(of_kind(FLAT, kind).sum())) for kind in FLAT.kinds]
    search, s, delta = published_search(start_U, sparsity), start_U.numpy().copy(), None
    for step in range(11):
        for members, count in budgets:
            s[members] = literal_projection(s[members], count)
        assert_close(search.probs_U, torch.from_numpy(s), EXACT)
        num_settled += int(((s == 0) | (s == 1)).sum())
        masks_BKCU = search.ask(step)
        masks_KU = masks_BKCU[0, :, 0]
        losses_K = (masks_KU.double() @ values_U).cos() + 0.1 * step
        s, delta = literal_step(s, delta, masks_KU.numpy(), losses_K.numpy(), learning_rate)
        search.tell(masks_BKCU, losses_K[None, :, None], learning_rate=learning_rate)
    assert num_settled > 0


def test_a_dropped_mask_shortens_the_published_sum() -> None:
    """Of three masks asked for, two that are left are still divided by 3 - 1, and one does not divide by zero."""
    for num_left in (1, 2, 3):
        losses_K = torch.tensor([2.0, 3.5, 1.0], dtype=torch.float64)[:num_left]
        baseline = make_baseline("published", window=5, num_masks=3)
        baseline.load_state_dict({"average": [4.0]})
        average = 0.8 * 4.0 + 0.2 * losses_K.mean()
        mean = batch_advantages(baseline, losses_K, None).mean()
        assert_close(mean, (losses_K - average).sum() / 2, EXACT)


# Chunks


@pytest.mark.parametrize("discount", [0.0, 0.4, 1.0])
def test_returns_are_discounted_sums(discount: float) -> None:
    """A chunk's own loss and those behind it, as a double loop has them."""
    losses_BKC = random_numbers(3 * 2 * 5, 0).view(3, 2, 5)
    expected = torch.zeros_like(losses_BKC)
    for chunk in range(5):
        for later in range(chunk, 5):
            expected[..., chunk] += discount ** (later - chunk) * losses_BKC[..., later]
    before, found = losses_BKC.clone(), rewards_to_go(losses_BKC, discount)
    assert torch.equal(losses_BKC, before)  # the argument is not written on
    assert_close(found, expected, EXACT)
    if discount == 0:
        assert torch.equal(found, losses_BKC)
    if discount == 1:
        assert_close(found, losses_BKC.flip(-1).cumsum(-1).flip(-1), EXACT)
