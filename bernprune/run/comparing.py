"""Finished runs side by side: which settings they differ in, and what that changed.

Runs that differ in nothing but their seed make a group. Groups are compared with the first one over the seeds that both
have: runs of the same seed draw the same text and the same numbers, so much of their chance is the same, too.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bernprune.config import RunConfig, make_config
from bernprune.errors import RunError
from bernprune.run.folder import open_run
from bernprune.run.origin import INPUTS, versions
from bernprune.settings import flat, without

# What decides where, how fast and with how much memory a run works, and what it measures besides; and what
# fingerprints tell of what it reads.
_NO_MATTER = (
    "seed",
    "model.path",
    "model.revision",
    "model.device",
    "model.trust_remote_code",
    "data.eval_text",
    "data.eval_join",
    "data.eval_tokens",
    "search.rows_per_forward",
    "search.checkpoint_seconds",
    "search.checkpoint_steps",
    "search.costs",
    "recover",
    "plans",
    "report",
    "backend",
)
_PROTOCOL = ("text_sha256", "window", "windows", "tokens")


@dataclass(frozen=True)
class _Run:
    """A finished run.

    Attributes:
        settings: what matters, by dotted names; of texts, files of scores and code their fingerprints.
        began: libraries, machine and fingerprints that it began with.
        loss: of what was saved, nats per token; infinite if it is not finite.
        sequences: that the search ran forward.
        in_all: the same of the whole run.
    """

    path: Path
    config: RunConfig
    settings: dict[str, Any]
    began: dict[str, str]
    weights: str
    protocol: dict[str, Any]
    dense: float | None
    loss: float
    removed: float
    sequences: int
    in_all: int


def compare_runs(paths: Sequence[str | Path]) -> dict[str, Any]:
    """What finished runs of one model, judged on one text, came to: a group for each configuration, over its seeds.

    Returns:
        ``protocol`` of all losses, and the ``dense`` one; ``unlike``, libraries or machines that differ, by name; and
        ``groups`` in the order given, each with its ``runs``, ``seeds``, and ``settings`` that are others than the
        first group's; means over the runs: the share ``removed``, ``loss`` (its ``deviation`` None of a single run),
        the ``sequences`` of the search and of the whole run (``in_all``); and ``against`` the first group over the
        ``seeds`` that both have: mean ``difference`` of losses, its standard ``error`` (None of a single one), and how
        many were ``better``; None for the first group, or without such seeds. A loss that is not finite makes what
        follows from it None.

    Raises:
        RunError: no run, one that is not finished, damaged, or given twice; or runs of other weights than the first, or
            judged on another text.
    """
    runs = [_read(Path(path)) for path in paths]
    if not runs:
        raise RunError("there is nothing to compare: give the folders of one or more finished runs")
    for run in runs[1:]:
        _check_alike(runs[0], run)
    groups = dict[str, dict[int, _Run]]()
    for run in runs:
        group = groups.setdefault(json.dumps(run.settings, sort_keys=True), {})
        if other := group.get(run.config.seed):
            raise RunError(
                f"{other.path} and {run.path} have the same settings and the same seed, {run.config.seed}; give one of "
                "them"
            )
        group[run.config.seed] = run
    first = next(iter(groups.values()))
    return {
        "protocol": runs[0].protocol,
        "dense": runs[0].dense,
        "unlike": _unlike(runs),
        "groups": [_told(group, None if group is first else first) for group in groups.values()],
    }


def _read(path: Path) -> _Run:
    """Raises ``RunError`` if no finished run lies there."""
    folder = open_run(path)
    if not folder.finished:
        raise RunError(f"the run in {path} is not finished: there is nothing to compare yet")
    config = folder.read_config()
    try:
        began, report = (json.loads(file.read_text(encoding="utf-8")) for file in (folder.versions, folder.report))
        read = {"data.text": began["text"], "score files": began.get("scores")}
        code = {name: digest for name, digest in began.items() if name not in {*INPUTS, *versions(), "machine"}}
        settings = flat(without(config.to_dict(), _NO_MATTER)) | read | code
        return _Run(
            path,
            config,
            settings,
            began,
            weights=began["weights"],
            protocol=report["protocol"],
            dense=report["loss"]["dense"],
            loss=math.inf if report["loss"]["pruned"] is None else float(report["loss"]["pruned"]),
            removed=report["sparsity"]["block_parameters"],
            sequences=report["search"]["sequences"],
            in_all=sum(report["windows_run"].values()),
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(f"the run in {path} is damaged: {type(error).__name__}: {error}") from None


def _check_alike(first: _Run, run: _Run) -> None:
    """Raises ``RunError`` if their losses do not compare."""
    if run.weights != first.weights:
        raise RunError(
            f"{first.path} and {run.path} pruned different models: {first.config.model.path} (fingerprint "
            f"{first.weights}) and {run.config.model.path} ({run.weights})"
        )
    judged = [{name: each.protocol.get(name) for name in _PROTOCOL} for each in (first, run)]
    if judged[0] != judged[1]:
        said = [", ".join(f"{name} {value}" for name, value in each.items()) for each in judged]
        raise RunError(
            f"{first.path} and {run.path} were judged differently, on {said[0]} and on {said[1]}; prune with the same "
            "--eval-text and data.window, and data.eval_tokens, to compare"
        )


def _unlike(runs: Sequence[_Run]) -> dict[str, list[str]]:
    """Libraries and machines that are not the same everywhere."""
    found = {name: sorted({run.began.get(name, "unknown") for run in runs}) for name in (*versions(), "machine")}
    return {name: values for name, values in found.items() if len(values) > 1}


def _told(group: Mapping[int, _Run], first: Mapping[int, _Run] | None) -> dict[str, Any]:
    runs = list(group.values())
    return {
        "runs": [str(run.path) for run in runs],
        "seeds": sorted(group),
        "settings": {} if first is None else _other_settings(runs[0], next(iter(first.values()))),
        "removed": statistics.fmean(run.removed for run in runs),
        **_mean_and("deviation", "loss", [run.loss for run in runs]),
        "sequences": round(statistics.fmean(run.sequences for run in runs)),
        "in_all": round(statistics.fmean(run.in_all for run in runs)),
        "against": None if first is None else _against(group, first),
    }


def _against(group: Mapping[int, _Run], first: Mapping[int, _Run]) -> dict[str, Any] | None:
    """How losses differ, seed by seed."""
    seeds = sorted(group.keys() & first.keys())
    if not seeds:
        return None
    differences = [group[seed].loss - first[seed].loss for seed in seeds]
    found = _mean_and("error", "difference", differences)
    if found["error"] is not None:
        found["error"] /= math.sqrt(len(seeds))
    return {"seeds": seeds, **found, "better": sum(difference < 0 for difference in differences)}


def _mean_and(spread: str, what: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation, by their names; None where a value is not finite, or one alone has no deviation."""
    if not all(map(math.isfinite, values)):
        return {what: None, spread: None}
    return {what: statistics.fmean(values), spread: statistics.stdev(values) if len(values) > 1 else None}


def _other_settings(run: _Run, first: _Run) -> dict[str, Any]:
    """Settings of a run that are others than the first one's. What follows from its preset goes without saying."""
    known = run.settings.keys() & first.settings.keys()  # code that the first does not take has a setting that names it
    said = {"preset"} | _beside_preset(run) | _beside_preset(first)
    told = {name: run.settings[name] for name in sorted(known & said) if run.settings[name] != first.settings[name]}
    return told | ({"data.text": run.config.data.text} if "data.text" in told else {})


def _beside_preset(run: _Run) -> set[str]:
    """Settings that do not follow from the preset."""
    preset = flat(make_config({"preset": run.config.preset}).to_dict())
    return {name for name, value in run.settings.items() if preset.get(name, ...) != value}
