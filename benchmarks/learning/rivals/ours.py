"""bernprune's own presets by the public road: a whole run in a folder, to its verified model and report.

``paper`` is the published method (Gao et al., 2024, arXiv 2406.10576) with the shorter budget and the scoring windows
of this benchmark; everything else is as in the preset.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.learning.task import Settings, Task
from bernprune.config import make_config
from bernprune.names import PresetName
from bernprune.run.folder import LEARNED
from bernprune.run.initial import scoring_sequences
from bernprune.run.pipeline import prune
from bernprune.run.plans import Learned
from bernprune.settings import merge

_REPORT = {
    "data": {"eval_tokens": 1024},  # the run's own report is on development text, and not looked at
    "report": {"initial_latency": False, "latency_repeats": 2, "latency_rows": 1},
    "repair": {"method": "none"},  # what is measured is the choice
}


def run_preset(preset: PresetName, task: Task, more: Settings) -> torch.Tensor:
    """What a run keeps that may take all that the task has; ``more`` is of its configuration."""
    given = merge(merge(task.given, {"preset": preset, **_REPORT}), more)
    config = make_config(given)
    scoring = scoring_sequences(config, len(task.view.layers))
    config = make_config(merge(given, {"search": {"sequences": task.meter.left - scoring}}))
    with TemporaryDirectory() as folder:
        report = prune(config, Path(folder) / "run", progress=False)
        learned = Learned.read(Path(folder) / "run" / LEARNED)
    task.meter.spend(scoring + report["search"]["sequences"])
    return learned.mask_U


def default(task: Task, settings: Settings) -> torch.Tensor:
    """The posterior search as it ships."""
    return run_preset("default", task, {"search": settings})


def reinforce(task: Task, settings: Settings) -> torch.Tensor:
    """Natural policy gradients, of which ``pull`` draws the policy to its start (its divergence in nats)."""
    return run_preset("reinforce", task, {"search": settings})


def paper(task: Task, settings: Settings) -> torch.Tensor:
    """The published method."""
    return run_preset("paper", task, {"search": settings})
