"""Metrics of one's own by the place where they stand, and fusions of metrics that one chooses."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_tokens, tiny_model
from tiny_run import Place, in_one_sentence, read_json, run, succeed

from bernprune.config import make_config
from bernprune.errors import ConfigError, ModelError
from bernprune.models.view import describe
from bernprune.run.checkpoint import read_state
from bernprune.run.initial import check_scores, check_scoring, scoring_sequences
from bernprune.scores import SCORES, LayerPass, Metric, Options, by_layer, initial_scores, metric_named
from bernprune.scores.fusion import group_ranks
from bernprune.settings import absolute

WINDOWS = "--set=data.window=16"
OWN = """
from pathlib import Path

import torch

from bernprune.scores import Metric, Projection, by_column

Path(__file__).with_suffix(".executed").open("a").write("once ")
number = 3


def like_magnitude(projection: Projection) -> torch.Tensor:
    return projection.weight_DE.square().sum(0)


pooled = Metric("pooled", "squares", "ours", by_column(like_magnitude), allocation="pooled")

"""
NOTING = (
    OWN
    + """

def noted(value):
    def run(context):
        context.notes["sure"] = value
        return pooled.run(context)

    return Metric("noted", "squares", "ours", run)


def fails(view, windows_WT):
    return view.nothing


tensor, text, endless = noted(torch.tensor(2.5)), noted("very"), noted(float("inf"))
needy = Metric("needy", "squares", "ours", pooled.run, needs=fails)
"""
)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with a function of columns and a metric."""
    path = tmp_path / "my_scores.py"
    path.write_text(OWN)
    return path


def test_a_function_in_a_file_starts_a_run(own: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the metric that it equals does, also for the one who resumes elsewhere; the file is executed once."""
    monkeypatch.chdir(own.parent)
    starts = []
    for score in ("magnitude", "my_scores.py:like_magnitude"):
        out = place.folder / score.partition(":")[0]
        succeed(*place.prune(f"initial.score={score}", "search.sequences=0", out=out))
        starts.append(read_state(out / "initial.safetensors"))
    assert torch.equal(starts[0]["probs_U"], starts[1]["probs_U"])
    assert f"score: {own}:like_magnitude\n" in (out / "config.yaml").read_text()
    assert own.with_suffix(".executed").read_text() == "once "
    told = succeed("scores", str(place.model), "--text", str(place.text), "--score", f"{own}:pooled", WINDOWS).out
    assert f"units by {own}:pooled in" in told


def test_what_a_metric_notes_is_a_number(own: Path, place: Place) -> None:
    """Or it could not stand in the report, which is written when all work is done."""
    own.write_text(NOTING)
    succeed(*place.prune(f"initial.score={own}:tensor", "search.sequences=0"))
    assert read_json(place.out / "report.json")["scores"] == {f"{own}:tensor": {"sure": 2.5}}
    for name, said in {"text": "'very'", "endless": "inf"}.items():
        done = in_one_sentence(run(*place.prune(f"initial.score={own}:{name}", out=place.folder / name)))
        assert f"must note finite numbers, but notes as 'sure' {said}" in done
        assert not (place.folder / name).exists()


@pytest.mark.parametrize("command", ["prune", "scores"])
def test_what_goes_wrong_before_a_metric_runs_is_told_too(command: str, own: Path, place: Place) -> None:
    own.write_text(NOTING)
    given = {"prune": place.prune(), "scores": ["scores", str(place.model), "--text", str(place.text), WINDOWS]}
    done = in_one_sentence(run(*given[command], "--score", f"{own}:needy"))
    assert f"score {own}:needy failed in line" in done and "AttributeError" in done


@pytest.mark.parametrize("values", ["(s > s.median()).double()", "0 * s"], ids=["two", "one"])
def test_of_equal_scores_a_run_keeps_the_same_as_the_metric(values: str, tmp_path: Path, place: Place) -> None:
    """Without a search, what is kept is what the metric would keep."""
    (tmp_path / "tied.py").write_text(f"def tied(p):\n    s = p.inputs.second_moment_E\n    return {values}\n")
    succeed(*place.prune(f"initial.score={tmp_path / 'tied.py'}:tied", "search.sequences=0", "repair.method=none"))
    report = read_json(place.out / "report.json")
    assert report["search"]["changed_units"] == 0 and report["loss"]["pruned"] == pytest.approx(
        report["loss"]["initial"]
    )


def test_a_metric_in_a_file_says_how_it_allocates(own: Path) -> None:
    assert metric_named(f"{own}:pooled").allocation == "pooled"
    assert metric_named(f"{own}:like_magnitude").name == f"{own}:like_magnitude"
    own.write_text(OWN.replace('allocation="pooled"', 'allocation="global"'))
    os.utime(own, ns=(1, 1))  # another time than before, whatever the clock says
    assert metric_named(f"{own}:pooled").allocation == "global"


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (None, "score", "my_scores.py does not exist"),
        (OWN, "like_magnitud", "has no 'like_magnitud'; did you mean 'like_magnitude'?"),
        (OWN, "x", "has no 'x', only ['like_magnitude', 'pooled']"),
        (OWN, "number", "must be a function or a Metric, but is 3"),
        ("def score(:", "score", "cannot be executed: SyntaxError"),
        ("1 / 0", "score", "cannot be executed: ZeroDivisionError in line 1: division by zero"),
        ("import sys; sys.exit(3)", "score", "cannot be executed: SystemExit in line 1: 3"),
    ],
)
def test_what_is_no_metric_is_refused(text: str | None, name: str, said: str, tmp_path: Path, place: Place) -> None:
    """In one sentence, before anything is written."""
    path = tmp_path / "my_scores.py"
    if text is not None:
        path.write_text(text)
    done = run(*place.prune(f"initial.score={path}:{name}", out=tmp_path / "out"))
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


BAD = '''
import sys
from dataclasses import dataclass

import numpy
import torch

from bernprune.scores import Metric


@dataclass
class Settings:
    """A dataclass looks for the module that it stands in."""

    power: "int" = 2


def raises(projection): raise KeyError("mine")
def leaves(projection): sys.exit(3)
def nothing(projection): pass
def array(projection): return numpy.ones(projection.weight_DE.shape[1])
def short(projection): return projection.inputs.second_moment_E[1:]
def matrix(projection): return projection.weight_DE
def imaginary(projection): return projection.inputs.second_moment_E + 1j
def unlike(projection): return projection.inputs.second_moment_E * float("nan")
def overwrites(projection): return projection.weight_DE.zero_().sum(0) + projection.inputs.second_moment_E
whole = Metric("whole", "", "", lambda context: [1.0])
'''


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "raises failed in line 18: KeyError: 'mine'"),
        ("leaves", "leaves failed in line 19: SystemExit: 3"),
        ("nothing", "nothing must give a tensor, but gave None"),
        ("array", "array must give a tensor, but gave array("),
        ("short", "one for each column of the weight that reads kv_groups in layer 0, but gave [47] of float64"),
        ("matrix", "but gave [36, 48] of float32"),
        ("imaginary", "of complex128"),
        ("unlike", "unlike' is not finite in layer 0"),
        ("whole", "whole must give a tensor, but gave [1.0]"),
        ("Settings", "Settings must be a function or a Metric, but is <class"),
    ],
)
def test_what_a_metric_does_wrong_is_told(name: str, said: str, tmp_path: Path, place: Place) -> None:
    """In one sentence, alone and as a member of a fusion."""
    path = tmp_path / "random.py"  # which is no reason to take it for the standard library's
    path.write_text(BAD)
    fused = ("initial.score=fused", f"initial.members=[flap, {path}:{name}]")
    for given in ((f"initial.score={path}:{name}",), fused):
        done = run(*place.prune(*given, out=tmp_path / "out"))
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_metric_cannot_change_the_model(tmp_path: Path) -> None:
    """Whatever it does to the weights that it is shown."""
    path = tmp_path / "mine.py"
    path.write_text(BAD)
    view = describe(tiny_model("llama", torch.float32))
    before = {name: weight.clone() for name, weight in view.model.state_dict().items()}
    initial_scores(view, random_tokens(4, 9), metric_named(f"{path}:overwrites"))
    assert all(weight.equal(before[name]) for name, weight in view.model.state_dict().items())


def test_a_home_is_found(own: Path, monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    """Of code and of files of scores, as of models and texts, by a run and from Python."""
    monkeypatch.setenv("HOME", str(own.parent))
    assert absolute({"initial": {"score": "~/my_scores.py:pooled"}})["initial"]["score"] == f"{own}:pooled"
    assert metric_named("~/my_scores.py:pooled").source == "ours"
    model, out = str(place.model), str(own.parent / "scores.safetensors")
    succeed("scores", model, "--text", str(place.text), WINDOWS, "--out", out)
    assert absolute({"initial": {"score": "~/scores.safetensors"}})["initial"]["score"] == out
    assert metric_named("~/scores.safetensors").name == metric_named(out).name


def test_places_are_made_absolute(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every setting that names scores."""
    monkeypatch.chdir(own.parent)
    names = ["flap", "my_scores.py:pooled"]
    found = absolute({"initial": {"score": names[1], "also": names, "members": names}})["initial"]
    assert found == {"score": f"{own}:pooled", "also": ["flap", f"{own}:pooled"], "members": ["flap", f"{own}:pooled"]}


# Fusions


def test_a_fusion_is_of_its_members(own: Path) -> None:
    """The mean of their ranks, and its cost the sum of theirs, of gradients too."""
    view, windows_WT = describe(tiny_model("llama", seed=4)), random_tokens(4, 9)
    members = tuple(metric_named(name) for name in ("wanda-sp", f"{own}:pooled", "taylor-element"))
    fused_U = initial_scores(view, windows_WT, SCORES["rank-average"], options=Options(members=members))
    alone = [group_ranks(view.space, initial_scores(view, windows_WT, metric)) for metric in members]
    torch.testing.assert_close(fused_U, torch.stack(alone).mean(0), rtol=1e-12, atol=0)
    names = ["wanda-sp", f"{own}:pooled", "taylor-element"]
    config = make_config({"initial": {"score": "rank-average", "members": names, "windows": 8}})
    check_scores(config)
    assert scoring_sequences(config, num_layers=3) == 8 * (1 + 1 + 4 * SCORES["taylor-element"].passes(3, Options()))


def test_weights_of_a_fusion_are_told_by_member(own: Path) -> None:
    view, notes = describe(tiny_model("llama", seed=4)), dict[str, float]()
    members = (SCORES["magnitude"], metric_named(f"{own}:like_magnitude"))
    options = Options(members=members)
    initial_scores(view, random_tokens(4, 9), SCORES["fused"], options=options, notes=notes)
    assert notes.keys() == {"weight of magnitude", f"weight of {own}:like_magnitude"}
    assert math.isclose(sum(notes.values()), 1)


@pytest.mark.parametrize(
    ("initial", "said"),
    [
        ({"members": ["flap", "goa"]}, "initial.members has no meaning for the score wanda-sp"),
        ({"score": "fused", "members": ["flap"]}, "two different metrics or more, but has flap"),
        ({"score": "fused", "members": ["flap", "flap"]}, "two different metrics or more, but has flap, flap"),
        ({"score": "fused", "members": ["flap", "rank-average"]}, "cannot hold a fusion, but has 'rank-average'"),
        ({"score": "fused", "members": ["flap", "block-influence"]}, "'block-influence' cannot rank units of kind"),
        ({"score": "fused", "members": ["flap", "no.safetensors"]}, "score file no.safetensors does not exist"),
    ],
)
def test_members_that_cannot_be_fused_are_refused(initial: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_scores(make_config({"initial": initial}))
    assert said in str(caught.value)


def test_members_are_checked_against_the_model() -> None:
    """Before the work: gradients' differences need more digits than bfloat16 has."""
    view = describe(tiny_model("llama", torch.bfloat16))
    config = make_config({"initial": {"score": "fused", "members": ["flap", "ifso"]}})
    check_scores(config)
    with pytest.raises(ModelError, match="score 'ifso' takes small differences"):
        check_scoring(config, view, random_tokens(4, 9))


def test_a_power_of_costs_means_nothing_to_a_file(tmp_path: Path) -> None:
    """Nor beside a metric, as both would be divided."""
    path = tmp_path / "a.safetensors"
    path.touch()
    for initial in ({"score": str(path)}, {"score": "wanda-sp", "also": [str(path)]}):
        with pytest.raises(ConfigError, match=r"initial\.cost_power has no meaning for a file of scores"):
            check_scores(make_config({"initial": {**initial, "cost_power": 0.5}}))
    check_scores(make_config({"initial": {"score": "fused", "members": "flap,magnitude", "cost_power": 0.5}}))
    with pytest.raises(ConfigError, match="score 'flap' is standardised"):
        check_scores(make_config({"initial": {"score": "magnitude", "also": "flap", "cost_power": 0.5}}))


def test_a_metric_of_layers_scores_each_unit() -> None:
    def fewer(at: LayerPass) -> Any:
        return {"kv_group": torch.ones(at.layer.shape.kv_groups), "channel": torch.ones(at.layer.shape.channels - 1)}

    def channels(at: LayerPass) -> Any:
        return {"channel": torch.ones(at.layer.shape.channels)}

    view = describe(tiny_model("llama"))
    with pytest.raises(ConfigError, match=r"a score must give 19 numbers for channel in layer 0, but gave \[18\]"):
        initial_scores(view, random_tokens(3), Metric("fewer", "", "", by_layer(fewer)))
    with pytest.raises(ModelError, match="score 'some' is not finite in layer 0 for a kv_group, or leaves"):
        initial_scores(view, random_tokens(3), Metric("some", "", "", by_layer(channels)))


def test_a_metric_is_allotted_as_metrics_can_be() -> None:
    with pytest.raises(ConfigError, match="allocation 'globl' is unknown"):
        Metric("mine", "", "", by_layer(lambda at: {}), allocation="globl")


def test_a_metric_of_layers_runs_each_once() -> None:
    """One that asks for more would look at the next layer."""

    def twice(at: LayerPass) -> Any:
        at.moments(("down",))
        return at.moments(("output",))

    metric = Metric("twice", "", "", by_layer(twice))
    with pytest.raises(ConfigError, match="runs each once"):
        initial_scores(describe(tiny_model("llama")), random_tokens(3), metric)
