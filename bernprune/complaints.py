"""What is wrong with settings, in one sentence that names the dotted key, the value and what is allowed."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bernprune.names import meant


def sentence(error: ValidationError, settings: type[BaseModel]) -> str:
    """The first of the problems that pydantic found with ``settings``."""
    problem, *others = error.errors()
    keys, given = [key for key, _ in fields(settings)], problem.get("input")
    key = _key(problem, keys)
    if problem["type"] == "extra_forbidden":
        return f"setting {key!r} is unknown; did you mean {_nearest(key, keys)!r}?"
    if problem["type"] == "model_type":
        return f"setting {key!r}: should be a section of settings, but got {given!r}"
    message: str = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    # A value of which several types are allowed has a problem with each.
    same = [other["msg"] for other in others if _key(other, keys) == key and other["input"] is given]
    told = (each.replace(" after validation", "") for each in (message, *same))
    messages = dict.fromkeys(each[0].lower() + each[1:] for each in told)
    guess = meant(str(given), re.findall("'(.*?)'", message)) if problem["type"] == "literal_error" else ""
    said = isinstance(given, str) and repr(given) in message  # as where a name is unknown
    got = "" if said else f", but got {given!r}"
    return f"setting {key!r}: {' or '.join(messages)}{got}{guess}"


def _key(problem: Any, keys: list[str]) -> str:
    """The dotted name of a setting, without what pydantic says of the types within it."""
    sections = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    names: list[str] = []
    for part in map(str, problem["loc"]):
        names.append(part)
        if ".".join(names) not in sections:
            break
    return ".".join(names)


def _nearest(key: str, keys: list[str]) -> str:
    section, _, name = key.rpartition(".")
    beside = {other.rpartition(".")[2]: other for other in keys if other.rpartition(".")[0] == section}
    if alike := difflib.get_close_matches(name, beside, n=1, cutoff=0.75):
        return beside[alike[0]]
    words = {known: known.split("_") for known in beside}
    if short := [known for known in words if name in (*words[known], "".join(word[:1] for word in words[known]))]:
        return beside[short[0]]  # of which the name is a word, or the initials
    same_name = [name for name in keys if name.split(".")[-1] == key.split(".")[-1]]
    if section:  # a section is no answer to what should be in one
        keys = [other for other in keys if not any(inner.startswith(f"{other}.") for inner in keys)]
    return (same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.0))[0]


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its dotted key, and every section before its own settings."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
