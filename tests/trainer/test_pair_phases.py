"""The plan's phases of a virtual stage are the model's, so that both issue a pair's phases in one
order."""

from __future__ import annotations

import pytest
import torch

from k2train.config.compose import load_config
from k2train.device.cpu import CpuDevice
from k2train.model.phase import CommunicationPhase
from k2train.parallel.communicator import World
from k2train.parallel.groups import build_groups
from k2train.parallel.threads import run_threads
from k2train.program import compile_program
from k2train.schedule.costs import Stream
from k2train.trainer.build import build_models


@pytest.mark.parametrize("vpp", [1, 2, 4])
def test_plan_and_model_have_the_same_phases_on_the_same_streams(words, vpp: int) -> None:
    """Embedding, a dense layer, MoE layers and the head, together and apart; backward is the
    forward in reverse."""
    config = load_config([*words, f"layout.vpp={vpp}", "layout.ep=2"])
    program = compile_program(config)
    layout, device = program.layout, CpuDevice(torch.device("cpu"))

    def phases_of(world: World) -> list[list[Stream]]:
        models = build_models(config, layout, build_groups(layout.grid, world, layout.relay_ranks), device)
        return [[stream_of(phase) for phase in model.phases] for model in models.values()]

    for streams in run_threads(2, phases_of):
        costs = program.costs.virtual_stages
        assert [[phase.stream for phase in one.forward] for one in costs] == streams
        # The look-up has no input gradient. It would be the last phase of its chain, so the order
        # of the others stands.
        streams[0].pop(0)
        assert [[phase.stream for phase in one.backward_input][::-1] for one in costs] == streams


def stream_of(phase: object) -> Stream:
    return Stream.EP if isinstance(phase, CommunicationPhase) else Stream.COMPUTE
