"""The validator's last check: does the schedule run to its end, and if not, who waits for whom.

Every stage is advanced as far as it can go; a step runs when what it needs has been sent to it or done on its own stage.
Sends and receives never block (`p2p.py`). A stage that stands still waits for exactly one action of one stage, so
following the waits from any stage ends in a cycle, and the cycle is the error.
"""

from __future__ import annotations

from k2train.schedule.actions import BACKWARDS, Action, Kind, Pair, Step, parts
from k2train.schedule.errors import ScheduleError
from k2train.schedule.program import Schedule


def check_progress(schedule: Schedule, has_messages: bool) -> None:
    """Run the lists without times. Raises ScheduleError with the cycle where they stand still."""
    run = _Run(schedule, has_messages)
    run.advance()
    stuck = [stage for stage, line in enumerate(schedule.stages) if run.position[stage] < len(line)]
    if stuck:
        raise ScheduleError(
            f"deadlock: {len(stuck)} of {schedule.num_stages} stages stand still, {run.remaining()} steps are left",
            run.cycle(stuck[0]),
        )


_PASSIVE = frozenset({Kind.W, Kind.RECV_F, Kind.RECV_B, Kind.OFFLOAD, Kind.RELOAD})
"""Kinds that wait for nothing of another stage and that nobody else waits for."""


class _Run:
    """Positions of all stages and what has been done."""

    def __init__(self, schedule: Schedule, has_messages: bool) -> None:
        self.schedule = schedule
        self.position = [0] * schedule.num_stages
        self._has_messages = has_messages
        cells = schedule.num_virtual_stages * schedule.num_microbatches
        # Done on its stage, and visible to the neighbour: by its SEND, or at once where there are no messages.
        self._forward, self._forward_sent = bytearray(cells), bytearray(cells)
        self._backward, self._backward_sent = bytearray(cells), bytearray(cells)

    def advance(self) -> None:
        """Advance every stage until none can go on."""
        waiting = list(range(self.schedule.num_stages))
        while waiting:
            stage = waiting.pop()
            for woken in self._advance_stage(stage):
                if woken not in waiting:
                    waiting.append(woken)

    def _advance_stage(self, stage: int) -> set[int]:
        line = self.schedule.stages[stage]
        place = self.schedule.placement
        woken: set[int] = set()
        index = self.position[stage]
        while index < len(line):
            step = line[index]
            if isinstance(step, Action) and step.kind in _PASSIVE:
                index += 1
                continue
            if self.blocker(stage, step) is not None:
                break
            for action in parts(step):
                target = self._mark(action)
                if target is not None and place[target] != stage:
                    woken.add(place[target])
            index += 1
        self.position[stage] = index
        return woken

    def _mark(self, action: Action) -> int | None:
        """Record an action; returns the virtual stage that may now go on."""
        kind, virtual_stage, microbatch = action
        cell = virtual_stage * self.schedule.num_microbatches + microbatch
        if kind is Kind.F:
            self._forward[cell] = 1
        elif kind is Kind.I or kind is Kind.B:
            self._backward[cell] = 1
        visible = not self._has_messages
        if kind is Kind.SEND_F or (visible and kind is Kind.F):
            self._forward_sent[cell] = 1
            return self.schedule.next[virtual_stage]
        if kind is Kind.SEND_B or (visible and kind in BACKWARDS):
            self._backward_sent[cell] = 1
            return self.schedule.previous[virtual_stage]
        return None

    def blocker(self, stage: int, step: Step) -> Action | None:
        """The compute or SEND action this step waits for, None where it can run."""
        for action in parts(step):
            needed = self._needed(stage, action)
            if needed is not None:
                return needed
        return None

    def _needed(self, stage: int, action: Action) -> Action | None:
        kind, virtual_stage, microbatch = action
        width = self.schedule.num_microbatches
        if kind is Kind.F:
            source, own, sent, send = (
                self.schedule.previous[virtual_stage],
                self._forward,
                self._forward_sent,
                Kind.SEND_F,
            )
        elif kind is Kind.I or kind is Kind.B:
            if not self._forward[virtual_stage * width + microbatch]:
                return Action(Kind.F, virtual_stage, microbatch)
            source, own, sent, send = (
                self.schedule.next[virtual_stage],
                self._backward,
                self._backward_sent,
                Kind.SEND_B,
            )
        else:
            return None
        if source is None:
            return None
        local = self.schedule.placement[source] == stage
        if (own if local else sent)[source * width + microbatch]:
            return None
        if self._has_messages and not local:
            return Action(send, source, microbatch)
        return Action(Kind.F if kind is Kind.F else Kind.I, source, microbatch)

    def remaining(self) -> int:
        return sum(len(line) - at for line, at in zip(self.schedule.stages, self.position, strict=True))

    def cycle(self, stage: int) -> list[str]:
        """The waits from a stage that stands still, cut down to the cycle they end in."""
        path: list[int] = []
        while stage not in path:
            path.append(stage)
            stage = self.schedule.placement[self._wait(stage).virtual_stage]
        return [self._describe(member) for member in path[path.index(stage) :]]

    def _wait(self, stage: int) -> Action:
        needed = self.blocker(stage, self.schedule.stages[stage][self.position[stage]])
        assert needed is not None
        return needed

    def _describe(self, stage: int) -> str:
        step = self.schedule.stages[stage][self.position[stage]]
        needed = self._wait(stage)
        other = self.schedule.placement[needed.virtual_stage]
        if other != stage:
            where = (
                f"which stage {other} reaches only after {self.schedule.stages[other][self.position[other]]}"
            )
        elif isinstance(step, Pair) and needed in step:
            where = "which runs in the same pair"
        else:
            where = "which stands later in the same list"
        return f"stage {stage} stands at {step} and waits for {needed}, {where}"
