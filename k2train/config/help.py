"""`--help` from the field declarations: every key with its type, default, unit and meaning."""

from __future__ import annotations

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union


@dataclasses.dataclass(frozen=True)
class KeyHelp:
    """One line of help: `name` is the dotted key, `default` empty where the key must be given by a config file."""

    name: str
    type: str
    default: str
    unit: str
    doc: str


def keys_of(cls: type, prefix: str = "") -> Iterator[KeyHelp]:
    """Every leaf key below dataclass `cls`, depth first, in declaration order."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        hint = _without_none(hints[field.name])
        nested = hint if dataclasses.is_dataclass(hint) else _element(hint)
        yield KeyHelp(
            name,
            _type_name(hints[field.name]),
            _default_text(field),
            field.metadata["unit"],
            field.metadata["doc"],
        )
        if dataclasses.is_dataclass(nested):
            suffix = "." if nested is hint else "[]."
            yield from keys_of(typing.cast(type, nested), f"{name}{suffix}")


def render_help(
    cls: type, title: str, usage: str, groups: dict[str, list[str]] | None = None, width: int = 100
) -> str:
    """The text of `--help`: title, usage, config groups with their files, then the keys under their sections."""
    lines = [title, "", "usage: " + usage]
    if groups:
        lines += ["", "config groups (group=name picks a file of configs/):"]
        lines += [f"  {name}={' | '.join(options)}" for name, options in groups.items()]
    lines += ["", "keys (key=value):"]
    for entry in keys_of(cls):
        lines += _render_key(entry, width)
    return "\n".join(lines)


def _render_key(entry: KeyHelp, width: int) -> list[str]:
    if entry.type == "section":
        return ["", *textwrap.wrap(f"{entry.name}: {entry.doc}", width)]
    default = f", default {entry.default}" if entry.default else ""
    unit = f", in {entry.unit}" if entry.unit else ""
    head = f"  {entry.name}  <{entry.type}{unit}{default}>"
    return [head, *textwrap.wrap(entry.doc, width, initial_indent="      ", subsequent_indent="      ")]


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def _element(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint


def _type_name(hint: Any) -> str:
    inner = _without_none(hint)
    optional = " or null" if inner is not hint else ""
    if typing.get_origin(inner) is Literal:
        return "|".join(map(str, typing.get_args(inner))) + optional
    if typing.get_origin(inner) is tuple:
        return f"list of {_type_name(typing.get_args(inner)[0])}{optional}"
    if dataclasses.is_dataclass(inner):
        return "section" + optional
    names = {int: "int", float: "float", bool: "bool", str: "text"}
    return names[inner] + optional


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return ""
    if field.default is None:
        return "null"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return "[]" if field.default == () else str(field.default)
