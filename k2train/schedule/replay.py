"""A run of the action lists without times, under the rules of their channels.

Stages take turns, one compute step each in a round, as stages would advance whose
steps are equally long. The rules are those of NCCL's communicators (`channels.py`):

    compute   waits for its inputs: results of its own stage, and messages that have moved
    SEND      goes to the end of its communicator's queue on this stage; the stage goes on
    RECV      likewise
    a message moves when its SEND is at the head of the sender's queue and its RECV at the head of
        the receiver's

Each queue has one writer and one reader, so what a stage may do next, nobody can take away again.
Therefore all runs end alike, whatever the steps' lengths: a schedule that completes here completes
always, and one that stands still here always does.

How many messages of one ordered pair of stages were under way at once, at most, is counted on the
way. A run whose SEND waits for the oldest where that many are under way is this very run, so it
completes too.
"""

from __future__ import annotations

from collections import deque

from k2train.schedule.actions import COPIES, Action, Kind, Pair, Step
from k2train.schedule.channels import ChannelForm, message_ends
from k2train.schedule.program import Schedule

Queue = deque[tuple[int, bool, Action]]
"""What a stage has given to one communicator and what has not moved: (peer, whether it is a SEND,
the action)."""


class Replay:
    """Positions of all stages, what has been done, and what is under way."""

    def __init__(
        self, schedule: Schedule, has_messages: bool, form: ChannelForm, max_sends: int | None = None
    ) -> None:
        self.schedule, self.has_messages, self.form = schedule, has_messages, form
        self.position = [0] * schedule.num_stages
        self.ends = message_ends(schedule, form)
        ends = [end for kind_ends in self.ends.values() for end in kind_ends if end is not None]
        self.queues: dict[tuple[int, tuple[int, ...]], Queue] = {
            (end.stage, end.key): deque() for end in ends
        }
        self.sends: list[dict[int, int]] = [{} for _ in schedule.stages]
        """For each stage, by the other stage, the messages under way to it now."""
        self.peak_sends: list[dict[int, int]] = [{} for _ in schedule.stages]
        self._max_sends = max_sends
        width = schedule.num_microbatches
        self.width = width
        cells = schedule.num_virtual_stages * width
        # Forwards that are done; forwards and backwards whose input from another virtual stage is
        # there.
        self.forward_done = bytearray(cells)
        self.forward_ready, self.backward_ready = bytearray(cells), bytearray(cells)
        self._produced: list[tuple[bytearray, int]] = []
        for vs in range(schedule.num_virtual_stages):
            for around, ready in (
                (schedule.previous, self.forward_ready),
                (schedule.next, self.backward_ready),
            ):
                if around[vs] is None:
                    ready[vs * width : (vs + 1) * width] = b"\x01" * width

    @property
    def stuck(self) -> list[int]:
        """The stages that have not come to the end of their lists."""
        return [stage for stage, line in enumerate(self.schedule.stages) if self.position[stage] < len(line)]

    def run(self) -> None:
        """Give every stage its turn, again and again, until none can go on."""
        moved = True
        while moved:
            moved = False
            for stage in range(self.schedule.num_stages):
                if self._turn(stage):
                    moved = True
            # What a round has produced is seen in the next one, or a microbatch would pass all
            # stages in a single round.
            for ready, cell in self._produced:
                ready[cell] = 1
            self._produced.clear()

    def _turn(self, stage: int) -> bool:
        """Let a stage go on, up to its second compute step. Returns whether it went on."""
        line, start = self.schedule.stages[stage], self.position[stage]
        index, computed = start, False
        while index < len(line):
            step = line[index]
            if isinstance(step, Action) and step.kind in self.ends:
                if not self._post(step):
                    break
            elif not (isinstance(step, Action) and step.kind in COPIES):
                if computed or not self.ready(step):
                    break
                self._compute(step)
                computed = True
            index += 1
        self.position[stage] = index
        return index != start

    def ready(self, step: Step) -> bool:
        """Whether a compute step has its inputs."""
        if isinstance(step, Pair):
            return self.ready(step.forward) and self.ready(step.backward_input)
        kind, virtual_stage, microbatch = step
        if kind is Kind.W:
            return True
        cell = virtual_stage * self.width + microbatch
        if kind is Kind.F:
            return bool(self.forward_ready[cell])
        return bool(self.forward_done[cell] and self.backward_ready[cell])

    def _compute(self, step: Step) -> None:
        if isinstance(step, Pair):
            self._compute(step.forward)
            self._compute(step.backward_input)
            return
        kind, virtual_stage, microbatch = step
        if kind is Kind.F:
            self.forward_done[virtual_stage * self.width + microbatch] = 1
            target, send, ready = self.schedule.next[virtual_stage], Kind.SEND_F, self.forward_ready
        elif kind is not Kind.W:
            target, send, ready = self.schedule.previous[virtual_stage], Kind.SEND_B, self.backward_ready
        else:
            return
        by_message = self.has_messages and self.ends[send][virtual_stage] is not None
        if target is not None and not by_message:
            self._produced.append((ready, target * self.width + microbatch))

    def _post(self, action: Action) -> bool:
        """Queue a SEND or RECV and move what can move. Returns False where the SEND has to wait."""
        end = self.ends[action.kind][action.virtual_stage]
        assert end is not None, f"{action} has no other stage to go to or come from"
        if end.is_send:
            under_way = self.sends[end.stage].get(end.peer, 0)
            if under_way == self._max_sends:
                return False
            self.sends[end.stage][end.peer] = under_way + 1
            peaks = self.peak_sends[end.stage]
            peaks[end.peer] = max(peaks.get(end.peer, 0), under_way + 1)
        queue = self.queues[end.stage, end.key]
        queue.append((end.peer, end.is_send, action))
        if len(queue) == 1:
            self._move(end.stage, end.key)
        return True

    def _move(self, stage: int, key: tuple[int, ...]) -> None:
        """Move every message of a communicator that can move since `stage` has a new head in its
        queue."""
        changed = [stage]
        while changed:
            stage = changed.pop()
            mine = self.queues[stage, key]
            while mine:
                peer, is_send, action = mine[0]
                theirs = self.queues[peer, key]
                if not theirs or theirs[0][0] != stage or theirs[0][1] is is_send:
                    break
                mine.popleft()
                other = theirs.popleft()[2]
                self._arrive(other if is_send else action, stage if is_send else peer)
                changed.append(peer)

    def _arrive(self, receive: Action, source: int) -> None:
        kind, virtual_stage, microbatch = receive
        ready = self.forward_ready if kind is Kind.RECV_F else self.backward_ready
        self._produced.append((ready, virtual_stage * self.width + microbatch))
        self.sends[source][self.schedule.placement[virtual_stage]] -= 1
