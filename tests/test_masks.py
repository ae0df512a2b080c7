"""The masks of a step: functions of seed, step, row and unit, whatever is asked for; and how they hang together.

Letters: B windows of text, K masks a window, C chunks of a window, U units, N masks.
"""

import itertools
import math
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from spaces import BLOCKS, FLAT, NESTED, make_space, random_numbers
from tiny_models import random_tokens, tiny_model
from tolerances import EXACT, assert_close

from bernprune.costs import Costs
from bernprune.errors import ConfigError
from bernprune.models.masking import LiveMasks
from bernprune.models.view import describe
from bernprune.names import Sampling
from bernprune.objective import masked_objective
from bernprune.policy import masks as module
from bernprune.policy.baselines import make_baseline
from bernprune.policy.budget import Budget
from bernprune.policy.contrast import contrast
from bernprune.policy.counters import WORDS, mask_words
from bernprune.policy.masks import ORDERS, Design, Masks, orders, with_reference
from bernprune.policy.posterior import PosteriorSearch
from bernprune.policy.reinforce import ReinforceSearch
from bernprune.policy.search import MaskSearch
from bernprune.run import loop
from bernprune.units import UnitSpace

SAMPLINGS: tuple[Sampling, ...] = ("independent", "antithetic", "exact")
# Into [3, 5, 2].
INDICES: dict[str, Any] = {
    "window": 1,
    "last": -1,
    "windows": slice(1, 3),
    "masks": (slice(None), slice(1, 4)),
    "one_mask": (2, 3, 1),
    "one_of_each": (slice(None), 2, 0),
    "rows": (torch.tensor([2, 0, 2]), torch.tensor([4, 4, 1])),
    "chosen": torch.tensor([True, False, True]),
    "chosen_masks": (slice(None), torch.tensor([True, False, False, True, True])),
    "nothing": slice(0, 0),
}

every_sampling = pytest.mark.parametrize("sampling", SAMPLINGS)


def make_masks(
    probs_U: torch.Tensor,
    design: Design,
    *,
    seed: int = 3,
    step: int = 7,
    space: UnitSpace = FLAT,
    sparsity: float = 0.4,
) -> Masks:
    return Masks(design.rows_BKC, probs_U, design, Budget(space, sparsity), seed, step)


def channels(probs_U: torch.Tensor, design: Design, **given: Any) -> Masks:
    """Of so many units of equal cost."""
    return make_masks(probs_U, design, space=make_space(["channel"], [(1, len(probs_U))]), **given)


def both_searches(space: UnitSpace, design: Design, start_U: torch.Tensor) -> list[MaskSearch]:
    """One of each method."""
    budget, baseline = Budget(space, 0.4), make_baseline("leave-one-out", window=5, num_masks=design.masks)
    return [
        PosteriorSearch(budget, start_U, start_U, seed=3, design=design, round_steps=1),
        ReinforceSearch(budget, start_U, baseline=baseline, seed=3, design=design),
    ]


# What is asked for


@every_sampling
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("block", [1, 3, 2**12])
def test_masks_do_not_depend_on_what_is_asked_for(
    index: Any, sampling: Sampling, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any part is that of the whole, however many random numbers are made at once; so is any part of rows in a row."""
    size = 2 * ORDERS + 11
    masks = channels(random_numbers(size, 0), Design(3, 5, 2, sampling))
    whole = masks[:]
    assert masks.shape == whole.shape == (3, 5, 2, size) and len(masks) == 3 and whole.dtype == torch.bool
    monkeypatch.setattr(module, "_BLOCK", ORDERS * block)
    assert torch.equal(masks[index], whole[index])
    rows = masks.to(torch.device("cpu")).flatten(0, 2)
    assert rows.shape == (30, size)
    assert torch.equal(rows[7:23], whole.flatten(0, 2)[7:23])
    assert torch.equal(rows[torch.tensor([29, 3, 3])], whole.flatten(0, 2)[[29, 3, 3]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_sampling
def test_masks_do_not_depend_on_the_device(sampling: Sampling) -> None:
    """To the bit."""
    masks = channels(random_numbers(2 * ORDERS + 11, 0), Design(3, 5, 2, sampling))
    found = masks.to(torch.device("cuda"))[:]
    assert found.device.type == "cuda" and torch.equal(found.cpu(), masks[:])


def test_masks_end_like_tensors() -> None:
    """A loop over windows stops after the last."""
    masks = make_masks(random_numbers(FLAT.size, 0), Design(3, 2, 2))
    assert torch.equal(torch.stack(list(masks)), masks[:])
    with pytest.raises(IndexError):
        masks[3]


@every_sampling
def test_masks_are_a_function_of_seed_and_step(sampling: Sampling) -> None:
    """In any order, whatever the global generator does; other steps and seeds give other masks."""
    probs_U, keys = random_numbers(FLAT.size, 0), [(seed, step) for seed in (0, 1, 2**40) for step in (0, 1, 2**33)]
    design = Design(2, 3, 1, sampling)
    first = {key: make_masks(probs_U, design, seed=key[0], step=key[1])[:] for key in keys}
    before = torch.random.get_rng_state()
    for seed, step in reversed(keys):
        assert torch.equal(make_masks(probs_U, design, seed=seed, step=step)[:], first[seed, step])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len({str(masks.tolist()) for masks in first.values()}) == len(keys)


def test_later_steps_do_not_change_masks() -> None:
    """They were proposed by the policy of their step."""
    start_U = torch.full((FLAT.size,), 0.6, dtype=torch.float64)
    for search in both_searches(FLAT, Design(4, 3, 2), start_U):
        masks_BKCU = search.ask(0)
        before = masks_BKCU[:]
        for step in range(3):
            search.tell(before, random_numbers(24, step).view(4, 3, 2), learning_rate=0.1)
        assert torch.equal(masks_BKCU[:], before)
        assert not torch.equal(search.probs_U, start_U) and not torch.equal(search.ask(0)[:], before)


# Couplings


def test_a_unit_is_kept_below_its_threshold() -> None:
    """round(s 2^32), as documented for kernels, for masks numbered window by window, mask by mask, chunk by chunk."""
    probs_U = torch.cat([random_numbers(9, 0), torch.tensor([0.0, 1.0, 2.0**-33, 1 - 2.0**-34]).double()])
    masks, thresholds = channels(probs_U, Design(2, 3, 2), seed=5, step=11)[:], (probs_U * WORDS).round()
    assert thresholds[-4:].tolist() == [0, WORDS, 0, WORDS]
    assert torch.equal(masks.flatten(0, 2), mask_words(5, 11, torch.arange(12), range(13)) < thresholds)


def test_thresholds_are_rounded_to_the_nearest_word() -> None:
    """Half of a step of 2^-32 decides whether the word itself is below."""
    words_U = mask_words(5, 11, torch.arange(1), range(40))[0].double()
    for part, kept in ((0.4, False), (0.6, True)):
        masks = channels((words_U + part) / WORDS, Design(1, 1), seed=5, step=11)
        assert (masks[0, 0, 0] == kept).all()


@pytest.mark.parametrize("num_masks", [2, 3, 4, 8])
def test_antithetic_masks_share_their_words(num_masks: int) -> None:
    """One row for each window and chunk, raised by as many K-th parts of 2^32 as the unit's order says."""
    size, order_OK = 2 * ORDERS + 5, orders(num_masks)
    probs_U = random_numbers(size, 1)
    masks = channels(probs_U, Design(3, num_masks, 2, "antithetic"), seed=5, step=11)[:]
    words_BCU = mask_words(5, 11, torch.arange(6), range(size)).view(3, 2, size)
    for k in range(num_masks):
        shifts_U = torch.tensor([order_OK[unit % ORDERS, k] * (WORDS // num_masks) for unit in range(size)])
        assert torch.equal(masks[:, k], (words_BCU + shifts_U) % WORDS < (probs_U * WORDS).round())


@pytest.mark.parametrize("num_masks", [2, 3, 4, 8, 16])
def test_no_two_masks_are_neighbours_everywhere(num_masks: int) -> None:
    """Orders are permutations, and over the units all pairs of masks are equally far apart, as of random ones."""
    order_OK = orders(num_masks)
    assert (order_OK.sort(1).values == torch.arange(num_masks)).all()
    distances = (order_OK[:, :, None] - order_OK[:, None]).abs()
    circular = torch.minimum(distances, num_masks - distances).double()
    means, spread = circular.mean(0), circular.var().sqrt() / ORDERS**0.5
    expected = num_masks**2 // 4 / (num_masks - 1)
    assert ((means - expected).abs() <= 5 * spread)[~torch.eye(num_masks, dtype=torch.bool)].all()


@pytest.mark.parametrize("num_masks", [2, 3, 5, 8])
def test_antithetic_masks_keep_what_is_expected(num_masks: int) -> None:
    """Of K masks on the same text, K s up to one keep a unit, in every window; sure units are sure."""
    probs_U = torch.cat([random_numbers(11, 2), torch.tensor([0.0, 0.5, 1.0]).double()])
    kept = channels(probs_U, Design(40, num_masks, 2, "antithetic"))[:].sum(1)
    assert ((kept - num_masks * probs_U).abs() < 1).all()
    assert (kept[..., -3] == 0).all() and (kept[..., -1] == num_masks).all()


@pytest.mark.parametrize("sampling", ["independent", "antithetic"])
def test_the_units_of_a_mask_are_independent(sampling: Sampling) -> None:
    """Means and covariances of any one of the masks, within five standard errors; certain units are certain."""
    probs_U = torch.tensor([0.0, 0.02, 0.3, 0.5, 0.77, 1.0], dtype=torch.float64)
    masks = channels(probs_U, Design(10_000, 2, 2, sampling))[:].double()
    variance_U, num_masks = probs_U * (1 - probs_U), 20_000
    for k in range(2):
        masks_NU = masks[:, k].flatten(0, 1)
        assert ((masks_NU.mean(0) - probs_U).abs() <= 5 * (variance_U / num_masks).sqrt()).all()
        covariance = (masks_NU - probs_U).T @ (masks_NU - probs_U) / num_masks
        bound = 5 * (variance_U[:, None] * variance_U / num_masks).sqrt()
        assert (covariance.abs() <= bound)[~torch.eye(6, dtype=torch.bool)].all()


def test_masks_of_a_step_and_of_successive_steps_are_independent() -> None:
    """Row by row, their agreement is that of independent draws, within five standard errors."""
    probs_U, size = torch.full((5_000,), 0.5, dtype=torch.float64), 5_000
    masks = [mask for step in range(2) for mask in channels(probs_U, Design(2, 1, 2), step=step).flatten(0, 2)]
    masks += [*channels(probs_U, Design(1, 1), seed=4).flatten(0, 2)]
    masks += [*channels(probs_U, Design(1, 1, 2, "antithetic"), seed=5).flatten(0, 2)]
    for i in range(len(masks)):
        for j in range(i):
            agreement = (masks[i] == masks[j]).double().mean().item()
            assert abs(agreement - 0.5) <= 5 * 0.5 / math.sqrt(size)


def shared(probability: Fraction, num_masks: int) -> Fraction:
    """How likely it is that of two different masks, chosen at random, one keeps a unit and the other does not."""
    shifts = [Fraction(k, num_masks) for k in range(num_masks)]
    breaks = sorted({(end - shift) % 1 for shift in shifts for end in (Fraction(0), probability)} | {Fraction(1)})
    total = Fraction(0)
    for low, high in itertools.pairwise(breaks):
        kept = sum((low + shift) % 1 < probability for shift in shifts)
        total += (high - low) * kept * (num_masks - kept)
    return total / (num_masks * (num_masks - 1))


@pytest.mark.parametrize("num_masks", [2, 3, 4, 7, 8])
def test_contrast_is_how_often_two_masks_differ(num_masks: int) -> None:
    """Over the uniform number that they share, in exact fractions; of independent masks it is s (1 - s)."""
    probs = [Fraction(k, 60) for k in range(61)]
    probs_U = torch.tensor([float(s) for s in probs], dtype=torch.float64)
    expected = torch.tensor([float(shared(s, num_masks)) for s in probs], dtype=torch.float64)
    assert_close(contrast(probs_U, Design(1, num_masks, 1, "antithetic")), expected, EXACT)
    assert_close(contrast(probs_U, Design(1, num_masks)), probs_U * (1 - probs_U), EXACT)
    assert contrast(probs_U, Design(1, num_masks, 1, "antithetic"))[[0, -1]].tolist() == [0.0, 0.0]


# The budget met by every mask


def literally_kept(masks: Masks, budget: Budget) -> torch.Tensor:
    """Of independent or exact masks, those of the first window, by loops: in falling order until one does not fit."""
    (groups, num_masks, chunks), probs = masks.rows.shape, masks.probs_U.tolist()
    assert groups == chunks == 1
    kept = torch.zeros(num_masks, len(probs), dtype=torch.bool)
    for row, words in enumerate(
        mask_words(masks.seed, masks.step, torch.arange(num_masks), range(len(probs))).tolist()
    ):
        uniform = [(word + 0.5) / WORDS for word in words]
        keys = [math.log(s / (1 - s)) - math.log(u / (1 - u)) for s, u in zip(probs, uniform, strict=True)]
        for pool in budget.pools:
            left = pool.limit * (1 + 1e-12)
            for unit in sorted(pool.members_U.nonzero()[:, 0].tolist(), key=lambda unit: -keys[unit]):
                left -= budget.costs_U[unit].item()
                if left < 0:
                    break
                kept[row, unit] = True
    return kept


@pytest.mark.parametrize("pools", ["joint", "separate"])
@pytest.mark.parametrize("sparsity", [0.2, 0.55])
def test_exact_masks_meet_the_budget(sparsity: float, pools: Any) -> None:
    """Each keeps the units of the highest keys as long as they fit, in every pool of its own."""
    budget, probs_U = Budget(FLAT, sparsity, pools=pools), 0.02 + 0.96 * random_numbers(FLAT.size, 0)
    design = Design(1, 50, 1, "exact")
    masks = Masks(design.rows_BKC, probs_U, design, budget, 3, 7)
    kept = masks[0, :, 0]
    assert torch.equal(kept, literally_kept(masks, budget))
    dearest = budget.costs_U.max()
    for pool in budget.pools:
        costs_K = kept[:, pool.members_U].double() @ budget.costs_U[pool.members_U]
        assert ((costs_K <= pool.limit) & (costs_K > pool.limit - dearest)).all()


def test_an_exact_mask_is_an_independent_one_filled_up_or_cut() -> None:
    """The key is above zero where an independent mask keeps a unit, so that one of the two contains the other."""
    probs_U = Budget(FLAT, 0.4).project(random_numbers(FLAT.size, 0), floor=0.05, ceiling=0.95)
    exact, free = (make_masks(probs_U, Design(1, 60, 1, name))[0, :, 0] for name in ("exact", "independent"))
    grown, cut = (free <= exact).all(1), (exact <= free).all(1)
    assert (grown | cut).all() and grown.any() and cut.any() and (grown != cut).any()


def test_exact_masks_keep_what_is_settled() -> None:
    """Units of probability 1 are in every mask, and those of 0 in none, even where there is room for them."""
    probs_U = torch.tensor([0.0, 1.0, 0.5, 0.4, 1.0, 0.0, 0.6], dtype=torch.float64)
    masks = channels(probs_U, Design(1, 200, 1, "exact"), sparsity=0.3)[:]  # room for four of seven, and a half
    kept = masks[0, :, 0]
    assert kept[:, [1, 4]].all() and not kept[:, [0, 5]].any()
    assert (kept.sum(1) == 4).all()
    full = channels(probs_U, Design(1, 20, 1, "exact"), sparsity=0.01)[0, :, 0]
    assert (full == (probs_U > 0)).all()


def inclusion(probs_U: torch.Tensor, num_kept: int) -> torch.Tensor:
    """How likely it is that a unit's key is among the highest, ``[U]``, integrated over its uniform number."""
    keys_U, uniform_G = probs_U.logit(), (torch.arange(10_001, dtype=torch.float64) + 0.5) / 10_001
    found = []
    for unit in range(len(probs_U)):
        above_GK = torch.zeros(len(uniform_G), len(probs_U) + 1).double()  # chances of so many keys above
        above_GK[:, 0] = 1.0
        for other in range(len(probs_U)):
            if other != unit:
                higher_G1 = torch.sigmoid(keys_U[other] - keys_U[unit] + uniform_G.logit())[:, None]
                above_GK = above_GK * (1 - higher_G1) + above_GK.roll(1, 1) * higher_G1
        found.append(above_GK[:, :num_kept].sum(1).mean())
    return torch.stack(found)


@pytest.mark.parametrize(("size", "bias"), [(8, 0.018), (16, 0.0085), (2, 0.0)])
def test_the_bias_of_exact_masks_is_the_documented_one(size: int, bias: float) -> None:
    """Half of the units at 0.05 and half at 0.95, half of all to keep; and in the long run it is what is drawn."""
    probs_U = torch.tensor([0.05, 0.95] * (size // 2), dtype=torch.float64)
    expected = inclusion(probs_U, size // 2)
    if size > 2:
        assert (expected - probs_U).abs().mean().item() == pytest.approx(bias, rel=0.02)
        assert ((expected - 0.5).abs() > (probs_U - 0.5).abs()).all()  # the sure become surer
    kept = channels(probs_U, Design(1, 60_000, 1, "exact"), sparsity=0.5)[0, :, 0].double()
    assert ((kept.mean(0) - expected).abs() <= 5 * (expected * (1 - expected) / 60_000).sqrt()).all()
    assert (kept.sum(1) == size // 2).all()


def test_exact_masks_of_nested_units_are_refused() -> None:
    """When the search is made; blocks side by side are taken."""
    for search in both_searches(BLOCKS, Design(2, 3, 1, "exact"), torch.full((BLOCKS.size,), 0.6)):
        assert search.ask(0)[:].shape == (2, 3, 1, BLOCKS.size)
    with pytest.raises(ConfigError, match="'exact' needs units that do not nest"):
        both_searches(NESTED, Design(2, 3, 1, "exact"), torch.full((NESTED.size,), 0.6))


# What goes through them

LAYOUTS = {"batch": Design(1, 9), "sequences": Design(4, 3), "chunks": Design(4, 3, 2)}


@every_sampling
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_masks_of_a_step_never_exist_together(
    layout: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective makes those of a forward pass, a search those of a window or of a block; the result is the same."""
    view, tokens_BT, asked = describe(tiny_model("llama")), random_tokens(4, 8), []
    original, design = Masks.__getitem__, LAYOUTS[layout]
    design = Design(design.groups, design.masks, design.chunks, sampling)
    size, all_rows = view.space.size, design.groups * design.masks * design.chunks

    def counting(self: Masks, index: Any) -> torch.Tensor:
        found = original(self, index)
        asked.append(found.numel() // size)
        return found

    start_U = torch.full((size,), 0.6, dtype=torch.float64)
    for search, whole in zip(*(both_searches(view.space, design, start_U) for _ in range(2)), strict=True):
        masks_BKCU = search.ask(0)
        tensor_BKCU, before = masks_BKCU[:], search.state_dict()
        with masked_objective(view, rows_per_forward=2) as objective, monkeypatch.context() as patch:
            patch.setattr(Masks, "__getitem__", counting)
            patch.setattr(module, "_ENTRIES", 3 * size)
            losses_BKC, *_ = loop.evaluate_step(objective, search, masks_BKCU, tokens_BT, start_U)
            batch = design.groups == design.chunks == 1  # whose masks, few as they are, are compared with each other
            assert max(asked) <= (all_rows if batch else 2 * design.chunks) and (batch or 2 * design.chunks < all_rows)
            search.tell(masks_BKCU, losses_BKC, learning_rate=0.1)
            window = design.masks * design.chunks if isinstance(search, PosteriorSearch) else 3
            assert max(asked) <= max(all_rows if batch else 2 * design.chunks, window) and (batch or len(asked) > 2)
        with masked_objective(view, rows_per_forward=2) as objective:
            expected, *_ = loop.evaluate_step(objective, whole, tensor_BKCU, tokens_BT, start_U)
        assert torch.equal(losses_BKC, expected)
        whole.tell(tensor_BKCU, losses_BKC, learning_rate=0.1)
        found, wanted = search.state_dict(), whole.state_dict()
        tensors = [name for name, value in wanted.items() if isinstance(value, torch.Tensor)]
        for name in tensors:
            assert_close(found[name], wanted[name], EXACT)
        assert any((found[name] - before[name]).abs().max() > 1e-3 for name in tensors)
        asked.clear()


def test_what_masks_may_keep_is_known_without_them() -> None:
    """Units with a chance and, where there is a reference, its own; what none may keep is not computed."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(2, 8)
    probs_U = random_numbers(view.space.size, 0)
    probs_U[torch.arange(len(probs_U)) % 3 == 1] = 0.0
    probs_U[torch.arange(len(probs_U)) % 7 == 1] = 1e-3  # seldom kept, and possible all the same
    masks, reference_U = make_masks(probs_U, Design(2, 3), space=view.space), torch.zeros(len(probs_U))
    reference_U[4] = 0.5
    assert masks.possible_U.equal(probs_U > 0) and not masks.possible_U[4]
    assert with_reference(masks, reference_U).possible_U.equal((probs_U > 0) | (reference_U > 0))
    asked, set_masks = [], LiveMasks.set

    def watched(self: LiveMasks, *given: Any, **more: Any) -> None:
        asked.append(more["working_U"])
        set_masks(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch, masked_objective(view, costs=Costs(0.0, 0.0, 1.0)) as objective:
        patch.setattr(LiveMasks, "set", watched)
        found = objective.token_losses(masks, tokens_BT)
        assert len(asked) == 1 and asked[0].equal(masks.possible_U)
    with masked_objective(view, costs=Costs(0.0, 2.0**40, 1.0)) as objective:
        assert_close(found, objective.token_losses(masks[:], tokens_BT), EXACT)


@pytest.mark.parametrize("gates", [False, True], ids=["mask", "gates"])
def test_a_reference_stands_beside_the_masks(gates: bool) -> None:
    """On every text, after the others, whether those are made when asked for or are a tensor."""
    masks, reference_U = make_masks(random_numbers(FLAT.size, 0), Design(3, 2, 2)), random_numbers(FLAT.size, 1)
    reference_U = reference_U.float() if gates else reference_U > 0.3
    lazy, tensor = with_reference(masks, reference_U), with_reference(masks[:], reference_U)
    assert lazy.shape == tensor.shape == (3, 3, 2, FLAT.size)
    whole = lazy[:]
    assert torch.equal(whole, tensor[:]) and whole.dtype == reference_U.dtype
    assert torch.equal(whole[:, :2], masks[:].to(whole.dtype))
    assert (whole[:, 2] == reference_U).all()
    rows, part = lazy.to(torch.device("cpu")).flatten(0, 1), torch.tensor([8, 2, 3])
    assert torch.equal(rows[part], whole.flatten(0, 1)[part])


@pytest.mark.parametrize("method", [0, 1], ids=["posterior", "reinforce"])
def test_antithetic_masks_are_told_together(method: int) -> None:
    """What they share is known of all of them only; whole windows may be missing, and independent masks too."""
    start_U = torch.full((FLAT.size,), 0.6, dtype=torch.float64)
    for sampling, refused in (("antithetic", True), ("independent", False)):
        search = both_searches(FLAT, Design(3, 4, 2, sampling), start_U)[method]
        masks, losses_BKC = search.ask(0), random_numbers(24, 0).view(3, 4, 2)
        search.tell(masks[1:], losses_BKC[1:], learning_rate=0.1)
        for left in (slice(3), slice(1, 4)):
            told: Any = nullcontext()
            if refused:
                told = pytest.raises(ConfigError, match="told all together: 4 on each text, but got 3")
            with told:
                search.tell(masks[:, left], losses_BKC[:, left], learning_rate=0.1)
