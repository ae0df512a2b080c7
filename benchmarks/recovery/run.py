"""Run what is missing of the benchmark of recoveries; README.md says what it is.

python benchmarks/recovery/run.py                                        # everything, and table.md
python benchmarks/recovery/run.py --model stories --way lora --seed 0
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is the checkout that this file lies in

from benchmarks.learning.rows import Row, append_row, commit, key_of, list_of, read_rows
from benchmarks.learning.run import SEQUENCES
from benchmarks.learning.task import SOURCES, Settings, at_hand
from benchmarks.learning.whole import named, run_settings
from benchmarks.memory import Peak
from benchmarks.recovery.show import KEY, show
from bernprune.backends import find_device
from bernprune.config import make_config
from bernprune.errors import BernpruneError
from bernprune.run.pipeline import prune
from bernprune.run.recovering import recover
from bernprune.settings import merge

HERE = Path(__file__).parent
SEEDS, SPARSITIES, TOKENS = [0, 1, 2, 3, 4], [0.3, 0.5, 0.2], 1_000_000
PLANS: dict[str, Settings] = {"wanda-sp": {"search": {"sequences": 0}}, "default": {}}
WAYS: dict[str, Settings] = {
    "lora": {},
    "lora-ranks-alike": {"ranks": "uniform"},
    "lora-distilled": {"distill": 1.0},
    "before-the-cut": {"masks": "policy"},
}
RATES, SWEEP_SEED = [1e-3, 3e-3, 1e-2, 3e-2], 100  # of the seeds none


class Bench:
    """A model, a plan of one seed, and what recoveries make of it; on development text, or on text held out."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder, self._scratch, self._commit = folder, scratch, commit()

    def row(self, *, held_out: bool, **key: Any) -> Row:
        """The row of this key, which is run and stored if it is missing."""
        path = self._folder / ("results.jsonl" if held_out else "sweeps.jsonl")
        for row in read_rows(path, KEY):
            if key_of(row, KEY) == key_of(key, KEY):
                return row
        run = self._pruned(key["model"], key["plan"], key["sparsity"], key["seed"], held_out=held_out)
        settings = {**WAYS[key["way"]], "tokens": key["tokens"], "learning_rate": key["learning_rate"]}
        peak = Peak(find_device("auto"))
        with TemporaryDirectory(dir=self._scratch) as folder:
            report = recover(run, Path(folder) / "recovered", changes={"recover": settings}, progress=False)
        kept = ("loss", "best_step", "steps", "ended", "seconds", "ranks", "machine")
        row = {
            **key,
            **{name: report[name] for name in kept},
            "peak_mib": round(peak.mib()),
            "protocol": named(report["protocol"], held_out=held_out),
            "commit": self._commit,
        }
        append_row(path, row)
        print(f"{list(key.values())}: {row['loss']['before']:.4f} to {row['loss']['after']:.4f}", flush=True)
        return row

    def best_rate(self, **key: Any) -> float:
        """Of the grid, that with the least loss on development text, of another seed."""
        rows = [self.row(held_out=False, learning_rate=rate, **{**key, "seed": SWEEP_SEED}) for rate in RATES]
        best: float = min(rows, key=lambda row: row["loss"]["after"])["learning_rate"]
        return best

    def _pruned(self, model: str, plan: str, sparsity: float, seed: int, *, held_out: bool) -> Path:
        """The folder of a run as it ships, which is repaired."""
        folder = self._scratch / f"{model}-{plan}-{sparsity}-{seed}-{held_out}"
        if not folder.exists():
            given = run_settings(SOURCES[model], self._scratch, sparsity=sparsity, seed=seed, held_out=held_out)
            given = merge(given, {"search": {"sequences": SEQUENCES[model]}})
            prune(make_config(merge(given, PLANS[plan])), folder, progress=False)
        return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the rows; what stands in them is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=list_of(str, SOURCES), default=list(SOURCES))
    parser.add_argument("--plan", type=list_of(str, PLANS), default=list(PLANS))
    parser.add_argument("--way", type=list_of(str, WAYS), default=list(WAYS))
    parser.add_argument("--sparsity", type=list_of(float), default=SPARSITIES)
    parser.add_argument("--seed", type=list_of(int), default=SEEDS)
    parser.add_argument("--tokens", type=list_of(int), default=[TOKENS])
    parser.add_argument("--folder", type=Path, default=HERE, help="where the rows and table.md lie")
    given = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        bench = Bench(given.folder, Path(scratch))
        for model in at_hand(given.model):
            for tokens, sparsity, way in itertools.product(given.tokens, given.sparsity, given.way):
                key = {"model": model, "way": way, "sparsity": sparsity, "tokens": tokens}
                rate = bench.best_rate(plan=given.plan[-1], **key)
                for plan, seed in itertools.product(given.plan, given.seed):
                    bench.row(held_out=True, plan=plan, seed=seed, learning_rate=rate, **key)
    show(given.folder)


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
