"""`Schedule`: one action list per pipeline stage, with what is needed to read it, and its file
form.

A microbatch passes through a **chain** of virtual stages, first to last. Most schedules have one
chain that every microbatch takes. DualPipe has two, over separate copies of the parameters: one
enters at stage 0, the other at the last stage. With n chains the microbatches are cut into n equal
contiguous runs, one for each chain.

    interleaved, pp 2, vpp 2     placement 0 1 0 1            chain 0 1 2 3
    V shape, pp 2                placement 0 1 1 0            chain 0 1 2 3
    DualPipe, pp 2               placement 0 1 1 0            chains 0 1 | 2 3

Source: docs/design.md, "Schedule"; the V shape and the two directions are those of DeepSeek's
DualPipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from k2train.schedule.actions import Kind, Step, format_line, parse_line, parts


@dataclass(frozen=True)
class Schedule:
    """Who does what, in which order."""

    name: str
    num_microbatches: int
    placement: tuple[int, ...]
    """The stage of every virtual stage."""
    chains: tuple[tuple[int, ...], ...]
    """The virtual stages a microbatch passes through, for each chain; every virtual stage is in
    exactly one."""
    stages: tuple[tuple[Step, ...], ...]
    """The action list of every stage."""

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def num_virtual_stages(self) -> int:
        return len(self.placement)

    @cached_property
    def previous(self) -> tuple[int | None, ...]:
        """The virtual stage before each virtual stage in its chain, None for the first of a
        chain."""
        before: list[int | None] = [None] * self.num_virtual_stages
        for chain in self.chains:
            for left, right in pairwise(chain):
                before[right] = left
        return tuple(before)

    @cached_property
    def next(self) -> tuple[int | None, ...]:
        """The virtual stage after each virtual stage in its chain, None for the last of a chain."""
        after: list[int | None] = [None] * self.num_virtual_stages
        for chain in self.chains:
            for left, right in pairwise(chain):
                after[left] = right
        return tuple(after)

    @cached_property
    def model_part(self) -> tuple[int, ...]:
        """Which part of the model each virtual stage holds: its place in its chain. Two chains are
        two copies."""
        place = [0] * self.num_virtual_stages
        for chain in self.chains:
            for index, virtual_stage in enumerate(chain):
                place[virtual_stage] = index
        return tuple(place)

    def chain_of(self, microbatch: int) -> int:
        """The chain a microbatch takes."""
        return microbatch * len(self.chains) // self.num_microbatches

    def microbatches_of(self, chain: int) -> range:
        """The microbatches that take a chain."""
        count, num_chains = self.num_microbatches, len(self.chains)
        first = -(-chain * count // num_chains)
        return range(first, -(-(chain + 1) * count // num_chains))

    def virtual_stages_of(self, stage: int) -> tuple[int, ...]:
        """The virtual stages that live on a stage, in ascending order."""
        return tuple(vs for vs, where in enumerate(self.placement) if where == stage)

    @cached_property
    def kinds(self) -> frozenset[Kind]:
        """Every kind of action that occurs."""
        pairs = {type(step) for line in self.stages for step in line if type(step) is tuple}
        assert not pairs, "a step is an Action or a Pair, never a bare tuple"
        return frozenset(action.kind for line in self.stages for step in line for action in parts(step))

    def to_text(self) -> str:
        """The file form; `parse_schedule` reads it back."""
        head = [
            f"schedule {self.name}",
            f"microbatches {self.num_microbatches}",
            "placement " + " ".join(map(str, self.placement)),
            *("chain " + " ".join(map(str, chain)) for chain in self.chains),
        ]
        body = [f"stage {stage}: {format_line(line)}" for stage, line in enumerate(self.stages)]
        return "\n".join([*head, *body]) + "\n"


def parse_schedule(text: str) -> Schedule:
    """A schedule from its file form. Blank lines and lines that begin with # are skipped. Raises
    ValueError."""
    single: dict[str, str] = {}
    chains: list[tuple[int, ...]] = []
    stages: list[tuple[Step, ...]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        word, _, rest = line.strip().partition(" ")
        if not word or word.startswith("#"):
            continue
        if word == "chain":
            chains.append(_ints(rest))
        elif word == "stage":
            stages.append(_stage_line(rest, len(stages), number))
        elif word in ("schedule", "microbatches", "placement") and word not in single:
            single[word] = rest.strip()
        else:
            raise ValueError(f"line {number}: unexpected {word!r}")
    missing = {"schedule", "microbatches", "placement"} - single.keys()
    if missing or not chains or not stages:
        raise ValueError(f"not a schedule file: no {', '.join(sorted(missing)) or 'chain or stage'} line")
    return Schedule(
        single["schedule"],
        int(single["microbatches"]),
        _ints(single["placement"]),
        tuple(chains),
        tuple(stages),
    )


def _stage_line(rest: str, expected: int, number: int) -> tuple[Step, ...]:
    head, colon, line = rest.partition(":")
    if not colon or head.strip() != str(expected):
        raise ValueError(f"line {number}: expected 'stage {expected}: ...'")
    try:
        return parse_line(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())
