"""One simulated rank: its streams, its place in its list, its waits and its memory."""

from __future__ import annotations

from collections.abc import Callable

from k2train.schedule.actions import Action, Kind, Pair, Step, parts
from k2train.schedule.sim_shared import UNKNOWN, Level, Shared
from k2train.schedule.simulation import Event, StageTimes, StepRecord, Waits

_EP, _PP, _COPY, _BUBBLE = range(4)


class Rank:
    """Advances one stage's list as far as its messages allow."""

    def __init__(self, stage: int, shared: Shared) -> None:
        self.stage = stage
        self._shared = shared
        self._schedule = shared.schedule
        self._width = shared.schedule.num_microbatches
        self._line = shared.schedule.stages[stage]
        self._index = 0
        self._compute_free = self._ep_free = self._out_free = self._in_free = 0.0
        self._last_start = 0.0  # of the compute step before
        self._offloaded: dict[int, float] = {}
        self._reloaded: dict[int, float] = {}
        self._busy = 0.0
        self._waits: list[tuple[float, float, int]] = []  # start, end, what for
        self.device, self.host = Level(), Level()
        self.records: list[StepRecord] = []
        self._others: dict[Kind, Callable[[Action], None]] = {
            Kind.SEND_F: self._send_forward,
            Kind.SEND_B: self._send_backward,
            Kind.RECV_F: self._post_forward,
            Kind.RECV_B: self._post_backward,
            Kind.OFFLOAD: self._offload,
            Kind.RELOAD: self._reload,
        }

    @property
    def finished(self) -> bool:
        return self._index == len(self._line)

    @property
    def end(self) -> float:
        """When the last stream falls silent."""
        return max(self._compute_free, self._ep_free, self._out_free)

    def advance(self) -> None:
        """Run steps until the end or until an input has not been sent."""
        line, others = self._line, self._others
        while self._index < len(line):
            step = line[self._index]
            act = None if isinstance(step, Pair) else others.get(step.kind)
            if act is not None:
                act(step)  # type: ignore[arg-type]  # a Pair never has a handler
            elif not self._compute(step):
                return
            self._index += 1

    def _compute(self, step: Step) -> bool:
        """Run a compute step; False where an input is not known yet."""
        until = [0.0, 0.0, 0.0, 0.0]  # when each kind of wait would end, by itself
        for action in parts(step):
            if not self._inputs(action, until):
                return False
        # A backward's first all-to-all need not wait until the step before has left the compute
        # stream.
        early = self._last_start if self._shared.starts_on_ep(step) else self._compute_free
        start = max(early, *until)
        if start > self._compute_free:
            self._attribute(start, until)
        layout = self._shared.layout(step, self._compute_free - start, self._ep_free - start)
        if layout.exposed_ep:
            free = max(start, self._compute_free)
            self._waits.append((free, free + layout.exposed_ep, _EP))
        self._busy += layout.busy
        self._last_start = max(start, self._compute_free)
        self._compute_free = max(self._compute_free, start + layout.compute_end)
        self._ep_free = max(self._ep_free, start + layout.ep_end)
        for action, began, done in zip(parts(step), layout.began, layout.done, strict=True):
            self._finish(action, start + began, start + done)
        if self._shared.record:
            self.records.append(StepRecord(step, start, layout))
        return True

    def _inputs(self, action: Action, until: list[float]) -> bool:
        """Raise `until` by what an action waits for; False where that is not known yet."""
        kind, virtual_stage, microbatch = action
        if kind is Kind.W:
            return True
        shared, schedule, width = self._shared, self._schedule, self._width
        cell = virtual_stage * width + microbatch
        if kind is Kind.F:
            source, mailbox, done = schedule.previous[virtual_stage], shared.activations, shared.forward_done
        else:
            source, mailbox, done = schedule.next[virtual_stage], shared.gradients, shared.backward_done
            if shared.forward_done[cell] == UNKNOWN:
                return False
            until[_EP] = max(until[_EP], shared.forward_done[cell])
            until[_COPY] = max(until[_COPY], self._reloaded.get(cell, 0.0))
        if source is None:
            return True
        if schedule.placement[source] == self.stage:
            produced = done[source * width + microbatch]
            until[_EP] = max(until[_EP], produced)
            return produced != UNKNOWN
        arrived = mailbox.arrived[cell]
        # Of two messages, the later one decides what is bubble and what is transfer.
        if arrived > until[_PP]:
            until[_PP], until[_BUBBLE] = arrived, mailbox.sent[cell]
        return arrived != UNKNOWN

    def _attribute(self, start: float, until: list[float]) -> None:
        """Divide the wait before a step: until its input is produced, under way, copied back, and
        the rest."""
        cursor = self._compute_free
        for kind in (_BUBBLE, _PP, _COPY):
            if until[kind] > cursor:
                self._waits.append((cursor, until[kind], kind))
                cursor = until[kind]
        if start > cursor:
            self._waits.append((cursor, start, _EP))

    def _finish(self, action: Action, start: float, done: float) -> None:
        """Note when a result is ready, and what memory it takes and frees."""
        kind, virtual_stage, microbatch = action
        costs = self._shared.costs[virtual_stage]
        cell = virtual_stage * self._width + microbatch
        saved = costs.activation_bytes + costs.offload_bytes
        # The allocator goes by the order of issue: what the compute step before it needed is free
        # for this one, also where this one's first all-to-all begins under it.
        taken = max(start, self._last_start)
        if kind is Kind.F:
            self._shared.forward_start[cell] = start
            self._shared.forward_done[cell] = done
            self.device.add(taken, saved + costs.forward_transient_bytes)
            self.device.add(done, -costs.forward_transient_bytes)
        elif kind is Kind.W:
            self.device.add(done, -costs.weight_queue_bytes)
        else:
            self._shared.backward_done[cell] = done
            queued = costs.weight_queue_bytes if kind is Kind.I else 0
            self.device.add(taken, costs.backward_transient_bytes)
            self.device.add(done, queued - saved - costs.backward_transient_bytes)

    def _send_forward(self, action: Action) -> None:
        shared = self._shared
        target = self._schedule.next[action.virtual_stage]
        assert target is not None
        done = shared.forward_done[action.virtual_stage * self._width + action.microbatch]
        shared.activations.sent[target * self._width + action.microbatch] = done
        shared.deliver(shared.activations, Kind.SEND_F, action.virtual_stage, target, action.microbatch)

    def _send_backward(self, action: Action) -> None:
        shared = self._shared
        target = self._schedule.previous[action.virtual_stage]
        assert target is not None
        done = shared.backward_done[action.virtual_stage * self._width + action.microbatch]
        shared.gradients.sent[target * self._width + action.microbatch] = done
        shared.deliver(shared.gradients, Kind.SEND_B, action.virtual_stage, target, action.microbatch)

    def _post_forward(self, action: Action) -> None:
        shared = self._shared
        source = self._schedule.previous[action.virtual_stage]
        assert source is not None
        shared.activations.posted[action.virtual_stage * self._width + action.microbatch] = self._compute_free
        shared.deliver(shared.activations, Kind.SEND_F, source, action.virtual_stage, action.microbatch)

    def _post_backward(self, action: Action) -> None:
        shared = self._shared
        source = self._schedule.next[action.virtual_stage]
        assert source is not None
        shared.gradients.posted[action.virtual_stage * self._width + action.microbatch] = self._compute_free
        shared.deliver(shared.gradients, Kind.SEND_B, source, action.virtual_stage, action.microbatch)

    def _offload(self, action: Action) -> None:
        costs = self._shared.costs[action.virtual_stage]
        cell = action.virtual_stage * self._width + action.microbatch
        start = max(self._out_free, self._shared.forward_done[cell])
        end = self._out_free = self._offloaded[cell] = start + costs.offload_seconds
        self.host.add(start, costs.offload_bytes)
        self.device.add(end, -costs.offload_bytes)
        self._record("d2h", action, start, end)

    def _reload(self, action: Action) -> None:
        costs = self._shared.costs[action.virtual_stage]
        cell = action.virtual_stage * self._width + action.microbatch
        start = max(self._in_free, self._compute_free, self._offloaded[cell])
        end = self._in_free = self._reloaded[cell] = start + costs.reload_seconds
        self.device.add(start, costs.offload_bytes)
        self.host.add(end, -costs.offload_bytes)
        self._record("h2d", action, start, end)

    def _record(self, stream: str, action: Action, start: float, end: float) -> None:
        if self._shared.record:
            self._shared.events.append(Event(self.stage, stream, action.kind.value, action, start, end))

    def times(self, makespan: float, steady: tuple[float, float]) -> StageTimes:
        """The account of the step, cut at the bounds of the steady phase. What is left after the
        last compute step counts as bubble."""
        bounds = (0.0, *steady, makespan)
        regions = [[0.0] * 4 for _ in range(3)]
        for start, end, kind in (*self._waits, (self._compute_free, makespan, _BUBBLE)):
            for region in range(3):
                inside = min(end, bounds[region + 1]) - max(start, bounds[region])
                if inside > 0.0:
                    regions[region][kind] += inside
        return StageTimes(self._busy, *(Waits(*region) for region in regions))
