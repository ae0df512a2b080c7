"""What a method's choice of single units is worth beside how many it keeps: its plans as they are, and with the same
number of units of each layer and kind, but the best by Wanda-sp. Losses on development text, from the rows that exist.

python benchmarks/learning/parts.py --model stories --sparsity 0.2,0.3 --method default,l0,evopress
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is the checkout that this file lies in

from benchmarks.learning.rivals import RIVALS
from benchmarks.learning.rows import kept_units, list_of, read_rows
from benchmarks.learning.run import HERE, SEEDS, SEQUENCES, SPARSITIES
from benchmarks.learning.task import SOURCES, Task, at_hand
from bernprune.errors import BernpruneError, DataError
from bernprune.units import UnitSpace

_KEY = ("model", "method", "sparsity", "sequences", "seed")
PARTS: dict[str, Collection[str]] = {
    "as it is": (),
    "channels by the metric": ("channel",),
    "all by the metric": ("channel", "kv_group"),
}


def by_metric(space: UnitSpace, mask_U: torch.Tensor, scores_U: torch.Tensor, kinds: Collection[str]) -> torch.Tensor:
    """The mask with as many units of each layer and kind, those of ``kinds`` the best by their scores, bool ``[U]``."""
    found_U = mask_U.clone()
    for group, span in zip(space.groups, space.spans, strict=True):
        if group.kind in kinds:
            best = scores_U[span].argsort(descending=True, stable=True)[: int(mask_U[span].sum())]
            found_U[span] = torch.zeros(group.count, dtype=torch.bool).index_fill(0, best, True)
    return found_U


def losses_of(model: str, sparsity: float, methods: Sequence[str], scratch: Path) -> dict[tuple[str, str], list[float]]:
    """Development losses by method and part, one a seed.

    Raises:
        DataError: there is no row of a method and seed.
    """
    losses, rows = defaultdict(list), read_rows(HERE / "results.jsonl")
    for seed in SEEDS:
        task = Task(SOURCES[model], scratch, sparsity=sparsity, seed=seed, limit=SEQUENCES[model])
        scores_U = task.scores("wanda-sp")
        for method in methods:
            wanted = (model, method, sparsity, SEQUENCES[model], seed)
            found = (row for row in rows if tuple(row[name] for name in _KEY) == wanted)
            if (row := next(found, None)) is None:
                raise DataError(f"there is no row of {method} on {model} at sparsity {sparsity:g}, seed {seed}")
            mask_U = kept_units(row["removed"])
            masks_KU = torch.stack([by_metric(task.space, mask_U, scores_U, kinds) for kinds in PARTS.values()])
            for part, loss in zip(PARTS, task.report(masks_KU, held_out=False)[0], strict=True):
                losses[method, part].append(loss)
    return losses


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=list_of(str, SOURCES), default=["stories", "embedded"])
    parser.add_argument("--method", type=list_of(str, RIVALS), default=["default", "evopress", "l0"])
    parser.add_argument("--sparsity", type=list_of(float), default=SPARSITIES)
    given = parser.parse_args(arguments)
    print(f"| model | removed | method | {' | '.join(PARTS)} |\n| --- | ---: | --- |{' ---: |' * len(PARTS)}")
    with TemporaryDirectory() as scratch:
        for model in at_hand(given.model):
            for sparsity in given.sparsity:
                losses = losses_of(model, sparsity, given.method, Path(scratch))
                for method in given.method:
                    cells = [losses[method, part] for part in PARTS]
                    told = [f"{statistics.fmean(each):.3f} ± {statistics.stdev(each):.3f}" for each in cells]
                    print(f"| {model} | {sparsity:.0%} | `{method}` | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
