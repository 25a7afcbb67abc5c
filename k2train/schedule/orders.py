"""Base orders of forwards and full backwards: GPipe, 1F1B and interleaved 1F1B.

Each stage has a fixed order of forwards, a fixed order of backwards, and a number of forwards it
runs before the first backward (its warm-up); after that they alternate. In interleaved 1F1B a stage
takes microbatches in groups: a group goes through its first virtual stage, then its second, and so
on, backwards in the opposite order. A microbatch comes back to a stage for its next virtual stage
pp slots later, so a group of at least pp microbatches never waits for itself.

Microbatches that are not a multiple of pp are spread over groups of pp or slightly more. Fewer than
pp are treated as a group of pp whose missing members are then struck out: what is struck out
belongs to microbatches that nothing else depends on, so a valid order stays valid.

Sources: Narayanan et al., "Efficient large-scale language model training on GPU clusters using
Megatron-LM" (arXiv 2104.04473); Huang et al., GPipe (arXiv 1811.06965).
"""

from __future__ import annotations

from collections.abc import Sequence

from k2train.layout.placement import looped
from k2train.schedule.actions import Action, Kind, Step
from k2train.schedule.program import Schedule


def microbatch_groups(num_microbatches: int, pp: int) -> tuple[int, ...]:
    """Sizes of the groups, larger ones first: as many as fit with at least pp in each, or a single
    one."""
    count = max(1, num_microbatches // pp)
    size, larger = divmod(num_microbatches, count)
    return (size + 1,) * larger + (size,) * (count - larger)


def interleaved_warmup(pp: int, vpp: int, stage: int, group: int, stride: int) -> int:
    """Forwards a stage runs before its first forward-backward slot.

    group: the largest group of microbatches. stride: how many more the stage before runs; 2 where a
    slot's forward and backward go to the neighbours together (interleaving, pairs), 1 in plain
    1F1B.
    """
    return stride * (pp - 1 - stage) + (vpp - 1) * group


def gpipe(pp: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards."""
    forwards = [(0, microbatch) for microbatch in range(num_microbatches)]
    lines = [_line(pp, stage, forwards, forwards, num_microbatches) for stage in range(pp)]
    return _looped("gpipe", pp, 1, num_microbatches, lines)


def one_f_one_b(pp: int, num_microbatches: int) -> Schedule:
    """1F1B: warm-up of pp - 1 - stage forwards, then forward and backward in turn."""
    return interleaved("1f1b", pp, 1, num_microbatches, stride=1)


def interleaved(name: str, pp: int, vpp: int, num_microbatches: int, stride: int = 2) -> Schedule:
    """Interleaved 1F1B for any number of microbatches of at least pp; see `build_schedule` for
    fewer."""
    groups = microbatch_groups(num_microbatches, pp)
    forwards = _grouped(groups, range(vpp))
    backwards = _grouped(groups, range(vpp - 1, -1, -1))
    warmups = [interleaved_warmup(pp, vpp, stage, groups[0], stride) for stage in range(pp)]
    lines = [_line(pp, stage, forwards, backwards, warmups[stage]) for stage in range(pp)]
    return _looped(name, pp, vpp, num_microbatches, lines)


def _grouped(groups: Sequence[int], chunks: range) -> list[tuple[int, int]]:
    """(place of the virtual stage on its stage, microbatch) in the order a stage takes them."""
    order = []
    first = 0
    for size in groups:
        order += [(chunk, microbatch) for chunk in chunks for microbatch in range(first, first + size)]
        first += size
    return order


def _line(
    pp: int,
    stage: int,
    forwards: Sequence[tuple[int, int]],
    backwards: Sequence[tuple[int, int]],
    warmup: int,
) -> list[Step]:
    """Warm-up forwards, then forward and backward in turn, then the remaining backwards."""
    ahead = [Action(Kind.F, chunk * pp + stage, microbatch) for chunk, microbatch in forwards]
    back = [Action(Kind.B, chunk * pp + stage, microbatch) for chunk, microbatch in backwards]
    warmup = min(warmup, len(ahead))
    steady = len(ahead) - warmup
    line: list[Step] = list(ahead[:warmup])
    for forward, backward in zip(ahead[warmup:], back[:steady], strict=True):
        line += (forward, backward)
    return line + list(back[steady:])


def _looped(name: str, pp: int, vpp: int, num_microbatches: int, lines: Sequence[Sequence[Step]]) -> Schedule:
    """Virtual stage v on stage v % pp, one chain through all of them."""
    chain = tuple(range(pp * vpp))
    return Schedule(name, num_microbatches, looped(pp, vpp), (chain,), tuple(map(tuple, lines)))
