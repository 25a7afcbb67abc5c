"""Configs of configs/, composed without Hydra: a bare machine has PyYAML (transformers needs it)
and no more.

A file may name others of its group under `defaults`, as Hydra's do; that is all of Hydra that is
needed here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from k2train.config.convert import from_dict
from k2train.config.schema import Config
from k2train.config.sections import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read_group(group: str, name: str) -> dict[str, Any]:
    """configs/GROUP/NAME.yaml, and under it what its defaults name."""
    data = yaml.safe_load((ROOT / "configs" / group / f"{name}.yaml").read_text()) or {}
    merged: dict[str, Any] = {}
    for other in data.pop("defaults", []):
        if other != "_self_":
            merged |= read_group(group, other)
    return {**merged, **{key: _numbers(value) for key, value in data.items()}}


def read_cluster(name: str) -> ClusterConfig:
    """configs/cluster/NAME.yaml."""
    return from_dict(ClusterConfig, read_group("cluster", name))


def compose(groups: dict[str, str], **changes: dict[str, Any]) -> Config:
    """A config of one file from each group, `changes` on top of them by section."""
    files = {
        "layout": "single",
        "schedule": "k2",
        "activations": "none",
        "optim": "muonclip",
        "data": "stdlib",
    }
    sections = {group: read_group(group, name) for group, name in {**files, **groups}.items()}
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    return from_dict(Config, {"name": "gpu-benchmark", **sections})


def _numbers(value: Any) -> Any:
    """YAML 1.1 takes 1e-6 for text; Hydra's reader, and ours, for a number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value
