"""`compile_program`: the one way from a config to a layout and action lists.

The kind of schedule decides where the parts of the model stand (DualPipeV folds them into a V), so
the model is cut for that placement, and the schedule is built over the same one.
"""

from __future__ import annotations

import dataclasses

from k2train.config.schema import Config
from k2train.config.sections import ScheduleConfig
from k2train.estimate.activations import check_policies
from k2train.layout.build import build_layout, check_pieces, num_microbatches
from k2train.layout.layout import Layout
from k2train.program.program import Program
from k2train.schedule.builders import build_schedule
from k2train.schedule.errors import told_as_config
from k2train.schedule.spec import ScheduleSpec, num_parts, placement


def compile_program(config: Config) -> Program:
    """The program of a config. Its proof and its costs are made when they are first asked for.

    Raises ConfigError for a config that has no layout or no action lists.
    """
    layout, spec = _checked(config)
    return Program(config, layout, build_schedule(spec), spec)


def check_program(config: Config) -> None:
    """Raise the ConfigError that `compile_program` would raise, without building action lists."""
    _checked(config)


def _checked(config: Config) -> tuple[Layout, ScheduleSpec]:
    check_policies(config.activations)
    layout = program_layout(config)
    return layout, schedule_spec(config, num_microbatches(config.train, layout))


def program_layout(config: Config) -> Layout:
    """Who is where, with the model cut for the placement of the config's schedule. Raises
    ConfigError."""
    section = config.layout
    kind = config.schedule.kind
    # Before the placement is written out, whose length nothing has bounded yet.
    check_pieces(section, config.model, num_parts(kind, section.pp, section.vpp))
    stages = placement(kind, section.pp, section.vpp)
    return build_layout(section, config.cluster, config.model, config.train.seq_len, stages)


def schedule_spec(config: Config, microbatches: int) -> ScheduleSpec:
    """The schedule section with degrees filled in. Something is offloaded as soon as one policy
    says so.

    microbatches: those of one pipeline in a step. Raises ConfigError for what cannot be scheduled.
    """
    names = [field.name for field in dataclasses.fields(ScheduleConfig)]
    section = {name: getattr(config.schedule, name) for name in names}
    offload = config.activations.offloads
    with told_as_config(config.schedule):
        return ScheduleSpec(config.layout.pp, microbatches, vpp=config.layout.vpp, offload=offload, **section)
