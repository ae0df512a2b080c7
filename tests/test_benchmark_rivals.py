"""The parts of the rivals in the learning benchmark, one by one, and what they are given."""

import functools
from typing import Any

import pytest
import torch
from benchmark_tasks import SPARSITY, WINDOW, random_masks, source_of, task_of
from tiny_models import random_tokens, tiny_model
from tiny_run import LAYERS, Place
from tolerances import EXACT, LOGITS, assert_close

from benchmarks.learning.gates import gated
from benchmarks.learning.rivals.bonsai import _candidates, _pair, ridge
from benchmarks.learning.rivals.evopress import Switches
from benchmarks.learning.rivals.gradients import learning_rates
from benchmarks.learning.rivals.ste import prefix
from benchmarks.learning.rivals.taylor import unit_importance
from benchmarks.learning.task import Source
from bernprune.data import tokenize
from bernprune.errors import ConfigError
from bernprune.losses import token_losses
from bernprune.models.loading import load_tokenizer
from bernprune.models.view import describe
from bernprune.objective import masked_objective
from bernprune.seeding import generator
from bernprune.text import load_documents


@pytest.fixture
def source(place: Place) -> Source:
    return source_of(place)


# Texts


def test_the_three_texts_share_nothing(source: Source) -> None:
    """Training windows end where the development text begins, and the held-out text is another file."""
    task = task_of(source)
    tokenizer = load_tokenizer(source.model)
    stream, held_out = (
        tokenize(tokenizer, load_documents(text, split="train"), vocab_size=10**6)
        for text in (source.text, source.held_out)
    )
    cut = len(stream) * 9 // 10
    windows_WT = task.text(task.stage.train.num_windows)
    assert sorted(windows_WT.tolist()) == sorted(stream[: cut // WINDOW * WINDOW].view(-1, WINDOW).tolist())
    development = task.stage.eval_windows_WT
    assert development.flatten().equal(stream[cut:][: development.numel()])
    _, protocol = task.report(random_masks(task, 1), held_out=True)
    assert protocol.windows == len(held_out) // WINDOW


def test_reading_goes_on(source: Source) -> None:
    """Where the last reading ended."""
    first, second = task_of(source), task_of(source)
    assert torch.cat([first.text(3), first.text(5)]).equal(second.text(8))


# Gates


@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}], ids=str)
def test_gates_of_0_and_1_are_masks(changes: Any) -> None:
    """The loss under hooks on the plain model is that of the masked objective."""
    model, tokens_BT = tiny_model("llama", **changes), random_tokens(3, 11)
    view = describe(model)
    random = torch.Generator().manual_seed(0)
    masks_KU = torch.rand(4, view.space.size, generator=random) < 0.6
    masks_KU[0, view.space.span("channel", 1)] = False  # a whole branch
    with masked_objective(view) as objective:
        expected_K = objective.losses(masks_KU, tokens_BT)
    with torch.no_grad():
        found = [gated_loss(view, mask_U, tokens_BT).item() for mask_U in masks_KU]
    assert_close(found, expected_K, LOGITS[torch.float64])


def gated_loss(view: Any, gates_U: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    with gated(view, gates_U):
        hidden_BTD = view.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return token_losses(view.model.get_output_embeddings(), hidden_BTD, tokens_BT).mean()


def test_gates_are_differentiable() -> None:
    """Autograd agrees with finite differences, at gates between 0 and 1 too, and no hook stays."""
    view, tokens_BT = describe(tiny_model("llama", num_hidden_layers=2, intermediate_size=5)), random_tokens(2, 6)
    view.model.requires_grad_(False)
    gates_U = torch.rand(view.space.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = functools.partial(gated_loss, view, tokens_BT=tokens_BT)
    # Norms are taken in float32, so finite differences must not be too small.
    assert torch.autograd.gradcheck(loss, gates_U.requires_grad_(), eps=1e-3, atol=2e-3, rtol=1e-3)
    assert not any(module._forward_pre_hooks for module in view.model.modules())


def test_scores_of_a_part_see_the_part(source: Source) -> None:
    """What is removed scores nothing; the first layer's attention does not notice; what lies behind does."""
    task = task_of(source)
    dense_U, mask_U = task.scores(), random_masks(task, 1)[0]
    part_U = task.scores(mask_U=mask_U)
    assert (part_U[~mask_U] == 0).all()
    first, last = task.space.span("kv_group", 0), task.space.span("channel", LAYERS - 1)
    assert part_U[first][mask_U[first]].equal(dense_U[first][mask_U[first]])
    assert (part_U[last][mask_U[last]] != dense_U[last][mask_U[last]]).all()


# Single rivals


@pytest.mark.parametrize("form", ["vector", "element"])
def test_taylor_by_hand(form: str) -> None:
    """One kv group and one channel of a model whose gradients are taken here; and a sum is at most its parts."""
    model, tokens_BT = tiny_model("llama"), random_tokens(21, 9)
    view = describe(model.requires_grad_(False))
    found_U = unit_importance(view, tokens_BT, form)
    model.requires_grad_(True)
    logits = model(input_ids=tokens_BT).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens_BT[:, 1:].flatten()).backward()
    layer, heads = model.model.layers[2], model.config.num_attention_heads // model.config.num_key_value_heads
    width = model.config.head_dim

    def importance(projection: Any, lines: range, axis: int) -> float:
        salience = (projection.weight * projection.weight.grad).detach()
        parts = [salience.select(axis, line) for line in lines]
        return sum(part.sum().abs().item() if form == "vector" else part.abs().sum().item() for part in parts)

    attention, ffn = layer.self_attn, layer.mlp
    queries, keys = range(heads * width, 2 * heads * width), range(width, 2 * width)  # of kv group 1
    group = sum(
        importance(projection, lines, axis)
        for projection, lines, axis in (
            (attention.q_proj, queries, 0),
            (attention.k_proj, keys, 0),
            (attention.v_proj, keys, 0),
            (attention.o_proj, queries, 1),
        )
    )
    channel = sum(
        importance(projection, range(7, 8), axis)
        for projection, axis in ((ffn.gate_proj, 0), (ffn.up_proj, 0), (ffn.down_proj, 1))
    )
    expected = [group, channel]
    places = [view.space.span("kv_group", 2).start + 1, view.space.span("channel", 2).start + 7]
    assert_close(found_U[places], expected, LOGITS[torch.float32])  # norms are taken in float32


def test_ridge_finds_what_is_there() -> None:
    """A noiseless linear loss to within the smallest ridge; noise alone is taken for less than least squares do."""
    random = torch.Generator().manual_seed(0)
    worth_N = torch.randn(7, generator=random, dtype=torch.float64)
    masks_KN = (torch.rand(200, 7, generator=random) < 0.5).double()
    assert (ridge(masks_KN, masks_KN @ worth_N + 5) - worth_N).abs().max() < 1e-3
    noise_K = torch.randn(200, generator=random, dtype=torch.float64)
    least_squares_N = torch.linalg.lstsq(masks_KN - masks_KN.mean(0), noise_K[:, None]).solution
    assert ridge(masks_KN, noise_K).norm() < 0.5 * least_squares_N.norm()


def test_sub_models_come_in_pairs(source: Source) -> None:
    """Of a pair, each candidate is dropped by one alone; the others stay, and no group loses all."""
    task = task_of(source)
    alive_U = random_masks(task, 1)[0]
    groups = list(_candidates(task.groups, task.scores(), alive_U, 0.2))
    at_N = torch.cat([at_G for at_G, _, _ in groups])
    assert alive_U[at_N].all()
    for index in range(5):
        mask_U, complement_U = _pair(alive_U, groups, generator(index, "pair"))
        assert (mask_U[at_N] ^ complement_U[at_N]).all()
        rest_U = alive_U.clone()
        rest_U[at_N] = False
        assert mask_U[rest_U].all()
        assert not mask_U[~alive_U].any()
        assert not complement_U[~alive_U].any()
        assert all((mask_U & complement_U)[units].any() for units in task.groups)


def test_single_candidates_of_several_layers_are_told_apart(source: Source) -> None:
    """Where a sub-model drops one of each kind in each layer, too: no candidate goes with another's in every pair."""
    task = task_of(source)
    alive_U = torch.ones(task.space.size, dtype=torch.bool)
    groups = [(at_G[:1], odds_G[:1], 1) for at_G, odds_G, _ in _candidates(task.groups, task.scores(), alive_U, 0.2)]
    masks_KU = torch.stack([mask for index in range(64) for mask in _pair(alive_U, groups, generator(index, "pair"))])
    masks_KN = masks_KU[:, torch.cat([at_G for at_G, _, _ in groups])].double()
    assert torch.linalg.matrix_rank(masks_KN - masks_KN.mean(0)) == masks_KN.shape[1] > 2


@pytest.mark.parametrize("switch", [{"switch": "levels", "channels": 3}, {"switch": "units", "band": 0.5}], ids=str)
def test_offspring_keep_the_budget(switch: Any, source: Source) -> None:
    """They differ from one another, cost no more than allowed, hardly less, and empty no group."""
    task = task_of(source)
    switches = Switches(task, task.scores(), generator(0, "offspring"))
    parent_U = task.select_by(task.scores(), "layer")
    masks_KU = switches.offspring(parent_U, {**switch, "offspring": 12})
    assert len({tuple(mask_U.tolist()) for mask_U in masks_KU}) == 12
    dearest = task.budget.costs_U.max().item()
    for mask_U in masks_KU:
        spare = (1 - SPARSITY) * task.budget.total - task.budget.alive_cost(mask_U)
        assert -1e-6 <= spare < 4 * dearest
        assert all(mask_U[units].any() for units in task.groups)


def test_a_level_is_of_the_metrics_worst_and_best(source: Source) -> None:
    """Whatever evolves, a group keeps its best units by score."""
    task = task_of(source)
    scores_U = task.scores()
    switches = Switches(task, scores_U, generator(0, "offspring"))
    settings = {"switch": "levels", "channels": 2, "offspring": 12}
    for mask_U in switches.offspring(task.select_by(scores_U, "layer"), settings):
        for units in task.groups:
            kept, removed = scores_U[units][mask_U[units]], scores_U[units][~mask_U[units]]
            assert not len(removed) or kept.min() >= removed.max()


def test_the_prefix_fits(source: Source) -> None:
    """Within the budget but for what a group's last unit costs, in order, and exactly ones and zeros."""
    task = task_of(source)
    priorities_U = torch.rand(task.space.size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mask_U = prefix(task, priorities_U)
    assert set(mask_U.tolist()) == {0.0, 1.0}
    best = {int(units[priorities_U[units].argmax()]) for units in task.groups}
    kept = set(mask_U.nonzero().flatten().tolist())
    assert best <= kept
    ordered = priorities_U.argsort(descending=True).tolist()
    limit, cost = (1 - SPARSITY) * task.budget.total, 0.0
    for unit in ordered:
        cost += task.budget.costs_U[unit].item()
        assert (unit in kept) == (cost <= limit or unit in best)


def test_rates_fall_and_add_up(source: Source) -> None:
    """To the travel, whatever the budget; and too small a budget is refused."""
    for limit in (16, 100, 2400):
        rates = learning_rates(task_of(source, limit=limit), {"travel": 0.7, "windows": 16})
        assert len(rates) == limit // 16
        assert rates == sorted(rates, reverse=True)
        assert_close(sum(rates), 0.7, EXACT)
    with pytest.raises(ConfigError, match="15 sequences"):
        learning_rates(task_of(source, limit=15), {"travel": 0.7, "windows": 16})
