"""Finished runs side by side: which settings they differ in, and what that changed.

Runs that differ in nothing but their seed make a group. Groups are compared with the first one over the seeds that both
have: runs of the same seed draw the same text and the same numbers, so much of their chance is the same, too.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bernprune.config import RunConfig, make_config
from bernprune.errors import RunError
from bernprune.evaluation.perplexity import perplexity
from bernprune.names import place_of
from bernprune.run.folder import open_run
from bernprune.run.origin import CHANGED, versions
from bernprune.scores.files import SUFFIX
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
_VERSION = "bernprune"  # which may compute something else


@dataclass(frozen=True)
class _Run:
    """A finished run.

    Attributes:
        settings: what matters, by dotted names, with fingerprints of texts, files of scores and code in their place.
        shown: the same as they were given.
        began: libraries, machine and fingerprints that it began with.
        loss: of what was saved, nats per token.
        sequences: that the search ran forward.
        in_all: the same of the whole run.
    """

    path: Path
    config: RunConfig
    settings: dict[str, Any]
    shown: dict[str, Any]
    began: dict[str, str]
    weights: str
    protocol: dict[str, Any]
    dense: float
    loss: float
    removed: float
    sequences: int
    in_all: int


def compare_runs(paths: Sequence[str | Path]) -> dict[str, Any]:
    """What finished runs of one model, judged on one text, came to: a group for each configuration, over its seeds.

    Returns:
        ``protocol`` of all losses, and the ``dense`` one; ``unlike``, what else differs and should not, by name:
        libraries and machines, and what runs of one group searched; and ``groups`` in the order given, each with its
        ``runs`` and their ``seeds``, and ``settings`` that are others than the first group's; means over the runs: the
        share of the prunable parameters that is ``removed``, ``loss`` (its ``deviation`` None of a single run) and its
        ``perplexity``, the ``sequences`` of the search and of the whole run (``in_all``); and ``against`` the first
        group over the ``seeds`` that both have: mean ``difference`` of losses, its standard ``error`` (None of a single
        one), and how many were ``better`` and ``equal``; None for the first group, or without such seeds.

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
    told = [_told(group, None if group is first else first) for group in groups.values()]
    return {
        "protocol": runs[0].protocol,
        "dense": runs[0].dense,
        "unlike": _unlike(runs) | _searched_unlike(groups.values()),
        "groups": told,
    }


def _read(path: Path) -> _Run:
    """Raises ``RunError`` if no finished run lies there."""
    folder = open_run(path)
    if not folder.finished:
        raise RunError(f"the run in {path} is not finished: there is nothing to compare yet")
    config = folder.read_config()
    try:
        began, report = (json.loads(file.read_text(encoding="utf-8")) for file in (folder.versions, folder.report))
        shown = flat(without(config.to_dict(), _NO_MATTER))
        shown |= {_VERSION: began[_VERSION], "search.dtype": report["search"]["dtype"]}
        return _Run(
            path,
            config,
            {name: _by_content(name, value, began) for name, value in shown.items()},
            shown,
            began,
            weights=began["weights"],
            protocol=report["protocol"],
            dense=float(report["loss"]["dense"]),
            loss=float(report["loss"]["pruned"]),
            removed=report["sparsity"]["block_parameters"],
            sequences=report["search"]["sequences"],
            in_all=sum(report["windows_run"].values()),
        )
    except KeyError as error:
        raise RunError(f"the run in {path} is damaged, or of another version: it does not say {error}") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RunError(f"the run in {path} is damaged: {error}") from None


def _by_content(name: str, value: Any, began: Mapping[str, str]) -> Any:
    """A setting with the fingerprint of what it names in its place, wherever that lies."""
    if name == "data.text":
        return began["text"]
    if isinstance(value, list):
        return [_by_content(name, each, began) for each in value]
    if isinstance(value, str) and (place := place_of(value)):
        return f"{began[place[0]]}:{place[1]}"
    return began["scores"] if isinstance(value, str) and value.endswith(SUFFIX) else value


def _check_alike(first: _Run, run: _Run) -> None:
    """Raises ``RunError`` if their losses do not compare."""
    if run.weights != first.weights:
        raise RunError(
            f"{first.path} and {run.path} pruned different models, or one in other number formats: "
            f"{first.config.model.path} (fingerprint {first.weights}) and {run.config.model.path} ({run.weights})"
        )
    judged = [{name: each.protocol.get(name) for name in _PROTOCOL} for each in (first, run)]
    if judged[0] != judged[1]:
        said = [", ".join(f"{name} {value}" for name, value in each.items()) for each in judged]
        raise RunError(
            f"{first.path} and {run.path} were judged differently, on {said[0]} and on {said[1]}; prune with the same "
            "--eval-text and data.window, and data.eval_tokens, to compare"
        )


def _unlike(runs: Sequence[_Run]) -> dict[str, list[str]]:
    """Libraries and machines that are not the same everywhere, or were not all through a run."""
    names = [name for name in (*versions(), "machine") if name != _VERSION]
    found = {name: sorted({run.began.get(name, "unknown") for run in runs}) for name in names}
    changed = [f"{run.path} began with {run.began[CHANGED]}" for run in runs if CHANGED in run.began]
    return {name: values for name, values in found.items() if len(values) > 1} | ({CHANGED: changed} if changed else {})


def _searched_unlike(groups: Iterable[Mapping[int, _Run]]) -> dict[str, list[str]]:
    """What the runs of a group searched, where that differs."""
    found = dict[str, list[str]]()
    for group in groups:
        searched = {run.sequences for run in group.values()}
        if len(searched) > 1:  # ended early, or by a limit of time
            name = f"searched in {next(iter(group.values())).path} and others"
            found[name] = [f"{sequences:,}" for sequences in sorted(searched)]
    return found


def _told(group: Mapping[int, _Run], first: Mapping[int, _Run] | None) -> dict[str, Any]:
    runs = list(group.values())
    losses = _mean_and("deviation", "loss", [run.loss for run in runs])
    return {
        "runs": [str(run.path) for run in runs],
        "seeds": list(group),
        "settings": {} if first is None else _other_settings(runs[0], next(iter(first.values()))),
        "removed": statistics.fmean(run.removed for run in runs),
        **losses,
        "perplexity": perplexity(losses["loss"]),
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
    better = sum(difference < 0 for difference in differences)
    return {"seeds": seeds, **found, "better": better, "equal": differences.count(0)}


def _mean_and(spread: str, what: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation, by their names; of one alone no deviation is known."""
    return {what: statistics.fmean(values), spread: statistics.stdev(values) if len(values) > 1 else None}


def _other_settings(run: _Run, first: _Run) -> dict[str, Any]:
    """Settings of a run that are others than the first one's; what follows from the two presets goes without saying,
    and what seems to, but does not, is said."""
    presets = [flat(make_config({"preset": each.config.preset}).to_dict()) for each in (run, first)]
    told = dict[str, Any]()
    for name, value in run.shown.items():
        differs, expected = run.settings[name] != first.settings[name], [preset.get(name) for preset in presets]
        by_presets = name != "preset" and expected[0] != expected[1]
        if [value, first.shown[name]] != expected if by_presets else differs:
            told[name] = f"{value} with other contents" if differs and value == first.shown[name] else value
    return told
