"""The README's promise that the steps of a run are open: all of them from public names alone."""

from pathlib import Path

import pytest
import torch
from tiny_models import random_tokens, tiny_model

import bernprune


def test_the_steps_of_a_run_by_hand(tmp_path: Path) -> None:
    """Describe, score, search, select, slice, save; and the saved model is the selected one."""
    model, text_WT = tiny_model("llama", torch.float32), random_tokens(6, 9)
    view = bernprune.describe(model)
    scores_U = bernprune.initial_scores(view, text_WT, bernprune.SCORES["wanda-sp"])
    budget = bernprune.Budget(view.space, 0.4)
    probs_U = bernprune.initial_probs(view.space, scores_U, keep=0.6)
    baseline = bernprune.make_baseline("leave-one-out", window=5, num_masks=4)
    search = bernprune.MaskSearch(budget, probs_U, baseline=baseline, seed=0, num_masks=4)
    with bernprune.masked_objective(view) as objective:
        for step in range(3):
            masks_KU = search.ask(step)
            search.tell(masks_KU, objective.losses(masks_KU, text_WT), learning_rate=0.1)
        mask_U = bernprune.select(search.probs_U, budget, limits=bernprune.Limits(), tie_break_U=scores_U)
        loss = objective.losses(mask_U[None], text_WT).item()
    plan = view.space.plan(mask_U)
    sliced = bernprune.slice_model(model, plan)
    loaded = bernprune.load_model(str(bernprune.save_pruned(sliced, None, tmp_path / "pruned", plan=plan)))
    with torch.inference_mode():
        logits = loaded(input_ids=text_WT).logits[:, :-1]
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text_WT[:, 1:].flatten()).item()
    assert found == pytest.approx(loss, rel=1e-5)


def test_a_score_is_a_function() -> None:
    """Names are for the configuration."""
    view = bernprune.describe(tiny_model("llama"))
    with pytest.raises(bernprune.BernpruneError, match=r"must be a function.*'wanda-sp'"):
        bernprune.initial_scores(view, random_tokens(2, 5), "wanda-sp")  # type: ignore[arg-type]
