"""The names of what can be chosen by a word, in one place, and what stands behind some of them."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from bernprune.errors import ConfigError

Kind = Literal["channel", "kv_group", "attention", "ffn", "layer"]
Measure = Literal["parameters", "flops"]
CapName = Literal["parameters", "flops", "kv_cache"]
Pools = Literal["joint", "separate"]
Projection = Literal["cost-weighted", "published"]
MethodName = Literal["posterior", "reinforce"]
MasksPer = Literal["batch", "sequence", "chunk"]
Sampling = Literal["independent", "antithetic", "exact"]
MapName = Literal["sigmap", "norm", "const", "hybrid", "uniform"]
Scope = Literal["layer", "global", "pooled"]
ScoreName = Literal[
    "wanda-sp",
    "flap",
    "flap-wifn",
    "flap-ifv",
    "goa",
    "goa-moment",
    "cfsp",
    "cfsp-released",
    "block-influence",
    "block-perplexity",
    "mini-llm",
    "mini-llm-weights",
    "taylor-vector",
    "taylor-element",
    "taylor-second",
    "hywia",
    "ifso",
    "ifso-repaired",
    "ifso-halfway",
    "rank-average",
    "fused",
    "magnitude",
    "random",
]
Allocation = Literal["uniform", "global", "pooled", "block-influence", "search"]
InfluenceName = Literal["angular", "cosine", "mse", "mae"]
BaselineName = Literal["none", "moving-average", "leave-one-out", "matched", "published"]
ReferenceName = Literal["initial", "dense", "current", "mean-field"]
Scaling = Literal["raw", "sqrt-fisher", "natural"]
ObjectiveName = Literal["cross-entropy", "kl"]
BackendName = Literal["auto", "torch", "triton"]
SearchDtype = Literal["auto", "same", "bfloat16", "int8"]
ShortDtype = Literal["bfloat16", "int8"]
RepairName = Literal["none", "bias", "ridge", "two-step", "scale", "admm", "auto"]
AUTO_REPAIRS: tuple[RepairName, ...] = ("ridge", "two-step")  # of which "auto" takes the better
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # strengths that are tried, relative to the mean square of an input
TargetName = Literal["own", "dense", "residual"]
PresetName = Literal["default", "reinforce", "paper"]

CUSTOM = "FILE.py:NAME"  # how custom code is named in a configuration


def check_name(what: str, name: str, names: Any) -> None:
    """Raises ``ConfigError`` unless ``name`` is one of ``names``, which is one of the types above."""
    if not isinstance(name, str) or name not in get_args(names):
        raise ConfigError(unknown(what, str(name), get_args(names)))


def place_of(name: str) -> tuple[str, str] | None:
    """Python file and name in it, of what is given as ``path/to/file.py:name``; None if it is no such place."""
    found = re.fullmatch(r"(.+\.py):([^\W\d]\w*)", name)
    return (found[1], found[2]) if found else None


def several(value: Any) -> Any:
    """A list of what is given as text with commas; anything else as it is."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """That a name is unknown, which ones are known, and which one was meant if that can be guessed."""
    known = tuple(known)
    return f"{what} {name!r} is unknown; known are {', '.join(known)}{meant(name, known)}"


def meant(name: str, known: Sequence[str]) -> str:
    """The question whether another name was meant, to go on with after a fault; empty if none is spelt like this, in
    capitals or not."""
    by_letters = {other.casefold(): other for other in reversed(known)}
    close = difflib.get_close_matches(name.casefold(), by_letters, n=1)
    return f"; did you mean {by_letters[close[0]]!r}?" if close else ""
