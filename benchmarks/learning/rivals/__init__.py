"""All methods by name: each a function ``(task, settings) -> mask_U``, and its settings.

Of several settings the best is found by a sweep on development text, at a fifth of the budget.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.learning.rivals.ablations import ABLATIONS, without
from benchmarks.learning.rivals.blockpruner import blockpruner
from benchmarks.learning.rivals.bonsai import bonsai
from benchmarks.learning.rivals.evopress import evopress
from benchmarks.learning.rivals.l0 import l0
from benchmarks.learning.rivals.metrics import metric
from benchmarks.learning.rivals.ours import auto, default, paper, reinforce
from benchmarks.learning.rivals.ste import ste
from benchmarks.learning.rivals.taylor import taylor
from benchmarks.learning.rows import ABLATED
from benchmarks.learning.task import Settings, Task


@dataclass(frozen=True)
class Method:
    """A function and the settings to try; ``sequences``: what it takes at most, whatever the budget."""

    run: Callable[[Task, Settings], torch.Tensor]
    grid: tuple[Settings, ...] = ({},)
    sequences: int | None = None


CALIBRATION = 128  # windows that bernprune's scores see
AUTO = 66_176  # what `search.sequences: auto` may take of stories and embedded, and calibration
_STAGES = (
    {"offspring": 32, "survivors": [8, 2, 1], "windows": [2, 8, 32]},
    {"offspring": 16, "survivors": [4, 1], "windows": [4, 32]},
)
_RATES = (0.0005, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_L0 = ((1.0, 2.0), (2.0, 2.0), (4.0, 2.0), (8.0, 2.0), (4.0, 1.0), (2.0, 4.0), (4.0, 4.0), (8.0, 4.0))


def _metric(score: str, scope: str) -> Method:
    return Method(metric, ({"score": score, "scope": scope},), CALIBRATION)


def _taylor(form: str, scope: str) -> Method:
    windows = (8, 32, CALIBRATION, 512, 2048)
    return Method(taylor, tuple({"form": form, "scope": scope, "windows": count} for count in windows), max(windows))


def _ste(order: str) -> tuple[Settings, ...]:
    tries = ((0.25, 16), (0.5, 16), (1.0, 16), (4.0, 16), (4.0, 4), (12.0, 4))
    return tuple({"order": order, "travel": travel, "windows": windows} for travel, windows in tries)


METHODS = {
    "default": Method(default),
    "default-auto": Method(auto, sequences=AUTO),
    "reinforce": Method(reinforce),
    "reinforce-pulled": Method(
        reinforce,
        tuple(
            {"learning_rate": rate, "pull": pull} for rate in (0.3, 1.0, 3.0, 10.0) for pull in (0.0, 0.001, 0.01, 0.1)
        ),
    ),
    "paper": Method(paper, tuple({"learning_rate": rate} for rate in _RATES)),
    "paper-published": Method(paper, ({"learning_rate": 0.002},)),
    "wanda-sp": _metric("wanda-sp", "layer"),
    "wanda-sp-global": _metric("wanda-sp", "global"),
    "wanda-sp-in-turn": Method(metric, ({"score": "wanda-sp", "scope": "layer", "inputs": "pruned"},), 1024),
    "flap": _metric("flap", "layer"),
    "flap-global": _metric("flap", "pooled"),
    "magnitude": _metric("magnitude", "layer"),
    "magnitude-global": _metric("magnitude", "global"),
    "random": _metric("random", "layer"),
    "random-global": _metric("random", "global"),
    "taylor-vector": _taylor("vector", "layer"),
    "taylor-vector-global": _taylor("vector", "global"),
    "taylor-element": _taylor("element", "layer"),
    "taylor-element-global": _taylor("element", "global"),
    "bonsai": Method(
        bonsai,
        tuple(
            {"share": share, "windows": windows, "per": per}
            for share, windows, per in (
                (0.05, 16, "unit"),
                (0.05, 16, "cost"),
                (0.1, 16, "cost"),
                (0.15, 16, "cost"),
                (0.15, 32, "cost"),
            )
        ),
    ),
    "evopress": Method(
        evopress, tuple({"switch": "levels", "channels": count, **stages} for count in (8, 16) for stages in _STAGES)
    ),
    "evopress-units": Method(
        evopress, tuple({"switch": "units", "band": band, **stages} for band in (0.1, 0.25) for stages in _STAGES)
    ),
    "blockpruner": Method(blockpruner, ({"windows": 256},)),
    "ste": Method(ste, (*_ste("p"), *_ste("cost"), {"order": "p", "rate": 0.01, "windows": 4})),
    "l0": Method(
        l0,
        tuple({"travel": travel, "windows": 16, "penalty": penalty} for travel, penalty in _L0),
    ),
    **{f"{ABLATED}{name}": Method(without(name)) for name in ABLATIONS},
}
RIVALS = [name for name in METHODS if not name.startswith(ABLATED)]
