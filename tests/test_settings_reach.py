"""What a configuration says reaches what it is about, and is not lost on the way."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_run import WINDOW, Place

from bernprune.config import RunConfig, make_config
from bernprune.models.view import describe
from bernprune.run import opening
from bernprune.run.initial import evolution_of, options_of, start_probs
from bernprune.run.repairs import Workshop
from bernprune.run.scoring import scores_of
from bernprune.run.stage import set_stage
from bernprune.settings import merge


def config_at(place: Place, **given: Any) -> RunConfig:
    data = {"text": str(place.text), "window": WINDOW, "eval_tokens": 320}
    return make_config(merge({"model": {"path": str(place.model)}, "data": data}, given))


def test_a_metric_is_told_of_the_budget_and_of_its_own(prepared: Place) -> None:
    initial = {"score": "mini-llm", "pairs": 3, "step": 0.01, "windows": 5, "window": 8}
    config = config_at(prepared, initial=initial, budget={"sparsity": 0.45})
    options = options_of(config)
    assert (options.sparsity, options.pairs, options.step) == (0.45, 3, 0.01)
    assert set_stage(config).initial_windows_WT.shape == (5, 8)
    assert evolution_of(config_at(prepared, initial={"allocation": "search", "generations": 3})).generations == 3


@pytest.mark.parametrize("given", [{"sharpness": 0.8}, {"map": "sigmap"}], ids=str)
def test_the_map_from_scores_is_the_one_that_is_named(given: dict[str, Any], prepared: Place) -> None:
    space = describe(tiny_model("llama")).space
    scores_U = torch.rand(space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, usual = (start_probs(config_at(prepared, initial=each), space, scores_U) for each in (given, {}))
    assert not torch.equal(one, usual)


def test_units_that_contain_others_start_at_the_ceiling_of_the_policy(prepared: Place) -> None:
    space = describe(tiny_model("llama"), ("layer", "kv_group", "channel")).space
    config = config_at(prepared, policy={"ceiling": 0.93}, granularity=["layer", "kv_group", "channel"])
    probs_U = start_probs(config, space, torch.ones(space.size, dtype=torch.float64))
    assert probs_U[space.of_kind("layer")].eq(0.93).all()


@pytest.mark.parametrize("name", ["random", "mini-llm", "fused"])
def test_what_a_metric_draws_follows_the_seed(name: str, prepared: Place) -> None:
    """On text that is the same for both."""
    stages = [set_stage(config_at(prepared, seed=seed, initial={"windows": 4})) for seed in (0, 1)]
    stages[1].initial_windows_WT = stages[0].initial_windows_WT
    first_U, second_U = (scores_of(stage, name) for stage in stages)
    assert not torch.equal(first_U, second_U)
    assert torch.equal(first_U, scores_of(stages[0], name))


def test_weights_are_of_the_revision(prepared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(opening, "load_model", lambda path, **given: told.append(given))
    opening.open_model(config_at(prepared, model={"revision": "v2"}), torch.device("cpu"))
    assert told[0]["revision"] == "v2"


def test_flops_are_those_of_the_window(prepared: Place) -> None:
    """Attention over more tokens takes more."""
    few, many = (
        set_stage(config_at(prepared, budget={"measure": "flops", "flops_window": window})).view.space.costs_U("flops")
        for window in (64, 4096)
    )
    assert few.sum() < many.sum()


def test_a_repair_is_fitted_as_it_is_told(prepared: Place) -> None:
    repair = {"method": "ridge", "target": "own", "ridges": [3.0], "windows": 20}
    workshop = Workshop.of_stage(set_stage(config_at(prepared, repair=repair)))
    assert (workshop.repairer.target, tuple(workshop.repairer.ridges)) == ("own", (3.0,))
