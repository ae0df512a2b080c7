"""Every setting in words, taken from what checks it."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from bernprune.complaints import fields
from bernprune.config import RunConfig

_WIDTH, _INDENT = 100, "    "


def manual() -> str:
    """Every setting: its name, its default, the words to choose from if there are some, and what it means."""
    lines = ["Every setting, for a YAML file or after --set, with its default, which a preset may change.", ""]
    for name, field in fields(RunConfig):
        default = field.get_default(call_default_factory=True)
        if not isinstance(default, BaseModel):  # a section, whose settings follow
            lines += [" ".join([name, "=", _written(default), *_choice(field.annotation)])]
            lines += textwrap.wrap(
                field.description or "",
                _WIDTH,
                initial_indent=_INDENT,
                subsequent_indent=_INDENT,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def _written(value: Any) -> str:
    """A value as YAML takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _choice(annotation: Any) -> list[str]:
    words = list(_words(annotation))
    return [f"({', '.join(words)})"] if len(words) > 1 else []


def _words(annotation: Any) -> Iterator[str]:
    for part in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield part
        else:
            yield from _words(part)
