"""A tiny model with a tokenizer and a text on disk, and the command line run on them, in this process or in its own."""

import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bernprune import cli
from bernprune.run import loop, pipeline, verification
from bernprune.run.checkpoint import read_state

REPOSITORY = Path(__file__).parent.parent
VOCABULARY, WINDOW, POSITIONS = 270, 16, 64
LAYERS, KV_GROUPS, CHANNELS = 3, 3, 19
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_GROUPS,
    "intermediate_size": CHANNELS,
    "max_position_embeddings": POSITIONS,
}
# Small enough for a run of a second: 8 steps of 2 windows, each under 3 masks and once more to be read, and 2 to probe
# the selection; a test adds what it is about.
STEPS, PASSES, PROBE, CHUNK = 8, 8, 2, 4
UNREAD_PASSES = 6  # of a step without reading
SETTINGS = (
    f"data.window={WINDOW}",
    "data.eval_tokens=320",
    "initial.windows=4",
    "search.masks=3",
    "search.windows=2",
    f"search.chunk={CHUNK}",
    f"search.sequences={STEPS * PASSES + PROBE}",
    "search.selection=0",
    "search.checkpoint_seconds=1000",
    "report.latency_rows=2",
    "report.latency_repeats=2",
    "report.initial_latency=false",
    "repair.method=none",
)
# What makes a tiny run one of the other method, or of masks that last longer. A round has several observations.
NO_CHUNKS = "search.chunk=null"
ONE_MASK = ("search.masks_per=batch", NO_CHUNKS)
FOUR_ROUNDS = ("search.rounds=4", f"search.sequences={STEPS * PASSES + 4 * PROBE}")
METHODS: dict[str, tuple[str, ...]] = {
    "posterior-chunk": FOUR_ROUNDS,
    "posterior-sequence": (*FOUR_ROUNDS, "search.masks_per=sequence", NO_CHUNKS),
    "posterior-batch": (f"search.sequences={STEPS * UNREAD_PASSES + 4 * PROBE}", "search.rounds=4", *ONE_MASK),
    "reinforce": (f"search.sequences={STEPS * UNREAD_PASSES + PROBE}", "preset=reinforce", NO_CHUNKS),
}
PASSES_OF = {method: PASSES if "chunk" in method or "sequence" in method else UNREAD_PASSES for method in METHODS}


STOPPING = "WARNING: stopping after the piece of work at hand; a second Ctrl-C or SIGTERM stops at once\n"


def interrupted(out: Path) -> str:
    """What a run says that was interrupted, and how it is continued."""
    return f"{STOPPING}interrupted; continue, or finish early by adding --finish, with: bernprune resume {out}\n"


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str


def tiny_folder(folder: Path, *, seed: int = 0, family: str = "llama", **changes: Any) -> Path:
    """A saved random model (float32, 3 layers) with a byte-level tokenizer; ``changes`` go to its config."""
    model = tiny_model(family, torch.float32, seed, **(SIZES | changes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, trained on the tiny text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([words(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def words(count: int, seed: int = 0) -> str:
    """A text of so many short words."""
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefgh", k=generator.randint(1, 5))) for _ in range(count))


def tiny_text(path: Path, count: int = 1500, seed: int = 0) -> Path:
    """A text file of so many words."""
    path.write_text(words(count, seed), encoding="utf-8")
    return path


def settings(*given: str) -> list[str]:
    """``--set`` for each; a later one wins."""
    return [part for setting in given for part in ("--set", setting)]


def prune_arguments(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    """The command line of a short run; ``more`` are further settings, such as ``search.masks=8``."""
    where = ["--model", str(model), "--text", str(text), "--out", str(out)]
    return ["prune", *where, *settings(*SETTINGS, *more)]


def run(*arguments: str) -> Outcome:
    """The command in this process; what it does not turn into an exit code is raised."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers_of = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    handlers, logging.root.handlers = logging.root.handlers, []  # pytest's, with which nothing would reach stderr
    try:
        with (
            patch.object(sys, "argv", ["bernprune", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        logging.root.handlers = handlers
        for number, handler in handlers_of.items():
            signal.signal(number, handler)
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*arguments: str) -> Outcome:
    """As ``run``, for a command that must end well."""
    done = run(*arguments)
    assert done.code == 0, done.err
    return done


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Verify saved models in this process, and draw nothing: either takes longer than all else of a tiny run."""
    patch.setattr(verification, "verify_saved", verify_here)
    patch.setattr(pipeline, "draw", lambda *_: b"")


@torch.no_grad()
def verify_here(folder: Path, tokens_BT: torch.Tensor, logits: torch.Tensor, *, device: str = "cpu") -> float:
    """What ``verify_saved`` measures, without the seconds that a clean process takes to start."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=logits.dtype).to(device)
    return float((loaded(input_ids=tokens_BT).logits - logits).abs().max())


def stopped_in_step(
    step: int,
    command: Sequence[str],
    number: signal.Signals = signal.SIGINT,
    *,
    before: Callable[[], object] = lambda: None,
) -> Outcome:
    """A command of which the search is interrupted in this step, as by Ctrl-C or another signal, after ``before``."""
    original = loop._Loop.step

    def interrupting(self: loop._Loop, *given: Any) -> Any:
        if self.work.step == step:
            before()
            os.kill(os.getpid(), number)
        return original(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "step", interrupting)
        return run(*command)


def steps_of(out: Path) -> list[int]:
    """The steps in a run's metrics, in the order of the file; fails on a line that is not whole."""
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def state_of(path: Path) -> Any:
    """A checkpoint's content but for its time; equal if and only if all is equal to the last bit."""
    state = read_state(path)
    state.get("work", state).pop("seconds", None)
    return _plain(state)


def _plain(value: Any) -> Any:
    """Tensors as lists, so that ``==`` compares."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Place:
    """A folder with a model and a text, in which a command is tried."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    @property
    def out(self) -> Path:
        return self.folder / "runs" / "out"

    def prune(
        self, *more: str, model: Path | None = None, text: Path | None = None, out: Path | None = None
    ) -> list[str]:
        """The command line of a short run here; ``more`` are settings."""
        return prune_arguments(model or self.model, text or self.text, out or self.out, *more)

    def model_with(self, **changes: Any) -> Path:
        """A copy of the model with another config."""
        config = read_json(self.model / "config.json") | changes
        (self.copied() / "config.json").write_text(json.dumps(config))
        return self.folder / "changed"

    def copied(self) -> Path:
        shutil.copytree(self.model, self.folder / "changed")
        return self.folder / "changed"

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def contents(self) -> dict[str, bytes]:
        """Everything in the folder."""
        paths = sorted(self.folder.rglob("*"))
        return {str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


def prepare(folder: Path) -> Place:
    """A model and a text in ``folder``."""
    tiny_folder(folder / "model")
    tiny_text(folder / "text.txt")
    return Place(folder)


def visit(prepared: Place, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of a place, where relative paths and temporary files go too, and runs end quickly."""
    shutil.copytree(prepared.folder, folder)
    (folder / "temporary").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tempfile.tempdir", str(folder / "temporary"))
    hurry(monkeypatch)
    return Place(folder)


def in_one_sentence(done: Outcome) -> str:
    """The sentence of a failed command; fails if there is more, less, or another exit code."""
    lines = done.err.splitlines()
    assert done.code == 2, done
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > len("error: ") + 10, done.err
    assert "Traceback" not in done.err and done.out == ""
    assert lines[0].count("error:") == 1, "an error was wrapped in another"
    return lines[0]


def finish(prepared: Place, folder: Path, *more: str) -> Path:
    """An undisturbed run with a held-out text of its own; returns its folder."""
    held_out = tiny_text(folder / "held-out.txt", 400, seed=9)
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        arguments = prepared.prune(*more, out=folder / "out")
        assert succeed(*arguments, "--eval-text", str(held_out)).err == ""
    return folder / "out"


def same_run(out: Path, other: Path) -> None:
    """Both ended in the same policy and plan to the last bit, over the same steps with the same losses."""
    newest = [sorted((folder / "checkpoints").iterdir())[-1] for folder in (out, other)]
    assert newest[0].name == newest[1].name
    assert state_of(newest[0]) == state_of(newest[1])
    assert (out / "plan.json").read_bytes() == (other / "plan.json").read_bytes()
    assert without_times(out / "metrics.jsonl") == without_times(other / "metrics.jsonl")


def without_times(metrics: Path) -> list[dict[str, Any]]:
    """A run's metrics but for their times."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
