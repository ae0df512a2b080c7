"""Kill tiny runs at random moments, go on with them, and compare each with the run that nothing disturbed.

python tests/kill_runs.py --runs 100 --seed 0

Of each way to search and to choose, and of a recovery. It is no test: it takes minutes, and how many moments are met
depends on the machine. Exit code 1 if any run ended in another way than the undisturbed one, whose folder is then kept.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import interpreting  # noqa: F401
import pytest
import torch
from children import Child
from safetensors.torch import load_file
from tiny_run import METHODS, PASSES, PROBE, Outcome, hurry, prepare, read_json, same_run, settings, tiny_text

CHUNKS = (*METHODS["posterior-chunk"], "search.rounds=5", "search.checkpoint_steps=3")
CHOICE = ("search.selection=0.4", "search.sequences=300", "search.final_windows=2")
RUNS: dict[str, tuple[str, ...]] = {
    "chunks": (*CHUNKS, f"search.sequences={20 * PASSES + 5 * PROBE}", "plans.sparsities=[0.2, 0.4]"),
    "choice": (*CHUNKS, *CHOICE),
    "repair": (*CHUNKS, *CHOICE, "repair.method=auto"),
    "refit": (*CHUNKS, *CHOICE, "repair.method=ridge", "search.refit=true"),
    "batch": (*METHODS["posterior-batch"], "search.checkpoint_steps=2"),
    "reinforce": (*METHODS["reinforce"], "search.checkpoint_steps=3", f"search.sequences={20 * PASSES}"),
}
RECOVERY = ("recover.batch=2", "recover.tokens=1024", "recover.held_out=6", "recover.checkpoint_seconds=0.2")
NUMBERS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


class Killer:
    """What is killed, and what it is compared with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.place, self.random = prepare(folder / "place"), random.Random(seed)
        self.held_out = tiny_text(folder / "held-out.txt", 400, seed=9)
        self.undisturbed, self.seconds, self.kills = folder / "undisturbed", dict[str, float](), 0
        for name in (*RUNS, "recovery"):
            started = time.monotonic()
            done = Child(self.command(name, self.undisturbed / name), self.place.folder).ended()
            assert done.code == 0, done.err
            self.seconds[name] = time.monotonic() - started

    def command(self, name: str, out: Path) -> list[str]:
        if name == "recovery":
            return ["recover", str(self.undisturbed / "chunks"), str(out), *settings(*RECOVERY)]
        return [*self.place.prune(*RUNS[name], out=out), "--eval-text", str(self.held_out)]

    def ended(self, name: str, out: Path) -> Outcome:
        """How a run ended that was killed up to three times, and went on by ``resume`` or by its own command."""
        command = self.command(name, out)
        for _ in range(self.random.randint(1, 3)):
            child = Child(command, self.place.folder)
            time.sleep(0.05 + self.random.random() * self.seconds[name])
            if child.process.is_alive():
                child.send(self.random.choice(NUMBERS))
                self.kills += 1
            done = child.ended()
            if done.code not in (-signal.SIGKILL, 130):
                return done
            if (out / "report.json").is_file():  # killed as it drew a picture of what was finished
                return replace(done, code=0)
            by_name = name == "recovery" or not (out / "config.yaml").is_file() or self.random.random() < 0.2
            command = self.command(name, out) if by_name else ["resume", str(out)]
        return Child(command, self.place.folder).ended()


def compare(out: Path, other: Path) -> None:
    """Raises ``AssertionError`` unless both folders hold the same run, in the same files."""
    same_run(out, other)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (out, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), "weights"
    files = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (out, other)]
    differ = {name for name in files[0] ^ files[1] if not name.startswith("checkpoints/step-")}  # made by the clock
    assert differ <= {"report.png"}, f"files: {differ}"
    assert read_json(out / "report.json")["perplexity"] == read_json(other / "report.json")["perplexity"], "perplexity"


def main(given: Sequence[str] | None = None) -> int:
    """Parse, kill, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(given)
    torch.set_num_threads(1)
    folder, others = Path(tempfile.mkdtemp(prefix="bernprune-kills-")), 0
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        killer = Killer(folder, asked.seed)
        for number in range(asked.runs):
            name, out = killer.random.choice(list(killer.seconds)), folder / f"run-{number}"
            done = killer.ended(name, out)
            try:
                assert done.code == 0, done
                compare(out, killer.undisturbed / name)
            except AssertionError as error:
                others += 1
                print(f"{name}, {out}: {error}")
            else:
                shutil.rmtree(out)
    print(f"{asked.runs} runs were killed {killer.kills} times; {others} ended otherwise than undisturbed")
    if not others:
        shutil.rmtree(folder)
    return int(others > 0)


if __name__ == "__main__":
    sys.exit(main())
