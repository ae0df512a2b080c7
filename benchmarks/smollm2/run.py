"""Prune SmolLM2-135M-Instruct as it ships, and by a metric alone; README.md says what is measured.

python benchmarks/smollm2/run.py                             # what is missing, and table.md
python benchmarks/smollm2/run.py --sequences 4096 --seed 0 --runs out/smollm2    # and keep the folder of the run
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
from benchmarks.learning.task import SHARED
from bernprune.config import make_config
from bernprune.errors import BernpruneError
from bernprune.run.pipeline import prune
from bernprune.storage import write_bytes

HERE = Path(__file__).parent
MODEL, TEXT = HERE / "model", SHARED / "data/c4-sample/c4-sample.jsonl"
KEY = ("sparsity", "sequences", "seed")
SEQUENCES, SPARSITIES, SEEDS = [0, 4_096], [0.3], [0]


def settings(key: Row) -> dict[str, Any]:
    """The defaults, but for what a row names."""
    return {
        "model": {"path": str(MODEL)},
        "data": {"text": str(TEXT)},
        "budget": {"sparsity": key["sparsity"]},
        "search": {"sequences": key["sequences"]},
        "seed": key["seed"],
    }


def check_files() -> None:
    """Leaves with a word on how to get what is missing."""
    for path in (MODEL, TEXT):
        if not path.exists():
            sys.exit(f"error: {path.name} is missing: fetch.py makes the model, and ../shared/data holds the text")


def run_folder(runs: Path, key: Row) -> Path:
    """Where the run of a row lies."""
    return runs / "-".join(str(key[name]) for name in KEY)


def run(key: Row, folder: Path) -> Row:
    """A run by the public road, which reports on the last tenth of its text."""
    report = prune(make_config(settings(key)), folder)
    return {
        **key,
        "loss": report["loss"],
        "kept": report["search"]["kept"],
        "finalists": report["repair"].get("finalists"),
        "repair": report["repair"]["chosen"],
        "search_seconds": report["search"]["seconds"],
        "repair_seconds": report["repair"]["seconds"],
        "latency": {name: figure["median_ms"] for name, figure in report["latency"].items()},
        "parameters": report["parameters"],
        "layers": [[layer["kv_groups"], layer["channels"]] for layer in report["layers"]],
        "machine": report["machine"],
        "protocol": {**report["protocol"], "text": "C4 sample, last tenth"},
        "commit": commit(),
    }


def table(rows: Sequence[Row]) -> str:
    """One line a run."""
    titles = ["removed", "sequences", "seed", "dense", "initial metric", "kept", "repaired", "which was", "repair"]
    lines = [
        "# SmolLM2-135M-Instruct",
        "",
        "Held-out loss, nats per token; `run.py` makes this from `results.jsonl`.",
        "",
    ]
    lines += [f"| {' | '.join(titles)} |", f"| {' | '.join(['---:'] * 7 + ['---'] * 2)} |"]
    for row in sorted(rows, key=lambda row: [row[name] for name in KEY]):
        losses = [f"{row['loss'][name]:.3f}" for name in ("dense", "initial", "unrepaired", "pruned")]
        cells = [
            f"{row['sparsity']:.0%}",
            f"{row['sequences']:,}",
            str(row["seed"]),
            *losses,
            row["kept"],
            row["repair"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the rows; what stands in them is not run again, unless its folder is to be kept and is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=list_of(float), default=SPARSITIES)
    parser.add_argument("--sequences", type=list_of(int), default=SEQUENCES)
    parser.add_argument("--seed", type=list_of(int), default=SEEDS)
    parser.add_argument("--folder", type=Path, default=HERE, help="where results.jsonl and table.md lie")
    parser.add_argument("--runs", type=Path, help="where to keep the folders of runs; by default they are not kept")
    given = parser.parse_args(arguments)
    check_files()
    results = given.folder / "results.jsonl"
    for sparsity, sequences, seed in itertools.product(given.sparsity, given.sequences, given.seed):
        key = {"sparsity": sparsity, "sequences": sequences, "seed": seed}
        known = any(key_of(row, KEY) == key_of(key, KEY) for row in read_rows(results, KEY))
        if known and (given.runs is None or (run_folder(given.runs, key) / "report.json").is_file()):
            continue
        with TemporaryDirectory() as scratch:
            row = run(key, run_folder(given.runs or Path(scratch), key))
        if not known:
            append_row(results, row)
    write_bytes(given.folder / "table.md", table(read_rows(results, KEY)).encode())


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
