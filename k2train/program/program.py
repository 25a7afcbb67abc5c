"""`Program`: a layout, its action lists, their proof and their costs; each of them made once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from k2train.config.convert import to_dict
from k2train.config.schema import Config
from k2train.estimate.virtual_stage import Estimator, build_estimator
from k2train.layout.layout import Layout, VirtualStage
from k2train.schedule.builders import build_schedule
from k2train.schedule.costs import Costs
from k2train.schedule.errors import told_as_config
from k2train.schedule.forward import proved_forward
from k2train.schedule.messages import Messages, plan_messages
from k2train.schedule.program import Schedule
from k2train.schedule.spec import ScheduleSpec
from k2train.schedule.validate import ScheduleReport, validate

MICROBATCHES_PER_STAGE = 8
"""A step with so many microbatches for each stage has usually reached its peaks of memory."""

DECISIVE = ("model", "layout", "schedule", "activations", "optim", "train", "ops", "cluster")
"""The sections of a config that decide what a step does. The others name files and reports, which
may differ from machine to machine."""


@dataclass(frozen=True)
class Program:
    """What a config was compiled to; made by `compile_program`. Ranks that are threads share
    one."""

    config: Config
    layout: Layout
    schedule: Schedule
    """Training's action lists."""
    spec: ScheduleSpec
    """What they were built from."""
    _evaluations: dict[int, Schedule] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        placed = tuple(self.schedule.placement[virtual_stage] for virtual_stage in self.schedule.chains[0])
        assert placed == self.layout.placement, "the model is cut for another placement than the schedule's"

    @property
    def parameter_copies(self) -> int:
        """How many times a pipeline holds every parameter: 2 in DualPipe, else 1."""
        return len(self.schedule.chains)

    @cached_property
    def pieces(self) -> tuple[VirtualStage, ...]:
        """The piece of the model on each virtual stage of the schedule."""
        return tuple(self.layout.virtual_stages[part] for part in self.schedule.model_part)

    def pieces_of(self, stage: int) -> list[VirtualStage]:
        """The pieces of the model on a stage."""
        return [self.pieces[virtual_stage] for virtual_stage in self.schedule.virtual_stages_of(stage)]

    @cached_property
    def report(self) -> ScheduleReport:
        """The proof of training's lists. Raises ConfigError, with the cycle of waits, where they
        cannot run."""
        with told_as_config(self.config.schedule):
            return validate(self.schedule)

    @cached_property
    def messages(self) -> Messages:
        """What training's and evaluation's lists ask of the channels between stages, all of them
        proved."""
        return plan_messages(self.schedule, self.report)

    def evaluation(self, num_microbatches: int) -> Schedule:
        """Evaluation's lists for any number of microbatches, proved for the channels that
        `messages` asks for."""
        if num_microbatches not in self._evaluations:
            lists, report = proved_forward(self.schedule, num_microbatches)
            fits = all(map(int.__le__, report.peak_sends, self.messages.max_sends))
            assert fits, f"evaluation has {report.peak_sends} messages under way"
            self._evaluations[num_microbatches] = lists
        return self._evaluations[num_microbatches]

    @cached_property
    def short_schedule(self) -> Schedule:
        """Training's lists for a step just long enough for its peaks of memory; the whole step
        where it is shorter."""
        enough = MICROBATCHES_PER_STAGE * self.layout.pp
        if self.schedule.num_microbatches <= enough:
            return self.schedule
        return build_schedule(dataclasses.replace(self.spec, num_microbatches=enough))

    @cached_property
    def estimator(self) -> Estimator:
        """What layers cost in this setting."""
        config = self.config
        return build_estimator(
            config.model, config.train, config.activations, self.layout, config.cluster, config.ops
        )

    @cached_property
    def costs(self) -> Costs:
        """The costs of every virtual stage, for `schedule` and for `short_schedule`."""
        put_off = self.config.schedule.split_weight_grad
        by_piece = {piece: self.estimator.virtual_stage(piece, put_off) for piece in set(self.pieces)}
        return Costs(tuple(by_piece[piece] for piece in self.pieces))

    @cached_property
    def words(self) -> dict[str, Any]:
        """What the config says on what a step does, by dotted key; plain values that JSON can
        hold."""
        return {
            key: value
            for name in DECISIVE
            for key, value in _dotted(name, to_dict(getattr(self.config, name)))
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the words, the layout and training's lists, in hexadecimal."""
        parts = (json.dumps(self.words, sort_keys=True), repr(self.layout), self.schedule.to_text())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _dotted(name: str, value: Any) -> list[tuple[str, Any]]:
    """The leaves of nested dicts under their dotted keys."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [leaf for key, inner in value.items() for leaf in _dotted(f"{name}.{key}", inner)]
