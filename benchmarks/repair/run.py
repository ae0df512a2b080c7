"""Run what is missing of the benchmark of repairs; README.md says what it is.

python benchmarks/repair/run.py                                                   # everything
python benchmarks/repair/run.py --model stories --repair ridge,two-step --sparsity 0.3 --seed 0,1
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is the checkout that this file lies in

from benchmarks.learning.rivals.ours import run_preset
from benchmarks.learning.rows import Row, append_row, commit, key_of, learned_mask, list_of, read_rows
from benchmarks.learning.run import SEQUENCES
from benchmarks.learning.task import SOURCES, Task, at_hand
from benchmarks.memory import Peak
from bernprune.config import make_config
from bernprune.errors import BernpruneError
from bernprune.evaluation.latency import machine
from bernprune.objective import masked_objective
from bernprune.policy.bernoulli import graded
from bernprune.repair import Repairer
from bernprune.run.initial import scope_of
from bernprune.run.scoring import group_shares, scores_of
from bernprune.settings import merge

HERE = Path(__file__).parent
LEARNED = HERE.parent / "learning" / "results.jsonl"
KEY = ("model", "plan", "sparsity", "seed", "repair", "target", "biases")
SEEDS, SPARSITIES = [0, 1, 2, 3, 4], [0.3, 0.2, 0.5]
PLANS = ["wanda-sp", "flap", "wanda-sp/search", "ifso-repaired/uniform"]  # of metrics
PLANS += ["default", "refitted", "evopress", "l0", "paper"]  # learned
WINDOWS, JUDGING = 128, 43
# Method, what outputs are fitted to, and whether there are biases that the family has not.
REPAIRS: dict[str, tuple[Any, Any, bool]] = {
    "two-step": ("two-step", "residual", False),
    "ridge": ("ridge", "residual", False),
    "bias": ("bias", "own", True),
    "scale": ("scale", "own", False),
    "admm": ("admm", "residual", False),
    "ridge-own": ("ridge", "own", False),
    "ridge-dense": ("ridge", "dense", False),
    "ridge-biases": ("ridge", "residual", True),
}


def mask_of(task: Task, model: str, plan: str) -> torch.Tensor:
    """What is kept, bool ``[U]``: by a metric, uniform or pooled as its authors do, or as a method of the learning
    benchmark found with the usual number of sequences.

    ``metric/allocation`` is another metric, or another way to share the budget out; ``refitted`` is what a run keeps
    that knows of its repair.

    Raises:
        DataError: the benchmark has no row for it.
    """
    if plan == "wanda-sp":
        return task.uniform_mask()
    if plan == "refitted":
        return run_preset("default", task, {"repair": {"method": "auto"}})
    if plan == "flap":
        return task.select_by(task.scores("flap"), "pooled")
    score, _, allocation = plan.partition("/")
    if allocation:
        config = make_config(merge(task.given, {"initial": {"score": score, "allocation": allocation}}))
        stage = dataclasses.replace(task.stage, config=config)
        scores_U = scores_of(stage, score)
        shares_G = group_shares(stage, scores_U)
        return task.select(
            graded(task.space, scores_U, scope_of(config), keep=1 - task.budget.sparsity, shares_G=shares_G), scores_U
        )
    key = {"model": model, "method": plan, "sparsity": task.budget.sparsity, "seed": task.seed}
    usual = {"sequences": SEQUENCES[model]} if model in SEQUENCES else {}
    return learned_mask(LEARNED, units=task.space.size, **key, **usual)


class Bench:
    """One mask of a task: what it loses unrepaired, and after each repair."""

    def __init__(self, task: Task, mask_U: torch.Tensor) -> None:
        self.task, self.mask_U = task, mask_U
        task.rewind()
        self.windows_WT, self.judging_WT = task.text(WINDOWS + JUDGING).split([WINDOWS, JUDGING])
        self.before_W, self.unrepaired = self.judged(), self.held_out()

    def judged(self) -> torch.Tensor:
        """Losses of the live model under the mask, ``[W]``."""
        with masked_objective(self.task.view, self.task.stage.ops) as objective:
            return objective.window_losses(self.mask_U[None], self.judging_WT)[0]

    def held_out(self) -> float:
        """Loss on text that nothing else has seen."""
        return self.task.report(self.mask_U[None], held_out=True)[0][0]

    def measure(self, name: str) -> Row:
        """Repair, look, and undo."""
        method, target, biases = REPAIRS[name]
        plan, peak, started = self.task.space.plan(self.mask_U), Peak(self.task.view.device), time.monotonic()
        done = Repairer(self.task.view, self.windows_WT, target=target, biases=biases).repair(plan, method)
        seconds, mib, gains_W = time.monotonic() - started, peak.mib(), self.before_W - self.judged()
        (loss,), protocol = self.task.report(self.mask_U[None], held_out=True)
        done.undo()
        return {
            "loss": loss,
            "unrepaired": self.unrepaired,
            "judged_gain": gains_W.mean().item(),
            "judged_error": gains_W.std().item() / JUDGING**0.5,
            "seconds": round(seconds, 1),
            "peak_mib": round(mib),
            "windows": WINDOWS,
            "judging_windows": JUDGING,
            "protocol": protocol.to_dict(),
            "machine": machine(self.task.view.device),
            "threads": torch.get_num_threads(),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill ``results.jsonl``; what stands in it is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=list_of(str, SOURCES), default=list(SOURCES))
    parser.add_argument("--plan", type=list_of(str), default=PLANS)
    parser.add_argument("--repair", type=list_of(str, REPAIRS), default=list(REPAIRS))
    parser.add_argument("--sparsity", type=list_of(float), default=SPARSITIES)
    parser.add_argument("--seed", type=list_of(int), default=SEEDS)
    parser.add_argument("--folder", type=Path, default=HERE, help="where the rows lie")
    given = parser.parse_args(arguments)
    results, version = given.folder / "results.jsonl", commit()
    with TemporaryDirectory() as scratch:
        for sparsity, seed, model in itertools.product(given.sparsity, given.seed, list(at_hand(given.model))):
            task = Task(SOURCES[model], Path(scratch), sparsity=sparsity, seed=seed, limit=SEQUENCES.get(model, 10_000))
            for plan in given.plan:
                place = {"model": model, "plan": plan, "sparsity": sparsity, "seed": seed}
                with task.as_in_a_run():
                    _fill(results, version, task, place, given)


def _fill(results: Path, version: str, task: Task, place: Row, given: argparse.Namespace) -> None:
    """The rows of one plan."""
    bench = None
    for name in given.repair:
        method, target, biases = REPAIRS[name]
        key = {**place, "repair": method, "target": target, "biases": biases}
        if any(key_of(row, KEY) == key_of(key, KEY) for row in read_rows(results, KEY)):
            continue
        bench = bench or Bench(task, mask_of(task, place["model"], place["plan"]))
        row = {**key, **bench.measure(name), "commit": version}
        append_row(results, row)
        print(f"{list(place.values())} {name}: {row['unrepaired']:.4f} to {row['loss']:.4f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
