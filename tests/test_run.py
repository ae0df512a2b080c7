"""Runs end to end: what they leave, what every kind of search does, and that they repeat themselves."""

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from children import Child
from safetensors.torch import load_file
from tiny_models import random_tokens, tiny_model
from tiny_run import (
    CHANNELS,
    METHODS,
    NO_CHUNKS,
    PASSES,
    PASSES_OF,
    PROBE,
    REPOSITORY,
    SETTINGS,
    STEPS,
    WINDOW,
    Place,
    finish,
    in_one_sentence,
    read_json,
    run,
    same_run,
    settings,
    steps_of,
    succeed,
    tiny_text,
    without_times,
    words,
)
from tolerances import EXACT, assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from bernprune.config import make_config
from bernprune.data import text_fingerprint, tokenize
from bernprune.embedded import prose
from bernprune.models.loading import load_tokenizer
from bernprune.models.slicing import slice_model
from bernprune.models.view import count_parameters, describe
from bernprune.objective import masked_objective
from bernprune.policy.masks import Design
from bernprune.report import table
from bernprune.run import effort, finals, finishing, loop, reporting
from bernprune.run import stage as stage_module
from bernprune.run.checkpoint import read_state
from bernprune.run.plans import Learned, read_plan
from bernprune.run.searches import make_search
from bernprune.run.stage import set_stage
from bernprune.settings import merge, parse_settings, read_yaml
from bernprune.text import load_documents

STORIES = REPOSITORY.parent / "shared" / "models" / "stories260K"
STORIES_TEXT = REPOSITORY.parent / "shared" / "data" / "tinystories"
CHANNEL_PARAMETERS = 3 * 36


# --- what a run leaves ---


def test_the_report(finished: Path) -> None:
    """The figures agree with each other and with the files."""
    report = read_json(finished / "report.json")
    sparsity, parameters, search = report["sparsity"], report["parameters"], report["search"]
    assert sparsity["target"] == 0.3
    surplus = (sparsity["achieved"] - sparsity["target"]) * parameters["prunable"]
    assert -1e-6 <= surplus < CHANNEL_PARAMETERS, "the budget is met within one unit"
    removed = parameters["dense"] - parameters["pruned"]
    assert sparsity["block_parameters"] == pytest.approx(removed / parameters["prunable"])
    assert sparsity["total_parameters"] == pytest.approx(removed / parameters["dense"])
    weights = load_file(finished / "model" / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == parameters["pruned"]
    assert report["perplexity"].keys() == {"dense", "uniform", "initial", "pruned"}
    for name, value in report["perplexity"].items():
        assert math.isfinite(value) and value == pytest.approx(math.exp(report["loss"][name]))
    protocol = report["protocol"]
    assert (protocol["window"], protocol["windows"], protocol["tokens"]) == (WINDOW, 20, 20 * (WINDOW - 1))
    assert protocol["text"].endswith("held-out.txt")
    sequences = STEPS * PASSES + PROBE
    assert (search["sequences"], search["forward_tokens"], search["steps"]) == (sequences, sequences * WINDOW, STEPS)
    assert search["ended"].startswith("sequences") and search["kept"] == "learned"
    assert search["finals"].pop("ended").startswith("sequences: ")
    assert search["finals"] == {"sequences": 0, "heats": []} and report["plans"] == []
    last = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert report["diagnostics"] == last["round"]
    assert 0 < last["seconds"] <= search["seconds"] + 0.01  # which is rounded
    known = next(line for line in table(report).splitlines() if line.startswith("known "))
    assert f"channel {report['diagnostics']['agreement']['channel']:.2f}" in known
    assert f"{abs(report['diagnostics']['gap']):.3f} nats" in known
    assert f"knowing every unit would gain about {report['diagnostics']['regret']:.3f} nats;" in known
    less = report | {"diagnostics": report["diagnostics"] | {"gap": -0.07}}
    assert "masks lost 0.070 nats less than what would be selected" in table(less)
    del report["diagnostics"]["regret"]  # which policy gradients do not know
    assert "; sampled masks lost" in table(report) and "knowing every unit" not in table(report)
    assert report["verified"]["max_logit_difference"] == 0


def test_the_files(finished: Path) -> None:
    """The folder holds what its module says and nothing else, and every step has one line."""
    names = {path.name for path in finished.iterdir()}
    required = {"config.yaml", "metrics.jsonl", "plan.json", "model", "report.json", "checkpoints"}
    assert required <= names
    assert steps_of(finished) == list(range(STEPS))
    assert (finished / "plan.json").stat().st_size < 4096
    assert {"config.json", "model.safetensors", "tokenizer.json", "modeling_bernprune.py"} <= {
        path.name for path in (finished / "model").iterdir()
    }


def test_the_stored_config_is_the_config(finished: Path) -> None:
    """config.yaml names every setting, and reads back to an equal config."""
    stored = read_yaml(finished / "config.yaml")
    config = make_config(stored)
    assert config.to_dict() == stored and make_config(config.to_dict()) == config
    assert (
        config.search.sequences == STEPS * PASSES + PROBE
        and config.data.window == WINDOW
        and config.budget.sparsity == 0.3
    )


def timeless(report: dict[str, Any]) -> dict[str, Any]:
    search = {key: value for key, value in report["search"].items() if key != "seconds"}
    return {**report, "search": search, "latency": None}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_repeats_itself(method: str, prepared: Place, tmp_path: Path) -> None:
    """The same seed gives the same report but for times, the same plan and the same weights; another seed does not."""
    more = (*METHODS[method], "search.selection=0")  # so that what was learned decides
    for name in ("first", "again", "other"):
        (tmp_path / name).mkdir()
    first, again = (finish(prepared, tmp_path / name, *more) for name in ("first", "again"))
    other = finish(prepared, tmp_path / "other", *more, "seed=1")
    reports = [timeless(read_json(out / "report.json")) for out in (first, again)]
    reports[1]["protocol"]["text"] = reports[0]["protocol"]["text"]
    assert reports[0] == reports[1]
    same_run(again, first)
    weights, expected = (load_file(out / "model" / "model.safetensors") for out in (again, first))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    assert without_times(other / "metrics.jsonl") != without_times(first / "metrics.jsonl")


METRICS = {
    *("step", "sequences", "seconds", "dropped"),
    *("loss", "loss_spread", "advantage_spread", "largest_move", "expected_sparsity", "entropy"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_metrics_of_every_method(method: str, place: Place) -> None:
    """What all have, and what moves the policy: a falling learning rate, or rounds that are concluded in time."""
    succeed(*place.prune(*METHODS[method]))
    lines = [json.loads(line) for line in (place.out / "metrics.jsonl").read_text().splitlines()]
    own = {"learning_rate"} if method == "reinforce" else {"rounds", "reliability", "softness", "unread"}
    per_round, probe = (STEPS, 0) if method == "reinforce" else (2, PROBE)
    ends = [step % per_round == per_round - 1 for step in range(STEPS)]
    assert [line.keys() for line in lines] == [METRICS | own | ({"round"} if end else set()) for end in ends]
    rounds = [(step + 1) // per_round for step in range(STEPS)]
    assert [line["sequences"] for line in lines] == [
        PASSES_OF[method] * (s + 1) + probe * r for s, r in enumerate(rounds)
    ]
    if method == "reinforce":
        rates = [0.05 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
        assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    else:
        assert [line["rounds"] for line in lines] == rounds
        moved = [line["largest_move"] > 0 for line in lines]
        assert moved == ends, "the policy moves between rounds alone"
        assert all(0 < line["reliability"] <= 1 for line in lines[1:]) and lines[0]["reliability"] == 0


@pytest.mark.parametrize("objective", ["cross-entropy", "kl"])
def test_what_a_round_would_select_is_probed(objective: str, place: Place) -> None:
    """Its loss on the windows of the round's last step, and how far from it the masks of that step were."""
    succeed(*place.prune(f"search.objective={objective}"))
    stage = set_stage(make_config(read_yaml(place.out / "config.yaml")))
    last = json.loads((place.out / "metrics.jsonl").read_text().splitlines()[-1])
    with masked_objective(stage.view, kind=stage.config.search.objective) as probe:
        kept_U = Learned.read(place.out / "learned.safetensors").mask_U
        loss = probe.losses(kept_U[None], stage.train.batch(last["step"], 2)).item()
    assert last["round"]["selected_loss"] == pytest.approx(loss, rel=1e-6)
    assert last["round"]["gap"] == last["loss"] - last["round"]["selected_loss"]


def test_the_seed_is_that_of_masks_and_of_windows(place: Place) -> None:
    """Another seed draws other masks from the same policy, and reads the text in another order."""
    asked = []
    for seed in (0, 1, 0):
        config = {
            "model": {"path": str(place.model)},
            "data": {"text": str(place.text), "window": WINDOW},
            "seed": seed,
        }
        stage = set_stage(make_config(config))
        flat_U = torch.full((stage.view.space.size,), 0.7, dtype=torch.float64)
        search = make_search(stage.config, stage.budget, flat_U, flat_U[:, None])
        asked.append((search.ask(3)[:], stage.train.batch(3, 4)))
    for first, other, again in zip(*asked, strict=True):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_folder_that_another_process_made_meanwhile_is_left_alone(
    place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that comes second says so, and removes nothing of it."""
    arguments = ("apply", str(finished / "plan.json"), str(place.model), "applied")
    save = PreTrainedModel.save_pretrained

    def overtaken(self: PreTrainedModel, folder: Path, **given: Any) -> None:
        save(self, folder, **given)
        Path("applied").mkdir()
        Path("applied", "config.json").write_text("theirs")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", overtaken)
    assert "applied exists already" in in_one_sentence(run(*arguments))
    assert Path("applied", "config.json").read_text() == "theirs"
    assert [path.name for path in Path().iterdir() if path.name.startswith(".applied")] == []


def test_what_units_say_of_flops(place: Place) -> None:
    """Of them a sparsity is no share of the parameters."""
    for measure, said in (("flops", "sparsity 0.3 is of their FLOPs"), ("parameters", "% of all")):
        assert said in succeed("units", str(place.model), *settings("data.window=16", f"budget.measure={measure}")).out


def test_flops_that_are_asked_for_are_told(place: Place) -> None:
    """Of a run and of a plan; what else must go, too."""
    arguments = ["budget.measure=flops", "budget.sparsity=0.4", "budget.also_parameters=0.3", "search.sequences=0"]
    out = succeed(*place.prune(*arguments)).out
    sparsity = read_json(place.out / "report.json")["sparsity"]
    assert f", {sparsity['achieved']:.2%} of the prunable flops\n" in out and sparsity["achieved"] >= 0.4
    assert out.count("of the prunable parameters") == 0, "which are told first"
    told = succeed("select", str(place.out), "--sparsity=0.35").out
    found = re.search(r"removed .* parameters, (\S+)% of the prunable flops\n", told)
    assert found and float(found[1]) >= 35


def test_no_bar_stands_for_a_choice_that_is_not_made(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finals, "bar", lambda *_, **__: pytest.fail("a bar"))
    succeed(*place.prune("search.selection=0"))


def test_a_run_folder_is_told_from_what_lies_in_it(place: Place, finished: Path) -> None:
    """Where a model or a plan is asked for."""
    for arguments, said in {
        ("evaluate", str(finished)): f"the model that was made there is {finished / 'model'}",
        ("apply", str(finished), str(place.model), "new"): "is a folder; that of a run is the plan.json in it",
    }.items():
        assert said in in_one_sentence(run(*arguments))


def test_held_out_text_that_is_missing_is_told_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what is learned from, of which there is more, is read."""
    monkeypatch.setattr(stage_module, "learning_text", lambda *_: pytest.fail("it was read"))
    assert "nowhere.txt" in in_one_sentence(run(*place.prune("data.eval_text=nowhere.txt")))


def test_a_search_that_may_settle_is_forecast_at_most(place: Place) -> None:
    most, as_given = (
        succeed("units", str(place.model), *settings(f"data.window={WINDOW}", f"search.sequences={given}")).out
        for given in ("auto", 8192)
    )
    assert "time         at most about " in most and "time         about " in as_given


def test_output_that_was_closed_before_is_no_error(place: Place) -> None:
    """As of ``bernprune settings >&-``."""
    with TemporaryFile() as out:
        pass
    done = Child(["settings"], place.folder, out).ended()
    assert (done.err, done.code) == ("", 0)


def test_a_plan_applies_to_another_copy(place: Place, finished: Path) -> None:
    """plan.json and any copy of the model give the very weights that the run saved."""
    assert succeed("apply", str(finished / "plan.json"), str(place.model), "applied").err == ""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (Path("applied"), finished / "model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_evaluate_gives_the_figures_of_the_report(place: Place, finished: Path) -> None:
    """On the same text and window, for the dense and for the pruned model."""
    report, text = read_json(finished / "report.json"), str(finished.parent / "held-out.txt")
    same = ["--text", text, "--window", str(WINDOW), "--tokens", "320"]
    for name, folder in (("dense", place.model), ("pruned", finished / "model")):
        result = json.loads(succeed("evaluate", str(folder), *same, "--json").out)
        assert result["perplexity"] == pytest.approx(report["perplexity"][name], rel=1e-6)
        assert result["protocol"] == report["protocol"]
        assert result["parameters"] == report["parameters"][name]
    printed = succeed("evaluate", str(finished / "model"), *same).out
    assert f"{report['perplexity']['pruned']:.4f}" in printed and f"{report['parameters']['pruned']:,}" in printed


def test_evaluate_joins_rows_as_a_run_does(place: Place) -> None:
    """Told so, or else each row is a text of its own, which other tokens come of."""
    rows = "".join(json.dumps({"text": words(20, seed)}) + "\n" for seed in range(20))
    held_out = str(place.file("rows.jsonl", rows))
    report = report_of(place, "data.eval_join=' '", flags=("--eval-text", held_out))
    given = ["evaluate", str(place.model), "--text", held_out, "--window", str(WINDOW), "--tokens", "320", "--json"]
    joined, apart = (json.loads(succeed(*given, *more).out) for more in (("--join", " "), ()))
    assert joined["protocol"] == report["protocol"] != apart["protocol"]
    assert joined["perplexity"] == pytest.approx(report["perplexity"]["dense"], rel=1e-6)


def test_evaluate_reads_as_much_as_a_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default."""
    asked: list[dict[str, Any]] = []

    def stop(*_: Any, **named: Any) -> None:
        asked.append(named)
        raise KeyboardInterrupt

    monkeypatch.setattr("bernprune.evaluation.perplexity.evaluate", stop)
    run("evaluate", str(place.model))
    data = make_config({}).data
    assert asked == [{"window": data.window, "max_tokens": data.eval_tokens, "joined_by": data.eval_join}]


def test_units_prints_what_there_is(place: Place) -> None:
    """Units per layer and in all, their cost, what is left out, and what a run takes."""
    done = succeed("units", str(place.model), *settings(f"data.window={WINDOW}", "search.sequences=640"))
    rows = [line.split() for line in done.out.splitlines()]
    assert ["channel", str(CHANNELS), str(3 * CHANNELS), str(CHANNEL_PARAMETERS)] in [row[:4] for row in rows]
    assert ["kv_group", "3", "9", "1,728"] in [row[:4] for row in rows]
    assert all(word in done.out for word in ("left out", "memory", "time", "640 sequences")) and done.err == ""


def test_units_takes_what_prune_takes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A YAML file, which flags and --set win over."""
    seen: list[Any] = []
    monkeypatch.setattr("bernprune.cli.commands.forecast", lambda config: seen.append(config) or "done")
    file = place.file("run.yaml", "model: {path: model}\nsearch: {masks: 4}\ngranularity: [ffn]\nseed: 3\n")
    succeed("units", str(file), "--granularity", "channel", "--set", "seed=5")
    given = {"model": {"path": "model"}, "search": {"masks": 4}, "granularity": "channel", "seed": 5}
    assert seen == [make_config(given)]


@pytest.mark.parametrize(
    ("given", "evaluated", "seconds"),
    [
        ("repair.method=none", 4, [99.0, 1.0, 2.0, 3.0]),
        ("repair.method=bias", 5, [4.0, 2.0, 2.0, 2.0]),
        ("search.dtype=bfloat16", 5, [9.0, 2.0, 8.0]),
        ("repair.method=none", 4, [1.0, 10.0]),
    ],
)
def test_units_tells_the_time_of_whole_steps(
    given: str, evaluated: int, seconds: list[float], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of the dense model and of reading, beside each mask's, are counted too, as they are in the budget. The
    first of four steps warms up; when the others took ten seconds there is no more."""
    ticks = iter(itertools.chain.from_iterable((100.0, 100.0 + step) for step in seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(effort, "_rate", lambda *_: 1e12)  # which would take the time, too
    usual = ("search.objective=kl", "search.masks=3", "search.windows=2", f"data.window={WINDOW}", "repair.method=none")
    shown = succeed("units", str(place.model), *settings(*usual, given), "--set", "search.sequences=960").out
    each = statistics.fmean(seconds[1:]) / ((3 + 2) * 2)  # of three masks, the dense model and reading, on two windows
    speed = f"{1 / each:,.0f} a second" if each < 0.5 else f"{each:.1f} s each"
    assert f"about {960 * each:,.0f} s of search for 960 sequences" in shown and f"({speed}" in shown
    others = 128 + evaluated * (131_072 // WINDOW)  # scores, and the loss of each model on the evaluation text
    assert f"{others * each:,.0f} s or less of scoring and evaluation" in shown


def test_help_without_a_command() -> None:
    """``bernprune`` alone explains itself, and is no error."""
    done = run()
    assert done.code == 0 and done.err == "" and all(name in done.out for name in ("prune", "resume", "evaluate"))


# --- kinds of search ---


def report_of(place: Place, *more: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    done = succeed(*place.prune(*more), *flags)
    assert done.err == ""
    return read_json(place.out / "report.json")


def test_the_published_method(place: Place) -> None:
    """--preset paper: two masks on eight windows a step, and each kind of unit loses its own 30 %."""
    given = ("search.sequences=64", "search.masks=2", "search.windows=8", NO_CHUNKS)
    report = report_of(place, *given, flags=("--preset", "paper"))
    assert report["search"]["steps"] == 4 and report["search"]["sequences"] == 64
    kept = [sum(layer[name] for layer in report["layers"]) for name in ("kv_groups", "channels")]
    assert kept == [math.floor(0.7 * 9), math.floor(0.7 * 57)]


def test_without_a_search(place: Place) -> None:
    """search.sequences=0 is the metric alone: what is learned is what it began with."""
    report = report_of(place, "search.sequences=0")
    assert report["search"]["kept"] == "initial"
    assert report["search"]["changed_units"] == report["search"]["steps"] == report["search"]["sequences"] == 0
    assert report["perplexity"]["pruned"] == pytest.approx(report["perplexity"]["initial"], rel=1e-5)
    assert steps_of(place.out) == []
    told = table(report).splitlines()
    assert "learned" not in "".join(told) and "search       none, as search.sequences is 0" in told
    assert not any(line.startswith("kept         ") and "comes from" in line for line in told)
    report["search"]["kept"] = "uniform"  # as a judgement after repairs may find
    assert "kept         comes from the row 'metric, uniform': on text not learned from, it was the best" in table(
        report
    )


def test_text_that_was_learned_from_is_said_to_flatter(place: Place) -> None:
    done = succeed(*place.prune("search.sequences=0", f"data.eval_text={place.text}"))
    assert f"100% of {place.text} stands in {place.text}, too" in done.err


def test_only_what_is_judged_by_can_flatter(caplog: pytest.LogCaptureFixture) -> None:
    """The beginning of the evaluation text, ``data.eval_tokens`` of it."""
    known_N, unknown_N = torch.arange(500), 500 + torch.arange(1500)
    config = make_config({"data": {"text": "mine.txt", "eval_tokens": 500}})
    stage_module.warn_of_known(config, known_N, torch.cat([unknown_N, known_N]), "other.txt")
    assert not caplog.records
    stage_module.warn_of_known(config, known_N, torch.cat([known_N, unknown_N]), "other.txt")
    assert caplog.messages == [
        "100% of other.txt stands in mine.txt, too: perplexities flatter what is learned from that"
    ]


def test_of_the_embedded_text_it_is_known(caplog: pytest.LogCaptureFixture) -> None:
    """How much of its held-out part stands in the other; the README says it."""
    tokens_N = torch.arange(500)
    for text, told in (("embedded", False), ("mine.txt", True)):
        stage_module.warn_of_known(make_config({"data": {"text": text}}), tokens_N, tokens_N, "embedded, held out")
        assert bool(caplog.records) is told


def test_the_embedded_text_has_parts_of_its_own(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named as evaluation text or not, it is the held-out one, from which nothing is learned."""
    monkeypatch.setattr(prose, "_collected", prose._collected.__wrapped__)  # not kept
    monkeypatch.setattr(prose, "_roots", lambda: iter([REPOSITORY / "bernprune"]))  # which are few files
    tokenizer = load_tokenizer("embedded")
    few = {"eval_tokens": 256, "max_characters": 999}
    found, expected = (
        stage_module.read_texts(make_config({"data": few | given}), tokenizer, len(tokenizer))
        for given in ({"eval_text": "embedded"}, {})
    )
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])
    assert found[2] == expected[2] == "embedded, held out" and not caplog.records


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("limit", ["search.sequences=null", "search.sequences=20000"])
def test_a_search_stops_in_time(limit: str, place: Place) -> None:
    """search.seconds ends the search with the step at work, whether or not sequences are limited too."""
    search = report_of(place, limit, "search.seconds=0.36")["search"]
    assert search["steps"] == len(steps_of(place.out)) == 24, "the first that ends at 0.36 or later"
    assert search["seconds"] == pytest.approx(25 / 64, abs=0.005), "the end of its round took one more"


@pytest.mark.usefixtures("ticking")
def test_a_round_that_time_cuts_short_is_learned_from(place: Place) -> None:
    """Else a run could spend all of it and know nothing."""
    report = report_of(place, "search.sequences=20000", "search.seconds=0.1", "search.rounds=1")
    assert report["search"]["steps"] == 7 and report["search"]["given"] == 20000
    assert report["diagnostics"]["regret"] > 0
    records = [json.loads(line) for line in (place.out / "metrics.jsonl").read_text().splitlines()]
    assert ["round" in record for record in records] == [False] * (len(records) - 1) + [True]
    assert f"{report['search']['sequences']:,} of 20,000 sequences run forward" in table(report)
    state = read_state(max((place.out / "checkpoints").iterdir()))
    assert state["search"]["rounds"] == 1 and state["search"]["count"] == 0


def test_the_table_has_a_row_for_each_selection(finished: Path) -> None:
    """A start that is the uniform cut is not shown twice; what is kept is called learned only if it was."""
    report = json.loads((finished / "report.json").read_text())
    report["perplexity"] |= {"uniform": 20.5, "initial": 30.25}
    for kept, last in (("learned", "learned"), ("widths", "learned"), ("initial", "kept")):
        report["search"]["kept"] = kept
        assert ("the best by the metric" in table(report)) is (kept == "widths")
        titles = [line[:16].strip() for line in table(report).splitlines()[1:5]]
        assert titles == ["dense", "metric, uniform", "initial metric", last]
    report["perplexity"]["initial"] = 20.5
    assert [line[:16].strip() for line in table(report).splitlines()[1:5]] == ["dense", "initial metric", "kept", ""]


@pytest.mark.parametrize("needs_reference", [False, True])
@pytest.mark.parametrize("design", [Design(1, 3), Design(2, 3), Design(2, 3, 4)], ids=str)
def test_masks_meet_their_windows(design: Design, needs_reference: bool) -> None:
    """One for a whole batch is evaluated on all of it, others on their own window; the reference is on every window."""
    view, tokens_BT = describe(tiny_model("llama")), random_tokens(2, 8)
    shape = design.groups, design.masks, design.chunks, view.space.size
    masks_BKCU = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
    reference_U = torch.arange(view.space.size) % 3 > 0
    search: Any = SimpleNamespace(design=design, needs_reference=needs_reference, needs_reading=False)
    with masked_objective(view) as objective:
        losses_BKC, reference_BC, _ = loop.evaluate_step(objective, search, masks_BKCU, tokens_BT, reference_U)
        for group in range(design.groups):
            text = tokens_BT if design.groups == 1 else tokens_BT[group : group + 1]
            wanted = masks_BKCU[group].expand(len(text), -1, -1, -1)
            assert_close(losses_BKC[group], objective.chunk_shares(wanted, text).mean(0), EXACT)
            if reference_BC is not None:
                wanted = reference_U.expand(len(text), 1, design.chunks, -1)
                assert_close(reference_BC[group], objective.chunk_shares(wanted, text).mean(0)[0], EXACT)
    assert (reference_BC is not None) == needs_reference
    assert losses_BKC.shape == masks_BKCU.shape[:3]


def test_channel_multiples_reach_the_saved_model(place: Place) -> None:
    """budget.channel_multiple=4: each layer of the loaded folder has a multiple of 4 channels; the budget holds."""
    report = report_of(place, "budget.channel_multiple=4")
    model = AutoModelForCausalLM.from_pretrained(place.out / "model")
    widths = [layer.mlp.gate_proj.out_features for layer in model.model.layers]
    assert all(width % 4 == 0 and width > 0 for width in widths)
    assert widths == [layer["channels"] for layer in report["layers"]]
    assert report["sparsity"]["achieved"] >= 0.3


def test_all_levels_at_once(place: Place) -> None:
    """All five granularities: half of the model goes, it loads, generates, and is worth what the report says."""
    everything = "granularity=layer,attention,kv_group,ffn,channel"
    held_out = str(tiny_text(place.folder / "held-out.txt", seed=1))
    others = f"plans.sparsities={[0.3, 0.35, 0.4, 0.45, 0.55, 0.6, 0.65]}"
    report = report_of(place, everything, others, flags=("--sparsity", "0.5", "--eval-text", held_out))
    assert 0.5 <= report["sparsity"]["achieved"] < 0.6
    for plan in report["plans"]:  # where blocks are kept with nothing in them, too
        dense = AutoModelForCausalLM.from_pretrained(place.model)
        left = count_parameters(slice_model(dense, read_plan(place.out / "plans" / plan["plan"])))
        removed = (report["parameters"]["dense"] - left) / report["parameters"]["prunable"]
        assert plan["removed"] == pytest.approx(removed, abs=1e-9)
    folder = str(place.out / "model")
    same = ["--text", held_out, "--window", str(WINDOW), "--tokens", "320", "--json"]
    result = json.loads(succeed("evaluate", folder, *same).out)
    assert result["perplexity"] == pytest.approx(report["perplexity"]["pruned"], rel=1e-6)
    tokens = torch.arange(5, 9)[None]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with_cache, without = (
        model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("kind", ["layer", "attention", "kv_group", "ffn", "channel"])
def test_each_level_alone(kind: str, place: Place) -> None:
    """Every granularity is a run by itself."""
    report = report_of(place, f"granularity={kind}", "budget.sparsity=0.4")
    assert report["sparsity"]["achieved"] >= 0.4 and math.isfinite(report["perplexity"]["pruned"])


def test_the_held_out_tenth_is_not_learned_from(place: Place) -> None:
    """With one text, evaluation has the last tenth of its tokens, and search and metric have none of them."""
    config = make_config({"model": {"path": str(place.model)}, "data": {"text": str(place.text), "window": WINDOW}})
    stage = set_stage(config)
    tokenizer = load_tokenizer(str(place.model))
    stream = tokenize(tokenizer, load_documents(str(place.text), split="train"), vocab_size=10**6)
    cut = len(stream) * 9 // 10
    learned, held_out = stream[:cut], stream[cut:]
    assert stage.text_sha256 == text_fingerprint(learned)
    assert torch.equal(stage.eval_windows_WT.flatten(), held_out[: stage.eval_windows_WT.numel()])
    assert stage.train.num_windows == cut // WINDOW
    epoch = stage.train.batch(0, stage.train.num_windows)
    expected = learned[: epoch.numel()].view(-1, WINDOW)
    assert sorted(epoch.tolist()) == sorted(expected.tolist())
    assert "last tenth" in stage.protocol.text


@pytest.mark.parametrize(
    ("more", "kept_back"),
    [
        (("search.sequences=400",), False),  # about 50 windows to learn from
        (("search.sequences=3600",), True),  # enough to learn from, but not to choose on as well
        (("search.sequences=40000",), True),
        (("search.sequences=40000", "search.selection=0"), False),
        (("search.sequences=null", "search.seconds=1"), True),
        (("search.sequences=0",), False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_text_is_kept_back_where_all_else_may_be_learned_from(
    more: tuple[str, ...], kept_back: bool, place: Place
) -> None:
    """A tenth of it at most, which neither the search nor the metric sees; otherwise the choice reads on."""
    tiny_text(place.text, 3000)
    given = parse_settings([*SETTINGS, "search.masks=8", "search.selection=0.1", *more])
    stage = set_stage(
        make_config(merge({"model": {"path": str(place.model)}, "data": {"text": str(place.text)}}, given))
    )
    assert (stage.kept_back is not None) == kept_back
    if stage.kept_back is not None:
        ends = (stage.train._stream_N, stage.kept_back._stream_N)
        tokenizer = load_tokenizer(str(place.model))
        stream = tokenize(tokenizer, load_documents(str(place.text), split="train"), vocab_size=10**6)
        assert torch.equal(torch.cat(ends), stream[: len(stream) * 9 // 10])
        assert 0 < len(ends[1]) <= len(stream) / 10
        learned = {tuple(window) for window in ends[0].unfold(0, WINDOW, 1).tolist()}
        assert {tuple(window) for window in stage.initial_windows_WT.tolist()} <= learned


def test_several_scores_of_a_start(place: Place) -> None:
    """Each in a column of its own, in the order asked for, as it is alone; the first starts the policy."""
    names = ["magnitude", "wanda-sp", "flap"]
    found = []
    for score, also in (("magnitude", "[wanda-sp, flap]"), *((name, "[]") for name in names)):
        out = place.folder / f"{score}-{also}"
        succeed(*place.prune("search.sequences=0", f"initial.score={score}", f"initial.also={also}", out=out))
        found.append(read_state(out / "initial.safetensors"))
    together, *alone = found
    assert torch.equal(together["scores_US"], torch.cat([start["scores_US"] for start in alone], dim=1))
    assert torch.equal(together["probs_U"], alone[0]["probs_U"])


def test_too_little_text_to_keep_back_is_said(place: Place) -> None:
    """And the run goes on."""
    tiny_text(place.text, 120)
    done = succeed(*place.prune("search.sequences=400", "search.selection=0.5", "search.final_windows=2"))
    assert "are too few to keep some back" in done.err
    given = ("search.sequences=0", "search.selection=0.5", "search.final_windows=4000")
    assert succeed(*place.prune(*given, out=place.folder / "unsearched")).err == ""  # nothing is learned from


# --- as a user starts it ---


def test_an_ordinary_command(place: Place) -> None:
    """In its own process: a table on stdout, nothing on stderr, verified by a clean load, in out/MODEL-SPARSITY."""
    arguments = place.prune()
    index = arguments.index("--out")
    command = [sys.executable, "-m", "bernprune", *arguments[:index], *arguments[index + 2 :]]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    report = read_json(place.folder / "out" / "model-0.3" / "report.json")
    assert report["verified"]["max_logit_difference"] == 0
    assert (place.folder / "out" / "model-0.3" / "report.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.split() for line in done.stdout.splitlines()]
    shown = {line[0]: line for line in lines if line}
    last = "learned" if report["search"]["kept"] in ("learned", "widths") else "kept"
    for row, name in (("dense", "dense"), (last, "pruned")):
        assert shown[row][1:3] == [f"{report['perplexity'][name]:.3f}", f"{report['parameters'][name]:,}"]
    assert shown["result"] == ["result", "out/model-0.3/model"]


@pytest.mark.parametrize("command", ["units", "--help"])
def test_nobody_reads_on(command: str, place: Place) -> None:
    """``bernprune units | head -1`` ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    given = [str(place.model), *settings(f"data.window={WINDOW}")] if command == "units" else []
    with open(write, "wb") as out:
        done = Child([command, *given], place.folder, out).ended()
    assert (done.err, done.code) == ("", 141)


def test_a_full_disk_behind_stdout_costs_no_result(place: Place, finished: Path) -> None:
    """It is said where that lies."""
    with open("/dev/full", "wb") as out:
        done = Child(["resume", str(finished)], place.folder, out).ended()
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"No space left on device; the run in {finished} is finished, and its result lies in" in done.err


# Settings of a short search, and the share of the initial perplexity that it must reach.
LEARNING = {
    "posterior": (("search.sequences=1280", "search.rounds=4"), 0.95),
    "reinforce": (("preset=reinforce", "search.sequences=3840", "search.selection=0"), 0.98),
}


@pytest.mark.skipif(not STORIES.is_dir() or not STORIES_TEXT.is_dir(), reason=f"no {STORIES} or {STORIES_TEXT}")
@pytest.mark.parametrize(("given", "share"), LEARNING.values(), ids=LEARNING)
def test_a_real_model_gets_better_by_learning(given: tuple[str, ...], share: float, place: Place) -> None:
    """stories260K at 30 %: a short search already beats the metric it starts from on held-out text."""
    small = ("data.max_characters=400000", "data.eval_tokens=8192", "report.latency_repeats=2", "repair.method=none")
    where = ["--model", str(STORIES), "--text", str(STORIES_TEXT / "train.jsonl"), "--out", str(place.out)]
    succeed("prune", *where, "--eval-text", str(STORIES_TEXT / "valid.jsonl"), *settings(*small, *given))
    report = read_json(place.out / "report.json")
    perplexities = report["perplexity"]
    assert perplexities["dense"] < perplexities["pruned"] < share * perplexities["initial"]
    assert report["search"]["kept"] in ("learned", "widths")
    assert report["sparsity"]["achieved"] == pytest.approx(0.3, abs=0.001)


# What is reported


def test_each_row_is_of_its_own_mask(prepared: Place) -> None:
    data = {"text": str(prepared.text), "window": WINDOW, "eval_tokens": 320}
    stage = set_stage(make_config({"model": {"path": str(prepared.model)}, "data": data}))
    masks = {
        name: torch.rand(stage.view.space.size, generator=torch.Generator().manual_seed(seed)) < 0.7
        for seed, name in enumerate(("uniform", "initial"))
    }
    found = reporting.losses_by_metric(stage, None, masks)
    assert {name: reporting.mask_loss(stage, mask_U, "") for name, mask_U in masks.items()}.items() <= found.items()
    assert len(set(found.values())) == 3


def test_each_latency_is_of_its_own_model(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over as many rows, and as often, as was asked for."""
    timed, latency = [], finishing.latency

    def noted(model: Any, rows: Any, **given: Any) -> Any:
        timed.append((count_parameters(model), len(rows), given))
        return latency(model, rows, **given)

    monkeypatch.setattr(finishing, "latency", noted)
    given = ("initial.score=flap", "report.initial_latency=true", "report.latency_rows=3", "report.latency_repeats=4")
    succeed(*place.prune(*given))
    report = read_json(place.out / "report.json")
    assert timed == [(report["parameters"][name], 3, {"repeats": 4}) for name in ("dense", "pruned", "initial")]
    assert all((figure["rows"], figure["repeats"]) == (3, 4) for figure in report["latency"].values())


def test_shares_and_counts_are_those_of_the_report(place: Place) -> None:
    """As a run, ``apply`` and ``units`` print them."""
    out = succeed(*place.prune("search.sequences=0")).out
    report = read_json(place.out / "report.json")
    assert f"{report['sparsity']['total_parameters']:.2%} of all parameters" in out
    told, counts = succeed("apply", str(place.out / "plan.json"), str(place.model), "applied").out, report["parameters"]
    assert f"{counts['dense']:,} before, {counts['pruned']:,} after" in told
    units = succeed("units", str(place.model), *settings(f"data.window={WINDOW}")).out
    rows = {line.split()[0]: line.split() for line in units.splitlines() if line.strip()}
    shares = [float(rows[kind][4].rstrip("%")) for kind in ("channel", "kv_group")]
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert f"sparsity 0.3 removes {0.3 * counts['prunable'] / counts['dense']:.1%} of all" in units
