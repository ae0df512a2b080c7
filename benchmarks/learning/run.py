"""Run what is missing of the benchmark; README.md says what it is.

python benchmarks/learning/run.py                                                # everything
python benchmarks/learning/run.py --model stories --method default,ste --seed 0,1
python benchmarks/learning/run.py --development                                  # leaves the held-out text alone
"""

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is the checkout that this file lies in

from benchmarks.learning.rivals import METHODS, RIVALS
from benchmarks.learning.rows import Row, append_row, commit, key_of, list_of, read_rows, removed_units
from benchmarks.learning.task import SOURCES, OverBudget, Settings, Task, at_hand
from bernprune.errors import BernpruneError, ConfigError, DataError
from bernprune.evaluation.latency import machine
from bernprune.evaluation.perplexity import perplexity

HERE = Path(__file__).parent
SEEDS, SPARSITIES = [0, 1, 2, 3, 4], [0.2, 0.3, 0.5]
SEQUENCES = {"stories": 20_480, "embedded": 8_192, "novels": 20_480}
ABLATIONS = [name for name in METHODS if name not in RIVALS]
# The whole benchmark: models, methods, sparsities, and budgets as multiples of what is usual for the model.
PARTS: list[tuple[list[str], list[str], list[float], list[float]]] = [
    (["stories", "embedded", "novels"], RIVALS, SPARSITIES, [1]),
    (["stories", "embedded"], ["default"], SPARSITIES, [3]),  # as dear as a gradient for each of the usual ones
    (["stories"], ["default", "paper"], [0.3], [8]),
    (["stories"], ["default", "reinforce", "paper", "l0"], [0.3], [0.25, 0.5]),
    (["stories", "embedded"], ABLATIONS, [0.3], [1]),
]
SWEEP_SEED, SWEEP_SHARE, SWEEP_LEAST = 100, 0.2, 4096  # of the seeds none; of the budget a fifth, or what tells more


def sweep_budget(sequences: int) -> int:
    """Sequences of each of the runs that choose the settings for one of ``sequences``."""
    return min(sequences, max(SWEEP_LEAST, int(SWEEP_SHARE * sequences)))


class Bench:
    """The files of the benchmark, in ``folder``: results on held-out text, and sweeps, all on development text."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.results, self.sweeps = folder / "results.jsonl", folder / "sweeps.jsonl"
        self._scratch, self._commit = scratch, commit()

    def row(self, *, held_out: bool, **key: Any) -> Row:
        """The row of this key, which is run and stored if it is missing."""
        path = self.results if held_out else self.sweeps
        for row in read_rows(path):
            if key_of(row) == key_of(key):
                return row
        row = self._run(key, held_out=held_out)
        self._check_text(path, row)
        append_row(path, row)
        print(
            f"{row['model']} {row['sparsity']} {row['method']} {dict(row['settings'])} seed {row['seed']}: "
            f"{row['loss']:.4f} nats on {row['protocol']['text']} text, {row['used']:,} of {row['sequences']:,} "
            f"sequences, {row['seconds']:.0f} s",
            flush=True,
        )
        return row

    def best_settings(self, model: str, name: str, sparsity: float, sequences: int) -> Settings:
        """The only settings of a method, or those of its grid with the least loss in a sweep."""
        method = METHODS[name]
        if len(method.grid) == 1:
            return method.grid[0]
        budget = method.sequences or sweep_budget(sequences)
        key = {"model": model, "method": name, "sparsity": sparsity, "sequences": budget, "seed": SWEEP_SEED}
        rows = []
        for settings in method.grid:
            with contextlib.suppress(ConfigError, OverBudget):  # what so few sequences do not allow
                rows.append(self.row(held_out=False, settings=settings, **key))
        if not rows:
            raise ConfigError(f"none of the settings of {name} can be tried with {budget:,} sequences")
        best: Settings = min(rows, key=lambda row: row["loss"])["settings"]
        return best

    def _check_text(self, path: Path, row: Row) -> None:
        """Raises ``DataError`` if the rows of the same model were taken on another text."""
        text = row["protocol"]["text_sha256"]
        others = {other["protocol"]["text_sha256"] for other in read_rows(path) if other["model"] == row["model"]}
        if others - {text}:
            raise DataError(
                f"the {row['protocol']['text']} text of {row['model']} is {text} here, but rows in {path} were taken "
                f"on {', '.join(sorted(others - {text}))}; install what requirements.txt beside run.py says, or give "
                "another --folder"
            )

    def _run(self, key: Row, *, held_out: bool) -> Row:
        limit, seed = key["sequences"], key["seed"]
        task = Task(SOURCES[key["model"]], self._scratch, sparsity=key["sparsity"], seed=seed, limit=limit)
        started = time.monotonic()
        with task.as_in_a_run():
            mask_U = METHODS[key["method"]].run(task, key["settings"])
            seconds = time.monotonic() - started
            masks_KU = torch.stack([torch.ones_like(mask_U), task.uniform_mask(), mask_U])
            (dense, uniform, loss), protocol = task.report(masks_KU, held_out=held_out)
        return {
            **key,
            "used": task.meter.sequences,
            "backward": task.meter.backward,
            "equivalent": task.meter.equivalent,
            "loss": loss,
            "perplexity": perplexity(loss),
            "dense_loss": dense,
            "uniform_loss": uniform,
            "reached": task.budget.removed_share(mask_U),
            "seconds": round(seconds, 1),
            "machine": machine(task.view.device),
            "commit": self._commit,
            "protocol": protocol.to_dict(),
            "removed": removed_units(mask_U),
        }


def _jobs(given: argparse.Namespace, model: str) -> Iterator[tuple[str, float, int]]:
    """Method, sparsity and budget of all runs: those of the benchmark, or the product of what was asked for."""
    usual = SEQUENCES.get(model, min(SEQUENCES.values()))
    if given.method or given.sparsity or given.sequences:
        for sparsity, sequences in itertools.product(given.sparsity or SPARSITIES, given.sequences or [usual]):
            for name in given.method or RIVALS:
                yield name, sparsity, sequences
        return
    for models, names, sparsities, multiples in PARTS:
        if model in models:
            for sparsity, multiple, name in itertools.product(sparsities, multiples, names):
                yield name, sparsity, int(multiple * usual)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the files; what stands in them is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=list_of(str, SOURCES), default=list(SOURCES))
    parser.add_argument("--method", type=list_of(str, METHODS))
    parser.add_argument("--sparsity", type=list_of(float))
    parser.add_argument("--seed", type=list_of(int), default=SEEDS)
    parser.add_argument("--sequences", type=list_of(int))
    parser.add_argument("--development", action="store_true", help="report on development text, among the sweeps")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the files lie")
    given = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        bench = Bench(given.folder, Path(scratch))
        for model in at_hand(given.model):
            for name, sparsity, sequences in _jobs(given, model):
                try:
                    settings = bench.best_settings(model, name, sparsity, sequences)
                    key = {"model": model, "method": name, "settings": settings, "sparsity": sparsity}
                    for seed in given.seed:
                        budget = METHODS[name].sequences or sequences
                        bench.row(held_out=not given.development, sequences=budget, seed=seed, **key)
                except (ConfigError, OverBudget) as error:
                    print(f"{model} {sparsity} {name} with {sequences:,} sequences is skipped: {error}")


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
