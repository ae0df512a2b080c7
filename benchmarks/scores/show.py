"""Make ``table.md`` and ``picture.png`` from the rows of ``results.jsonl`` alone.

python benchmarks/scores/show.py
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.rows import Row, read_rows
from benchmarks.picture import dots
from bernprune.storage import write_bytes

KEY = ("model", "score", "inputs", "allocation", "sparsity", "seed")


def table(rows: Sequence[Row]) -> str:
    """Of every model and sparsity the variants, the best first: loss, time and memory, means over calibration draws."""
    places: dict[tuple[str, float], dict[tuple[str, str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        places[row["model"], row["sparsity"]][row["score"], row["inputs"], row["allocation"]].append(row)
    lines = ["# Metrics alone", ""]
    for (model, sparsity), found in sorted(places.items()):
        first = next(iter(found.values()))[0]
        machines = sorted({row["machine"] for same in found.values() for row in same})
        lines += [
            f"## {model}, {sparsity:.0%} removed",
            "",
            f"Held-out loss in nats per token, {first['protocol']['windows']:,} windows of "
            f"{first['protocol']['window']} tokens, dense {first['dense_loss']:.3f}; {'; '.join(machines)}.",
            "",
            "| metric | allocation | loss | perplexity | seconds | peak MiB | draws |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for (score, inputs, allocation), same in sorted(found.items(), key=lambda item: _mean(item[1], "loss")):
            losses = [row["loss"] for row in same]
            spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            name = f"`{score}`" + (", in turn" if inputs == "pruned" else "")
            lines.append(
                f"| {name} | {allocation} | {_mean(same, 'loss'):.3f}{spread} | {_mean(same, 'perplexity'):.2f} | "
                f"{_mean(same, 'seconds'):.1f} | {_mean(same, 'peak_mib'):.0f} | {len(same)} |"
            )
        lines.append("")
    return "\n".join(lines)


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def picture(rows: Sequence[Row]) -> bytes:
    """A PNG: a panel a model and sparsity, a line a metric, a colour an allocation."""
    points = [
        (
            f"{row['model']}, {row['sparsity']:.0%} removed",
            row["score"],
            row["allocation"] + (", in turn" if row["inputs"] == "pruned" else ""),
            row["loss"] - row["dense_loss"],
        )
        for row in sorted(rows, key=lambda row: (row["model"], row["sparsity"]))
    ]
    series = sorted({name for _, _, name, _ in points})
    return dots(points, series, "held-out loss over that of the dense model, nats per token")


def show(results: Path) -> None:
    """Write the table and the picture beside the rows."""
    rows = read_rows(results, KEY)
    write_bytes(results.with_name("table.md"), table(rows).encode())
    write_bytes(results.with_name("picture.png"), picture(rows))


if __name__ == "__main__":
    show(Path(__file__).parent / "results.jsonl")
