"""The README's promise that the steps of a run are open: all of them from public names alone."""

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import bernprune
from bernprune import Design


def posterior(budget: bernprune.Budget, probs_U: torch.Tensor, scores_U: torch.Tensor) -> bernprune.MaskSearch:
    """Two rounds of two steps, three chunks a window."""
    return bernprune.PosteriorSearch(budget, probs_U, scores_U, seed=0, design=Design(6, 4, 3), round_steps=2)


def reinforce(budget: bernprune.Budget, probs_U: torch.Tensor, scores_U: torch.Tensor) -> bernprune.MaskSearch:
    """Plain policy gradients, each window under masks of its own."""
    baseline = bernprune.make_baseline("leave-one-out", window=5, num_masks=4)
    return bernprune.ReinforceSearch(budget, probs_U, baseline=baseline, seed=0, design=Design(6, 4))


def matched(budget: bernprune.Budget, probs_U: torch.Tensor, scores_U: torch.Tensor) -> bernprune.MaskSearch:
    """All windows under the same masks, and under one more that these are compared with."""
    baseline = bernprune.make_baseline("matched", window=5, num_masks=4)
    return bernprune.ReinforceSearch(budget, probs_U, baseline=baseline, seed=0, design=Design(1, 4))


@pytest.mark.parametrize("method", [posterior, reinforce, matched])
def test_the_steps_of_a_run_by_hand(method: Callable[..., bernprune.MaskSearch], tmp_path: Path) -> None:
    """Describe, score, search, select, slice, save; and the saved model is the selected one."""
    model, text_WT = tiny_model("llama", torch.float32), random_tokens(6, 9)
    view = bernprune.describe(model)
    scores_U = bernprune.initial_scores(view, text_WT, bernprune.SCORES["wanda-sp"])
    budget = bernprune.Budget(view.space, 0.4)
    probs_U = bernprune.initial_probs(view.space, scores_U, keep=0.6)
    search = method(budget, probs_U, scores_U)
    start_U = search.probs_U.clone()
    with bernprune.masked_objective(view) as objective:
        for step in range(4):
            masks_BKCU = search.ask(step)
            losses_BKC, reference_BC, reading = bernprune.evaluate_step(
                objective, search, masks_BKCU, text_WT, bernprune.select(search.priorities_U, budget)
            )
            search.tell(masks_BKCU, losses_BKC, learning_rate=0.1, reference_BC=reference_BC, reading=reading)
        mask_U = bernprune.select(search.priorities_U, budget, limits=bernprune.Limits(), tie_break_U=scores_U)
        loss = objective.losses(mask_U[None], text_WT).item()
    assert not torch.equal(search.probs_U, start_U)
    plan = view.space.plan(mask_U)
    sliced = bernprune.slice_model(model, plan)
    loaded = bernprune.load_model(str(bernprune.save_pruned(sliced, None, tmp_path / "pruned", plan=plan)))
    with torch.inference_mode():
        logits = loaded(input_ids=text_WT).logits[:, :-1]
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text_WT[:, 1:].flatten()).item()
    assert found == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("readme", ["README.md", "bernprune/README.md"])
def test_what_the_readmes_name_is_there(readme: str) -> None:
    """Functions by their modules, and files."""
    text = (Path(__file__).parents[1] / readme).read_text(encoding="utf-8")
    places = re.findall(r"`(bernprune(?:\.\w+)+)`", text)
    files = re.findall(r"[`(]((?:bernprune|benchmarks|tests|configs|kernels)/[\w/]+\.\w+)[`)]", text)
    assert len(files) > 3 and (places or readme == "README.md"), "and none is named"
    for place in places:
        module, _, name = place.rpartition(".")
        assert hasattr(importlib.import_module(module), name), place
    for file in files:
        assert (Path(__file__).parents[1] / file).exists(), file


def test_a_score_is_a_function() -> None:
    """Names are for the configuration."""
    view = bernprune.describe(tiny_model("llama"))
    with pytest.raises(bernprune.BernpruneError, match=r"must be a function.*'wanda-sp'"):
        bernprune.initial_scores(view, random_tokens(2, 5), "wanda-sp")  # type: ignore[arg-type]
