"""What repairs and weights for the policy take is counted as it is done."""

from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
import torch
from tiny_models import random_plan, random_tokens, tiny_model
from tiny_run import LAYERS, METHODS, Place, read_json, settings, succeed
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bernprune.config import RunConfig, make_config
from bernprune.models.streaming import LayerStream
from bernprune.models.view import describe
from bernprune.names import RepairName
from bernprune.repair import ExpectedWeights, Repairer, fitting
from bernprune.repair.moments import Moments
from bernprune.repair.pairs import Pair
from bernprune.repair.places import places
from bernprune.repair.weights import Weights
from bernprune.report import table
from bernprune.run import effort, finishing, workload
from bernprune.run.folder import RunFolder
from bernprune.run.workload import fitting_windows
from bernprune.units import UnitSpace

TEXT = {"data": {"window": 16}}


def space() -> UnitSpace:
    return describe(tiny_model("llama")).space


def counted_fits(config: RunConfig, units: UnitSpace) -> int:
    """Of weights to the policy, from the operations that they would take."""
    counted = effort.policy_weights(config, units)
    if counted == effort.Effort():
        return 0
    assert counted.windows == fitting_windows(units.architecture, config.data.window)
    read, hidden = counted.windows * config.data.window, units.architecture.hidden_size
    widths = list(effort._fitted_widths(units))
    moments = sum(2 * read * every**2 for every in widths)
    return round((counted.single - moments) / sum(every**2 * (every / 3 + 4 * hidden) for every in widths))


@pytest.mark.parametrize(
    "given",
    [
        {"repair.method": "auto"},
        {"repair.method": "auto", "repair.judge_finalists": False},
        {"repair.method": "bias", "repair.biases": "always"},
        {"repair.method": "auto", "initial.score": "flap"},
        {"repair.method": "auto", "granularity": "channel"},
    ],
)
def test_repairs_that_are_counted_are_those_that_are_done(
    given: dict[str, Any], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In their order; of finalists there may be fewer, where two of them are the same."""
    done: list[str] = []
    repair, fit, fits = Repairer.repair, ExpectedWeights.fit, [0]

    def repairing(self: Repairer, plan: Any, method: Any) -> Any:
        done.append(method)
        return repair(self, plan, method)

    def refitting(self: ExpectedWeights, probs_U: torch.Tensor) -> None:
        fits[0] += 1
        fit(self, probs_U)

    monkeypatch.setattr(Repairer, "repair", repairing)
    monkeypatch.setattr(ExpectedWeights, "fit", refitting)
    succeed(*place.prune(*(f"{name}={value}" for name, value in given.items())))
    config, units = RunFolder(place.out).read_config(), space()
    counted = [name for name, _ in effort.repairs_of(config, units.architecture)]
    assert counted[-len(done) :] == done and len(counted) - len(done) in (0, 1)
    assert fits[0] == counted_fits(config, units) and (fits[0] > 1) == config.search.refit


@pytest.mark.parametrize(
    "given",
    [
        ("repair.method=none",),
        ("repair.method=ridge", "repair.windows=12"),
        ("repair.method=auto", "repair.windows=40"),
        ("repair.method=auto", "repair.judge_finalists=false", "search.refit=false", "search.selection=0.4"),
        ("initial.score=mini-llm", "initial.allocation=block-influence", "plans.sparsities=[0.2, 0.4]"),
        ("search.sequences=0", "repair.method=auto", "repair.windows=12"),
        (*METHODS["reinforce"], "search.baseline=matched", "search.sequences=100"),
        ("search.objective=kl", "search.sequences=200"),
        ("initial.windows=9999", "repair.method=ridge", "repair.windows=12"),
    ],
    ids=["none", "ridge", "finalists", "choice", "metric", "no-search", "reference", "kl", "short-text"],
)
@pytest.mark.usefixtures("one_by_one")
def test_all_that_is_run_forward_is_reported(
    given: tuple[str, ...], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the windows that pass through decoder layers, apart from those that are timed or verified."""
    seen, aside = [0], [False]
    # Or finalists would be repaired on as much as what is kept; for a short text, on more than there is.
    monkeypatch.setattr(workload, "FITTING_WINDOWS", 9999 if "initial.windows=9999" in given else 3)

    def count(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, LlamaDecoderLayer) and "forward" not in vars(module) and not aside[0]:
            seen[0] += inputs[0].shape[0]

    def uncounted(run: Any) -> Any:
        def call(*given: Any, **others: Any) -> Any:
            aside[0] = True
            try:
                return run(*given, **others)
            finally:
                aside[0] = False

        return call

    for name in ("latency", "save_and_verify"):
        monkeypatch.setattr(finishing, name, uncounted(getattr(finishing, name)))
    hook = register_module_forward_pre_hook(count)
    try:
        succeed(*place.prune(*given))
    finally:
        hook.remove()
    report = read_json(place.out / "report.json")
    assert seen[0] == LAYERS * sum(report["windows_run"].values())
    if "repair.windows=40" in given:
        assert len(report["repair"]["finalists"]) > 1 and report["repair"]["finalist_windows"] == 23
    told = next(line for line in table(report).splitlines() if line.startswith("in all "))
    assert f"{sum(report['windows_run'].values()):,} sequences of 16 tokens run forward: " in told


@pytest.mark.parametrize("method", ["ridge", "two-step"])
def test_moments_and_passes_are_counted_exactly(method: RepairName, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, inputs, outputs = 50, 7, 5
    with FlopCounterMode(display=False) as counter:
        Moments(inputs, outputs, torch.device("cpu")).add(torch.randn(tokens, inputs), torch.randn(tokens, outputs))
    assert effort._fit("ridge", inputs, outputs, tokens, 6).single == counter.get_total_flops()

    view, through, rows = describe(tiny_model("llama")), LayerStream._through, [0]
    plan = view.space.plan(torch.ones(view.space.size, dtype=torch.bool))

    def counting(self: LayerStream, hidden_RTD: torch.Tensor) -> torch.Tensor:
        rows[0] += len(hidden_RTD)
        return through(self, hidden_RTD)

    monkeypatch.setattr(LayerStream, "_through", counting)
    monkeypatch.setattr(workload, "FITTING_WINDOWS", 3)
    config = make_config(TEXT | {"repair": {"method": method, "windows": 40}})
    Repairer(view, random_tokens(40, 16), rows_per_forward=7).repair(plan, method)
    judging = 40
    ((_, counted),) = effort.repairs_of(config, view.architecture)[-1:]
    assert counted.windows == rows[0] / len(view.layers) + judging

    rows[0] = 0
    Repairer(view, random_tokens(23, 16), rows_per_forward=7).repair(plan, method)
    of_finalist = effort.repairs_of(config, view.architecture)[0][1]
    assert of_finalist.windows == rows[0] / len(view.layers) + judging


@pytest.mark.parametrize("deciding", [512, 4])
def test_work_in_float64_is_counted_exactly(deciding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors, solving with them, and products; but not the one that tells what no repair at all would give."""
    inputs, outputs, solve, others = 9, 6, torch.cholesky_solve, [0.0]

    def solving(wanted_AD: torch.Tensor, factor_AA: torch.Tensor) -> torch.Tensor:
        others[0] += len(factor_AA) ** 3 / 3 + 2 * wanted_AD.numel() * len(factor_AA)
        return solve(wanted_AD, factor_AA)

    monkeypatch.setattr(torch, "cholesky_solve", solving)
    for module in (fitting, effort):
        monkeypatch.setattr(module, "DECIDING", deciding)
    fit, check = (Moments(inputs, outputs, torch.device("cpu")) for _ in range(2))
    for moments in (fit, check):
        moments.add(torch.randn(40, inputs), torch.randn(40, outputs))
    dense = fitting.Linear(torch.randn(outputs, inputs, dtype=torch.float64), None)
    forms = [("none", None, lambda _, dense: dense)]
    forms += [("ridge", ridge, partial(fitting.reconstructed, ridge=ridge, biased=False)) for ridge in (1.0, 0.1, 1e-9)]
    with FlopCounterMode(display=False) as counter:
        choice, _ = fitting._choose(forms, dense, fit, check)
    assert choice.repair == "ridge", "the fit comes once more"
    done = counter.get_total_flops() + others[0] - 2 * inputs**2 * min(outputs, deciding)
    assert effort._fit("ridge", inputs, outputs, 0, 3).double == pytest.approx(done, rel=1e-12)


def test_a_start_that_is_not_uniform_makes_one_finalist_more() -> None:
    counts = {
        name: len(effort.repairs_of(make_config({"initial": initial}), space().architecture))
        for name, initial in {"uniform": {}, "pooled": {"score": "flap"}, "shared": {"kv_sparsity": 0.4}}.items()
    }
    assert counts == {"uniform": 5, "pooled": 6, "shared": 6}


def test_weights_are_fitted_where_units_may_go() -> None:
    """Of channels alone, the down projections; without a search, none."""
    channels = describe(tiny_model("llama"), granularity=("channel",)).space
    wide = sum(shape.channels * (4 * shape.channels + 4 * 36) for shape in channels.architecture.layers)
    config = make_config(TEXT | {"granularity": "channel"})
    assert channels.architecture.hidden_size == 36 and effort.policy_bytes(config, channels, 4) == wide
    for given in ({"sequences": 0}, {"refit": False}):
        config = make_config(TEXT | {"search": given})
        assert effort.policy_weights(config, space()) == effort.Effort()
        assert effort.policy_bytes(config, space(), 4) == 0


def test_finalists_that_cannot_be_repaired_are_judged_as_they_are() -> None:
    """Where no repair could be tried, judging is all that is run."""
    repair = {"method": "auto", "losses": {"none": 1.0}, "windows": 90, "finalist_windows": 40, "judging_windows": 7}
    search = {"sequences": 5, "finals": {"sequences": 2}}
    config, finalists = make_config(TEXT), {"learned": 1.0, "initial": 2.0}
    for given, judged in ((repair, 1), (repair | {"finalists": finalists}, 3)):
        found = effort.windows_run(
            config, space().architecture, scored=1, fitted=0, search=search, repair=given, evaluated=0
        )
        assert found["repair"] == judged * 7


@pytest.mark.parametrize("method", ["ridge", "two-step", "auto"])
def test_copies_of_weights_while_a_repair_is_chosen(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as are held at most, where every method is better than the one before."""
    view, held, most = describe(tiny_model("llama")), WeakSet[Weights](), [0]
    plan, judged = random_plan(view.architecture, 5), iter(range(9, 0, -1))

    def judge() -> torch.Tensor:
        most[0] = max(most[0], sum(each.of(projection)[0].nbytes for each in held for projection in each.projections))
        return torch.tensor([1.0, 1.0]) * next(judged)

    start = Weights.__init__
    monkeypatch.setattr(Weights, "__init__", lambda self, *given: held.add(self) or start(self, *given))
    methods = ("ridge", "two-step") if method == "auto" else (method,)
    Repairer(view, random_tokens(32, 12)).best(plan, methods, judge)  # type: ignore[arg-type]
    config = make_config(TEXT | {"repair": {"method": method}})
    assert most[0] == effort.kept_bytes(config, view.architecture, 8)


def test_hidden_states_that_a_repair_keeps() -> None:
    """As many bytes as are held in a layer, each counted once."""
    view, windows = describe(tiny_model("llama")), 20
    pair = Pair(view, random_tokens(windows, 16), rows_per_forward=7)
    for layer in range(2):
        pair.enter(places(view, random_plan(view.architecture, 5), layer))
        states = [pair._dense.hidden_RTD, pair._pruned.hidden_RTD, *pair._before, pair._after]
        held = {state_RTD.data_ptr(): state_RTD.nbytes for passes in states for state_RTD in passes}
        config = make_config(TEXT | {"repair": {"windows": windows}})
        assert sum(held.values()) == effort.states_bytes(config, view.architecture, 8)
        pair.leave()


def test_what_is_not_done_is_not_counted(place: Place) -> None:
    config = make_config(TEXT | {"repair": {"method": "none"}})
    architecture = space().architecture
    assert effort.repairs_of(config, architecture) == [] and effort.repair_bytes(config, architecture) == 0
    assert effort.kept_bytes(config, architecture, 4) == effort.states_bytes(config, architecture, 4) == 0
    assert effort.policy_weights(config, space()) == effort.Effort()
    assert effort.policy_bytes(config, space(), 4) == 0
    told = {}
    for method in ("auto", "none"):
        given = settings("data.window=16", "search.sequences=640", f"repair.method={method}")
        told[method] = succeed("units", str(place.model), *given).out
    assert "5 repairs (ridge, ridge, ridge, ridge, two-step)" in told["auto"]
    assert "to fit weights to the policy" in told["auto"]
    assert "repairs" not in told["none"] and "to fit weights" not in told["none"]
