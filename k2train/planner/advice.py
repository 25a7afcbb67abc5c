"""When a plan does not fit: which switch would make it fit.

Switches are tried alone and then together, those that cost least speed first, each by planning a
short step with it. The first that fits with room to spare is named. Nothing is changed for the
user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.planner.plan import Plan, build_plan
from k2train.program.program import MICROBATCHES_PER_STAGE

EXPOSED_WORTH_A_NOTE = 0.005
"""Share of the steady phase."""
ROOM = 0.05
"""Share of device and host that advice leaves free where it can: a plan is not exact to the last
byte."""
ACTIVATION_PRESETS = ("recompute", "recompute_fp8", "k2")
"""From the cheapest in time to the smallest on the device."""


@dataclass(frozen=True)
class Advice:
    """Overrides that make a plan fit, and what they bring it to.

    Bytes of the fullest device and node.
    """

    overrides: tuple[str, ...]
    device: int
    node: int


def problems(plan: Plan) -> list[str]:
    """What does not fit, a line each; empty where everything does."""
    lines = []
    full, host = plan.fullest, plan.fullest_host
    if not full.fits_device:
        lines.append(
            f"stage {full.stage} needs {full.device / 1e9:.1f} GB of {full.capacity / 1e9:.0f} GB on a device"
        )
    if not host.fits_host:
        lines.append(
            f"stage {host.stage} needs {host.node / 1e9:.0f} GB of {host.host_capacity / 1e9:.0f} GB on a host"
        )
    return lines


def advise(plan: Plan) -> Advice | None:
    """The first switch, or set of switches, that makes everything fit with room to spare.

    Where none leaves ROOM, the one that leaves most; None where none makes it fit.
    """
    tight: list[tuple[float, Advice]] = []
    for overrides, config in _candidates(_shorter(plan.config, plan)):
        try:
            tried = build_plan(config, check=False)
        except ConfigError:
            continue
        if tried.fits:
            advice = Advice(overrides, tried.fullest.device, tried.fullest_host.node)
            if room(tried) >= ROOM:
                return advice
            tight.append((room(tried), advice))
    return max(tight, key=lambda pair: pair[0])[1] if tight else None


def room(plan: Plan) -> float:
    """Free share of the fullest device or of the fullest host, whichever is smaller."""
    device, host = plan.fullest, plan.fullest_host
    return min(1 - device.device / device.capacity, 1 - host.node / host.host_capacity)


_Change = tuple[tuple[str, ...], Config]


def _candidates(config: Config) -> Iterator[_Change]:
    """Changed configs: optimizer states elsewhere, then activation policies, then smaller
    microbatches, then mixtures."""
    states: Literal["host", "device"] = "host" if config.optim.states == "device" else "device"
    elsewhere = dataclasses.replace(config.optim, states=states)
    moved = (f"optim.states={states}",), dataclasses.replace(config, optim=elsewhere)
    policies = [_with_activations(config, name) for name in ACTIVATION_PRESETS]
    policies = [change for change in policies if change[1].activations != config.activations]
    yield moved
    yield from policies
    for names, changed in policies:
        yield (*names, *moved[0]), dataclasses.replace(changed, optim=elsewhere)
    if config.train.microbatch_size > 1:
        train = dataclasses.replace(config.train, microbatch_size=1)
        single = dataclasses.replace(config, train=train)
        yield ("train.microbatch_size=1",), single
        for names, changed in policies:
            yield (*names, "train.microbatch_size=1"), dataclasses.replace(changed, train=train)


def _with_activations(config: Config, name: str) -> _Change:
    override = f"activations={name}"
    return (override,), dataclasses.replace(config, activations=load_config([override]).activations)


def _shorter(config: Config, plan: Plan) -> Config:
    """A global batch just long enough for the step to reach its peaks."""
    layout = plan.program.layout
    num = min(plan.program.schedule.num_microbatches, MICROBATCHES_PER_STAGE * layout.pp)
    tokens = config.train.seq_len * config.train.microbatch_size * layout.dp * num
    return dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch_tokens=tokens))


def all_to_all_note(plan: Plan) -> str | None:
    """Where the steady phase waits for the all-to-all: how much, and what sending a token once
    per node would leave."""
    exposed = steady_ep_share(plan)
    layout = plan.config.layout
    gpus = plan.config.cluster.gpus_per_node
    crosses_evenly = layout.ep > gpus and layout.ep % gpus == 0
    if exposed < EXPOSED_WORTH_A_NOTE or layout.dispatch == "per_node" or not crosses_evenly:
        return None
    other = dataclasses.replace(layout, dispatch="per_node")
    tried = build_plan(dataclasses.replace(_shorter(plan.config, plan), layout=other), check=False)
    return (
        f"The all-to-all is not fully hidden: the steady phase waits for it {100 * exposed:.1f} % of its time. With "
        f"layout.dispatch=per_node, where a token crosses to a node once, that would be {100 * steady_ep_share(tried):.1f} %."
    )


def steady_ep_share(plan: Plan) -> float:
    """Share of the steady phase that the busiest stage waits for the all-to-all."""
    start, end = plan.simulation.steady_window
    return plan.busiest.steady.ep / (end - start) if end > start else 0.0
