"""Weights for a policy are right on average over its masks, and gone without a trace afterwards.

Letters: N units, E inputs, D outputs, T tokens, K masks.
"""

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VARIANTS, Variant, random_tokens, tiny_model
from tiny_run import FOUR_ROUNDS, STEPS, Place, finish, read_json, run, settings, succeed, without_times
from tolerances import EXACT, LOGITS, assert_close

from bernprune.backends import TORCH
from bernprune.config import make_config
from bernprune.errors import ConfigError, ModelError
from bernprune.models.hooks import hooked
from bernprune.models.loading import load_model
from bernprune.models.masking import masked
from bernprune.models.slicing import slice_model
from bernprune.models.statistics import weights_by_stream
from bernprune.models.view import describe
from bernprune.names import Kind
from bernprune.policy.rounds import Informativeness
from bernprune.repair import ExpectedWeights, Repairer, expected
from bernprune.repair.closed import factor
from bernprune.repair.expected import expected_fit
from bernprune.run import loop, workload
from bernprune.run.plans import read_plan
from bernprune.run.repairs import Workshop
from bernprune.settings import merge, read_yaml
from bernprune.units import KeepPlan

WINDOWS_WT = random_tokens(12, 9)


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
@pytest.mark.parametrize("units", [4, 2])
def test_they_are_least_squares_over_inputs_and_masks(units: int, ridge: float) -> None:
    """Every mask with its probability, every token, and a row more an input that holds back."""
    random = np.random.default_rng(0)
    x_TE, weight_DE = random.normal(size=(30, 4)), random.normal(size=(3, 4))
    x_TE[:, 1] += x_TE[:, 0]
    probs_N = random.uniform(0.1, 0.9, size=units)
    rows, targets = [], []
    for kept in itertools.product([0, 1], repeat=units):
        share = math.prod(p if k else 1 - p for p, k in zip(probs_N, kept, strict=True))
        rows.append(np.sqrt(share / 30) * x_TE * np.repeat(kept, 4 // units))
        targets.append(np.sqrt(share / 30) * x_TE @ weight_DE.T)
    gram_EE = x_TE.T @ x_TE / 30
    holding = np.sqrt(ridge * gram_EE.diagonal().mean()) * np.eye(4)
    solved = np.linalg.lstsq(np.vstack([*rows, holding]), np.vstack([*targets, holding @ weight_DE.T]), rcond=None)[0]
    found_DE = expected_fit(torch.tensor(weight_DE), torch.tensor(gram_EE), torch.tensor(probs_N), ridge)
    assert_close(found_DE, torch.tensor(solved.T), 1e2 * EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_are_always_zero_change_no_weight(dtype: torch.dtype) -> None:
    """As of a branch that does nothing."""
    weight_DE, probs_N = torch.arange(8, dtype=dtype).view(2, 4), torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert expected_fit(weight_DE, torch.zeros(4, 4, dtype=dtype), probs_N, 0.1).equal(weight_DE)


def test_of_a_selection_they_are_its_ridge_regression() -> None:
    """What is kept with certainty takes over for what is not, whose own weights stay as they are."""
    random = torch.Generator().manual_seed(0)
    x_TE = torch.randn(40, 6, generator=random, dtype=torch.float64)
    weight_DE = torch.randn(3, 6, generator=random, dtype=torch.float64)
    gram_EE, kept = x_TE.T @ x_TE / 40, torch.tensor([0, 1, 3, 5])
    gone = torch.tensor([2, 4])
    probs_E = torch.zeros(6).index_fill(0, kept, 1.0)
    found_DE = expected_fit(weight_DE, gram_EE, probs_E, 0.01)
    ridged = gram_EE[kept][:, kept] + 0.01 * gram_EE.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    change_DA = torch.linalg.solve(ridged, gram_EE[kept][:, gone] @ weight_DE[:, gone].T).T
    assert_close(found_DE[:, kept], weight_DE[:, kept] + change_DA, EXACT)
    assert_close(found_DE[:, gone], weight_DE[:, gone], EXACT)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_they_come_nearer_to_the_dense_model_on_average(variant: Variant) -> None:
    """In the loss of masks of the policy, which are none of those that they were computed from."""
    model = variant.model(torch.float32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    view = describe(model)
    weights = ExpectedWeights(view, WINDOWS_WT, rows_per_forward=5)
    masks_KU = torch.rand(40, view.space.size, generator=torch.Generator().manual_seed(1)) < 0.7

    @torch.no_grad()
    def error() -> float:
        """Of the last hidden states, which nothing fits, but those that are wrong less on the way are nearer."""
        with masked(view, TORCH) as live:
            total = 0.0
            for mask_U in masks_KU:
                live.set(mask_U[None])
                total += (model.model(WINDOWS_WT).last_hidden_state - dense_RTD).square().mean().item()
        return total

    with torch.no_grad():
        dense_RTD = model.model(WINDOWS_WT).last_hidden_state
    unfitted = error()
    weights.fit(torch.full((view.space.size,), 0.7, dtype=torch.float64))
    assert error() < 0.99 * unfitted
    weights.fit(torch.ones(view.space.size))
    with torch.no_grad():
        assert_close(model.model(WINDOWS_WT).last_hidden_state, dense_RTD, 1e2 * LOGITS[torch.float32])
    weights.undo()
    assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["output", "down"])
def test_errors_count_as_shares_of_the_stream(name: str) -> None:
    """Token by token: what is fitted is that of moments by hand, each divided by the stream's mean squares."""
    model = tiny_model("llama")
    view = describe(model)
    entering, around = list[torch.Tensor](), list[torch.Tensor]()
    layer, projection = view.layers[2], getattr(view.layers[2], name)

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        around.append(torch.cat([inputs[0], output], dim=-1))

    with torch.no_grad(), hooked((projection, lambda _, x, y: entering.append(x[0])), (layer.layer, note)):
        model(input_ids=WINDOWS_WT, use_cache=False)
    moments = torch.zeros(2, projection.in_features, projection.in_features, dtype=torch.float64)
    for x_E, stream_2D in zip(entering[0].flatten(0, 1), around[0].flatten(0, 1), strict=True):
        share = 2 * stream_2D.square().mean()
        moments += torch.outer(x_E, x_E) / torch.stack([share, torch.ones_like(share)])[:, None, None]
    kind: Kind = "kv_group" if name == "output" else "channel"
    probs_U = torch.linspace(0.1, 0.9, view.space.size, dtype=torch.float64)
    dense_DE = projection.weight.detach().clone()
    expected_DE, plain_DE = (
        expected_fit(dense_DE, gram_EE, probs_U[view.space.span(kind, 2)], 0.01) for gram_EE in moments
    )
    ExpectedWeights(view, WINDOWS_WT, rows_per_forward=5).fit(probs_U)
    assert_close(projection.weight, expected_DE, LOGITS[torch.float32])
    assert not torch.allclose(expected_DE, plain_DE, rtol=1e-3)


def test_a_token_with_a_stream_a_thousand_times_as_large_decides_nothing() -> None:
    """As the first one of many language models has, before a layer or after it, or in the pruned model alone."""
    streams = torch.randn(3, 1, 7, 12, generator=torch.Generator().manual_seed(0))
    plain_RT = weights_by_stream(*streams)
    assert plain_RT.min() > 0.1 and plain_RT.max() < 2
    for stream_RTD in streams:
        stream_RTD[0, 3] *= 1000
        found_RT = weights_by_stream(*streams.bfloat16())
        assert found_RT.dtype == torch.float32 and found_RT[0, 3] < 1e-5
        stream_RTD[0, 3] /= 1000
    assert weights_by_stream(*(0 * streams)).isfinite().all()
    streams[:, 0, 3] = 0
    found_RT = weights_by_stream(*streams)
    assert found_RT[0, 3] == 0 and found_RT[0, :3].equal(plain_RT[0, :3])


def test_blocks_have_nothing_to_make_up_with() -> None:
    """Their projections are left alone, and only those of the kinds that are there are fitted."""
    model = tiny_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    view = describe(model, ("ffn", "channel"))
    ExpectedWeights(view, WINDOWS_WT, rows_per_forward=5).fit(torch.full((view.space.size,), 0.5))
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4)}


def test_what_is_not_finite_is_named() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj.weight.data[0] = math.inf
    with pytest.raises(ModelError, match="activations of layer 2 are not finite"):
        ExpectedWeights(describe(model), WINDOWS_WT, rows_per_forward=5)


@pytest.mark.parametrize(
    ("kind", "said"), [("kv_group", "the attention output projection"), ("channel", "the down projection")]
)
def test_what_cannot_be_solved_is_named(kind: Kind, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = describe(tiny_model("llama"), (kind,))
    weights = ExpectedWeights(view, WINDOWS_WT, rows_per_forward=5)
    monkeypatch.setattr(expected, "factor", lambda gram_EE: factor(torch.full_like(gram_EE, math.nan)))
    with pytest.raises(ModelError, match=f"^{said} of layer 0 cannot be fitted: the Gram matrix of .* is singular"):
        weights.fit(torch.full((view.space.size,), 0.5))


# In a run


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"repair": {"method": "ridge"}}, True),
        ({"repair": {"method": "none"}}, False),
        ({"repair": {"method": "bias"}}, False),
        ({"search": {"objective": "kl"}}, False),
        ({"search": {"dtype": "int8"}}, False),
        ({"granularity": ["attention", "ffn"]}, False),
        ({"granularity": ["ffn", "channel"]}, True),
        ({"preset": "paper"}, False),
        ({"search": {"refit": False}}, False),
        ({"search": {"refit": True}, "repair": {"method": "none"}}, True),
    ],
    ids=str,
)
def test_when_weights_are_refitted(given: dict[str, Any], expected: bool) -> None:
    """It is settled when a run begins, and finalists are judged if so, whatever repair is left in the end."""
    config = make_config(given)
    assert config.search.refit is expected
    assert config.judges_finalists is expected
    assert make_config(config.to_dict() | {"repair": {"method": "none"}}).search.refit is expected
    assert not make_config(merge(config.to_dict(), {"search": {"sequences": 0}})).judges_finalists


@pytest.mark.parametrize(
    "given", [{"search": {"objective": "kl"}}, {"search": {"dtype": "int8"}}, {"granularity": ["layer"]}], ids=str
)
def test_it_is_refused_where_it_cannot_be(given: dict[str, Any]) -> None:
    given = {**given, "search": {**given.get("search", {}), "refit": True}}
    with pytest.raises(ConfigError, match=r"search\.refit has no meaning for (search|granularity)"):
        make_config(given)


@pytest.fixture(scope="module")
def refitted(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose masks saw other weights."""
    return finish(prepared, tmp_path_factory.mktemp("refitted"), *FOUR_ROUNDS, "search.refit=true")


def test_what_is_reported_is_of_the_model_itself(refitted: Path, prepared: Place, tmp_path: Path) -> None:
    """The search saw other losses; what is not learned has the same figures, and the plan cuts the same model."""
    plain = finish(prepared, tmp_path, *FOUR_ROUNDS)
    reports = [read_json(folder / "report.json") for folder in (plain, refitted)]
    for name in ("dense", "uniform", "initial"):
        assert reports[0]["loss"][name] == reports[1]["loss"][name]
    losses = [[line["loss"] for line in without_times(folder / "metrics.jsonl")] for folder in (plain, refitted)]
    assert losses[0][0] != losses[1][0] and len(losses[0]) == len(losses[1]) == STEPS
    model = slice_model(load_model(str(prepared.model)), read_plan(refitted / "plan.json"))
    found = load_file(refitted / "model" / "model.safetensors")
    assert all(found[name].equal(value) for name, value in model.state_dict().items() if name in found)


@pytest.mark.parametrize(
    ("fits", "expected"), [(32, [0, 2, 4, 6, 8]), (4, [0, 2, 4, 6, 8]), (2, [0, 4, 8]), (1, [0, 8])]
)
def test_weights_are_fitted_so_often_at_most(
    fits: int, expected: list[int], prepared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the policy at the start, and where rounds end."""
    steps: list[int] = []
    fit = loop._Loop.fit

    def noted(self: Any, probs_U: torch.Tensor) -> None:
        steps.append(self.work.step)
        fit(self, probs_U)

    monkeypatch.setattr(loop._Loop, "fit", noted)
    monkeypatch.setattr(workload, "FITS", fits)
    finish(prepared, tmp_path, *FOUR_ROUNDS, "search.refit=true")
    assert steps == expected


def test_weights_are_fitted_to_a_policy_that_was_drawn_in(
    prepared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and not only where the next round ends, which is after every second step."""
    fitted, fit = list[tuple[int, float]](), loop._Loop.fit

    def noted(self: loop._Loop, probs_U: torch.Tensor) -> None:
        fitted.append((self.work.step, self.search.softness))
        fit(self, probs_U)

    monkeypatch.setattr(loop._Loop, "fit", noted)
    monkeypatch.setattr(
        Informativeness, "too_soft", property(lambda self: self._contrast > self._first_contrast - 1e-9)
    )
    finish(prepared, tmp_path, *FOUR_ROUNDS, "search.refit=true")
    assert len(fitted) > 5 and any(step % 2 for step, softness in fitted if softness < 1), "none was drawn in"


def test_nothing_is_fitted_for_a_search_of_nothing(
    prepared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpectedWeights, "__init__", lambda *_, **__: 1 / 0)
    out = finish(prepared, tmp_path, "search.sequences=0", "search.refit=true")
    assert read_json(out / "report.json")["search"]["sequences"] == 0


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """The run, as far as that step."""
    whole = loop._Loop.step

    def until(self: Any, *more: Any) -> Any:
        if self.work.step == step:
            raise KeyboardInterrupt
        return whole(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "step", until)
        assert run(*command).code == 130


REFITTED = (*FOUR_ROUNDS, "repair.method=ridge", "search.checkpoint_steps=1")


@pytest.mark.parametrize(
    "changes", [("repair.method=none",), ("repair.windows=20",), ("repair.judge_finalists=false",)], ids="".join
)
def test_a_repair_that_changes_on_the_way_changes_no_search(
    changes: tuple[str, ...], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the weights that masks are run on, nor the text that is kept back."""
    succeed(*place.prune(*REFITTED, out=place.folder / "whole"))
    interrupted_at(5, monkeypatch, place.prune(*REFITTED))
    succeed("resume", str(place.out), *settings(*changes))
    assert make_config(read_yaml(place.out / "config.yaml")).search.refit
    assert without_times(place.out / "metrics.jsonl") == without_times(place.folder / "whole" / "metrics.jsonl")


def test_finalists_are_judged_as_they_are_where_the_repair_is_given_up(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned in view of a repair may be worse without one than what the metric keeps."""
    interrupted_at(5, monkeypatch, place.prune(*REFITTED))
    done = succeed("resume", str(place.out), *settings("repair.method=none"))
    report = read_json(place.out / "report.json")
    losses, windows = report["repair"]["finalists"], report["repair"]["judging_windows"]
    assert len(losses) > 1 and min(losses, key=losses.get) == report["search"]["kept"]
    assert f"loss of each, on {windows} windows" in done.out and report["repair"]["method"] == "none"
    assert report["windows_run"]["choice"] == windows * len(losses)


def test_a_run_goes_on_with_the_weights_that_it_had(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the policy has changed since they were fitted."""
    monkeypatch.setattr(workload, "FITS", 2)
    succeed(*place.prune(*REFITTED, out=place.folder / "whole"))
    interrupted_at(7, monkeypatch, place.prune(*REFITTED))
    succeed("resume", str(place.out))
    assert without_times(place.out / "metrics.jsonl") == without_times(place.folder / "whole" / "metrics.jsonl")


def test_nothing_of_them_is_held_after_the_search(
    prepared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ExpectedWeights] = []
    undo = ExpectedWeights.undo

    def noted(self: ExpectedWeights) -> None:
        assert self._places
        undo(self)
        made.append(self)

    monkeypatch.setattr(ExpectedWeights, "undo", noted)
    finish(prepared, tmp_path, *FOUR_ROUNDS, "search.refit=true")
    (weights,) = made
    assert not weights._places and not weights._originals.projections


@pytest.mark.parametrize("error", [ModelError, torch.OutOfMemoryError])
def test_a_finalist_that_cannot_be_repaired_loses(
    error: type[Exception], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    repair = Repairer.repair

    def failing(self: Repairer, plan: KeepPlan, method: Any) -> Any:
        if plan == plans[0]:
            raise error("singular")
        return repair(self, plan, method)

    plans: list[KeepPlan] = []
    prefer = Workshop.prefer

    def noted(self: Workshop, given: dict[str, KeepPlan], *more: Any) -> Any:
        plans.append(given["initial"])
        return prefer(self, given, *more)

    monkeypatch.setattr(Workshop, "prefer", noted)
    monkeypatch.setattr(Repairer, "repair", failing)
    done = run(*place.prune(*FOUR_ROUNDS, "repair.method=ridge"))
    assert done.code == 0 and "the finalist 'initial' loses, as it cannot be repaired: singular" in done.err
    assert read_json(place.out / "report.json")["repair"]["finalists"]["initial"] is None


def test_what_filled_a_gpu_is_let_go_before_a_finalist_is_judged(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is being handled holds on to all that was at work when it came."""
    losses, judged = Workshop.losses, list[bool]()

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("the memory is full")

    def noted(self: Workshop, plan: KeepPlan) -> torch.Tensor:
        judged.append(sys.exc_info()[0] is None)
        return losses(self, plan)

    monkeypatch.setattr(Repairer, "repair", full)
    monkeypatch.setattr(Workshop, "losses", noted)
    done = run(*place.prune(*FOUR_ROUNDS, "repair.method=auto"))
    assert done.code == 0 and "is judged as it is, as it cannot be repaired: the memory is full" in done.err
    assert len(judged) > 2 and all(judged)


def test_finalists_that_auto_cannot_repair_are_judged_as_they_are(place: Place) -> None:
    """As it would leave them."""
    done = run(*place.prune(*FOUR_ROUNDS, "repair.method=auto", "repair.windows=2"))
    report = read_json(place.out / "report.json")
    assert done.code == 0 and "is judged as it is, as it cannot be repaired: the calibration text is too" in done.err
    losses, kept = report["repair"]["finalists"], report["search"]["kept"]
    assert min(losses, key=losses.get) == kept and losses[kept] == pytest.approx(report["repair"]["losses"]["none"])
    assert "repair       none: none could be tried, as said in warnings" in done.out


def test_a_full_gpu_leaves_the_fit_to_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows would not help."""
    view = describe(tiny_model("llama"))
    probs_U = torch.linspace(0.1, 0.9, view.space.size, dtype=torch.float64)
    weights = ExpectedWeights(view, WINDOWS_WT, rows_per_forward=5)
    weights.fit(probs_U)
    fitted = [place.projection.weight.clone() for place in weights._places]
    weights.fit(torch.ones_like(probs_U))
    calls = list[torch.Tensor]()

    def full_at_first(weight_DE: torch.Tensor, *given: Any) -> torch.Tensor:
        calls.append(weight_DE)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("the memory is full")
        return expected_fit(weight_DE, *given)

    monkeypatch.setattr(expected, "expected_fit", full_at_first)
    weights.fit(probs_U)
    assert len(calls) == 1 + len(fitted), "it was tried again on a GPU that is full"
    assert weights._on_cpu
    assert all(torch.equal(place.projection.weight, w) for place, w in zip(weights._places, fitted, strict=True))
    weights.undo()
