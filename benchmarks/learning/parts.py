"""What a method's choice of single units is worth beside how many it keeps: its plans as they are, and with the same
number of units of each layer and kind, but the best by Wanda-sp. Losses on development text, from the rows that exist.

python benchmarks/learning/parts.py --model stories --sparsity 0.2,0.3 --method default,l0,evopress
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is measured is the checkout that this file lies in

from benchmarks.learning.rivals import RIVALS
from benchmarks.learning.rows import learned_mask, list_of
from benchmarks.learning.run import HERE, SEEDS, SEQUENCES, SPARSITIES
from benchmarks.learning.task import SOURCES, Task, at_hand
from bernprune.errors import BernpruneError
from bernprune.names import Kind
from bernprune.policy.bernoulli import reordered

PARTS: dict[str, tuple[Kind, ...]] = {  # which kinds go by the metric
    "as it is": (),
    "channels by the metric": ("channel",),
    "all by the metric": ("channel", "kv_group"),
}


def losses_of(model: str, sparsity: float, methods: Sequence[str], scratch: Path) -> dict[tuple[str, str], list[float]]:
    """Development losses by method and part, one a seed.

    Raises:
        DataError: there is no row of a method and seed.
    """
    losses = defaultdict(list)
    for seed in SEEDS:
        task = Task(SOURCES[model], scratch, sparsity=sparsity, seed=seed, limit=SEQUENCES[model])
        with task.as_in_a_run():
            scores_U = task.scores("wanda-sp")
        for method in methods:
            mask_U = learned_mask(
                HERE / "results.jsonl",
                units=task.space.size,
                model=model,
                method=method,
                sparsity=sparsity,
                sequences=SEQUENCES[model],
                seed=seed,
            )
            kept_KU = [reordered(task.space, mask_U.double(), scores_U, kinds) for kinds in PARTS.values()]
            masks_KU = torch.stack(kept_KU) > 0.5
            with task.as_in_a_run():
                found, _ = task.report(masks_KU, held_out=False)
            for part, loss in zip(PARTS, found, strict=True):
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
