"""Run what is missing of the benchmark of metrics alone; README.md says what it is.

python benchmarks/scores/run.py                                          # everything, and table.md
python benchmarks/scores/run.py --model stories --score flap,cfsp --seed 0
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is the checkout that this file lies in

from benchmarks.learning.rows import Row, append_row, commit, key_of, list_of, read_rows
from benchmarks.learning.task import SOURCES, Task, at_hand
from benchmarks.memory import Peak
from benchmarks.scores.show import KEY, show
from bernprune.config import make_config
from bernprune.errors import BernpruneError, ModelError
from bernprune.evaluation.latency import machine
from bernprune.evaluation.perplexity import perplexity
from bernprune.policy.bernoulli import graded
from bernprune.run.initial import scope_of
from bernprune.run.scoring import group_shares, scores_of
from bernprune.scores import SCORES, Metric
from bernprune.scores.base import BLOCKS
from bernprune.settings import merge

HERE = Path(__file__).parent
SEEDS, SPARSITIES = [0, 1, 2, 3, 4], [0.2, 0.3, 0.5]
# Allocations beside uniform, global and the metric's own; an evolution takes as long for one score as for another.
MORE = {
    "wanda-sp": ("block-influence", "search"),
    "flap": ("block-influence",),
    "taylor-element": ("block-influence",),
    "ifso-repaired": ("block-influence",),
}
IN_TURN = ("wanda-sp", "flap")
NO_LIMIT = 10**9  # of sequences: metrics are not metered
Scored = tuple[torch.Tensor, float, float]  # scores, seconds, and MiB at the peak


def variants(metric: Metric) -> Iterator[tuple[str, str]]:
    """What a metric is tried with: inputs and allocation."""
    if set(metric.kinds) <= set(BLOCKS):
        yield "dense", "pooled"
        return
    for allocation in dict.fromkeys(["uniform", "global", metric.allocation, *MORE.get(metric.name, ())]):
        yield "dense", allocation
    if metric.name in IN_TURN:
        yield "pruned", "uniform"


class Bench:
    """One model, one seed: metrics are taken once, and selected by at every sparsity."""

    def __init__(self, model: str, seed: int, scratch: Path) -> None:
        self._model, self._seed, self._scratch, self._commit = model, seed, scratch, commit()
        self._tasks: dict[tuple[float, bool], Task] = {}
        self._scored: dict[Any, Scored] = {}

    def rows(self, name: str, sparsity: float, wanted: Sequence[tuple[str, str]]) -> Iterator[Row]:
        """A row for each of the wanted inputs and allocations."""
        task = self._task(SCORES[name], sparsity)
        dense_U = torch.ones(task.space.size, dtype=torch.bool)
        with task.as_in_a_run():
            found = [self._selected(task, name, sparsity, inputs, allocation) for inputs, allocation in wanted]
            masks_KU = torch.stack([dense_U, *(mask_U for mask_U, _ in found)])
            (dense, *losses), protocol = task.report(masks_KU, held_out=True)
        for (inputs, allocation), (mask_U, (_, seconds, mib)), loss in zip(wanted, found, losses, strict=True):
            yield {
                "model": self._model,
                "score": name,
                "inputs": inputs,
                "allocation": allocation,
                "sparsity": sparsity,
                "seed": self._seed,
                "loss": loss,
                "perplexity": perplexity(loss),
                "dense_loss": dense,
                "reached": task.budget.removed_share(mask_U),
                "seconds": round(seconds, 2),
                "peak_mib": round(mib),
                "machine": machine(task.view.device),
                "commit": self._commit,
                "protocol": protocol.to_dict(),
            }

    def _task(self, metric: Metric, sparsity: float) -> Task:
        blocks = set(metric.kinds) <= set(BLOCKS)
        if (sparsity, blocks) not in self._tasks:
            source = SOURCES[self._model]
            if blocks:
                source = dataclasses.replace(source, config=merge(source.config, {"granularity": ["attention", "ffn"]}))
            self._tasks[sparsity, blocks] = Task(
                source, self._scratch, sparsity=sparsity, seed=self._seed, limit=NO_LIMIT
            )
        return self._tasks[sparsity, blocks]

    def _selected(
        self, task: Task, name: str, sparsity: float, inputs: str, allocation: str
    ) -> tuple[torch.Tensor, Scored]:
        """As a run's start, before it is learned from."""
        initial = {"score": name, "inputs": inputs, "allocation": allocation}
        stage = dataclasses.replace(task.stage, config=make_config(merge(task.given, {"initial": initial})))
        # At another sparsity they are the same, but for those that suppose some.
        supposed = sparsity if inputs == "pruned" or "sparsity" in SCORES[name].reads else None
        if (name, inputs, supposed) not in self._scored:
            peak, started = Peak(task.view.device), time.perf_counter()
            scores_U = scores_of(stage, name)
            self._scored[name, inputs, supposed] = scores_U, time.perf_counter() - started, peak.mib()
        scored = self._scored[name, inputs, supposed]
        started = time.perf_counter()
        shares_G = group_shares(stage, scored[0])
        seconds = scored[1] + time.perf_counter() - started
        order_U = graded(task.space, scored[0], scope_of(stage.config), keep=1 - sparsity, shares_G=shares_G)
        return task.select(order_U, scored[0]), (scored[0], seconds, scored[2])


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the rows; what stands in them is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=list_of(str, SOURCES), default=list(SOURCES))
    parser.add_argument("--score", type=list_of(str, SCORES), default=list(SCORES))
    parser.add_argument("--sparsity", type=list_of(float), default=SPARSITIES)
    parser.add_argument("--seed", type=list_of(int), default=SEEDS)
    parser.add_argument("--folder", type=Path, default=HERE, help="where results.jsonl and table.md lie")
    given = parser.parse_args(arguments)
    results = given.folder / "results.jsonl"
    with TemporaryDirectory() as scratch:
        for model in at_hand(given.model):
            for seed in given.seed:
                _fill(results, Bench(model, seed, Path(scratch)), model, seed, given)
    show(results)


def _fill(results: Path, bench: Bench, model: str, seed: int, given: argparse.Namespace) -> None:
    for sparsity in given.sparsity:
        for name in given.score:
            known = {key_of(row, KEY) for row in read_rows(results, KEY)}
            base = {"model": model, "score": name, "sparsity": sparsity, "seed": seed}
            wanted = [
                (inputs, allocation)
                for inputs, allocation in variants(SCORES[name])
                if key_of({**base, "inputs": inputs, "allocation": allocation}, KEY) not in known
            ]
            if not wanted:
                continue
            try:
                rows = list(bench.rows(name, sparsity, wanted))
            except ModelError as error:  # gradients' differences of a model in bfloat16, for one
                print(f"{model} without {name}: {error}", file=sys.stderr)
                continue
            for row in rows:
                append_row(results, row)
            print(f"{model} {sparsity} seed {seed}: {name}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
