"""What a repair of SmolLM2-135M leaves, by how much text it is fitted on; README.md says of what.

python benchmarks/smollm2/windows.py                         # what is missing, and windows.md
python benchmarks/smollm2/windows.py --windows 128,512
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is the checkout that this file lies in

from benchmarks.learning.rows import Row, append_row, commit, list_of, read_rows
from benchmarks.smollm2 import run
from bernprune.config import make_config
from bernprune.errors import BernpruneError
from bernprune.evaluation.latency import machine
from bernprune.models.products import quick_products
from bernprune.objective import masked_objective
from bernprune.repair import Repairer
from bernprune.run.stage import Stage, set_stage
from bernprune.scores import SCORES, initial_scores
from bernprune.storage import write_bytes
from bernprune.units import KeepPlan

HERE = Path(__file__).parent
KEY = ("sequences", "windows")
WINDOWS, METHOD, JUDGING = [32, 64, 128, 256, 512, 1_024], "two-step", 128


def plan_of(stage: Stage, widths: Sequence[tuple[int, int]]) -> KeepPlan:
    """The best kv groups and channels by Wanda-sp, so many of each layer."""
    space, kept_U = stage.view.space, torch.zeros(stage.view.space.size, dtype=torch.bool)
    scores_U = initial_scores(stage.view, stage.initial_windows_WT, SCORES["wanda-sp"], ops=stage.ops)
    for layer, counts in enumerate(widths):
        for kind, count in zip(("kv_group", "channel"), counts, strict=True):
            span = space.span(kind, layer)  # type: ignore[arg-type]
            assert span is not None, "these are the units of the default granularity"
            kept_U[span.start + scores_U[span].topk(count).indices] = True
    return space.plan(kept_U)


def rows(stage: Stage, sequences: int, plan: KeepPlan, windows: Sequence[int]) -> Iterator[Row]:
    """Losses after a repair on so much text, on the first held-out windows and on training text not fitted on."""
    texts = {
        "held_out": stage.eval_windows_WT[:JUDGING],
        "training": stage.train.windows(stage.train.num_windows - JUDGING, JUDGING),
    }
    kept_1U = stage.view.space.mask(plan)[None]
    for count in windows:
        started = time.monotonic()
        fitted_WT = stage.train.windows(0, min(count, stage.train.num_windows - JUDGING))
        done = Repairer(stage.view, fitted_WT, rows_per_forward=stage.rows).repair(plan, METHOD)
        seconds = round(time.monotonic() - started, 1)
        with masked_objective(stage.view, stage.ops, rows_per_forward=stage.rows) as objective:
            losses = {name: objective.losses(kept_1U, text_WT).item() for name, text_WT in texts.items()}
        done.undo()
        yield {
            "sequences": sequences,
            "windows": count,
            "fitted": len(fitted_WT),
            "loss": losses,
            "seconds": seconds,
            "machine": machine(stage.view.device),
            "protocol": {"window": stage.train.window, "windows": JUDGING},
            "commit": commit(),
        }


def table(found: Sequence[Row]) -> str:
    """One line for each number of windows."""
    lines = [
        "# SmolLM2-135M-Instruct, repaired on more and less text",
        "",
        f"Loss after `{METHOD}`, nats per token; `windows.py` makes this from `windows.jsonl`.",
        "",
        "| widths of the row with so many sequences | windows | held-out text | training text | commit |",
        "| ---: | ---: | ---: | ---: | --- |",
    ]
    for row in sorted(found, key=lambda row: tuple(row[name] for name in KEY)):
        losses = f"{row['loss']['held_out']:.3f} | {row['loss']['training']:.3f}"
        lines.append(f"| {row['sequences']:,} | {row['fitted']:,} | {losses} | {row['commit'][:7]} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the rows; what stands in them is not run again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=list_of(int), default=WINDOWS)
    parser.add_argument("--sequences", type=int, default=32_768, help="the row of results.jsonl whose widths are kept")
    parser.add_argument("--folder", type=Path, default=HERE, help="where results.jsonl, windows.jsonl and .md lie")
    given = parser.parse_args(arguments)
    run.check_files()
    results = given.folder / "windows.jsonl"
    runs = [row for row in read_rows(given.folder / "results.jsonl", run.KEY) if row["sequences"] == given.sequences]
    if not runs:
        sys.exit(f"error: results.jsonl has no row with {given.sequences:,} sequences, which run.py would make")
    had = {row["windows"] for row in read_rows(results, KEY) if row["sequences"] == given.sequences}
    if missing := sorted({*given.windows} - had):
        stage = set_stage(make_config(run.settings({**runs[0], "sequences": 0})))
        with quick_products(stage.view.device, stage.view.model.dtype):
            for row in rows(stage, given.sequences, plan_of(stage, runs[0]["layers"]), missing):
                append_row(results, row)
    write_bytes(given.folder / "windows.md", table(read_rows(results, KEY)).encode())


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
