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
    """What a run keeps; ``more`` is of its configuration. Unless that says otherwise, all sequences are for it."""
    given = merge(merge(task.given, {"preset": preset, **_REPORT}), more)
    scoring = scoring_sequences(make_config(given), len(task.view.layers))
    config = make_config(merge({"search": {"sequences": task.meter.left - scoring}}, given))
    with TemporaryDirectory() as folder:
        report = prune(config, Path(folder) / "run", progress=False)
        learned = Learned.read(Path(folder) / "run" / LEARNED)
    task.meter.spend(scoring + report["search"]["sequences"])
    return learned.mask_U


def default(task: Task, settings: Settings) -> torch.Tensor:
    """The posterior search with all its settings as they ship; no repair follows, so that it is not learned for one."""
    return run_preset("default", task, {"search": settings})


def auto(task: Task, settings: Settings) -> torch.Tensor:
    """The same, which ends where it expects to gain little by going on."""
    return run_preset("default", task, {"search": {"sequences": "auto", **settings}})


def reinforce(task: Task, settings: Settings) -> torch.Tensor:
    """Natural policy gradients, of which ``pull`` draws the policy to its start (its divergence in nats)."""
    return run_preset("reinforce", task, {"search": settings})


def paper(task: Task, settings: Settings) -> torch.Tensor:
    """The published method."""
    return run_preset("paper", task, {"search": settings})
