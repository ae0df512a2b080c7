"""Recovery of what a run kept, by the command line: what it saves and tells, how it goes on, and what it refuses."""

import json
import lzma
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import (
    WINDOW,
    Place,
    finish,
    in_one_sentence,
    read_json,
    run,
    settings,
    steps_of,
    succeed,
    tiny_folder,
    tiny_text,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import bernprune
from bernprune.config import changed_config
from bernprune.data import TokenWindows
from bernprune.errors import ConfigError, ModelError
from bernprune.models.adapters import Adapters
from bernprune.models.slicing import slice_model
from bernprune.recovery import Training
from bernprune.run import exporting, recovering, recovery_setup, verification
from bernprune.run.checkpoint import read_state, write_state
from bernprune.run.folder import RunFolder
from bernprune.run.recovery_setup import Before
from bernprune.storage import write_json

SMALL = ("recover.tokens=1024", "recover.batch=8", "recover.held_out=8", "recover.learning_rate=0.01", "recover.rank=2")
STEPS = 8
WAYS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "uniform": ("recover.ranks=uniform",),
    "distilled": ("recover.distill=0.5", "recover.recompute=true"),
    "before the cut": ("recover.masks=policy",),
    "before the cut, distilled": ("recover.masks=policy", "recover.distill=1"),
}


@pytest.fixture(scope="module")
def layered(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that removes whole blocks and layers."""
    more = ("granularity=layer,attention,ffn", "budget.sparsity=0.5", "initial.score=block-influence")
    return finish(prepared, tmp_path_factory.mktemp("layered"), *more, "search.sequences=0")


def recover(place: Place, folder: Path, *more: str, out: str = "recovered") -> list[str]:
    return ["recover", str(folder), str(place.folder / out), *settings(*SMALL, *more)]


def test_code_of_the_search_is_not_needed_again(place: Place) -> None:
    """It may be gone when what it found is recovered, and when an interrupted recovery goes on."""
    mine = place.file("mine.py", "def mine(p):\n    return p.inputs.second_moment_E\n")
    succeed(*place.prune(f"initial.score={mine}:mine", "search.sequences=0"))
    mine.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovering, "_report", None)
        with pytest.raises(TypeError):
            run(*recover(place, place.out))
    assert succeed(*recover(place, place.out)).err == ""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["parts", "layers"])
def test_what_a_run_kept_is_recovered(
    kind: str, way: str, place: Place, finished: Path, layered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads like any other, has the loss that is told, and is of the same size."""
    folder, out = finished if kind == "parts" else layered, place.folder / "recovered"
    sliced: list[Any] = []
    monkeypatch.setattr(recovering, "slice_model", lambda model, plan: sliced.append(plan) or slice_model(model, plan))
    done = succeed(*recover(place, folder, *WAYS[way]))
    report, before = read_json(out / "report.json"), read_json(folder / "report.json")
    assert done.err == "" and f"trained      {1024:,} tokens" in done.out
    assert report["loss"]["before"] == pytest.approx(before["loss"]["pruned"], rel=1e-6)
    assert report["loss"]["after"] < report["loss"]["before"]
    assert f"recovered    {report['perplexity']['after']:>15.3f}" in done.out
    assert (report["steps"], report["tokens"]) == (STEPS, 1024) and steps_of(out) == list(range(STEPS))
    assert len(sliced) == ("before" in way)
    kept = [layer for layer in before["layers"] if layer["kv_groups"] or layer["channels"]]
    assert len(report["ranks"]) == (3 if "before" in way else len(kept))
    assert sum(report["ranks"]) == 2 * len(report["ranks"])
    assert (out / "plan.json").read_bytes() == (folder / "plan.json").read_bytes()
    weights, earlier = (load_file(each / "model" / "model.safetensors") for each in (out, folder))
    assert {name: value.shape for name, value in weights.items()} == {n: v.shape for n, v in earlier.items()}
    assert report["parameters"] == before["parameters"]["pruned"]
    evaluated = succeed(
        "evaluate", str(out / "model"), "--text", report["protocol"]["text"], "--window", "16", "--tokens", "320"
    )
    assert f"({report['loss']['after']:.4f} nats" in evaluated.out
    loaded = AutoModelForCausalLM.from_pretrained(out / "model", trust_remote_code=True)
    assert loaded(input_ids=torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("way", ["plain", "before the cut"])
def test_what_is_asked_for_reaches_its_part(
    way: str, place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds of windows, adapters and masks, the scale of adapters, the format of weights, the kind of influence."""
    found: list[tuple[str, Any]] = []

    def watch(name: str, *told: str) -> None:
        part = getattr(recovery_setup, name)

        def made(*given: Any, **named: Any) -> Any:
            found.extend((f"{name} {each}", named[each]) for each in told)
            return part(*given, **named)

        monkeypatch.setattr(recovery_setup, name, made)

    watch("TokenWindows", "seed")
    watch("Adapters", "scale", "seed")
    watch("SampledMasks", "seed")
    influence = recovery_setup.layer_influence
    monkeypatch.setattr(
        recovery_setup,
        "layer_influence",
        lambda context, kind: found.append((kind, context.view.model.dtype)) or influence(context, kind),
    )
    given = ("seed=7", "recover.scale=3.0", "initial.influence=mae", "model.dtype=bfloat16")
    succeed(*recover(place, finished, *WAYS[way], *given))
    expected = {"TokenWindows seed": 7, "Adapters scale": 3.0, "Adapters seed": 7, "mae": torch.bfloat16}
    assert dict(found) == expected | ({"SampledMasks seed": 7} if way == "before the cut" else {})


def test_biases_of_a_repair_go_where_the_cut_comes_after(place: Place) -> None:
    succeed(*place.prune("search.sequences=0", "repair.method=bias", "repair.biases=always", "repair.windows=16"))
    done = succeed(*recover(place, place.out, "recover.masks=policy"))
    before, after = (
        read_json(folder / "report.json")["parameters"] for folder in (place.out, place.folder / "recovered")
    )
    assert after < before["pruned"]
    assert f"merged: {after:,} parameters, {before['pruned']:,} before, with biases of the repair" in done.out


def test_layers_were_removed(layered: Path) -> None:
    layers = read_json(layered / "report.json")["layers"]
    assert sum(not layer["kv_groups"] and not layer["channels"] for layer in layers) == 1, layers


def interrupted(place: Place, folder: Path, *more: str) -> Path:
    """The folder of a recovery that was stopped in its sixth step, after a checkpoint."""
    step = Training.step

    def once_more(training: Training) -> Any:
        if training.steps == 5:
            raise KeyboardInterrupt
        return step(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", once_more)
        done = run(*recover(place, folder, "recover.checkpoint_seconds=0", *more))
    assert done.code == 130
    assert "interrupted; the same command, without --overwrite, goes on, and with --finish ends early" in done.err
    return place.folder / "recovered"


def test_a_recovery_goes_on_with_what_it_began_with_alone(place: Place, finished: Path) -> None:
    """Not with weights that were repaired in another way since, nor from a checkpoint of another version."""
    folder = shutil.copytree(finished, place.folder / "finished")
    out = interrupted(place, folder)
    weights = load_file(folder / "model" / "model.safetensors")
    changed = weights | {"model.norm.weight": 1.01 * weights["model.norm.weight"]}
    save_file(changed, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    said = in_one_sentence(run(*recover(place, folder)))
    assert "weights are not those that the recovery" in said
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "versions.json", read_json(out / "versions.json") | {"torch": "1.0"})
    for path in (out / "checkpoints").iterdir():
        state = read_state(path)
        write_state(path, {name: value for name, value in state.items() if name != "ranks"})
    assert "of another version" in in_one_sentence(run(*recover(place, folder)))
    shutil.rmtree(out / "checkpoints")
    (out / "plan.json").unlink()  # as if killed before it was written
    done = succeed(*recover(place, folder, "recover.rows=1"))
    assert "the recovery began with torch 1.0" in done.err
    assert "rows: 1\n" in (out / "recover.yaml").read_text()
    assert (out / "plan.json").read_bytes() == (folder / "plan.json").read_bytes()


def test_a_recovery_may_move(place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To where the dense model and the texts lie elsewhere, which is said where they are missed; not to others."""
    folder = shutil.copytree(finished, place.folder / "finished")
    config = RunFolder(folder).read_config()
    gone = {"model": {"path": "/gone/model"}, "data": {"text": "/gone/text.txt", "eval_text": "/gone/held-out.txt"}}
    RunFolder(folder).write_config(changed_config(config, gone))
    moved = [f"data.text={place.text}"]
    said = in_one_sentence(run(*recover(place, folder, *moved)))
    assert '"/gone/held-out.txt" does not exist; --set data.eval_text names where' in said
    moved.append(f"data.eval_text={finished.parent / 'held-out.txt'}")
    said = in_one_sentence(run(*recover(place, folder, *moved)))
    assert "model folder /gone/model does not exist; --set model.path names the dense model" in said
    interrupted(place, folder, *moved, f"model.path={place.model}", "recover.distill=0.5")
    other = tiny_folder(place.folder / "other", seed=5)
    given = [*moved, "recover.distill=0.5", f"model.path={other}"]
    assert "the dense model's weights are not those" in in_one_sentence(run(*recover(place, folder, *given)))
    given[-1] = f"model.path={shutil.copytree(place.model, place.folder / 'again')}"
    succeed(*recover(place, folder, *given))


def test_an_interrupted_recovery_goes_on(place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command ends in the same weights to the last bit; a setting that costs memory may differ."""
    succeed(*recover(place, finished, out="whole"))
    out = interrupted(place, finished)
    newest = max((out / "checkpoints").iterdir())
    write_state(newest, read_state(newest) | {"seconds": 5000.0})
    assert not (out / "model").exists() and not (out / "report.json").exists()
    assert "another configuration" in in_one_sentence(run(*recover(place, finished, "recover.rank=3")))
    with monkeypatch.context() as patch:  # ranks that are known are not computed again, and not otherwise
        patch.setattr(recovery_setup, "_ranks", lambda *_, **__: 1 / 0)
        succeed(*recover(place, finished, "recover.checkpoint_seconds=7"))
    assert steps_of(out) == list(range(STEPS))
    found, expected = (
        load_file(place.folder / name / "model" / "model.safetensors") for name in ("recovered", "whole")
    )
    assert all(value.equal(found[name]) for name, value in expected.items())
    reports = [read_json(place.folder / name / "report.json") for name in ("recovered", "whole")]
    assert reports[0]["held_out"] == reports[1]["held_out"] and reports[0]["loss"] == reports[1]["loss"]
    assert reports[0]["seconds"] > 5000 > reports[1]["seconds"]  # in all


def test_a_recovery_is_ended_where_it_stands(place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``--finish``: the best state of an interrupted one, judged where it stands, which takes no teacher."""
    given = ("recover.evaluate_steps=3", "recover.distill=0.5")
    out, command = place.folder / "recovered", [*recover(place, finished, *given), "--finish"]
    assert "no interrupted recovery in" in in_one_sentence(run(*command)) and not out.exists()
    interrupted(place, finished, *given)
    assert "no interrupted recovery in" in in_one_sentence(run(*command, "--overwrite"))
    monkeypatch.setattr(Training, "step", None)
    monkeypatch.setattr(recovery_setup, "_dense", None)
    done = succeed(*command)
    report = read_json(out / "report.json")
    assert "it was told to finish" in done.out and report["steps"] == 5
    assert report["held_out"].keys() == {"0", "3", "5"}
    assert report["loss"]["after"] < report["loss"]["before"]


@pytest.mark.parametrize("what", ["step", "evaluation"])
def test_a_recovery_that_diverges_keeps_its_best(
    what: str, place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained until then, also if the process dies before it is saved; an error if nothing was gained yet."""
    name = "_loss" if what == "step" else "_cross_entropy"
    original, from_step = getattr(Training, name), 0

    def diverging(self: Training, *given: torch.Tensor) -> torch.Tensor:
        return original(self, *given) * (torch.nan if self.steps >= from_step else 1)

    monkeypatch.setattr(Training, name, diverging)
    command = recover(place, finished, "recover.evaluate_steps=2")
    said = in_one_sentence(run(*command))
    assert "is nan" in said and said.endswith("; begin anew with --overwrite")
    from_step = 5 if what == "step" else 6  # of the latter, the evaluation behind the sixth step alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "verify_saved", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*command)
    monkeypatch.setattr(Training, "step", None)
    done = succeed(*command)
    report = read_json(place.folder / "recovered" / "report.json")
    assert (
        report["best_step"] == 4
        and report["steps"] == from_step
        and "is nan" in report["ended"]
        and report["ended"] in done.out
    )
    assert report["loss"]["after"] < report["loss"]["before"]


def test_masks_of_a_policy_that_is_gone_are_refused(place: Place, finished: Path) -> None:
    """Those of the start would be masks of another policy."""
    folder = shutil.copytree(finished, place.folder / "finished")
    shutil.rmtree(folder / "checkpoints")
    said = in_one_sentence(run(*recover(place, folder, "recover.masks=policy")))
    assert "recover.masks 'policy'" in said and f"holds no step-{STEPS:08d}.safetensors" in said
    assert not (place.folder / "recovered").exists()


def test_masks_of_an_older_policy_are_refused(place: Place, finished: Path) -> None:
    """They would be others than those that a recovery began with, or than its run ended with."""
    folder = shutil.copytree(finished, place.folder / "finished")
    (last,) = (folder / "checkpoints").iterdir()
    shutil.copy(last, last.with_name(f"step-{STEPS - 1:08d}.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    said = in_one_sentence(run(*recover(place, folder, "recover.masks=policy")))
    assert "recover.masks 'policy'" in said and f"{last} is damaged" in said


@pytest.mark.parametrize("trusted", [True, False])
def test_code_that_a_run_trusted_is_trusted_again(
    trusted: bool, place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the tokenizer, by a recovery; for an export it must be asked for."""
    folder, given = shutil.copytree(finished, place.folder / "finished"), list[bool]()
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        config.replace("trust_remote_code: false", f"trust_remote_code: {str(trusted).lower()}")
    )

    def noted(path: str, *, trust_remote_code: bool = False) -> None:
        given.append(trust_remote_code)
        raise ModelError("it came far enough")

    for module in (recovery_setup, exporting):
        monkeypatch.setattr(module, "load_tokenizer", noted)
    assert "it came far enough" in in_one_sentence(run(*recover(place, folder)))
    asked = ["--trust-remote-code"] if trusted else []
    assert "it came far enough" in in_one_sentence(run("export", str(folder), "out.gguf", *asked))
    assert given == [trusted, trusted]


def test_a_finished_recovery_is_replaced_on_request(place: Place, finished: Path) -> None:
    succeed(*recover(place, finished))
    before = (place.folder / "recovered" / "report.json").read_bytes()
    assert "finished recovery" in in_one_sentence(run(*recover(place, finished)))
    assert (place.folder / "recovered" / "report.json").read_bytes() == before
    succeed(*recover(place, finished, "recover.rank=1"), "--overwrite")
    assert read_json(place.folder / "recovered" / "report.json")["ranks"] == [1, 1, 1]


@pytest.mark.parametrize(("rate", "said"), [("1e-30", True), ("0.01", False)])
def test_it_is_said_if_nothing_was_gained(rate: str, said: bool, place: Place, finished: Path) -> None:
    done = succeed(*recover(place, finished, f"recover.learning_rate={rate}"))
    loss = read_json(place.folder / "recovered" / "report.json")["loss"]
    assert (loss["after"] >= loss["before"]) == said
    assert (f"nothing was recovered: the loss on the evaluation text is {loss['after']:.4f}" in done.err) == said


@pytest.mark.parametrize("kept", ["pruned", "recovered"])
def test_what_the_run_kept_is_beaten_or_saved(
    kept: str, place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is repaired, and what is trained before the cut begins without that; text that trains nothing decides."""
    of, held_out = Before.of, 0.0 if kept == "pruned" else 100.0
    monkeypatch.setattr(Before, "of", lambda *given: of(*given)._replace(held_out=held_out))
    done = succeed(*recover(place, finished, "recover.masks=policy"))
    report = read_json(place.folder / "recovered" / "report.json")
    found, before = (
        load_file(folder / "model" / "model.safetensors") for folder in (place.folder / "recovered", finished)
    )
    same = all(value.equal(before[name]) for name, value in found.items())
    assert report["kept"] == kept and same == (kept == "pruned")
    assert ("no state was better than what the run kept" in done.out) == same
    assert ("nothing was recovered" in done.err) == same == (report["loss"]["after"] == report["loss"]["before"])


def test_what_merging_loses_was_not_recovered(place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What adapters add to weights of 16 bits may be too little for any: the merged model is what must be better."""
    merge = Adapters.merge

    def lossy(adapters: Adapters) -> Any:
        for parameter in adapters.parameters.values():
            parameter.data.zero_()
        return merge(adapters)

    monkeypatch.setattr(Adapters, "merge", lossy)
    done = succeed(*recover(place, finished))
    report = read_json(place.folder / "recovered" / "report.json")
    assert report["best_step"] > 0 and report["merged"] == pytest.approx(report["held_out"]["0"], rel=1e-5)
    assert report["kept"] == "pruned" and "no state was better than what the run kept" in done.out


def lengths_trained_on(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each text that is trained on from now on."""
    lengths: list[int] = []

    class Watched(TokenWindows):
        def __init__(self, stream_N: torch.Tensor, **given: Any) -> None:
            lengths.append(len(stream_N))
            super().__init__(stream_N, **given)

    monkeypatch.setattr(recovery_setup, "TokenWindows", Watched)
    return lengths


def test_other_text_may_be_trained_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path is that of the moment, wherever the run was; none of it is left out, and the last tenth of the run's own
    is what it is judged by."""
    succeed(*place.prune("search.sequences=0"))
    other, lengths = tiny_text(place.folder / "other.txt", 900, seed=4), lengths_trained_on(monkeypatch)
    succeed(*recover(place, place.out), "--text", "other.txt")
    assert str(other) in (place.folder / "recovered" / "recover.yaml").read_text()
    tokens = AutoTokenizer.from_pretrained(place.model)(other.read_text())["input_ids"]
    assert abs(lengths[-1] + 8 * 16 - len(tokens)) <= 1  # but for windows that are held out, and a token that opens it
    protocols = [read_json(folder / "report.json")["protocol"] for folder in (place.out, place.folder / "recovered")]
    assert protocols[0] == protocols[1] and protocols[0]["text"].endswith("last tenth")


def test_the_run_s_text_is_known_wherever_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last tenth, which a recovery is judged by, is not trained on: not by a link, of a copy, or within more."""
    text = place.text.read_text()
    place.text.write_text(text + text[:2000])  # so that the last tenth has a passage that stands in what is trained on
    succeed(*place.prune("search.sequences=0"))
    (place.folder / "link.txt").symlink_to(place.text)
    (place.folder / "copy.txt.xz").write_bytes(lzma.compress(place.text.read_bytes()))
    other = tiny_text(place.folder / "other.txt", seed=3).read_text()
    (place.folder / "more.txt").write_text(f"{other} {place.text.read_text()} {other}")
    lengths, protocols = lengths_trained_on(monkeypatch), []
    for given in ([], ["--text", "link.txt"], ["--text", "copy.txt.xz"], ["--text", "more.txt"]):
        done = succeed(*recover(place, place.out), *given, "--overwrite")
        protocols.append(read_json(place.folder / "recovered" / "report.json")["protocol"])
        assert ("and are left out" in done.err) is ("more.txt" in given)
    assert protocols == protocols[:1] * 4 and protocols[0]["text"].endswith("last tenth")
    assert lengths[0] == lengths[1] == lengths[2] < lengths[3]
    found = re.search(r"(\S+) of (\S+) tokens of \S+/more.txt stand in \S+/text.txt, last tenth", done.err)
    assert found is not None
    left_out, tokens = (int(number.replace(",", "")) for number in found.groups())
    assert lengths[3] == tokens - left_out - 8 * WINDOW  # the last eight windows choose a state
    assert left_out > lengths[0] / 9  # that tenth, and what repeats it


def test_a_recovery_goes_on_where_its_text_lies_now(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last tenth judges: what it was is told by its fingerprints, the old place need not be there. Other
    text needs it."""
    succeed(*place.prune("search.sequences=0"))
    interrupted(place, place.out)
    lengths, moved = lengths_trained_on(monkeypatch), place.text.rename(place.folder / "moved.txt")
    longer = place.file("longer.txt", moved.read_text() + " and more")
    for text in (longer, tiny_text(place.folder / "short.txt", 500)):
        said = in_one_sentence(run(*recover(place, place.out, f"data.text={text}", out="another")))
        assert f'"{place.text}" does not exist; --set data.eval_text names where' in said
    succeed(*recover(place, place.out, f"data.text={moved}"))
    moved.rename(place.text)
    succeed(*recover(place, place.out, out="whole"))
    assert lengths[-1] == lengths[-2]
    reports = [read_json(place.folder / name / "report.json") for name in ("recovered", "whole")]
    assert all(reports[0][name] == reports[1][name] for name in ("protocol", "loss", "held_out"))


def test_text_that_a_recovery_learns_from_is_said_to_flatter(place: Place) -> None:
    succeed(*place.prune("search.sequences=0"))
    done = succeed(*recover(place, place.out, f"data.eval_text={place.text}"))
    assert f"100% of {place.text} stands in {place.text}, too" in done.err


def test_less_of_the_text_leaves_what_is_judged_by(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the run's last tenth, not the last tenth of what is left."""
    succeed(*place.prune("search.sequences=0"))
    lengths, protocols, most = lengths_trained_on(monkeypatch), [], len(place.text.read_text()) // 2
    for given in ([], [f"data.max_characters={most}"]):
        succeed(*recover(place, place.out, *given), "--overwrite")
        protocols.append(read_json(place.folder / "recovered" / "report.json")["protocol"])
    assert protocols[0] == protocols[1]
    assert lengths[1] == pytest.approx(lengths[0] * 5 / 9, rel=0.05)


def test_a_failure_in_saving_leaves_no_model(place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was trained is not lost."""
    with monkeypatch.context() as patch:
        patch.setattr(recovering, "save_and_verify", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        done = run(*recover(place, finished))
    assert "No space left" in in_one_sentence(done)
    assert not (place.folder / "recovered" / "model").exists()
    monkeypatch.setattr(Training, "step", lambda _: 1 / 0)
    succeed(*recover(place, finished))


@pytest.mark.parametrize("overwritten", [False, True], ids=["new", "finished"])
def test_a_recovery_that_cannot_begin_leaves_all_as_it_was(overwritten: bool, place: Place, finished: Path) -> None:
    if overwritten:
        succeed(*recover(place, finished))
    (place.folder / "model" / "model.safetensors").unlink()
    folder = place.folder / "run"
    shutil.copytree(finished, folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(re.sub(r"path: \S+", f"path: {place.model}", config, count=1))
    before = place.contents()
    done = run(*recover(place, folder), *(["--overwrite"] if overwritten else []))
    assert str(place.model) in in_one_sentence(done)
    assert place.contents() == before


def test_what_it_was_evaluated_on_stays(place: Place) -> None:
    """Where the run had no text for that, it is the last tenth of its own, whatever is trained on."""
    succeed(*place.prune())
    other = tiny_text(place.folder / "other.txt", 900, seed=4)
    succeed(*recover(place, place.out), "--text", str(other))
    found, before = (read_json(folder / "report.json") for folder in (place.folder / "recovered", place.out))
    assert found["protocol"] == before["protocol"]
    assert found["loss"]["before"] == pytest.approx(before["loss"]["pruned"], rel=1e-6)


def test_only_what_may_differ_from_the_run_may_be_given(place: Place, finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"setting 'granularity' is not possible here; what can be set is recover"):
        bernprune.recover(finished, place.folder / "recovered", changes={"granularity": "ffn"})
    with pytest.raises(ConfigError, match=r"setting 'model.revision' is not possible"):
        bernprune.recover(finished, place.folder / "recovered", changes={"model": {"path": "x", "revision": "y"}})


def _unfinished(place: Place, folder: Path) -> list[str]:
    shutil.copytree(folder, place.out)
    (place.out / "report.json").unlink()
    return recover(place, place.out)


def _occupied(place: Place, folder: Path) -> list[str]:
    (place.folder / "recovered").mkdir()
    (place.folder / "recovered" / "thesis.txt").write_text("mine")
    return recover(place, folder)


def _other_run(place: Place, folder: Path) -> list[str]:
    command = recover(place, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "step", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*command)
    plan = read_json(place.folder / "recovered" / "plan.json")
    plan["layers"][0]["kv_groups"] = [0, 1, 2]
    (place.folder / "recovered" / "plan.json").write_text(json.dumps(plan))
    return command


REFUSED: dict[str, tuple[Callable[[Place, Path], list[str]], str]] = {
    "no run": (lambda p, f: recover(p, p.folder / "nothing"), "holds no bernprune run"),
    "unfinished": (_unfinished, "is not finished: there is nothing to recover"),
    "no peft": (lambda p, f: recover(p, f), r"the package peft; install it: pip install \"\.\[recover\]\""),
    "occupied": (_occupied, "holds no bernprune recovery; give another folder"),
    "a run's folder": (lambda p, f: recover(p, f, out=str(f)), "holds no bernprune recovery"),
    "another run": (_other_run, "unfinished recovery of another run"),
    "a setting of the run": (lambda p, f: recover(p, f, "search.masks=4"), "search.masks.*recover, data"),
    "misspelt": (lambda p, f: recover(p, f, "recover.rang=4"), "recover.rang.*did you mean.*rank"),
    "out of range": (lambda p, f: recover(p, f, "recover.distill=2"), "recover.distill.*less than or equal to 1"),
    "no text": (lambda p, f: [*recover(p, f), "--text", "none.txt"], "none.txt.*does not exist"),
    "little text": (
        lambda p, f: recover(p, f, "recover.held_out=5000"),
        r"at least recover.batch \+ recover.held_out = 8 \+ 5000 windows of 16 tokens, but there are \d+",
    ),
    "long windows": (lambda p, f: recover(p, f, "data.window=100"), "100 tokens is longer than the model's 64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str, place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, with nothing left behind that was not there."""
    make, message = REFUSED[case]
    if case == "no peft":
        monkeypatch.setitem(sys.modules, "peft", None)
    command = make(place, finished)
    before = place.contents()
    done = run(*command)
    assert re.search(message, in_one_sentence(done)), done.err
    assert place.contents() == before


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_the_dense_model_is_held_beside_the_pruned_one_only_to_teach(
    distill: float, place: Place, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tells ranks by it lets go of it before the other is loaded."""
    dense, alive = list[weakref.ref[Any]](), list[bool]()
    load_dense, load_pruned = recovery_setup.open_model, recovery_setup.kept_model

    def open_model(*given: Any) -> Any:
        model = load_dense(*given)
        dense.append(weakref.ref(model))
        return model

    def pruned(*given: Any) -> Any:
        alive.append(dense[0]() is not None)
        return load_pruned(*given)

    monkeypatch.setattr(recovery_setup, "open_model", open_model)
    monkeypatch.setattr(recovery_setup, "kept_model", pruned)
    succeed(*recover(place, finished, "recover.ranks=influence", f"recover.distill={distill}"))
    assert alive == [distill > 0]


def test_a_recovery_is_no_run(place: Place, finished: Path) -> None:
    succeed(*recover(place, finished))
    out = str(place.folder / "recovered")
    for command in (["resume", out], ["select", out, "--sparsity", "0.3"], ["recover", out, str(place.folder / "two")]):
        assert re.search("holds no bernprune run .*; it holds a recovery", in_one_sentence(run(*command)))
    assert "holds no bernprune run" in in_one_sentence(run(*place.prune(out=Path(out)), "--overwrite"))
