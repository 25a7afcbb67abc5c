"""How the phases of one step lie on the compute stream and the expert-parallel channel.

A forward or a backward alone runs its phases one after another. A pair has two such chains and two
streams. Its phases are issued one of each chain in turn, the forward first (`pair_order`), here and
by the runtime alike; each stream runs what it was given in the order it was given, as soon as its
input is there. With one layer on each side that is the report's Figure 7:

    compute   F attention | I experts  | F experts | I attention
    ep        I combine   | F dispatch | I dispatch| F combine

The order follows from the number of phases alone, so no measurement or estimate can make two ranks,
or plan and run, disagree. docs/schedule.md compares it with choosing by readiness. Source: Kimi K2
report, Figure 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from k2train.schedule.costs import Phase, Stream


class Span(NamedTuple):
    """One phase of a step; times are offsets from the start of the step."""

    chain: int
    """0, or 1 for the backward of a pair."""
    phase: Phase
    start: float
    end: float


class Overlap(NamedTuple):
    """The timing of one step from the moment it starts."""

    began: tuple[float, ...]
    """When each chain has started its first phase."""
    done: tuple[float, ...]
    """When each chain has finished its last phase."""
    compute_start: float
    """When the first compute phase starts."""
    compute_end: float
    """When the compute stream is free for the next step."""
    ep_end: float
    """When the expert-parallel channel is free."""
    busy: float
    """Seconds of compute."""
    exposed_ep: float
    """Seconds the compute stream stands still from when it is free until `compute_end`."""
    spans: tuple[Span, ...]


def pair_order(num_forward: int, num_backward: int) -> tuple[int, ...]:
    """The order in which the phases of a pair are issued: the chain of each, 0 for the forward, 1
    for the backward.

    One of each in turn, the forward first; what the longer chain has more comes at the end.
    """
    together = min(num_forward, num_backward)
    return (0, 1) * together + (0,) * (num_forward - together) + (1,) * (num_backward - together)


def overlap(chains: Sequence[Sequence[Phase]], compute_free: float = 0.0, ep_free: float = 0.0) -> Overlap:
    """Lay out one chain, or the two of a pair. compute_free, ep_free: when the streams are free, as
    offsets."""
    free = {Stream.COMPUTE: compute_free, Stream.EP: ep_free}
    ready = [0.0] * len(chains)
    phases = [iter(chain) for chain in chains]
    busy = 0.0
    spans = []
    for c in (0,) * len(chains[0]) if len(chains) == 1 else pair_order(*map(len, chains)):
        phase = next(phases[c])
        start = max(ready[c], free[phase.stream])
        ready[c] = free[phase.stream] = start + phase.seconds
        busy += phase.seconds if phase.stream is Stream.COMPUTE else 0.0
        spans.append(Span(c, phase, start, ready[c]))
    compute_end = free[Stream.COMPUTE]
    exposed = max(0.0, compute_end - compute_free - busy)
    began = tuple(
        min((span.start for span in spans if span.chain == c), default=0.0) for c in range(len(chains))
    )
    starts = (span.start for span in spans if span.phase.stream is Stream.COMPUTE)
    first = min(starts, default=compute_free)
    return Overlap(began, tuple(ready), first, compute_end, free[Stream.EP], busy, exposed, tuple(spans))
