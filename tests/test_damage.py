"""What fails in the middle of a run, the disk, a checkpoint or the losses, leaves a run that can be resumed."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import (
    METHODS,
    NO_CHUNKS,
    PASSES,
    PROBE,
    STEPS,
    Place,
    hurry,
    in_one_sentence,
    prune_arguments,
    read_json,
    run,
    state_of,
    steps_of,
    succeed,
    tiny_text,
    verify_here,
)

from bernprune import picture, storage
from bernprune.config import make_config
from bernprune.errors import ModelError, RunError
from bernprune.models import saving
from bernprune.models.loading import load_model
from bernprune.models.view import describe
from bernprune.objective import MaskedObjective
from bernprune.policy.search import Reading, Seen
from bernprune.run import applying, finishing, loop, opening, pipeline, stage, verification
from bernprune.run.checkpoint import read_checkpoint, read_latest, read_state, write_checkpoint, write_state
from bernprune.run.folder import RunFolder
from bernprune.run.plans import read_plan

# 10 steps, checkpoints at 4, 8 and 10, in the middle of rounds of 5; what was learned is what is kept.
WORKING = (
    f"search.sequences={10 * PASSES + 2 * PROBE}",
    "search.checkpoint_steps=4",
    "search.rounds=2",
    "search.selection=0",
)


# --- a power cut ---


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, in order, by name."""
    seen, replace, rename = list[str](), os.replace, Path.rename

    def renamed(by: Callable[[Any, Any], Any]) -> Callable[[Any, Any], None]:
        def call(source: Any, target: Any) -> None:
            seen.append("renamed")
            by(source, target)

        return call

    monkeypatch.setattr(os, "fsync", lambda number: seen.append(Path(f"/proc/self/fd/{number}").readlink().name))
    monkeypatch.setattr(os, "replace", renamed(replace))
    monkeypatch.setattr(Path, "rename", renamed(rename))
    return seen


def test_a_file_has_its_name_once_it_is_on_disk(tmp_path: Path, on_disk: list[str]) -> None:
    """And then the name is: a power cut leaves the old file or all of the new one."""
    storage.write_bytes(tmp_path / "report.json", b"whole")
    assert on_disk == [".report.json.part", "renamed", tmp_path.name]


def test_a_folder_has_its_name_once_all_in_it_is_on_disk(tmp_path: Path, on_disk: list[str]) -> None:
    with saving.written_whole(tmp_path / "model") as folder:
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(b"whole")
    assert sorted(on_disk[:2]) == ["config.json", "model.safetensors"]
    assert on_disk[2:] == [folder.name, "renamed", tmp_path.name]


def test_what_a_killed_process_left_of_a_folder_goes(tmp_path: Path) -> None:
    """With the next one that is written in its place; what another process is writing now, and other files, stay."""
    left, other = tmp_path / ".model.0123abcd.part", tmp_path / ".model.part"
    for folder in (left, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")

    def write_at_once() -> None:
        with saving.written_whole(tmp_path / "model") as first:
            assert not left.exists()
            with saving.written_whole(tmp_path / "model") as second:
                assert first.is_dir() and second != first

    with pytest.raises(RunError, match="exists already"):
        write_at_once()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.part", "model"]


def test_a_checkpoint_has_its_name_once_it_is_on_disk(tmp_path: Path, on_disk: list[str]) -> None:
    """The folder of the first one is known before."""
    write_checkpoint(tmp_path / "checkpoints", 1, {"step": 1})
    assert on_disk == [tmp_path.name, ".step-00000001.safetensors.part", "renamed", "checkpoints"]


# --- a full disk ---


def _full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file whose path holds ``name`` can be written whole."""
    replace = os.replace

    def fail(source: Any, target: Any) -> None:
        if re.search(name, str(target)):
            raise _full()
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", fail)


def _full_for_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(1000))
    original = loop.sync_stream

    def fail(file: Any) -> None:
        if next(count) >= 1:
            raise _full()
        original(file)

    monkeypatch.setattr(loop, "sync_stream", fail)


def _full_for_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise _full()

    monkeypatch.setattr(saving.shutil, "copyfile", fail)


def _full_for_verifying(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> float:
        raise _full()

    monkeypatch.setattr(verification, "verify_saved", fail)


def _failing_after_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    original = storage.sync

    def fail(path: Path) -> None:
        original(path)
        if (path / "report.json").is_file():
            raise _full()

    monkeypatch.setattr(storage, "sync", fail)


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "initial": lambda patch: _full_for(r"initial\.safetensors$", patch),
    "first-checkpoint": lambda patch: _full_for(r"step-00000004", patch),
    "last-checkpoint": lambda patch: _full_for(r"step-00000010", patch),
    "metrics": _full_for_metrics,
    "plan": lambda patch: _full_for(r"plan\.json$", patch),
    "model": _full_for_model,
    "verifying": _full_for_verifying,
    "report": lambda patch: _full_for(r"report\.json$", patch),
    "after-the-report": _failing_after_the_report,
}


@pytest.fixture(scope="module")
def undisturbed(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the disks' setting with nothing in its way."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        succeed(*prune_arguments(prepared.model, prepared.text, out, *WORKING))
    return out


@pytest.mark.parametrize("where", FULL)
def test_a_full_disk(where: str, place: Place, undisturbed: Path) -> None:
    """The run says so and leaves no model and no scrap; once there is room it is resumed to the same result."""
    with pytest.MonkeyPatch.context() as patch:
        FULL[where](patch)
        sentence = in_one_sentence(run(*place.prune(*WORKING)))
    assert "No space left" in sentence
    assert ("cannot be written" in sentence) == (where not in ("model", "verifying"))
    left = {path.name for path in place.out.rglob("*")}
    assert not (place.out / "model").exists() and not (place.out / "report.json").exists()
    assert not [name for name in left if name.endswith(".part") or name.startswith(".model")]
    assert not list((place.folder / "temporary").iterdir())
    succeed("resume", str(place.out))
    assert (place.out / "plan.json").read_bytes() == (undisturbed / "plan.json").read_bytes()
    assert steps_of(place.out) == list(range(10))


def test_a_picture_that_cannot_be_drawn(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is missing, which is said; the model, its report and the run are what they are with it."""

    def fail(*_: Any) -> bytes:
        raise LookupError("no fonts here")

    monkeypatch.setattr(pipeline, "draw", fail)
    done = succeed(*place.prune())
    assert done.err == f"WARNING: {place.out / 'report.png'} could not be drawn: no fonts here\n"
    assert (place.out / "model").is_dir() and read_json(place.out / "report.json")["perplexity"]
    assert not (place.out / "report.png").exists()


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("told", [True, False])
def test_a_disk_without_room_for_the_result(
    told: bool, replacing: bool, place: Place, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is told of before the search, by the byte, and nothing is changed. What is replaced makes room."""
    model, before, short = place.model / "model.safetensors", place.contents(), int(told)
    command = place.prune("budget.sparsity=0.3", "search.dtype=bfloat16")
    if replacing:  # also what a process that was killed while saving has left
        shutil.copytree(undisturbed, place.out)
        shutil.copytree(undisturbed / "model", place.out / ".model.dead")
        command, before = [*command, "--overwrite"], place.contents()
        short += 2 * sum(path.stat().st_size for path in (place.out / "model").iterdir())
    space = describe(load_model(str(place.model))).space
    removed = 0.3 * space.costs_U("parameters").sum().item()
    needed = 4 * (sum(value.numel() for value in load_file(model).values()) - removed)
    usage = shutil.disk_usage(place.folder)._replace(free=math.ceil(needed) - short)
    monkeypatch.setattr(finishing.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(pipeline, "run_search", lambda *_, **__: 1 / 0)
    if not told:
        with pytest.raises(ZeroDivisionError):
            run(*command)
        return
    sentence = in_one_sentence(run(*command))
    assert re.search(r"may take \S+ GiB in .*out, where there is room for \S+", sentence)
    assert place.contents() == before


def test_of_a_budget_of_flops_the_disk_must_hold_all(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows before the search how many parameters go."""
    needed = (place.model / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(place.folder)._replace(free=int(0.9 * needed))
    monkeypatch.setattr(finishing.shutil, "disk_usage", lambda path: usage)
    succeed(*place.prune("budget.sparsity=0.5", "search.sequences=0"))
    flops = ("budget.measure=flops", "budget.sparsity=0.5", "search.sequences=0")
    assert "there is room for" in in_one_sentence(run(*place.prune(*flops, out=place.folder / "other")))


def test_a_disk_full_from_the_start(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the configuration can be written, the folder and those above it are gone again."""
    _full_for(r"config\.yaml$", monkeypatch)
    before = place.contents()
    assert "No space left" in in_one_sentence(run(*place.prune()))
    assert place.contents() == before


def test_a_disk_full_while_applying(place: Place, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``apply`` leaves neither a model nor the folders it made for it."""
    _full_for_verifying(monkeypatch)
    before = place.contents()
    done = run("apply", str(undisturbed / "plan.json"), str(place.model), str(place.folder / "deep" / "er"))
    sentence = in_one_sentence(done)
    assert "could not be verified" in sentence and "No space left" in sentence and str(place.folder) in sentence
    assert place.contents() == before


def test_a_saved_model_that_differs_is_not_left(
    place: Place, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saved folder whose logits are not the model's fails the run loudly, and nobody can mistake it for a result."""
    monkeypatch.setattr(verification, "verify_saved", lambda *_, **__: 0.5)
    for arguments in (place.prune(), ["apply", str(undisturbed / "plan.json"), str(place.model), "applied"]):
        assert "not the one in memory" in in_one_sentence(run(*arguments))
    assert not (place.out / "model").exists() and not (place.out / "report.json").exists()
    assert not (place.folder / "applied").exists()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_how_far_logits_may_differ(
    scale: float, place: Place, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a share of the largest of them; and never by what is no number."""
    weights = place.copied() / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] *= scale
    save_file(tensors, weights, metadata={"format": "pt"})
    plan = read_plan(undisturbed / "plan.json")
    config = make_config({"model": {"path": str(weights.parent)}, "repair": {"method": "none"}})
    largest, differences = list[float](), iter([0.0, 0.9e-5, 1.1e-5, math.inf])

    def verify(folder: Path, tokens_BT: torch.Tensor, logits: torch.Tensor, **_: Any) -> float:
        largest.append(logits.abs().max().item())
        return next(differences) * largest[-1]

    monkeypatch.setattr(verification, "verify_saved", verify)
    for name in ("a", "b"):
        assert applying.apply_plan(config, plan, name)["tolerance"] == pytest.approx(1e-5 * largest[-1])
    for name in ("c", "d"):
        with pytest.raises(RunError, match="not the one in memory"):
            applying.apply_plan(config, plan, name)


def test_a_saved_model_is_compared_in_full_precision(
    place: Place, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller may have asked for products of less; a clean process knows nothing of it, and the caller keeps it."""

    def clean(*given: Any, **named: Any) -> float:
        asked.append(torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        return verify_here(*given, **named)

    asked, before = list[str](), torch.get_float32_matmul_precision()
    monkeypatch.setattr(verification, "verify_saved", clean)
    torch.set_float32_matmul_precision("medium")
    try:
        done = succeed("apply", str(undisturbed / "plan.json"), str(place.model), "applied")
        assert asked == ["medium"] and "difference 0.0e+00" in done.out
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_saved_model_is_loaded_in_the_place_of_the_one_in_memory(
    place: Place, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has let go of its weights by then: for both there may be no room."""
    saved, held = list[torch.nn.Module](), list[bool]()

    def write(model: Any, *given: Any, **named: Any) -> None:
        saved.append(model)
        saving.write_pruned(model, *given, **named)

    def verify(*given: Any, **named: Any) -> float:
        held.extend(not parameter.is_meta for parameter in saved[0].parameters())
        return verify_here(*given, **named)

    monkeypatch.setattr(verification, "write_pruned", write)
    monkeypatch.setattr(verification, "verify_saved", verify)
    done = succeed("apply", str(undisturbed / "plan.json"), str(place.model), "applied")
    assert held and not any(held) and "difference 0.0e+00" in done.out


# --- damaged checkpoints ---


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {"truncated": _truncated, "bit-flipped": _flipped, "emptied": _emptied}


def _stopped_after_its_search(place: Place, undisturbed: Path) -> list[Path]:
    """The run without its result; returns its checkpoints, the older one first."""
    shutil.copytree(undisturbed, place.out)
    (place.out / "report.json").unlink()
    shutil.rmtree(place.out / "model")
    return sorted((place.out / "checkpoints").iterdir())


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_older_checkpoint_is_used(damage: str, place: Place, undisturbed: Path) -> None:
    """A damaged checkpoint is named, the one before it is used, which is said too, and the result is the same."""
    older, newer = _stopped_after_its_search(place, undisturbed)
    whole = state_of(newer)
    DAMAGE[damage](newer)
    done = succeed("resume", str(place.out))
    assert newer.name in done.err and "damaged" in done.err and f"older checkpoint {older.name}" in done.err
    assert state_of(newer) == whole
    assert (place.out / "plan.json").read_bytes() == (undisturbed / "plan.json").read_bytes()
    assert steps_of(place.out) == list(range(10))


def test_checkpoints_of_another_text_are_refused(tmp_path: Path) -> None:
    """Also where the fingerprints are lost that a run began with."""
    write_checkpoint(tmp_path, 3, {"step": 3, "text_sha256": "ab"})
    keys = ("step", "text_sha256")
    assert read_checkpoint(tmp_path, keys, "ab") == {"step": 3, "text_sha256": "ab"}
    with pytest.raises(RunError, match="the text is not the one that the checkpoints"):
        read_checkpoint(tmp_path, keys, "cd")
    with pytest.raises(RunError, match="are of another version"):
        read_checkpoint(tmp_path, (*keys, "search"), "ab")


def test_a_damaged_checkpoint_takes_no_place(tmp_path: Path) -> None:
    """Two that are whole are kept while a search that went on from an older one catches up."""
    for step in (80, 90, 100):
        write_checkpoint(tmp_path, step, {"step": step})
    _flipped(tmp_path / "step-00000100.safetensors")
    (tmp_path / ".step-00000095.safetensors.part").write_bytes(b"half")  # of one that was killed while it wrote
    for step in (93, 96):
        write_checkpoint(tmp_path, step, {"step": step})
        assert read_latest(tmp_path) == {"step": step}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000093.safetensors",
        "step-00000096.safetensors",
    ]


def test_no_checkpoint_is_whole(place: Place, undisturbed: Path) -> None:
    """Where every checkpoint is damaged the last line says what to do, and doing it gives the same result."""
    for path in _stopped_after_its_search(place, undisturbed):
        _flipped(path)
    before = place.contents()
    done = run("resume", str(place.out))
    assert done.code == 2 and "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: none of the 2 checkpoints") and "delete that folder" in last
    assert not (place.out / "model").exists()
    assert {name for name, data in place.contents().items() if before.get(name) != data} <= {"runs/out/.lock"}
    shutil.rmtree(place.out / "checkpoints")
    succeed("resume", str(place.out))
    assert (place.out / "plan.json").read_bytes() == (undisturbed / "plan.json").read_bytes()


def test_a_damaged_start_is_computed_again(place: Place, undisturbed: Path) -> None:
    """The scores that a run began with are a function of its input, so losing them costs time alone."""
    _stopped_after_its_search(place, undisturbed)
    _flipped(place.out / "initial.safetensors")
    done = succeed("resume", str(place.out))
    assert "initial.safetensors" in done.err and "again" in done.err
    assert state_of(place.out / "initial.safetensors") == state_of(undisturbed / "initial.safetensors")


def test_a_checkpoint_of_another_text_is_refused(place: Place, undisturbed: Path) -> None:
    """A text that changed under the run is noticed before it mixes two searches."""
    _stopped_after_its_search(place, undisturbed)
    stored = (place.out / "config.yaml").read_text()
    old = re.search(r"text: (\S+)", stored)
    assert old is not None
    (place.out / "config.yaml").write_text(stored.replace(old[1], str(tiny_text(place.folder / "new.txt", seed=1))))
    assert "training text" in in_one_sentence(run("resume", str(place.out)))


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_checkpoint_of_other_weights_is_refused(size: str, place: Place, undisturbed: Path) -> None:
    """Weights that changed under the run are noticed before it mixes two models, whose units may be as many."""
    _stopped_after_its_search(place, undisturbed)
    channels = read_json(place.model / "config.json")["intermediate_size"]
    if size == "same":
        changed = place.copied()
        tensors = load_file(changed / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.01
    else:
        changed = place.model_with(intermediate_size=channels - 1)
        every = load_file(changed / "model.safetensors").items()
        tensors = {name: _without_last(values, channels).contiguous() for name, values in every}
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    stored = (place.out / "config.yaml").read_text()
    old = re.search(r"path: (\S+)", stored)
    assert old is not None
    (place.out / "config.yaml").write_text(stored.replace(old[1], str(changed)))
    before = place.contents()
    assert "weights are not those" in in_one_sentence(run("resume", str(place.out)))
    assert place.contents() == before


def _without_last(values: torch.Tensor, size: int) -> torch.Tensor:
    """Cut to one less wherever it is of that size."""
    return values[tuple(slice(size - 1 if length == size else None) for length in values.shape)]


@pytest.mark.parametrize("missing", ["work", "search.beliefs.spread_L", "search"])
def test_a_checkpoint_of_another_version_is_refused(missing: str, place: Place, undisturbed: Path) -> None:
    """What it lacks, at any depth, is noticed before anything is taken over."""
    _stopped_after_its_search(place, undisturbed)
    for folder in sorted((place.out / "checkpoints").iterdir()):
        state = read_state(folder)
        within = state
        *outer, last = missing.split(".")
        for name in outer:
            within = within[name]
        del within[last]
        write_state(folder, state)
    assert "version" in in_one_sentence(run("resume", str(place.out)))


def test_a_checkpoint_of_other_units_is_refused(place: Place, undisturbed: Path) -> None:
    """A model that changed under the run is noticed where its units differ."""
    _stopped_after_its_search(place, undisturbed)
    stored = (place.out / "config.yaml").read_text()
    (place.out / "config.yaml").write_text(stored.replace("- kv_group\n", ""))
    (place.out / "initial.safetensors").unlink()
    assert "another model or another granularity" in in_one_sentence(run("resume", str(place.out)))


# --- losses that are not finite ---


MASKS, WINDOWS = 3, 2  # of a step
LAYOUTS = {name: (1 if name in ("posterior-batch", "reinforce") else WINDOWS, MASKS) for name in METHODS}


def _losses_with_nan(
    monkeypatch: pytest.MonkeyPatch, step: int, bad: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, torch.Tensor]:
    """The last chunks of ``bad`` masks of a step get a loss that is no number; the true losses are noted by step.

    ``bad`` is given the numbers of the masks, ``[B, K]``.
    """
    noted: dict[int, torch.Tensor] = {}
    original = loop.evaluate_step

    def evaluate(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None, Reading | None]:
        losses_BKC, reference_BC, reading = original(*arguments)
        losses_BK, now = losses_BKC.sum(-1), len(noted)
        noted[now] = losses_BK
        if now == step:
            losses_BKC = losses_BKC.clone()
            lost_BK = bad(torch.arange(losses_BK.numel()).view_as(losses_BK))
            losses_BKC[..., -1][lost_BK] = float("nan")
            if reading is not None:
                reading.losses_BKT[..., -2][lost_BK] = float("nan")
        return losses_BKC, reference_BC, reading

    monkeypatch.setattr(loop, "evaluate_step", evaluate)
    return noted


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_stops_the_run(method: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, with the step, the number of masks and the way out."""
    _losses_with_nan(monkeypatch, step=3, bad=lambda numbers_BK: numbers_BK == 1)
    sentence = in_one_sentence(run(*place.prune(*METHODS[method])))
    groups, masks = LAYOUTS[method]
    assert f"1 of {groups * masks} losses of step 3" in sentence
    assert ("search.non_finite=drop" in sentence) == (method != "posterior-batch"), "antithetic, and on one text"
    assert not (place.out / "model").exists()


@pytest.mark.parametrize("again", ["prune", "resume"])
def test_the_way_out_can_be_taken(again: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that a loss has stopped goes on without the masks that have such losses."""
    drop = "search.non_finite=drop"
    with pytest.MonkeyPatch.context() as patch:
        _losses_with_nan(patch, step=3, bad=lambda numbers_BK: numbers_BK == 1)
        in_one_sentence(run(*place.prune()))
    _losses_with_nan(monkeypatch, step=3, bad=lambda numbers_BK: numbers_BK == 1)
    succeed(*(place.prune(drop) if again == "prune" else ["resume", str(place.out), "--set", drop]))
    lines = [json.loads(line) for line in (place.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["dropped"] for line in lines] == [0, 0, 0, MASKS, 0, 0, 0, 0]


# Of antithetic masks on a whole batch none may be missing.
DROPPING = ("search.non_finite=drop", "search.sampling=independent")


@pytest.mark.parametrize("method", METHODS)
def test_losses_that_are_not_finite_can_be_dropped(method: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On request: the others count, and the log says how many were left out.

    Where every window has masks of its own, those that competed with a lost one are lost with it.
    """
    noted = _losses_with_nan(monkeypatch, step=3, bad=lambda numbers_BK: numbers_BK < 2)
    succeed(*place.prune(*DROPPING, *METHODS[method]))
    lines = [json.loads(line) for line in (place.out / "metrics.jsonl").read_text().splitlines()]
    groups, masks = LAYOUTS[method]
    dropped = [(2 if groups == 1 else masks) if step == 3 else 0 for step in range(STEPS)]
    assert [line["dropped"] for line in lines] == dropped
    means = [noted[step].flatten()[dropped[step] :].mean().item() for step in range(STEPS)]
    assert [line["loss"] for line in lines] == pytest.approx(means)
    assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    rounds = [line["round"] for line in lines if "round" in line]
    assert rounds and json.dumps(rounds, allow_nan=False)


@pytest.mark.parametrize("drop", [False, True])
def test_activities_that_are_not_finite_are_like_losses(
    drop: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stop the run, or the window is not read: beliefs would take them in."""
    original, calls = MaskedObjective.look, list[int]()

    def look(self: MaskedObjective, mask_U: torch.Tensor, tokens_BT: torch.Tensor, see: Seen) -> None:
        def spoil(layer: int, windows: slice, active_RTF: torch.Tensor) -> None:
            if len(calls) == 4 and layer == 1:
                active_RTF = active_RTF.clone()
                active_RTF[1, 3, 2] = float("inf")
            see(layer, windows, active_RTF)

        calls.append(len(tokens_BT))
        original(self, mask_U, tokens_BT, spoil)

    monkeypatch.setattr(MaskedObjective, "look", look)
    done = run(*place.prune(*METHODS["posterior-chunk"], *(DROPPING if drop else ())))
    if not drop:
        sentence = in_one_sentence(done)
        assert f"activities in 1 of {WINDOWS} windows of step 3" in sentence and "search.non_finite=drop" in sentence
        return
    lines = [json.loads(line) for line in (place.out / "metrics.jsonl").read_text().splitlines()]
    assert done.code == 0 and [line["unread"] for line in lines] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert not any(line["dropped"] for line in lines)
    assert json.dumps([line.get("round") for line in lines], allow_nan=False)


ENOUGH = {
    "posterior-chunk": METHODS["posterior-chunk"],
    "posterior-batch": METHODS["posterior-batch"],
    "reinforce": METHODS["reinforce"],
    "paper": ("preset=paper", NO_CHUNKS),
}


@pytest.mark.parametrize("method", ENOUGH)
def test_one_finite_loss_is_enough(place: Place, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Also of the published two masks, or one window of two: the step counts for less, and the run goes on."""
    _losses_with_nan(monkeypatch, step=1, bad=lambda numbers_BK: numbers_BK == 0)
    succeed(*place.prune(*DROPPING, "search.masks=2", *ENOUGH[method]))
    lines = [json.loads(line) for line in (place.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["dropped"] for line in lines[:4]] == [0, 2 if method == "posterior-chunk" else 1, 0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_no_finite_loss_stops_the_run_all_the_same(method: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to learn from."""
    _losses_with_nan(monkeypatch, step=3, bad=lambda numbers_BK: numbers_BK >= 0)
    lost = math.prod(LAYOUTS[method])
    arguments = place.prune(*DROPPING, *METHODS[method])
    assert f"{lost} of {lost} losses of step 3" in in_one_sentence(run(*arguments))


@pytest.mark.parametrize("method", ["posterior-chunk", "posterior-sequence"])
def test_a_loss_lost_in_every_window_stops_the_run(method: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """No window is left whose masks can be compared."""
    _losses_with_nan(monkeypatch, step=3, bad=lambda numbers_BK: numbers_BK % MASKS == 1)
    assert "2 of 6 losses of step 3" in in_one_sentence(run(*place.prune(*DROPPING, *METHODS[method])))


@pytest.mark.parametrize("lost", [("uniform",), ("initial",), ("uniform", "initial")])
def test_a_start_that_loses_beyond_measure_is_no_reason_to_fail(
    lost: tuple[str, ...], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no figure, in the report, the table and the picture; what was learned is kept."""
    original, names = MaskedObjective.losses, iter(("uniform", "initial"))

    def losses(self: MaskedObjective, masks_KU: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
        found_K = original(self, masks_KU, tokens_BT)
        return found_K * math.nan if next(names, None) in lost else found_K

    monkeypatch.setattr(MaskedObjective, "losses", losses)
    monkeypatch.setattr(pipeline, "draw", picture.draw)
    done = succeed(*place.prune("search.method=reinforce", "initial.map=sigmap", "initial.allocation=global"))
    assert done.err.count("on the evaluation text is nan") == len(lost)
    report = read_json(place.out / "report.json")
    for name in ("dense", "uniform", "initial", "pruned"):
        assert (report["loss"][name] is None) == (report["perplexity"][name] is None) == (name in lost)
    row = next(line for line in done.out.splitlines() if line.startswith("initial metric"))
    assert ("not finite" in row) == ("initial" in lost)
    assert (place.out / "report.png").is_file()


# --- a full GPU ---


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("set_stage", torch.OutOfMemoryError("CUDA out of memory"), "another model.device"),
        ("run_search", torch.OutOfMemoryError("CUDA out of memory"), "--set search.rows_per_forward=32"),
        ("run_search", RuntimeError("Triton Error [CUDA]: out of memory"), "--set search.rows_per_forward=32"),
    ],
    ids=["loading", "searching", "kernels"],
)
def test_a_full_gpu(name: str, error: Exception, said: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """While loading, before there is a run, and in the search, from where it can be continued."""

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, name, full)
    sentence = in_one_sentence(run(*place.prune()))
    assert "memory is full" in sentence and said in sentence
    assert ("bernprune resume" in sentence) == (name == "run_search") == place.out.exists()


@pytest.mark.parametrize("command", ["prune", "resume"])
def test_what_a_full_gpu_advises_can_be_done(command: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that it gives goes on with half as much at once, whichever command met it."""
    search = pipeline.run_search

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline, "run_search", full)
    for attempt in (place.prune("search.rows_per_forward=12"), ["resume", str(place.out)]):
        sentence = in_one_sentence(run(*attempt))
        if attempt[0] == command:
            break
    monkeypatch.setattr(pipeline, "run_search", search)
    succeed(*sentence.rpartition("bernprune ")[2].split())
    config = RunFolder(place.out).read_config()
    assert (config.search.rows_per_forward, config.report.latency_rows) == (6, 1)


def test_what_is_advised_is_less_than_there_was_room_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's memory may have left room for a few rows only, long before it was full."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stage, "rows_per_forward", lambda *_: 4)
    monkeypatch.setattr(pipeline, "run_search", full)
    assert "--set search.rows_per_forward=2 " in in_one_sentence(run(*place.prune()))


@pytest.mark.parametrize("command", ["prune", "resume"])
def test_what_is_advised_is_less_than_the_search_came_down_to(
    command: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever comes behind it."""
    hidden = MaskedObjective._hidden

    def small(self: MaskedObjective, tokens_RT: torch.Tensor, *given: Any) -> torch.Tensor:
        if len(tokens_RT) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, tokens_RT, *given)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(MaskedObjective, "_hidden", small)
    monkeypatch.setattr(pipeline, "make_pruned", full)
    for attempt in (place.prune("search.masks=8"), ["resume", str(place.out)]):
        done = run(*attempt)
        assert "--set search.rows_per_forward=2 " in done.err.splitlines()[-1]
        if attempt[0] == command:
            break


def test_what_a_full_gpu_has_no_room_for_is_tried_once(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that were too many stay fewer for all that a run evaluates, and it is said once."""
    passes, hidden = [], MaskedObjective._hidden

    def full(self: MaskedObjective, tokens_RT: torch.Tensor, *given: Any) -> torch.Tensor:
        passes.append(len(tokens_RT))
        if len(tokens_RT) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, tokens_RT, *given)

    monkeypatch.setattr(MaskedObjective, "_hidden", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    given = {
        "model": {"path": str(place.model)},
        "data": {"text": str(place.text), "window": 16},
        "search": {"rows_per_forward": 8},
    }
    made = stage.set_stage(make_config(given))
    mask_U = torch.ones(made.view.space.size, dtype=torch.bool)
    for _ in range(2):
        with made.objective() as objective:
            objective.losses(mask_U[None], made.initial_windows_WT[:8])
    assert [rows for rows in passes if rows > 4] == [8] and made.rows == 4
    assert [record.message for record in caplog.records if "is full" in record.message] == [
        "the GPU's memory is full: going on with 4 rows in a forward pass"
    ]


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")],
)
def test_a_full_machine(error: Exception, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said in a sentence, with how to go on; other errors of torch keep their traceback."""

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run_search", full)
    sentence = in_one_sentence(run(*place.prune()))
    assert "the machine's memory is full; continue with: bernprune resume" in sentence
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        run("resume", str(place.out))


def test_a_gpu_too_small_for_the_model(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python, too, that is an error of ours, which names the model."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(opening, "load_model", full)
    with pytest.raises(ModelError, match=rf"memory of cpu is full before {place.model} is loaded"):
        opening.open_model(make_config({"model": {"path": str(place.model)}}), torch.device("cpu"))


# --- states of other versions ---


@pytest.mark.parametrize("name", ["initial", "finals"])
def test_a_state_of_another_version_is_made_again(name: str, place: Place, undisturbed: Path) -> None:
    """Whole, but with other content: what it holds is computed again, and the result is the same."""
    with pytest.MonkeyPatch.context() as patch:
        FULL["verifying"](patch)
        run(*place.prune(*WORKING))
    write_state(place.out / f"{name}.safetensors", {"scores_U": torch.zeros(3), "step": 10})
    succeed("resume", str(place.out))
    assert (place.out / "plan.json").read_bytes() == (undisturbed / "plan.json").read_bytes()
