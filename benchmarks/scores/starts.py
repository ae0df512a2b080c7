"""Run what is missing of the benchmark of metrics as starts of the search; README.md says what it is.

python benchmarks/scores/starts.py                                       # everything, starts.md and starts.png
python benchmarks/scores/starts.py --model stories --score flap,cfsp --seed 0
"""

import argparse
import itertools
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is the checkout that this file lies in

from benchmarks.learning.rows import Row, append_row, commit, key_of, list_of, read_rows
from benchmarks.learning.task import SOURCES, at_hand
from benchmarks.learning.whole import named, run_settings
from benchmarks.picture import dots
from bernprune.config import make_config
from bernprune.errors import BernpruneError, ModelError
from bernprune.run.pipeline import prune
from bernprune.scores import SCORES
from bernprune.scores.base import BLOCKS
from bernprune.settings import merge, without_none
from bernprune.storage import write_bytes

HERE = Path(__file__).parent
KEY = ("model", "score", "sparsity", "sequences", "seed")
SEEDS, SPARSITIES = [0, 1, 2, 3, 4], [0.3, 0.5, 0.2]
SEQUENCES = [0, 2_048, 8_192]  # none is the metric alone; the last is the default for models of this size
STARTS = [name for name, metric in SCORES.items() if not set(metric.kinds) <= set(BLOCKS)]
STARTS += ["wanda-sp/search"]  # by another allocation than its own: the best metric alone, where nothing is repaired


def run(scratch: Path, key: Row) -> Row:
    """A run as it ships, but for its start: losses on held-out text before and after its repair."""
    source = SOURCES[key["model"]]
    given = run_settings(source, scratch, sparsity=key["sparsity"], seed=key["seed"], held_out=True)
    score, _, allocation = key["score"].partition("/")
    initial = without_none({"score": score, "allocation": allocation or None})
    given = merge(given, {"initial": initial, "search": {"sequences": key["sequences"]}})
    with TemporaryDirectory(dir=scratch) as folder:
        report = prune(make_config(given), Path(folder) / "run", progress=False)
    return {
        **key,
        "loss": report["loss"]["pruned"],
        "unrepaired": report["loss"]["unrepaired"],
        "initial": report["loss"]["initial"],
        "kept": report["search"]["kept"],
        "repair": report["repair"]["chosen"],
        "seconds": report["search"]["seconds"],
        "machine": report["machine"],
        "protocol": named(report["protocol"], held_out=True),
        "commit": commit(),
    }


def table(rows: Sequence[Row]) -> str:
    """Of every model and sparsity the metrics, the best start with the most sequences first."""
    places: dict[tuple[str, float], dict[str, dict[int, list[Row]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        places[row["model"], row["sparsity"]][row["score"]][row["sequences"]].append(row)
    lines = ["# Metrics as starts", "", "Held-out loss after the repair, nats per token; `starts.py` makes this.", ""]
    for (model, sparsity), found in sorted(places.items()):
        budgets = sorted({sequences for by_budget in found.values() for sequences in by_budget})
        titles = ["metric", *map(_title, budgets), "draws"]
        lines += [f"## {model}, {sparsity:.0%} removed", "", _commits(found.values()), ""]
        lines += [f"| {' | '.join(titles)} |"]
        lines += [f"| --- |{' ---: |' * (len(budgets) + 1)}"]
        for score, by_budget in sorted(found.items(), key=lambda item: _mean(item[1].get(budgets[-1], []))):
            cells = [_cell(by_budget.get(budget, [])) for budget in budgets]
            draws = max(len(same) for same in by_budget.values())
            lines.append(f"| `{score}` | {' | '.join(cells)} | {draws} |")
        lines.append("")
    return "\n".join(lines)


def _commits(found: Iterable[dict[int, list[Row]]]) -> str:
    """How many rows are of which state of the code, the most first."""
    rows = itertools.chain.from_iterable(itertools.chain.from_iterable(by_budget.values()) for by_budget in found)
    counted = Counter(row["commit"][:7] for row in rows).most_common()
    return f"Rows of commits {', '.join(f'{name} ({count})' for name, count in counted)}."


def picture(rows: Sequence[Row]) -> bytes:
    """A PNG: a panel a model and sparsity, a line a metric, a colour a number of sequences."""
    points = [
        (f"{row['model']}, {row['sparsity']:.0%} removed", row["score"], _title(row["sequences"]), row["loss"])
        for row in sorted(rows, key=lambda row: (row["model"], row["sparsity"]))
    ]
    series = [_title(sequences) for sequences in sorted({row["sequences"] for row in rows})]
    return dots(points, series, "held-out loss after the repair, nats per token")


def _title(sequences: int) -> str:
    return f"{sequences:,} sequences" if sequences else "alone"


def _mean(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["loss"] for row in rows) if rows else float("inf")


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    spread = f" ± {statistics.stdev(row['loss'] for row in rows):.3f}" if len(rows) > 1 else ""
    return f"{_mean(rows):.3f}{spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the rows; what stands in them is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=list_of(str, SOURCES), default=list(SOURCES))
    parser.add_argument("--score", type=list_of(str, STARTS), default=STARTS)
    parser.add_argument("--sparsity", type=list_of(float), default=SPARSITIES)
    parser.add_argument("--seed", type=list_of(int), default=SEEDS)
    parser.add_argument("--sequences", type=list_of(int), default=SEQUENCES)
    parser.add_argument("--folder", type=Path, default=HERE, help="where starts.jsonl, starts.md and starts.png lie")
    given = parser.parse_args(arguments)
    results = given.folder / "starts.jsonl"
    with TemporaryDirectory() as scratch:
        for model in at_hand(given.model):
            for sparsity, seed, score, sequences in itertools.product(
                given.sparsity, given.seed, given.score, given.sequences
            ):
                key = {"model": model, "score": score, "sparsity": sparsity, "sequences": sequences, "seed": seed}
                _fill(results, Path(scratch), key)
    if rows := read_rows(results, KEY):
        write_bytes(given.folder / "starts.md", table(rows).encode())
        write_bytes(given.folder / "starts.png", picture(rows))


def _fill(results: Path, scratch: Path, key: dict[str, Any]) -> None:
    if any(key_of(row, KEY) == key_of(key, KEY) for row in read_rows(results, KEY)):
        return
    try:
        row = run(scratch, key)
    except ModelError as error:  # gradients' differences of a model in bfloat16, for one
        print(f"{key['model']} without {key['score']}: {error}", file=sys.stderr)
        return
    append_row(results, row)
    print(f"{list(key.values())}: {row['unrepaired']:.4f} to {row['loss']:.4f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
