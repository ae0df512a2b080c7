"""Settings as a user writes them, in YAML files and after ``--set``: nested plain data, not yet checked."""

import functools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

try:  # that of libyaml, with which PyYAML comes on most machines, takes a tenth of the time
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeLoader  # type: ignore[assignment]

from bernprune.embedded import EMBEDDED
from bernprune.errors import ConfigError
from bernprune.names import place_of, several


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``base`` with the entries of ``over`` in their place, also where only one of the two is a section."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


_MERGE = "tag:yaml.org,2002:merge"  # of the key <<, which the safe loader replaces by what it stands for


class _Loader(SafeLoader):
    """As the safe one, but of a key that is given twice none is silently lost."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._flat = set[int]()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what << stands for in its place; that a key is given there and here is no mistake."""
        if id(node) not in self._flat:
            self._flat.add(id(node))
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
            twice = _repeated(keys)
            if twice is not None:
                raise yaml.YAMLError(f"{twice!r} is given twice")
        super().flatten_mapping(node)


def _load(text: str) -> Any:
    """Raises ``yaml.YAMLError`` for all that is not YAML, a date with a thirteenth month, say."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(error) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The nested data of a YAML file, in which ``a.b: c`` stands for ``a: {b: c}``.

    Raises:
        ConfigError: there is none, or a setting is given twice.
    """
    try:
        data = _load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if data is None:  # an empty file
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"config file {path} must hold keys and values, but holds {str(data)[:80]!r}")
    try:
        twice = _repeated([key for name, value in data.items() for key in flat(_as_section(name, value))])
    except RecursionError:
        raise ConfigError(f"config file {path} holds an alias of what it lies in") from None
    if twice is not None:
        raise ConfigError(f"config file {path}: setting {twice!r} is given twice")
    return nested(data)


def nested(data: Mapping[str, Any]) -> dict[str, Any]:
    """Data in which ``a.b: c`` stands for ``a: {b: c}``."""
    return functools.reduce(merge, (_as_section(str(key), value) for key, value in data.items()), {})


def _as_section(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _repeated(values: Sequence[Any]) -> Any:
    return next((value for number, value in enumerate(values) if value in values[:number]), None)


def parse_settings(settings: Sequence[str], *, only: Sequence[str] = ()) -> dict[str, Any]:
    """``["a.b=c", ...]`` to nested data; the values are read as YAML.

    Args:
        only: the settings, or sections of them, that are allowed; by default all are.

    Raises:
        ConfigError: what is not of this form, or not allowed.
    """
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {setting!r} must have the form section.key=value")
        if only and not _among(key, only):
            raise ConfigError(f"--set {setting!r} is not possible here; what can be set is {', '.join(only)}")
        try:
            value = text if text.isspace() else _load(text)  # for YAML it is nothing, but rows may be joined by it
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: the value is not YAML: {' '.join(str(error).split())}") from None
        parsed = merge(parsed, _as_section(key, value))
    return parsed


def check_only(data: Mapping[str, Any], only: Sequence[str]) -> None:
    """Raises ``ConfigError`` if nested data hold another setting than these, or than those of these sections."""
    for key, value in flat(data).items():
        if value != {} and not _among(key, only):
            raise ConfigError(f"setting {key!r} is not possible here; what can be set is {', '.join(only)}")


def _among(key: str, only: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{allowed}.") for allowed in only)


def without_none(data: dict[str, Any]) -> dict[str, Any]:
    """The entries that were given."""
    inner = {key: without_none(value) if isinstance(value, dict) else value for key, value in data.items()}
    return {key: value for key, value in inner.items() if value is not None and value != {}}


def without(settings: dict[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Nested settings less those of the dotted ``keys``."""
    return {
        key: without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in settings.items()
        if f"{prefix}{key}" not in keys
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; an empty section is a value."""
    found = dict[str, Any]()
    for key, value in settings.items():
        within = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if within else {f"{prefix}{key}": value}
    return found


def difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first setting of ``given`` that is another in ``stored``, in words."""
    known = flat(stored)
    for key, value in flat(given).items():
        if value != {} and known.get(key) != value:
            return f"{key} is {known.get(key)!r} there and {value!r} here"
    return None


def absolute(data: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with local paths made absolute, so that a run can be resumed from another folder."""
    return nested({key: _PLACES[key](value) if key in _PLACES else value for key, value in flat(data).items()})


def _path(value: Any) -> Any:
    if not isinstance(value, str) or value == EMBEDDED:
        return value
    expanded = os.path.expanduser(value)
    return os.path.abspath(expanded) if os.path.exists(expanded) else value


def _text(value: Any) -> Any:
    if not isinstance(value, str) or _path(value) != value:
        return _path(value)
    folder, colon, rest = value.partition(":")  # of a dataset: its configuration and its split
    return _path(folder) + colon + rest if os.path.isdir(os.path.expanduser(folder)) else value


def _named(value: Any) -> Any:
    if found := place_of(str(value)):
        return f"{_path(found[0])}:{found[1]}"
    return _path(value) if str(value).endswith(".safetensors") else value  # not a folder that is called flap


def _all_named(value: Any) -> Any:
    names = several(value)
    return [_named(name) for name in names] if isinstance(names, list) else names


_PLACES: dict[str, Callable[[Any], Any]] = {  # settings that may name a file or folder
    "model.path": _path,
    "data.text": _text,
    "data.eval_text": _text,
    "initial.score": _named,
    "initial.also": _all_named,
    "initial.members": _all_named,
    "search.method": _named,
    "search.baseline": _named,
    "search.objective": _named,
}
