"""Specs that the schedule tests enumerate, and costs they share, handed to tests as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from k2train.config.errors import ConfigError
from k2train.schedule import Costs, Phase, ScheduleSpec, Stream, VirtualStageCosts
from k2train.schedule.spec import INTERLEAVED, KINDS

MAX_PP, MAX_VPP, MAX_MICROBATCHES = 8, 4, 24


def _specs(
    kind: str, microbatches: range = range(1, MAX_MICROBATCHES + 1), **switches: Any
) -> Iterator[ScheduleSpec]:
    """Every legal spec of a kind with pp to 8 and vpp to 4."""
    assert kind in KINDS
    for pp in range(1, MAX_PP + 1):
        for vpp in range(1, MAX_VPP + 1) if kind in INTERLEAVED else (1,):
            for num_microbatches in microbatches:
                try:
                    yield ScheduleSpec.preset(kind, pp, num_microbatches, vpp, **switches)
                except ConfigError:
                    assert kind in ("dualpipe", "dualpipe_v")


def _moe_costs(
    num_virtual_stages: int,
    layers: int = 1,
    attention: float = 3.0,
    experts: float = 5.0,
    all_to_all: float = 1.5,
    weight_grad: float = 6.0,
    hop: float = 1.0,
    copy: float = 2.0,
) -> Costs:
    """MoE layers whose all-to-alls are shorter than the compute of the other half of a pair."""
    forward = (
        Phase("attention", Stream.COMPUTE, attention),
        Phase("dispatch", Stream.EP, all_to_all),
        Phase("experts", Stream.COMPUTE, experts),
        Phase("combine", Stream.EP, all_to_all),
    )
    backward = (
        Phase("combine", Stream.EP, all_to_all),
        Phase("experts", Stream.COMPUTE, 1.2 * experts),
        Phase("dispatch", Stream.EP, all_to_all),
        Phase("attention", Stream.COMPUTE, 1.2 * attention),
    )
    one = VirtualStageCosts(
        forward * layers,
        backward * layers,
        weight_grad * layers,
        send_forward_seconds=hop,
        send_backward_seconds=hop,
        offload_seconds=copy * layers,
        reload_seconds=copy * layers,
        offload_bytes=100 * layers,
        activation_bytes=10 * layers,
        forward_transient_bytes=3,
        backward_transient_bytes=5,
        weight_queue_bytes=20 * layers,
    )
    return Costs((one,) * num_virtual_stages)


@pytest.fixture(scope="session")
def specs() -> Callable[..., Iterator[ScheduleSpec]]:
    """`specs(kind, microbatches=range(1, 25), **switches)`: every legal spec of a kind."""
    return _specs


@pytest.fixture(scope="session")
def moe_costs() -> Callable[..., Costs]:
    """`moe_costs(num_virtual_stages, layers=1, ...)`: costs with all-to-alls that fit under
    compute."""
    return _moe_costs
