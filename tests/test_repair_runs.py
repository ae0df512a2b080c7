"""Repair within a run, and where a plan is applied: what is saved, what is told, and what is refused in time."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import WINDOW, Place, hurry, in_one_sentence, read_json, run, same_run, settings, succeed, tiny_text
from transformers import AutoModelForCausalLM

from bernprune.backends import load_backend
from bernprune.config import make_config
from bernprune.data import TokenWindows
from bernprune.models.loading import load_model
from bernprune.models.view import describe
from bernprune.objective import masked_objective
from bernprune.repair import repairing
from bernprune.repair.fitting import Fitter
from bernprune.report import table
from bernprune.run import pipeline, repairs, workload
from bernprune.run.folder import RunFolder
from bernprune.run.opening import open_model, open_tokenizer
from bernprune.run.plans import Learned
from bernprune.run.repairs import Workshop, repair_text
from bernprune.run.stage import set_stage
from bernprune.units import KeepPlan

WINDOWS = 60
METHODS: dict[str, tuple[str, ...]] = {
    "bias": (),
    "ridge": ("repair.target=own",),
    "two-step": ("repair.biases=always",),
    "scale": (),
    "admm": ("repair.target=dense",),
    "auto": (),
}


def repairing_by(method: str, *more: str) -> tuple[str, ...]:
    return (f"repair.method={method}", f"repair.windows={WINDOWS}", *more)


def end(prepared: Place, folder: Path, *more: str) -> Path:
    """As ``finish``, whatever is said of a repair that makes things worse, as it may with so little text."""
    held_out = tiny_text(folder / "held-out.txt", 400, seed=9)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        succeed(*prepared.prune(*more, out=folder / "out"), "--eval-text", str(held_out))
    return folder / "out"


@pytest.mark.parametrize("method", METHODS)
def test_a_run_repairs_what_it_keeps(method: str, prepared: Place, tmp_path: Path) -> None:
    """The saved model has the loss that the report tells, and biases where they were asked for."""
    out = end(prepared, tmp_path, *repairing_by(method, *METHODS[method]))
    report = read_json(out / "report.json")
    repair, losses = report["repair"], report["loss"]
    assert (repair["method"], repair["windows"], repair["judging_windows"]) == (method, WINDOWS, WINDOWS)
    assert repair["chosen"] in (("none", "ridge", "two-step") if method == "auto" else (method,))
    assert len(repair["layers"]) == (3 if repair["chosen"] != "none" else 0)
    assert set(repair["losses"]) == ({"none", "ridge", "two-step"} if method == "auto" else {"none", method})
    assert all(math.isfinite(loss) for loss in repair["losses"].values()) and repair["seconds"] >= 0
    weights = load_file(out / "model" / "model.safetensors")
    assert any(name.endswith("o_proj.bias") for name in weights) == (method in ("bias", "two-step"))
    shown = table(report)
    names = [line.split()[0] for line in shown.partition("\n\n")[0].splitlines()[1:]]
    assert f"repair       {repair['chosen']}" in shown and (names[-1] == "repaired") == (repair["chosen"] != "none")
    if repair["chosen"] == "none":
        assert losses["pruned"] == pytest.approx(losses["unrepaired"], rel=1e-5)
    else:
        assert abs(losses["pruned"] - losses["unrepaired"]) > 1e-6
    evaluated = succeed(
        "evaluate", str(out / "model"), "--text", report["protocol"]["text"], "--window", str(WINDOW), "--tokens", "320"
    )
    assert f"({losses['pruned']:.4f} nats" in evaluated.out


def test_without_repair_nothing_is_told_of_it(finished: Path) -> None:
    report = read_json(finished / "report.json")
    assert report["repair"] == {"method": "none"} and "unrepaired" not in report["perplexity"]
    assert "repair" not in table(report)


def test_an_interrupted_repair_is_repeated(prepared: Place, place: Place, tmp_path: Path) -> None:
    whole = end(prepared, tmp_path, *repairing_by("two-step"))
    held_out, last, left = tiny_text(place.folder / "held-out.txt", 400, seed=9), Fitter.last, [3]

    def interrupted(fitter: Any, at: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return last(fitter, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fitter, "last", interrupted)
        done = run(*place.prune(*repairing_by("two-step")), "--eval-text", str(held_out))
    assert done.code == 130 and "bernprune resume" in done.err
    assert not (place.out / "model").exists() and not (place.out / "report.json").exists()
    succeed("resume", str(place.out))
    same_run(place.out, whole)
    found, expected = (load_file(out / "model" / "model.safetensors") for out in (place.out, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_repair_may_change_on_the_way(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Fitter, "last", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*place.prune(*repairing_by("ridge")))
    succeed("resume", str(place.out), *settings("repair.method=none", "repair.windows=null"))
    assert read_json(place.out / "report.json")["repair"].keys() == {"method", "finalists", "judging_windows"}


def test_finalists_are_judged_by_what_repair_makes_of_them(
    prepared: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def prefer(workshop: Any, plans: dict[str, Any], path: Path) -> tuple[str, dict[str, float]]:
        asked.append(list(plans))
        return "initial", dict.fromkeys(plans, 1.0)

    monkeypatch.setattr(pipeline.Workshop, "prefer", prefer)
    out = end(prepared, tmp_path, *repairing_by("ridge", "repair.judge_finalists=true"))
    report = read_json(out / "report.json")
    assert asked[0][0] == "learned" and "initial" in asked[0]
    assert report["search"]["kept"] == "initial" and report["repair"]["finalists"].keys() == set(asked[0])
    assert report["loss"]["unrepaired"] == pytest.approx(report["loss"]["initial"], rel=1e-6)
    view = describe(load_model(str(prepared.model)))
    plan = KeepPlan.from_dict(read_json(out / "plan.json"))
    learned, config = Learned.read(out / "learned.safetensors"), RunFolder(out).read_config()
    with masked_objective(view) as objective:
        eval_WT = set_stage(config).eval_windows_WT
        loss = objective.losses(view.space.mask(plan)[None], eval_WT).item()
    assert report["loss"]["unrepaired"] == pytest.approx(loss, rel=1e-6)
    assert learned.mask_U.equal(view.space.mask(plan))
    assert learned.select(config, config.budget.sparsity).equal(learned.mask_U)


def test_a_finalist_is_repaired_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the run was interrupted after that, if the repair is the same; and it ends as if it had not been."""
    given = repairing_by("ridge", "repair.judge_finalists=true")
    whole = place.folder / "whole"
    succeed(*place.prune(*given, out=whole))
    finalists, tried = read_json(whole / "report.json")["repair"]["finalists"], list[str]()
    judge = Workshop._loss_repaired

    def once(self: Workshop, name: str, plan: KeepPlan) -> tuple[float, bool]:
        if len(tried) % 2:  # the second one of each attempt
            tried.append(name)
            raise KeyboardInterrupt
        tried.append(name)
        return judge(self, name, plan)

    monkeypatch.setattr(Workshop, "_loss_repaired", once)
    assert len(finalists) > 2
    assert run(*place.prune(*given)).code == 130
    codes = [run("resume", str(place.out)).code for _ in list(finalists)[1:]]
    assert codes[-1] == 0 and sorted(tried) == sorted([*finalists, *list(finalists)[1:]])
    same_run(place.out, whole)
    assert read_json(place.out / "report.json")["repair"]["finalists"] == finalists
    tried.clear()
    (place.out / "report.json").unlink()
    assert run("resume", str(place.out), *settings("repair.ridges=[0.5]")).code == 130 and len(tried) == 2


def test_nothing_is_kept_before_it_is_judged(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that may yet change is not one: neither to be applied, nor to select from."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Workshop, "prefer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*place.prune(*repairing_by("ridge", "repair.judge_finalists=true")))
    assert not (place.out / "plan.json").exists()
    assert "learned.safetensors is missing" in in_one_sentence(run("select", str(place.out), "--sparsity=0.2"))
    succeed("resume", str(place.out))
    assert succeed("select", str(place.out), "--sparsity=0.2").err == ""


def workshop_at(place: Place, kept_back: TokenWindows | None = None, method: str = "ridge") -> Workshop:
    """Of the tiny model, on the text of a run."""
    given = {"path": str(place.model)}, {"text": str(place.text), "window": WINDOW}
    config = make_config({"model": given[0], "data": given[1], "repair": {"method": method, "windows": WINDOWS}})
    model = open_model(config, torch.device("cpu"))
    stream_N = repair_text(config, open_tokenizer(config), model.config)
    view, train = describe(model), TokenWindows(stream_N, window=WINDOW, seed=config.seed)
    return Workshop.of(config, view, train, load_backend("torch", model.device), 4, kept_back)


def plans_of(workshop: Workshop) -> dict[str, KeepPlan]:
    """One that keeps a single unit of a kind in a layer, and one that keeps all."""
    space = workshop.repairer.view.space
    few_U, many_U = torch.zeros(2, space.size, dtype=torch.bool)
    many_U[:] = True
    for layer in range(len(space.architecture.layers)):
        for kind in ("kv_group", "channel"):
            few_U[space.span(kind, layer).start] = True  # type: ignore[arg-type, union-attr]
    return {"few": space.plan(few_U), "many": space.plan(many_U)}


def test_what_judges_a_repair_was_not_fitted_on(prepared: Place) -> None:
    """Windows that nothing was learned from if there are any; else others of those that were."""
    kept_back = TokenWindows(torch.arange(5 * WINDOW) % 7, window=WINDOW, seed=1)
    plain, held = workshop_at(prepared), workshop_at(prepared, kept_back)
    fitted = {tuple(window_T.tolist()) for window_T in plain.repairer.windows_WT}
    assert len(fitted) == WINDOWS and fitted.isdisjoint(tuple(window_T.tolist()) for window_T in plain.judging_WT)
    assert len(plain.judging_WT) == WINDOWS
    assert torch.equal(held.judging_WT, kept_back.windows(0, 5))
    assert torch.equal(held.repairer.windows_WT, plain.repairer.windows_WT)


@pytest.mark.parametrize("available", [12, 40, 1100, 2000, 2900, 3006, 3007, 5000])
def test_text_is_shared_out(available: int) -> None:
    """What there is goes into the fit, but for what judges: at most what is meant to, and a quarter of little text."""
    train, wanted = TokenWindows(torch.arange(available * 4) % 7, window=4, seed=1), 2751
    fitted_WT, judging_WT = repairs._shared_out(train, None, wanted, 0)
    most = repairs.judging_windows(wanted)
    assert len(judging_WT) == (
        most if available >= wanted + most else min(most, max(repairs.LEAST_JUDGING, available // 4))
    )
    assert len(fitted_WT) == min(wanted, available - len(judging_WT))


def test_finalists_are_repaired_on_less(prepared: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first of the windows that what is kept is repaired on."""
    read, repair = list[torch.Tensor](), repairing.Repairer.repair

    def watched(repairer: Any, plan: KeepPlan, method: Any) -> Any:
        read.append(repairer.windows_WT)
        return repair(repairer, plan, method)

    monkeypatch.setattr(workload, "FITTING_WINDOWS", 3)
    monkeypatch.setattr(repairing.Repairer, "repair", watched)
    workshop = workshop_at(prepared)
    plan = plans_of(workshop)["many"]
    workshop.prefer({"many": plan})
    report = workshop.repair(plan)
    assert [len(windows_WT) for windows_WT in read] == [23, WINDOWS]
    assert torch.equal(read[0], read[1][:23]) and report["finalist_windows"] == 23


def test_what_judges_has_a_limit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what a search leaves alone for it, whatever a repair is fitted on."""
    with monkeypatch.context() as patch:
        patch.setattr(workload, "MOST_JUDGING", 20)
        assert len(workshop_at(place).judging_WT) == 20
    tiny_text(place.text, 6000)
    given = {"path": str(place.model)}, {"text": str(place.text), "window": WINDOW}
    stages = []
    for most in (256, 33):
        monkeypatch.setattr(workload, "MOST_JUDGING", most)
        stage = set_stage(make_config({"model": given[0], "data": given[1], "search": {"sequences": 12_000}}))
        workshop = Workshop.of_stage(stage)
        assert stage.kept_back is not None
        stages.append((stage.kept_back.num_windows, len(workshop.judging_WT)))
    assert stages[1] == (33, 33) and min(stages[0]) > 33


@pytest.mark.parametrize(("sequences", "kept_back"), [(900, False), (12_000, True)], ids=["some", "all of it"])
def test_finalists_are_judged_on_text_that_was_not_learned_from(sequences: int, kept_back: bool, place: Place) -> None:
    """What the search does not come to or, where it reads all, what is kept back from it."""
    tiny_text(place.text, 6000)
    search = {"masks": 3, "windows": 2, "chunk": 4, "sequences": sequences}
    given = {"path": str(place.model)}, {"text": str(place.text), "window": WINDOW}
    stage = set_stage(make_config({"model": given[0], "data": given[1], "search": search, "repair": {"windows": 6}}))
    workshop = Workshop.of_stage(stage)
    assert stage.workload.steps is not None
    read_WT = stage.train.windows(0, 2 * stage.workload.steps)
    read, judging = ({tuple(row_T.tolist()) for row_T in rows_WT} for rows_WT in (read_WT, workshop.judging_WT))
    assert (stage.kept_back is not None) == kept_back and (len(read_WT) > stage.train.num_windows) == kept_back
    assert len(judging) == len(workshop.judging_WT) == 6 and read.isdisjoint(judging)
    assert {tuple(row_T.tolist()) for row_T in workshop.repairer.windows_WT} <= read
    if not kept_back:  # a search that was ended earlier leaves more
        earlier = Workshop.of_stage(stage, 4)
        assert torch.equal(earlier.judging_WT, stage.train.windows(8, 6))


@pytest.mark.parametrize(
    ("ahead", "preferred"),
    [(0.1, "many"), (0.0, "few"), (-0.1, "few"), (math.nan, "few"), (-math.inf, "few")],
)
def test_the_best_after_repair_is_kept_and_nothing_is_left_of_the_others(
    ahead: float, preferred: str, prepared: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = workshop_at(prepared)
    before = {name: parameter.clone() for name, parameter in workshop.repairer.view.model.named_parameters()}
    plans, first_W = plans_of(workshop), torch.full((4,), 5.0, dtype=torch.float64)
    losses = {plans["few"]: first_W, plans["many"]: first_W - ahead}
    monkeypatch.setattr(Workshop, "losses", lambda _, plan: losses[plan])
    best, told = workshop.prefer(plans)
    expected = losses[plans["many"]].mean().item()
    assert best == preferred and told == {"few": 5.0, "many": expected if math.isfinite(expected) else None}
    parameters = dict(workshop.repairer.view.model.named_parameters())
    assert all(torch.equal(parameters[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("repair.method=ridge", "repair.windows=4"), "too short for repair 'ridge'.*4 windows of 16 tokens, but 7"),
        (("repair.method=bias", "repair.biases=never"), "'bias' needs biases.*llama model has not"),
        (("repair.method=none", "repair.windows=4"), "repair.windows has no meaning for repair.method 'none'"),
        (("repair.method=bias", "repair.ridges=[1]"), "repair.ridges has no meaning for repair.method 'bias'"),
        (("repair.method=ridge", "repair.ridges=[0]"), "greater than 0"),
        (("repair.method=glue",), "'repair.method'.*'bias'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(more: tuple[str, ...], message: str, place: Place) -> None:
    done = run(*place.prune(*more))
    assert re.search(message, in_one_sentence(done)), done.err
    assert not place.out.exists()


def test_a_plan_is_applied_with_repair(place: Place) -> None:
    """On the text that is named, declared to whoever loads it."""
    succeed(*place.prune())
    plan, more = str(place.out / "plan.json"), settings("data.window=16", f"repair.windows={WINDOWS}")
    arguments = ("apply", plan, str(place.model))
    bare = succeed(*arguments, str(place.folder / "bare"))
    assert "repair" not in bare.out
    done = succeed(*arguments, str(place.folder / "new"), "--repair", "bias", "--text", str(place.text), *more)
    assert f"repair       bias, from {WINDOWS} windows" in done.out
    config = read_json(place.folder / "new" / "config.json")
    assert config["bernprune"]["added_biases"]
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        found, without = (
            AutoModelForCausalLM.from_pretrained(place.folder / name)(input_ids=tokens).logits
            for name in ("new", "bare")
        )
    assert (found - without).abs().max() > 1e-6
    for given in (["--text", str(place.text)], ["--set", "data.window=16"]):
        refused = run(*arguments, str(place.folder / "other"), *given)
        assert "the text (--text, data) is that of a repair" in in_one_sentence(refused)
    assert not (place.folder / "other").exists()


@pytest.mark.parametrize(
    ("dead", "repair", "tried"),
    [("up_proj", "auto", {"none", "ridge", "two-step"}), ("down_proj", "scale", {"none", "scale"})],
)
def test_a_branch_that_does_nothing_is_no_obstacle(dead: str, repair: str, tried: set[str], place: Place) -> None:
    """Inputs or weights that are all zero, as in expanded models: no method fails of them."""
    changed = place.copied()
    tensors = load_file(changed / "model.safetensors")
    tensors[f"model.layers.1.mlp.{dead}.weight"].zero_()
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    succeed(*place.prune(f"repair.method={repair}", model=changed))
    assert set(read_json(place.out / "report.json")["repair"]["losses"]) == tried


def test_auto_makes_do_with_little_text(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tries what the text suffices for, and the run goes on."""
    tried: list[Any] = []
    repair = repairing.Repairer.repair
    monkeypatch.setattr(
        repairing.Repairer, "repair", lambda self, plan, method: tried.append(method) or repair(self, plan, method)
    )
    done = run(*place.prune("repair.method=auto", "repair.windows=4"))
    assert done.code == 0 and done.err.count("too short for repair") == 2 and set(tried) == {"scale"}


def test_a_repair_that_raises_the_loss_is_told(
    prepared: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was asked for by name, and is done."""
    workshop, told = workshop_at(prepared), iter([1.0, 2.0])
    monkeypatch.setattr(Workshop, "losses", lambda *_: torch.tensor([next(told)]))
    workshop.repair(plans_of(workshop)["many"])
    assert "raised the loss from 1.0000 to 2.0000" in caplog.text
