"""`--help` from the field declarations: every key with its type, default, unit and meaning."""

from __future__ import annotations

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union

import yaml

from k2train.config.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class KeyHelp:
    """One line of help.

    name: the dotted key. default: empty where a config file must give the key.
    """

    name: str
    type: str
    default: str
    unit: str
    doc: str


def keys_of(cls: type, prefix: str = "") -> Iterator[KeyHelp]:
    """Every key below dataclass `cls`, sections included, depth first, in declaration order."""
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


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which keys a help shows, and with which values.

    only: words of the user; a key is shown if one of them is its name, one of its sections, or a
        part of its name.
    without: sections and keys that the command does not read. values: a composed config as plain
    dicts, whose values stand in place of the declared defaults.
    """

    only: Sequence[str] = ()
    without: Sequence[str] = ()
    values: Mapping[str, Any] | None = None

    def shows(self, name: str) -> bool:
        plain = name.replace("[]", "")
        if any(_below(plain, hidden) for hidden in self.without):
            return False
        # A section's own line comes with every key below it, and a word names a section before a
        # part of a name.
        return not self.only or any(_below(plain, word) or word in plain for word in self.only)


def _below(name: str, section: str) -> bool:
    return name == section or name.startswith(f"{section}.")


def render_help(
    cls: type,
    title: str,
    usage: str,
    groups: Mapping[str, Sequence[str]] | None = None,
    width: int = 100,
    selection: Selection | None = None,
) -> str:
    """The text of `--help`: title, usage, config groups with their files, then the keys under their
    sections.

    Raises ConfigError where a word of the selection fits no key.
    """
    selection = selection or Selection()
    keys = [entry for entry in keys_of(cls) if selection.shows(entry.name)]
    if not keys:
        every = dataclasses.replace(selection, only=())
        names = [entry.name for entry in keys_of(cls) if every.shows(entry.name)]
        raise ConfigError(
            "--help", " ".join(selection.only), "fits no key", nearest(selection.only[0], names)
        )
    lines = [title, "", "usage: " + usage] if not selection.only else []
    if groups and not selection.only:
        lines += ["", "config groups (group=name picks a file of configs/, or of your own folder):"]
        lines += [f"  {name}={' | '.join(options)}" for name, options in groups.items()]
    if not selection.only:
        lines += ["", "keys (key=value):"]
    for entry in keys:
        lines += _render_key(entry, width, selection.values)
    return "\n".join(lines).lstrip("\n")


def _render_key(entry: KeyHelp, width: int, values: Mapping[str, Any] | None) -> list[str]:
    if entry.type.startswith("section"):
        return ["", *textwrap.wrap(f"{entry.name}: {entry.doc}", width)]
    value = _value_text(entry, values) if values is not None else ""
    shown = f" = {value}" if value else ""
    default = f", default {entry.default}" if entry.default and not shown else ""
    unit = f", in {entry.unit}" if entry.unit else ""
    head = textwrap.wrap(
        f"{entry.name}  <{entry.type}{unit}{default}>{shown}",
        width - 2,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    doc = textwrap.wrap(entry.doc, width, initial_indent="      ", subsequent_indent="      ")
    return [*(f"  {line}" for line in head), *doc]


def _value_text(entry: KeyHelp, values: Mapping[str, Any]) -> str:
    """The value of a key in a composed config; empty where it has none, for entries of lists and
    absent sections.
    """
    value: Any = values
    for part in entry.name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ""
        value = value[part]
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


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
