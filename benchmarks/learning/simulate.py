"""How far a budget of sequences goes in models of billions of parameters, on a surrogate of a loss that can be known.

    python benchmarks/learning/simulate.py                                        # small sizes, minutes
    python benchmarks/learning/simulate.py --units 353280 --per-unit 0.7 --seed 0 # the size of Llama-2-7B, hours

The surrogate is linear-quadratic. Removing unit u costs w_u nats on average; on n windows of text it costs
w_u (1 + k e / sqrt n), e standard normal and fresh for each unit and text, where n is 8 for a mask shared by a batch of
8 windows and 1/4 for one of four chunks of a window; and the more a layer has lost, the dearer is the rest. Worths are
log-normal (heavy-tailed) around a level of their layer, itself log-normal. The score knows the order within a layer,
with a rank correlation of about a half, and nothing of the layers; it varies by a fifth, as Wanda-sp does within layers
of stories260K (``paper`` goes by the size of scores, ``default`` by their order). Worths are scaled so that the score's
own uniform selection costs 1.2 nats, about what it costs a real model at this sparsity. k = 3 is about what one window
showed on stories260K when few units were changed. It knows no tokens, so that ``default`` has to do without activities.
There is no final choice: the search has nine tenths of the sequences, and what it learned is selected.

Recovered is the share of what can be gained over the score's uniform selection, that is over the best selection which
knows all worths: 0 is no better than the score, 1 is the best there is. *Levels* is what is recovered by one that knows
exactly what the units of a kind in a layer are worth on average, and what the score says of each: what can be learned
without telling single units apart.

Letters: U units, L layers, B windows, K masks, C chunks.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # what is simulated is the checkout that this file lies in

from benchmarks.learning.rows import SIMULATED, Row, append_row, commit, key_of, read_rows
from bernprune.config import make_config
from bernprune.errors import BernpruneError, ConfigError
from bernprune.evaluation.latency import machine
from bernprune.policy.bernoulli import graded
from bernprune.policy.budget import Budget
from bernprune.policy.selection import Limits, select
from bernprune.run.initial import start_probs
from bernprune.run.searches import make_search
from bernprune.run.workload import Work, make_budget, plan_work
from bernprune.seeding import generator
from bernprune.units import Architecture, LayerShape, UnitGroup, UnitSpace

SPARSITY, START_EXCESS, TEXT_SPREAD, TEXT_SHARE = 0.3, 1.2, 0.35, 3.0
SCORE_SPREAD, SCORE_DOUBT = 0.2, 1.6  # the doubt is in logarithms of worths, which deviate by 1 themselves
LOOKS = 8  # at what would be selected, in a run
LAYERS, CHANNELS_OF_A_HEAD = 32, 344  # kv groups are a 344th of the channels, as in Llama-2-7B, and cost 43 of them
METHODS: dict[str, dict[str, Any]] = {
    "default": {"search": {"by_activity": False, "selection": 0.1}},
    "without-swing": {"search": {"by_activity": False, "selection": 0.1, "swing": 0.0}},
    "paper, rate 0.0005": {"preset": "paper", "search": {"learning_rate": 0.0005}},
    "paper, rate 0.002": {"preset": "paper"},
    "paper, rate 0.01": {"preset": "paper", "search": {"learning_rate": 0.01}},
    "paper, rate 0.05": {"preset": "paper", "search": {"learning_rate": 0.05}},
}


def make_space(num_units: int) -> UnitSpace:
    """About so many units in 32 layers, in the proportions of Llama-2-7B. Raises ``ConfigError`` for too few."""
    least = 3 * LAYERS
    if num_units < least:
        raise ConfigError(f"a surrogate has at least {least} units, 3 a layer, but {num_units} were asked for")
    heads = max(2, round(num_units / LAYERS / (CHANNELS_OF_A_HEAD + 1)))
    channels = num_units // LAYERS - heads
    shapes = (LayerShape(heads, heads, channels),) * LAYERS
    groups = [
        group
        for layer in range(LAYERS)
        for group in (
            UnitGroup("kv_group", layer, heads, 43, 43.0),
            UnitGroup("channel", layer, channels, 1, 1.0),
        )
    ]
    return UnitSpace(Architecture("llama", 4096, 128, shapes), groups)


class Surrogate:
    """The loss of masks, on a text and on average."""

    def __init__(self, space: UnitSpace, seed: int) -> None:
        random, size = generator(seed, "surrogate"), space.size
        self.space, self.seed = space, seed
        self.layers_U = space.layer_U
        costs_U = space.costs_U()
        level_L = torch.randn(LAYERS, generator=random, dtype=torch.float64).mul(0.7).exp()
        within_U = torch.randn(size, generator=random, dtype=torch.float64)
        self.worth_U = level_L[self.layers_U] * within_U.exp() * costs_U
        known_U = within_U + SCORE_DOUBT * torch.randn(size, generator=random, dtype=torch.float64)
        self.scores_U = (SCORE_SPREAD * known_U / known_U.std()).exp()
        self.curvature = 0.0
        budget = Budget(space, SPARSITY)
        start_U = uniform_selection(space, self.scores_U)
        self.worth_U *= 0.5 * START_EXCESS / self.excess(start_U)
        self.curvature = (START_EXCESS - self.excess(start_U)) / self._by_layer(start_U).square().sum().item()
        self.start, self.best = self.excess(start_U), self.excess(self._best(budget, self.worth_U))
        said_U = (known_U / (1 + SCORE_DOUBT**2)).exp()  # expected of a unit, but for a factor
        levels = [said_U[units] * self.worth_U[units].sum() / said_U[units].sum() for units in space.spans]
        self.levels = self.recovered(self._best(budget, torch.cat(levels)))

    def _by_layer(self, mask_U: torch.Tensor) -> torch.Tensor:
        return torch.zeros(LAYERS, dtype=torch.float64).index_add(
            0, self.layers_U, self.worth_U * (1 - mask_U.double())
        )

    def excess(self, mask_U: torch.Tensor) -> float:
        """Nats over the dense model, on average."""
        lost_L = self._by_layer(mask_U)
        return (lost_L.sum() + self.curvature * lost_L.square().sum()).item()

    def _best(self, budget: Budget, worth_U: torch.Tensor) -> torch.Tensor:
        """By these worths at the margin, until they change no more."""
        mask_U, lost_L = torch.ones(self.space.size, dtype=torch.bool), torch.zeros(LAYERS, dtype=torch.float64)
        for _ in range(50):
            lost_L = 0.7 * lost_L + 0.3 * self._by_layer(mask_U)
            margin_U = worth_U * (1 + 2 * self.curvature * lost_L[self.layers_U])
            mask_U = select(margin_U / budget.costs_U, budget, limits=Limits())
        return mask_U

    def losses(self, masks_BKCU: Any, step: int, windows: int = 1) -> torch.Tensor:
        """What a search is told, ``[B, K, C]``: a text has a level, and every unit an effect of its own on each chunk.

        Args:
            windows: of text that each of the B groups of masks is run on, in nats per token of all of it.
        """
        random, parts = generator(self.seed, "text", step), []
        worth_U = self.worth_U.float()
        sizes = self.layers_U.bincount().tolist()  # layers follow one another
        for masks_KCU in masks_BKCU:
            chunks = masks_KCU.shape[1]
            share = TEXT_SHARE * math.sqrt(chunks / windows)
            effects_CU = worth_U * (1 + share * torch.randn(chunks, self.space.size, generator=random))
            vectors_CU2 = torch.stack([effects_CU, worth_U.expand(chunks, -1)], dim=-1)
            pieces = zip(masks_KCU.split(sizes, dim=2), vectors_CU2.split(sizes, dim=1), strict=True)
            lost_LCK2 = torch.stack([(~kept).float().transpose(0, 1) @ vectors for kept, vectors in pieces]).double()
            level = TEXT_SPREAD / math.sqrt(windows) * torch.randn((), generator=random)
            excess_CK = lost_LCK2[..., 0].sum(0) + self.curvature * lost_LCK2[..., 1].square().sum(0)
            parts.append((level + excess_CK.T) / chunks)
        return torch.stack(parts)

    def recovered(self, mask_U: torch.Tensor) -> float:
        """The share of what can be gained, see above."""
        return (self.start - self.excess(mask_U)) / (self.start - self.best)


def uniform_selection(space: UnitSpace, scores_U: torch.Tensor) -> torch.Tensor:
    """What the score keeps when every layer and kind loses the same share."""
    return select(graded(space, scores_U), Budget(space, SPARSITY), limits=Limits(), tie_break_U=scores_U)


def run(name: str, num_units: int, sequences: int, seed: int) -> Row:
    """One search: what was recovered at each look. Raises ``ConfigError`` for sizes that cannot be run."""
    space = make_space(num_units)
    surrogate = Surrogate(space, seed)
    given = METHODS[name]
    config = make_config({**given, "seed": seed, "search": {**given.get("search", {}), "sequences": sequences}})
    budget, scores_U = make_budget(config, space), surrogate.scores_U
    search = make_search(config, budget, start_probs(config, space, scores_U), scores_U[:, None])
    workload, work, started = plan_work(config, space), Work(), time.monotonic()
    steps, windows = workload.steps, config.search.windows // search.design.groups
    if not steps:
        raise ConfigError(f"{sequences} sequences are less than a step of {workload.step_sequences}")
    looks = sorted({math.ceil(look * steps / LOOKS) for look in range(1, LOOKS + 1)})
    recovered = []
    for step in tqdm(range(steps), desc=f"{name}, {num_units:,} units", disable=not sys.stderr.isatty()):
        masks_BKCU = search.ask(step)
        losses_BKC = surrogate.losses(masks_BKCU[:], step, windows)
        search.tell(masks_BKCU, losses_BKC, learning_rate=workload.learning_rate_at(work))
        work.step += 1
        if work.step in looks:
            mask_U = select(search.priorities_U, budget, limits=Limits(), tie_break_U=scores_U)
            recovered.append(surrogate.recovered(mask_U))
    return {
        "method": name,
        "units": num_units,
        "sequences": sequences,
        "seed": seed,
        "used": [step * workload.step_sequences for step in looks],
        "recovered": recovered,
        "start": surrogate.start,
        "best": surrogate.best,
        "levels": surrogate.levels,
        "seconds": round(time.monotonic() - started, 1),
        "machine": machine(torch.device("cpu")),
        "commit": commit(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of what was asked for, and append the rows."""
    parser = argparse.ArgumentParser(description="Recovered importance against budget on a surrogate loss.")
    parser.add_argument("--units", type=int, nargs="+", default=[3_520, 14_080])
    parser.add_argument("--per-unit", type=float, nargs="+", default=[0.7, 5.6], help="sequences for each unit")
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="where simulation.jsonl lies")
    given = parser.parse_args(arguments)
    file = given.folder / "simulation.jsonl"
    for units, per_unit, name, seed in itertools.product(given.units, given.per_unit, given.method, given.seed):
        key = {"method": name, "units": units, "sequences": round(units * per_unit), "seed": seed}
        if key_of(key, SIMULATED) in {key_of(row, SIMULATED) for row in read_rows(file, SIMULATED)}:
            continue
        row = run(name, units, key["sequences"], seed)
        append_row(file, row)
        print(
            f"{name:<20}{units:>10,} units{key['sequences']:>10,} sequences, seed {seed}: "
            f"recovered {row['recovered'][-1]:6.3f}, {row['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except BernpruneError as error:
        sys.exit(f"error: {error}")
