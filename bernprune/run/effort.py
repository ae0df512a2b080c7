"""What repairs and weights for the policy take, by counting what their closed forms compute and the text they read.

Letters: A kept inputs of a projection, E all its inputs, D its outputs.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bernprune.config import RunConfig
from bernprune.names import AUTO_REPAIRS, RepairName
from bernprune.repair.closed import ADMM_STEPS
from bernprune.repair.fitting import DECIDING
from bernprune.run.initial import allocation_of, scoring_sequences
from bernprune.run.workload import (
    FITS,
    finalist_windows,
    fitting_windows,
    judging_windows,
    plan_work,
    repair_windows,
)
from bernprune.scores.base import PARTS
from bernprune.units import Architecture, LayerShape, UnitSpace

_FINALISTS = 3  # what was learned, its widths in the metric's order, and the metric's own; and its uniform, if another
_PASSES = 4  # of a repair: the dense model, the pruned one, and that again as far as each last projection
_TIMED_SIZE = {"cpu": 1024, "cuda": 4096}
_FACTOR = 1 / 3  # of the cube of a size, for a Cholesky factor; solving with it and multiplying by it are 2 each


@dataclass(frozen=True)
class Effort:
    """Floating-point operations in float32 and float64, and windows run forward."""

    single: float = 0.0
    double: float = 0.0
    windows: float = 0.0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(self.single + other.single, self.double + other.double, self.windows + other.windows)

    def seconds(self, device: torch.device, window_seconds: float) -> float:
        """Seconds it takes, at the speed that products and factors of matrices have now on a device."""
        single, double = (_rate(device, dtype) for dtype in (torch.float32, torch.float64))
        return self.single / single + self.double / double + self.windows * window_seconds


def repairs_of(config: RunConfig, architecture: Architecture) -> list[tuple[RepairName, Effort]]:
    """Each repair that a run tries, those of its finalists first."""
    method = config.repair.method
    if method == "none":
        return []
    tried = list(AUTO_REPAIRS) if method == "auto" else [method]
    uniform = allocation_of(config) == "uniform" and config.initial.kv_sparsity is None
    finalists = _FINALISTS if uniform else _FINALISTS + 1
    count = repair_windows(config, architecture)
    quick = finalist_windows(architecture, config.data.window, count)
    judged = [(tried[0], _repair(config, architecture, tried[0], quick))] * finalists if config.judges_finalists else []
    return judged + [(name, _repair(config, architecture, name, count)) for name in tried]


def _repair(config: RunConfig, architecture: Architecture, method: RepairName, count: int) -> Effort:
    """Effort of one on so many windows."""
    tokens, ridges = count * config.data.window, len(config.repair.ridges)
    keep = 1.0 if method == "admm" else 1 - config.budget.sparsity
    total = Effort(windows=count * _passes(method) + judging_windows(repair_windows(config, architecture)))
    for shape in architecture.layers:
        for every in _widths(architecture, shape):
            total += _fit(method, round(keep * every), architecture.hidden_size, tokens, ridges)
        if method == "two-step":
            heads = (shape.query_heads + 2 * shape.kv_groups) * architecture.head_dim
            for outputs in (heads, 2 * shape.channels):
                total += _fit(method, architecture.hidden_size, round(keep * outputs), tokens, ridges)
    return total


def _passes(method: str) -> int:
    """Of a repair; to refit first projections, two more are left where these read."""
    return _PASSES + 2 * (method == "two-step")


def _fit(method: RepairName, inputs: int, outputs: int, tokens: int, ridges: int) -> Effort:
    """Effort of moments, of all ridges on what decides (a factor and three products each), and of the best on all."""
    deciding = outputs if method == "scale" else min(outputs, DECIDING)
    steps = 1
    square = inputs**2
    if method in ("bias", "admm"):
        ridges, steps = int(method == "admm"), ADMM_STEPS
    choosing = ridges * square * (_FACTOR * inputs + (2 * steps + 4) * deciding)
    fitting = min(ridges, 1) * square * (_FACTOR * inputs + (2 * steps + 2) * outputs)
    return Effort(single=2.0 * tokens * inputs * (inputs + outputs), double=choosing + fitting)


def policy_weights(config: RunConfig, space: UnitSpace) -> Effort:
    """Effort of refitting weights to the policy where rounds end; refits after it was drawn in are not counted."""
    architecture, workload = space.architecture, plan_work(config, space)
    if not config.fits_to_policy:
        return Effort()
    count = fitting_windows(architecture, config.data.window)
    fits = FITS if workload.steps is None else 1 + sum(map(workload.fits, range(workload.steps)))
    single, outputs = 0.0, architecture.hidden_size
    for every in _fitted_widths(space):
        single += every**2 * (2.0 * count * config.data.window + fits * (_FACTOR * every + 4 * outputs))
    return Effort(single=single, windows=count)


def windows_run(
    config: RunConfig,
    architecture: Architecture,
    *,
    scored: int,
    fitted: int,
    search: Mapping[str, Any],
    repair: Mapping[str, Any],
    evaluated: int,
) -> dict[str, int]:
    """Windows of ``data.window`` tokens that a run puts through the model, by what for, without those that are timed.

    What is back-propagated counts as what it takes; layers that are left early, or that masks remove a part of, count
    as whole ones.

    Args:
        scored: windows that the initial metrics were taken on.
        fitted: windows that weights for the policy were fitted on.
        search, repair: as the report has them.
        evaluated: windows that perplexities are taken of.
    """
    counted = {
        "metric": scoring_sequences(config, len(architecture.layers), scored),
        "weights for the policy": fitted,
        "search": search["sequences"] - search["finals"]["sequences"],
        "choice": search["finals"]["sequences"],
    }
    if repair["method"] != "none":
        tried = [name for name in repair["losses"] if name != "none"]
        passes = [_passes(name) for name in tried]
        finalists = len(repair.get("finalists", ()))  # auto judges them by the first that it tries
        counted["repair"] = sum(passes) * repair["windows"] + finalists * sum(passes[:1]) * repair["finalist_windows"]
        counted["repair"] += (finalists + len(tried) + 1) * repair["judging_windows"]
    elif "finalists" in repair:
        counted["choice"] += len(repair["finalists"]) * repair["judging_windows"]
    counted["evaluation"] = evaluated
    return {name: count for name, count in counted.items() if count}


def policy_bytes(config: RunConfig, space: UnitSpace, itemsize: int) -> int:
    """Bytes that weights for the policy keep on the CPU meanwhile: moments, and the projections as they were."""
    if not config.fits_to_policy:
        return 0
    outputs = space.architecture.hidden_size
    return sum(every * (max(4, itemsize) * every + itemsize * outputs) for every in _fitted_widths(space))


def repair_bytes(config: RunConfig, architecture: Architecture) -> int:
    """Bytes that the dearest projection's moments on two texts, and solving with them, take on the device."""
    method, hidden = config.repair.method, architecture.hidden_size
    if method == "none":
        return 0
    keep = 1.0 if method == "admm" else 1 - config.budget.sparsity
    sizes = [(round(keep * max(_widths(architecture, shape))), hidden) for shape in architecture.layers]
    if method in ("auto", "two-step"):
        sizes += [(hidden, round(keep * 2 * shape.channels)) for shape in architecture.layers]
    return max(8 * inputs * (5 * inputs + 6 * outputs) for inputs, outputs in sizes)


def kept_bytes(config: RunConfig, architecture: Architecture, itemsize: int) -> int:
    """Bytes on the CPU of weights as they were before a repair; for ``auto`` also as the best one so far left them."""
    if config.repair.method == "none":
        return 0
    last = every = 0
    for shape in architecture.layers:
        last += sum(_widths(architecture, shape))
        every += 2 * (shape.query_heads + shape.kv_groups) * architecture.head_dim + 3 * shape.channels
    changed = {"two-step": every, "auto": last + every}.get(config.repair.method, last)
    return itemsize * architecture.hidden_size * changed


def states_bytes(config: RunConfig, architecture: Architecture, itemsize: int) -> int:
    """Bytes on the CPU of a repair's hidden states: two models', and the dense one's before each branch of a layer."""
    tokens = 0 if config.repair.method == "none" else repair_windows(config, architecture) * config.data.window
    return itemsize * architecture.hidden_size * 4 * tokens


def _widths(architecture: Architecture, shape: LayerShape) -> tuple[int, int]:
    """Inputs of the last projections of a layer's two branches."""
    return shape.query_heads * architecture.head_dim, shape.channels


def _fitted_widths(space: UnitSpace) -> Iterator[int]:
    """Inputs of the last projections of the branches whose units may go."""
    for layer, shape in enumerate(space.architecture.layers):
        for kind, every in zip(PARTS, _widths(space.architecture, shape), strict=True):
            if space.span(kind, layer) is not None:
                yield every


def _rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second: of a product in float32; in float64 of a factor, solving with it, and a product."""
    size = _TIMED_SIZE.get(device.type, 1024)
    matrix = torch.eye(size, dtype=dtype, device=device) + torch.full((), 0.5 / size, dtype=dtype, device=device)
    seconds = [_timed(matrix) for _ in range(2)]  # the first one warms up
    operations = size**3 * (2 if dtype == torch.float32 else _FACTOR + 4)
    return operations / max(seconds[-1], 1e-9)


def _timed(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    if matrix.dtype == torch.float64:
        matrix = torch.cholesky_solve(matrix, torch.linalg.cholesky(matrix))
    (matrix @ matrix)[0, 0].item()  # waits for a GPU
    return time.perf_counter() - started
