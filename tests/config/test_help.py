"""`--help` is made from the field declarations, so it can leave nothing out."""

import dataclasses

from k2train.config.compose import load_config
from k2train.config.convert import to_dict
from k2train.config.data import DataBuildConfig
from k2train.config.help import keys_of, render_help
from k2train.config.schema import Config


def _leaves(value: object, prefix: str = "") -> set[str]:
    if isinstance(value, dict):
        return {
            leaf
            for key, item in value.items()
            for leaf in _leaves(item, f"{prefix}.{key}" if prefix else key)
        }
    return {prefix}


def test_help_lists_every_key_a_config_can_hold() -> None:
    listed = {entry.name for entry in keys_of(Config)}
    composed = _leaves(to_dict(load_config(["model=k2"])))
    assert composed <= listed
    text = render_help(Config, "t", "u")
    assert all(name in text for name in composed)


def test_every_key_is_explained_and_every_quantity_has_a_unit() -> None:
    for root in (Config, DataBuildConfig):
        for entry in keys_of(root):
            assert entry.doc, entry.name
            if entry.name.endswith(
                ("_tokens", "_bytes", "_seconds", "_steps", ".steps", "_per_second", "seq_len")
            ):
                assert entry.unit, entry.name


def test_help_wraps_to_the_width_asked_for() -> None:
    text = render_help(Config, "t", "u", {"model": ["k2"]}, width=80)
    indented = [line for line in text.splitlines() if line.startswith("      ")]
    assert max(map(len, indented)) <= 80
    assert dataclasses.is_dataclass(Config)
