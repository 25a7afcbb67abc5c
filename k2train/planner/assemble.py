"""From a config to what the simulator needs: a layout, an action list, and the costs of its virtual stages.

The schedule decides where virtual stages stand (DualPipeV folds them into a V, DualPipe holds the model twice), so it
is built first, the model is cut to fit it, and every virtual stage is costed by the piece of the model it holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from k2train.config.schema import Config
from k2train.config.sections import ScheduleConfig
from k2train.estimate.activations import check_policies
from k2train.estimate.layer_costs import TimedPhase
from k2train.estimate.virtual_stage import Estimator, VirtualStageEstimate, build_estimator
from k2train.layout.build import build_layout, num_microbatches
from k2train.layout.layout import Layout, VirtualStage
from k2train.schedule.builders import build_schedule
from k2train.schedule.costs import Costs, Phase, Stream, VirtualStageCosts
from k2train.schedule.errors import told_as_config
from k2train.schedule.program import Schedule
from k2train.schedule.spec import ScheduleSpec


@dataclass(frozen=True)
class Assembly:
    """A layout, its schedule, and what every virtual stage of the schedule holds and costs."""

    layout: Layout
    schedule: Schedule
    estimator: Estimator
    pieces: tuple[VirtualStage, ...]
    """The piece of the model on each virtual stage of the schedule."""
    estimates: tuple[VirtualStageEstimate, ...]
    costs: Costs

    @property
    def copies(self) -> int:
        """How many times a pipeline holds every parameter: 2 in DualPipe, else 1."""
        return len(self.schedule.chains)

    def pieces_of(self, stage: int) -> list[VirtualStage]:
        """The pieces of the model on a stage."""
        return [self.pieces[virtual_stage] for virtual_stage in self.schedule.virtual_stages_of(stage)]


def assemble(config: Config) -> Assembly:
    """Build everything a step is simulated from. Raises ConfigError."""
    layout = build_layout(config.layout, config.cluster, config.model, config.train.seq_len)
    microbatches = num_microbatches(config.train, layout)
    schedule = build_schedule(schedule_spec(config, microbatches))
    layout = _fitted(config, layout, schedule)
    estimator = build_estimator(
        config.model, config.train, config.activations, layout, config.cluster, config.ops
    )
    pieces = tuple(layout.virtual_stages[part] for part in schedule.model_part)
    by_piece = {piece: estimator.virtual_stage(piece) for piece in set(pieces)}
    estimates = tuple(by_piece[piece] for piece in pieces)
    costs = Costs(
        tuple(virtual_stage_costs(estimate, config.schedule.split_weight_grad) for estimate in estimates)
    )
    return Assembly(layout, schedule, estimator, pieces, estimates, costs)


def check_layout(config: Config) -> None:
    """Raise ConfigError for what `assemble` would refuse, without building a schedule."""
    layout = build_layout(config.layout, config.cluster, config.model, config.train.seq_len)
    schedule_spec(config, num_microbatches(config.train, layout))
    check_policies(config.activations)


def schedule_spec(config: Config, microbatches: int) -> ScheduleSpec:
    """The schedule section with degrees filled in. Something is offloaded as soon as one policy says so."""
    section = {
        field.name: getattr(config.schedule, field.name) for field in dataclasses.fields(ScheduleConfig)
    }
    offload = config.activations.offloads
    with told_as_config(config.schedule):
        return ScheduleSpec(config.layout.pp, microbatches, vpp=config.layout.vpp, offload=offload, **section)


def _fitted(config: Config, layout: Layout, schedule: Schedule) -> Layout:
    """The model cut anew where the schedule places its virtual stages in another way than round the stages."""
    chain = schedule.chains[0]
    placement = tuple(schedule.placement[virtual_stage] for virtual_stage in chain)
    if placement == layout.placement:
        return layout
    section = dataclasses.replace(config.layout, layers_per_virtual_stage=None)
    return build_layout(section, config.cluster, config.model, config.train.seq_len, placement)


def virtual_stage_costs(estimate: VirtualStageEstimate, put_off: bool) -> VirtualStageCosts:
    """The estimate in the words of the schedule room. A stage without layers passes its input on in no time.

    put_off: whether weight gradients are.
    """
    return VirtualStageCosts(
        forward=_phases(estimate.forward),
        backward_input=_phases(estimate.backward_input),
        weight_grad_seconds=estimate.weight_grad_seconds,
        send_forward_seconds=estimate.message_seconds,
        send_backward_seconds=estimate.message_seconds,
        offload_seconds=estimate.offload_seconds,
        reload_seconds=estimate.offload_seconds,
        offload_bytes=estimate.offload_bytes,
        activation_bytes=estimate.device_bytes,
        forward_transient_bytes=estimate.forward_transient_bytes,
        backward_transient_bytes=estimate.put_off_transient_bytes
        if put_off
        else estimate.backward_transient_bytes,
        weight_queue_bytes=estimate.weight_queue_bytes,
    )


def _phases(timed: Sequence[TimedPhase]) -> tuple[Phase, ...]:
    phases = tuple(Phase(phase.name, Stream(phase.stream), phase.seconds) for phase in timed)
    return phases or (Phase("pass on", Stream.COMPUTE, 0.0),)
