"""`ScheduleSpec`: what a schedule is built from, and the checks on it.

The fields carry the names of the config's `schedule` section, so that one is copied into the other
word by word. `ScheduleSpec.preset("k2", pp, num_microbatches, vpp)` sets the switches that a kind
is known for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, get_args

import yaml

from k2train.config.errors import ConfigError, nearest
from k2train.config.sections import ScheduleKind, check_pairs_are_split
from k2train.layout.placement import folded, looped

KINDS: tuple[ScheduleKind, ...] = get_args(ScheduleKind)
"""Every base order. `k2` and `interleaved_1f1b` are the same one; what makes K2's schedule is its
switches."""
INTERLEAVED = ("k2", "interleaved_1f1b")
"""Kinds that take layout.vpp; the others fix their virtual stages themselves."""
MAX_CHUNKS = 2**20
"""Microbatches times virtual stages: 16 times K2's largest step, about a gigabyte of actions."""
SELF_SPLIT = ("zb_h1", "dualpipe", "dualpipe_v")
"""Kinds whose published order already says where weight gradients go; passes may not move them."""


@dataclass(frozen=True)
class ScheduleSpec:
    """The input of `build_schedule`. Raises ConfigError for numbers that cannot be scheduled."""

    pp: int
    """Pipeline stages."""
    num_microbatches: int
    """Microbatches a pipeline runs in one step."""
    kind: str = "interleaved_1f1b"
    """The base order, one of KINDS."""
    vpp: int = 1
    """Virtual stages on each stage. DualPipe and DualPipeV always have two; leave 1 there."""
    extra_warmup_microbatches: int = 0
    """Forwards a stage runs ahead beyond the base order's warm-up."""
    pair_forward_backward: bool = False
    """Run a forward and an input gradient together in the steady phase."""
    split_weight_grad: bool = False
    """Take the weight gradient out of the backward and place it beside the pipeline's sends."""
    offload: bool = False
    """Insert OFFLOAD after forwards and RELOAD ahead of backwards."""
    prefetch_depth: int = 1
    """How many backwards ahead a RELOAD is issued."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("schedule.kind", self.kind, "is not a schedule", nearest(str(self.kind), KINDS))
        for field, minimum in _MINIMUM.items():
            _check_int(field, getattr(self, field), minimum)
        _check_size(self)
        _check_vpp(self)
        _check_switches(self)
        _check_dual(self)

    @classmethod
    def preset(cls, kind: str, pp: int, num_microbatches: int, vpp: int = 1, **changes: Any) -> ScheduleSpec:
        """A kind with the switches of configs/schedule/KIND.yaml, and K2's with offload; `changes`
        override single fields."""
        known = {field.name for field in fields(cls)}
        assert changes.keys() <= known, f"unknown fields: {changes.keys() - known}"
        switches = {"offload": kind == "k2", **preset_switches(kind), **changes}
        return cls(pp, num_microbatches, kind, vpp, **switches)


@lru_cache(maxsize=len(KINDS))
def preset_switches(kind: str) -> Mapping[str, Any]:
    """The switches of a kind's file in configs/schedule, which owns them."""
    # Imported here: it brings Hydra, and whoever schedules without a preset needs none.
    from k2train.config.compose import config_dir

    text = (config_dir() / "schedule" / f"{kind}.yaml").read_text(encoding="utf-8")
    return {name: value for name, value in yaml.safe_load(text).items() if name != "kind"}


def num_parts(kind: str, pp: int, vpp: int) -> int:
    """Parts that the model is cut into under a kind of schedule: as many as `placement` has
    entries."""
    return 2 * pp if kind == "dualpipe_v" else pp * vpp


def placement(kind: str, pp: int, vpp: int) -> tuple[int, ...]:
    """The stage of every part of the model under a kind of schedule, in the order of the model.

    DualPipe has a second copy of every part, placed the other way round, which is not listed.
    """
    if kind == "dualpipe_v":
        return folded(pp)
    return looped(pp, vpp)


_FIELD_NAMES = {"pp": "layout.pp", "vpp": "layout.vpp", "num_microbatches": "num_microbatches"}
_MINIMUM = {"pp": 1, "vpp": 1, "num_microbatches": 1, "extra_warmup_microbatches": 0, "prefetch_depth": 1}


def _check_int(field: str, value: object, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        name = _FIELD_NAMES.get(field, f"schedule.{field}")
        raise ConfigError(name, value, f"must be a whole number of at least {minimum}")


def _check_size(spec: ScheduleSpec) -> None:
    chunks = spec.pp * spec.vpp * spec.num_microbatches
    if chunks > MAX_CHUNKS:
        raise ConfigError(
            "num_microbatches",
            spec.num_microbatches,
            f"pp * vpp * microbatches = {chunks} are more than the {MAX_CHUNKS} a schedule may have",
            "take a smaller global batch or more data-parallel ranks",
        )


def _check_vpp(spec: ScheduleSpec) -> None:
    if spec.vpp > 1 and spec.kind not in INTERLEAVED:
        raise ConfigError(
            "layout.vpp",
            spec.vpp,
            f"schedule.kind={spec.kind} fixes the number of virtual stages itself",
            "set layout.vpp=1, or schedule.kind=interleaved_1f1b or k2",
        )


def _check_switches(spec: ScheduleSpec) -> None:
    check_pairs_are_split(spec.pair_forward_backward, spec.split_weight_grad)
    if spec.pair_forward_backward and spec.kind not in INTERLEAVED:
        raise ConfigError(
            "schedule.pair_forward_backward",
            True,
            f"schedule.kind={spec.kind} has no warm-up that pairs could run after",
            "set schedule.kind=k2, which also takes layout.vpp=1",
        )
    if spec.extra_warmup_microbatches and spec.kind in SELF_SPLIT:
        raise ConfigError(
            "schedule.extra_warmup_microbatches",
            spec.extra_warmup_microbatches,
            f"the order of schedule.kind={spec.kind} is fixed",
            "set it to 0",
        )


def _check_dual(spec: ScheduleSpec) -> None:
    if spec.kind not in ("dualpipe", "dualpipe_v"):
        return
    if spec.kind == "dualpipe" and spec.pp % 2:
        raise ConfigError("layout.pp", spec.pp, "DualPipe mirrors the stages, so pp must be even")
    if spec.kind == "dualpipe" and spec.num_microbatches % 2:
        raise ConfigError(
            "num_microbatches", spec.num_microbatches, "DualPipe halves them, so they must be even"
        )
    if spec.num_microbatches < 2 * spec.pp:
        raise ConfigError(
            "num_microbatches",
            spec.num_microbatches,
            f"schedule.kind={spec.kind} fills its pipeline with at least 2 * pp = {2 * spec.pp} microbatches",
            "take a larger global batch, fewer stages or another schedule",
        )
