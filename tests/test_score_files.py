"""Scores of one's own: written, read, refused; and metrics on the command line, from the list to a run."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from spaces import FLAT, make_space
from tiny_models import random_tokens, tiny_model
from tiny_run import Place, in_one_sentence, read_json, run, settings, stopped_in_step, succeed, tiny_folder
from transformers import AutoModelForCausalLM

from bernprune.errors import ConfigError
from bernprune.models.view import describe
from bernprune.policy.bernoulli import graded, initial_probs
from bernprune.run import scoring
from bernprune.run.checkpoint import read_state
from bernprune.scores import SCORES, Options, initial_scores, metric_named, read_scores, write_scores
from bernprune.scores.files import scores_digest
from bernprune.units import UnitSpace


def space_of(**changes: int) -> UnitSpace:
    return describe(tiny_model("llama", **changes)).space


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """To the bit."""
    view = describe(tiny_model("llama"))
    scores_U = initial_scores(view, random_tokens(2, 9), SCORES["wanda-sp"])
    write_scores(tmp_path / "a.safetensors", view.space, scores_U, {"score": "wanda-sp"})
    assert torch.equal(read_scores(tmp_path / "a.safetensors", view.space), scores_U)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Of another model, without scores or fingerprint, not finite, no such file, not of this format."""
    space, path = space_of(), tmp_path / "a.safetensors"
    write_scores(path, space, torch.ones(space.size))
    for other in (space_of(intermediate_size=20), space_of(hidden_size=48)):
        with pytest.raises(ConfigError, match="holds 88 scores of another model's units"):
            read_scores(path, other)
    with pytest.raises(ConfigError, match="does not exist"):
        read_scores(tmp_path / "b.safetensors", space)
    for tensors in ({"scores": torch.ones(88)}, {"other": torch.ones(88)}):
        save_file(tensors, path)
        with pytest.raises(ConfigError, match="needs a tensor 'scores' and the metadata 'fingerprint'"):
            read_scores(path, space)
    odd = torch.ones(88).index_fill(0, torch.tensor(5), float("nan"))
    for scores, said in (
        (odd, "finite numbers, but unit 5 has nan"),
        (torch.ones(87), r"must hold \[88\] scores, but holds \[87\]"),
        (torch.ones(88, dtype=torch.int64), "floating-point numbers, but holds torch.int64"),
    ):
        save_file({"scores": scores}, path, metadata={"fingerprint": space.fingerprint})
        with pytest.raises(ConfigError, match=said):
            read_scores(path, space)
    path.write_bytes(b"no such format")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_scores(path, space)


def test_the_list_has_every_metric() -> None:
    """With what it costs, where it comes from and what it says."""
    told = succeed("scores").out
    for metric in SCORES.values():
        (line,) = [line for line in told.splitlines() if line.startswith(f"{metric.name} ")]
        assert metric.source in line and metric.allocation in line and f"    {metric.about}\n" in told


def test_scores_of_the_command_line_start_a_run(place: Place) -> None:
    """A file written by it starts a run as its metric does, by its allocation, and only on the same units."""
    given = [f"--set={setting}" for setting in ("data.window=16", "initial.windows=4", "search.windows=2")]
    out = place.folder / "flap.safetensors"
    told = succeed("scores", str(place.model), "--text", str(place.text), "--score=flap", f"--out={out}", *given).out
    assert "units by flap in" in told and str(out) in told
    space = describe(AutoModelForCausalLM.from_pretrained(place.model)).space
    for layer, line in enumerate(told.splitlines()[1:][: int(space.layer_U.max()) + 1]):
        scores = [read_scores(out, space)[space.span(kind, layer)] for kind in ("kv_group", "channel")]
        shown = [f"{number:.4g}" for scores_N in scores for number in (scores_N.median(), scores_N.max())]
        assert line.split() == [str(layer), *shown]
    starts = []
    for name, score in (("by-name", "flap"), ("by-file", str(out))):
        succeed(*place.prune(f"initial.score={score}", "search.sequences=0", out=place.folder / name))
        starts.append(read_state(place.folder / name / "initial.safetensors"))
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in ("scores_US", "probs_U"))
    refused = run(*place.prune(f"initial.score={out}", "granularity=channel", out=place.folder / "refused"))
    assert refused.code == 2 and "of another granularity" in refused.err


def test_a_run_does_not_go_on_without_its_score_file(place: Place) -> None:
    """By which it knows how many units each layer keeps, nor with another; it goes on once that is back."""
    given = settings("data.window=16", "initial.windows=4")
    out, moved = place.folder / "a.safetensors", place.folder / "b.safetensors"
    succeed("scores", str(place.model), "--text", str(place.text), "--score=flap", f"--out={out}", *given)
    succeed(*place.prune(f"initial.score={out}"))
    (place.out / "report.json").unlink()
    out.rename(moved)
    refused = run("resume", str(place.out))
    assert f"score file {out} does not exist" in in_one_sentence(refused)
    succeed("scores", str(place.model), "--text", str(place.text), "--score=wanda-sp", f"--out={out}", *given)
    before = place.contents()
    assert "the score files are not those that the run in" in in_one_sentence(run("resume", str(place.out)))
    assert place.contents() == before
    moved.unlink()
    succeed("scores", str(place.model), "--text", str(place.text), "--score=flap", f"--out={out}", *given)  # anew
    succeed("resume", str(place.out))


def test_digests_are_of_what_a_run_takes(tmp_path: Path) -> None:
    """Scores, and how they are allocated; not of what else is said, nor of the order in which it lies."""
    scores_U, path = torch.arange(float(FLAT.size)), tmp_path / "a.safetensors"
    facts = {"allocation": "pooled", "model": "a", "weights": "b"}
    digests = []
    for given, said in ((scores_U, facts), (scores_U, {**facts, "model": "c"}), (scores_U + 1, facts), (scores_U, {})):
        write_scores(path, FLAT, given, said)
        digests.append(scores_digest(path))
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_scores_of_other_weights_are_told_of(place: Place) -> None:
    """Once, by the name of their model; scores of one's own making, which say of none, and the model's own are not."""
    given = settings("data.window=16", "initial.windows=4")
    other = tiny_folder(place.folder / "other", seed=1)
    out, again = place.folder / "a.safetensors", ("search.sequences=0",)
    succeed("scores", str(other), "--text", str(place.text), "--score=magnitude", f"--out={out}", *given)
    told = succeed(*place.prune(f"initial.score={out}", *again, out=place.folder / "of-other")).err
    assert told.count("WARNING") == told.count(f"was made of other weights, those of {other}") == 1
    succeed("scores", str(place.model), "--text", str(place.text), "--score=magnitude", f"--out={out}", *given)
    assert "WARNING" not in succeed(*place.prune(f"initial.score={out}", *again, out=place.folder / "of-its-own")).err
    space = describe(AutoModelForCausalLM.from_pretrained(other)).space
    write_scores(out, space, read_scores(out, space))
    assert "WARNING" not in succeed(*place.prune(f"initial.score={out}", *again, out=place.folder / "bare")).err


def test_mistakes_on_the_command_line(place: Place) -> None:
    """One sentence each."""
    (place.folder / "a.safetensors").mkdir()
    said = {
        ("scores", "--score=flap"): "without a model lists the metrics, and takes no options",
        ("scores", str(place.model), "--out=scores.bin"): "must end in .safetensors, but is 'scores.bin'",
        ("scores", str(place.model), "--score=flop"): "did you mean 'flap'?",
        ("scores", str(place.model), "--set=initial.also=flap,magnitude"): "initial.also is ['flap', 'magnitude']",
        ("scores", str(place.model), "--score=no.safetensors"): "score file no.safetensors does not exist",
        ("scores", str(place.model), f"--score={place.folder / 'a.safetensors'}"): "a.safetensors is a folder",
        ("scores", str(place.model), "--set=initial.influence=mse"): "initial.influence has no meaning",
    }
    for arguments, sentence in said.items():
        done = run(*arguments)
        assert done.code == 2 and sentence in done.err and done.err.count("\n") == 1


def test_what_metrics_note_is_told(place: Place) -> None:
    """By each that leaves something, in the report of a run and at its end; also of one that goes on."""
    noting = ("initial.score=mini-llm", "initial.pairs=2", "initial.also=fused,flap", "initial.members=flap,magnitude")
    assert stopped_in_step(2, place.prune(*noting)).code != 0
    done = succeed("resume", str(place.out))
    notes = read_json(place.out / "report.json")["scores"]
    assert list(notes) == ["mini-llm", "fused", "flap"] and notes["flap"] == {}
    error, weights = notes["mini-llm"]["standard error of a gradient"], notes["fused"]
    assert error > 0 and weights.keys() == {"weight of flap", "weight of magnitude"}
    assert sum(weights.values()) == pytest.approx(1)
    assert f", standard error of a gradient {error:.4g}\n" in done.out
    assert f"scores       fused: weight of flap {weights['weight of flap']:.4g}" in done.out
    assert "scores       flap" not in done.out


def test_the_list_says_what_scores_are_divided_by() -> None:
    told = {line.split()[0]: line for line in succeed("scores").out.splitlines() if line and line[0] != " "}
    for name, said in (("taylor-vector", " yes "), ("ifso", " its root "), ("flap", " no ")):
        assert said in told[name]


def test_a_name_that_is_no_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^score 'wandasp' is unknown; .*; did you mean 'wanda-sp'\?$"):
        metric_named("wandasp")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pairs": 0}, "pairs is 0"),
        ({"step": 0.0}, "above 0, but is 0.0"),
        ({"sparsity": 1.0}, "and below 1: 1.0"),
        ({"sparsity": -0.1}, "must be 0 or more, and below 1: -0.1"),
    ],
)
def test_options_that_cannot_be_are_refused(given: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Options(**given)


# How much each layer keeps


def price_of(keep: float) -> float:
    """The priority down to which layers with shares of their own keep so much of all."""
    return math.log(keep) / (math.log(keep) - 1) - 1e-12


def test_layers_keep_shares_of_their_own() -> None:
    """At the start, the best of each group; and by priorities, at any sparsity, powers of those shares."""
    space = space_of(intermediate_size=50)
    scores_U = torch.rand(space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares_G = torch.tensor([0.2 + 0.1 * group.layer for group in space.groups], dtype=torch.float64)
    kept_U = initial_probs(space, scores_U, keep=0.35, map_name="const", sharpness=1.0, shares_G=shares_G) > 0.5
    priorities_U = graded(space, scores_U, keep=0.35, shares_G=shares_G)
    for group, share in enumerate(shares_G.tolist()):
        units_U = space.group_U == group
        best = scores_U[units_U].argsort(descending=True)[: round(share * int(units_U.sum()))]
        assert set(kept_U[units_U].nonzero()[:, 0].tolist()) == set(best.tolist())
        assert kept_U[units_U].equal(priorities_U[units_U] > price_of(0.35))
        for keep in (0.1, 0.6, 0.99):
            taken = (priorities_U[units_U] > price_of(keep)).double().mean().item()
            assert (
                abs(taken - keep ** (torch.log(shares_G[group]) / torch.log(torch.tensor(0.35))).item()) <= 1 / 6 + 1e-9
            )


def test_layers_that_keep_nearly_all_or_nothing_are_still_in_order() -> None:
    space = make_space(["channel"], [(1, 50), (1, 50), (1, 50)])
    scores_U = torch.rand(space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares_G = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    priorities_U = graded(space, scores_U, keep=0.5, shares_G=shares_G)
    for units, kept in zip(space.spans, (50, 25, 0), strict=True):
        assert priorities_U[units].argsort().equal(scores_U[units].argsort())
        assert len(priorities_U[units].unique()) == 50 and (priorities_U[units] > price_of(0.5)).sum() == kept


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_kv_groups_of_which_a_share_goes(place: Place, allocation: str) -> None:
    """As many as were asked for, of each layer or of all; channels are what is left to the budget (FLAP's MM)."""
    shared = ("initial.score=flap", f"initial.allocation={allocation}", "budget.sparsity=0.5", "search.sequences=0")
    kept = {}
    for kv_sparsity in ("null", "0.67"):
        out = place.folder / kv_sparsity
        succeed(*place.prune(*shared, "budget.min_kv_groups=0", f"initial.kv_sparsity={kv_sparsity}", out=out))
        assert 0.5 <= read_json(out / "report.json")["sparsity"]["achieved"] < 0.51
        kept[kv_sparsity] = [len(layer["kv_groups"]) for layer in read_json(out / "plan.json")["layers"]]
    assert sum(kept["0.67"]) == 3 < sum(kept["null"])
    assert kept["0.67"] == [1, 1, 1] or allocation == "global"


def test_an_allocation_that_is_searched_for(place: Place) -> None:
    """It lies on the budget, and loses no more on its windows than equal shares."""
    losses = {}
    for allocation in ("uniform", "search"):
        out = place.folder / allocation
        more = ("initial.generations=3",) if allocation == "search" else ()
        settings = ("search.sequences=0", f"initial.allocation={allocation}", "budget.sparsity=0.4", *more)
        succeed(*place.prune(*settings, "initial.windows=32", "data.eval_tokens=512", out=out))
        losses[allocation] = read_json(out / "report.json")["loss"]["initial"]
        shares_G = read_state(out / "initial.safetensors")["shares_G"]
        assert (shares_G.std() > 0) == (allocation == "search")
    assert losses["search"] < losses["uniform"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["initial.allocation=search", "granularity=[attention, ffn]"],
            "'search' says how many units each layer keeps",
        ),
        (["initial.generations=4"], "initial.generations has no meaning for initial.allocation 'uniform'"),
        (["initial.kv_sparsity=0.5", "initial.score=flap"], "initial.kv_sparsity needs kv_group and channel"),
        (["initial.kv_sparsity=0.5", "granularity=channel"], "but they are channel and 'uniform'"),
        (
            ["initial.kv_sparsity=0.9"],
            "with 0.9 of the kv groups gone, no share of the channels removes 0.3 of all cost",
        ),
        (
            ["initial.kv_sparsity=0.3", "budget.also_kv_cache=0.5"],
            "lets 0.3 of the kv groups go at first, but budget.also_kv_cache is 0.5",
        ),
        (["initial.pairs=4"], "initial.pairs has no meaning for the score wanda-sp"),
        (["initial.score=taylor-vector", "initial.inputs=pruned"], "'taylor-vector' does not go layer by layer"),
        (["initial.score=block-influence"], "'block-influence' cannot rank units of kind kv_group, channel"),
    ],
)
def test_settings_that_would_be_ignored_are_errors(
    given: list[str], said: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the work."""
    monkeypatch.setattr(scoring, "initial_scores", lambda *_, **__: pytest.fail("something was scored"))
    done = run(*place.prune(*given))
    assert done.code == 2 and said in done.err


def test_a_run_gives_more_to_layers_that_change_more(place: Place) -> None:
    """CFSP's allocation by default, and for any other metric when asked for; their sum is the same."""
    shares = {}
    for name, more in {"cfsp": (), "wanda-sp": ("initial.allocation=block-influence", "initial.influence=mae")}.items():
        out = place.folder / name
        succeed(*place.prune("search.sequences=0", f"initial.score={name}", *more, out=out))
        shares[name] = read_state(out / "initial.safetensors")["shares_G"]
    for shares_G in shares.values():
        assert shares_G.mean().item() == pytest.approx(0.7) and shares_G.std() > 0.001
    assert not torch.allclose(shares["cfsp"], shares["wanda-sp"])


def test_a_place_that_cannot_be_written_is_refused_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a folder that is not there yet is made."""
    (place.folder / "file").write_text("")
    settings = ["--set", "data.window=16", "--score", "magnitude"]
    arguments = ["scores", str(place.model), "--text", str(place.text), *settings, "--out"]
    succeed(*arguments, str(place.folder / "new" / "scores.safetensors"))
    assert (place.folder / "new" / "scores.safetensors").is_file()
    monkeypatch.setattr(scoring, "set_stage", lambda config: pytest.fail("the model was loaded"))
    for where in ("file", "file/below"):
        sentence = in_one_sentence(run(*arguments, str(place.folder / where / "scores.safetensors")))
        assert "is a file, but a folder is needed" in sentence or "is not a writable folder" in sentence
