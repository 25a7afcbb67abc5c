"""Plain dicts (what YAML gives) to frozen dataclasses and back, with errors that name the dotted
key.

The rules are few: unknown keys are errors, a missing key without a default is an error, whole
floats are accepted where an int is asked for (`1e6`), nothing else is coerced.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from k2train.config.errors import ConfigError, nearest

T = TypeVar("T")


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Build dataclass `cls` from a mapping; `path` is the dotted key of the mapping, for errors.

    Raises ConfigError for an unknown or missing key, a wrong type, or a value the dataclass itself
    refuses.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(path or "config", data, "must be a section with keys", _keys_hint(cls))
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            prefix = f"{path}." if path else ""
            rule = "is not a key of this program"
            raise ConfigError(f"{prefix}{name}", data[name], rule, nearest(str(name), fields, prefix))
    values = {name: _convert(hints[name], value, _join(path, str(name))) for name, value in data.items()}
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        name = _join(path, missing[0])
        meaning = fields[missing[0]].metadata["doc"]
        raise ConfigError(name, "(missing)", "must be given", f"give {name}: {meaning}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise error.placed(path) from error


def to_dict(config: Any) -> Any:
    """The inverse of from_dict: plain dicts and lists, ready for YAML or JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _keys_hint(cls: type) -> str:
    return "its keys are " + ", ".join(field.name for field in dataclasses.fields(cls))


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, path)
    if origin is Literal:
        return _convert_choice(args, value, path)
    if origin is tuple:
        return _convert_tuple(args[0], value, path)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    return _convert_scalar(hint, value, path)


def _convert_choice(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    # YAML reads `1f1b` as text but an unquoted `none` or `1` as something else, so compare as text.
    for choice in choices:
        if str(value) == choice:
            return choice
    rule = "must be one of " + ", ".join(map(str, choices))
    raise ConfigError(path, value, rule, nearest(str(value), map(str, choices)))


def _convert_tuple(item: Any, value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        remedy = f"{path}=[{value}]" if value is not None else f"{path}=[] for none"
        raise ConfigError(path, value, "must be a list", remedy)
    return tuple(_convert(item, element, f"{path}[{index}]") for index, element in enumerate(value))


def _convert_scalar(hint: type, value: Any, path: str) -> Any:
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise ConfigError(path, value, f"must be {names[hint]}")
