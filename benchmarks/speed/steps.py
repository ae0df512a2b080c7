"""Time whole steps of a search, from masks to the next policy, and add rows to ``steps.jsonl``; scores are random.

python benchmarks/speed/steps.py --model llama2-7b --device cuda --seconds 60
"""

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning.rows import append_row, commit
from benchmarks.speed import models
from benchmarks.speed.run import asked_device
from bernprune.backends import keep_freed_memory
from bernprune.config import RunConfig, make_config
from bernprune.costs import measure
from bernprune.evaluation.latency import machine
from bernprune.models.masking import choose_ops
from bernprune.models.view import ModelView
from bernprune.objective import masked_objective
from bernprune.policy.search import MaskSearch
from bernprune.policy.selection import select
from bernprune.presets import PRESETS
from bernprune.run.loop import evaluate_step
from bernprune.run.searches import make_search
from bernprune.run.workload import make_budget, make_limits
from bernprune.seeding import generator

HERE = Path(__file__).parent
PUBLISHED_TOKENS = 30.72e6  # 15,000 steps of 2 masks on 8 windows of 128 tokens


class Laps:
    """Milliseconds between calls, by name, with all work on the device done."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.found = device, defaultdict[str, list[float]](list)
        self.start()

    def start(self) -> None:
        self._since = self._now()

    def __call__(self, name: str) -> None:
        now = self._now()
        self.found[name].append(1e3 * (now - self._since))
        self._since = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def a_search(config: RunConfig, view: ModelView, kernels: object) -> tuple[MaskSearch, torch.Tensor]:
    """At its start, by random scores; and what it would select there."""
    space, budget = view.space, make_budget(config, view.space)
    scores_U = torch.rand(space.size, generator=generator(0, "scores"), dtype=torch.float64)
    probs_U = budget.project(0.2 + 0.6 * scores_U, floor=config.policy.floor, ceiling=config.policy.ceiling)
    search = make_search(config, budget, probs_U, scores_U[:, None], kernels)
    return search, select(probs_U, budget, limits=make_limits(config))


def steps(config: RunConfig, view: ModelView, *, least: float, rows: int) -> dict[str, list[float]]:
    """Milliseconds of the parts of as many steps as take so many seconds, after three that warm up."""
    device, window = view.device, config.data.window
    ops = choose_ops(config.backend, view)
    search, selected_U = a_search(config, view, ops.sums)
    laps, step = Laps(device), 0
    with masked_objective(view, ops, rows_per_forward=rows, costs=measure(view, ops, window)) as objective:
        while step < 4 or sum(map(sum, laps.found.values())) < 1e3 * least:
            if step == 3:
                laps = Laps(device)
            tokens_BT = models.text(view, config.search.windows, window)
            laps.start()
            masks = search.ask(step).to(device)
            laps("ask")
            losses, reference_BC, reading = evaluate_step(objective, search, masks, tokens_BT, selected_U)
            laps("evaluate")
            search.tell(
                masks, losses, learning_rate=config.search.learning_rate, reference_BC=reference_BC, reading=reading
            )
            laps("tell")
            if search.needs_reading:  # what the text is read for once more, which is a pass like the others
                objective.look(selected_U, tokens_BT, lambda *_: None)
                laps("look")
            step += 1
    return laps.found


def main() -> None:
    """Parse, and time one preset after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.NAMES, default="llama-25m")
    parser.add_argument("--preset", nargs="+", choices=sorted(PRESETS), default=["default", "paper"])
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=128, help="most windows in a forward pass")
    parser.add_argument("--seconds", type=float, default=10.0, help="of steps, at least")
    parser.add_argument("--folder", type=Path, default=HERE, help="where steps.jsonl lies")
    given = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    keep_freed_memory()
    device = asked_device(given.device)
    if reason := models.missing(given.model):
        sys.exit(f"{given.model} is skipped: {reason}")
    view = models.build(given.model, getattr(torch, given.dtype), device, layers=given.layers)
    for preset in given.preset:
        config = make_config({"preset": preset})
        found = steps(config, view, least=given.seconds, rows=given.rows)
        look, search = found.pop("look", None), config.search
        per_step = search.masks * search.windows * config.data.window
        total = sum(map(sum, found.values())) / len(found["tell"])
        medians = {name: statistics.median(times) for name, times in found.items()}
        passes = medians["evaluate"] + (statistics.median(look) if look else 0.0)
        row = {
            "model": given.model, "layers": len(view.layers), "dtype": given.dtype, "preset": preset,
            "units": view.space.size, "tokens": per_step, "steps": len(found["tell"]), "step_ms": total,
            "parts_ms": medians, "passes_ms": passes, "beside_passes": 1 - passes / sum(medians.values()),
            "published_budget_minutes": PUBLISHED_TOKENS / per_step * total / 6e4, "machine": machine(device),
            "commit": commit(),
        }  # fmt: skip
        append_row(given.folder / "steps.jsonl", row)
        print(
            f"{given.model:<10} {preset:<8} {len(found['tell']):>5} steps of {per_step:,} tokens under masks, "
            f"{total:.1f} ms each ({', '.join(f'{name} {ms:.1f}' for name, ms in medians.items())}), "
            f"{row['beside_passes']:.1%} beside passes, {row['published_budget_minutes']:.1f} minutes for "
            f"{PUBLISHED_TOKENS / 1e6:.1f} million tokens",
            flush=True,
        )


if __name__ == "__main__":
    main()
