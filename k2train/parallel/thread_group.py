"""What the ranks of a threads world share about one group: pending operations, checked and computed
when complete.

The n-th collective a rank starts in a group is matched with the n-th of every other; the last to
arrive checks that all fit and computes every output, in rank order. A misfit is a
CommunicationError that names both ranks, the group, the operations and the lines that started them.

Messages follow NCCL's rules, so that a run stands still here where it would over NCCL. What a rank
sends to and receives from one peer is one queue, or, where the world has one communicator for all,
what it sends and receives at all. A message moves when its two ends are at the heads of their
queues; nothing is buffered.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from k2train.parallel.communicator import CommunicationError, split_parts
from k2train.schedule.channels import ChannelForm

_HERE = os.path.dirname(os.path.abspath(__file__))


@dataclasses.dataclass(frozen=True)
class CallSite:
    """The line outside this package that started an operation."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@functools.cache
def _is_ours(file: str) -> bool:
    return os.path.dirname(file) == _HERE


def call_site() -> CallSite:
    """The innermost caller outside k2train.parallel."""
    frame = sys._getframe()
    while frame.f_back and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return CallSite(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


@dataclasses.dataclass(frozen=True)
class Call:
    """One rank's part in a collective. arguments: what must be equal on all ranks."""

    kind: str
    rank: int
    site: CallSite
    arguments: dict[str, Any]
    out: torch.Tensor
    t: torch.Tensor
    out_splits: tuple[int, ...] = ()
    in_splits: tuple[int, ...] = ()


class Operation:
    """A pending collective or message; `waiters` are global ranks."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = False
        self.calls: dict[int, Call] = {}
        self.waiters: list[int] = []


@dataclasses.dataclass(frozen=True)
class _End:
    """A send or a receive, one end of a message that has not moved. peer: the rank in the group at
    the other end."""

    is_send: bool
    peer: int
    tensor: torch.Tensor
    site: CallSite
    operation: Operation

    def __str__(self) -> str:
        return f"{self.operation.what}, {self.site}"


class GroupState:
    """Pending operations of one group. Only the rank that holds the baton may call it.

    count: how many groups its first member had made with it.
    """

    def __init__(self, name: str, ranks: Sequence[int], form: ChannelForm, count: int) -> None:
        self.name = name
        self.count = count
        self.ranks = tuple(ranks)
        self._one_queue = form is ChannelForm.ONE
        self._counts = [0] * len(self.ranks)
        self._pending: dict[int, Operation] = {}
        self._queues: dict[tuple[int, int | None], collections.deque[_End]] = collections.defaultdict(
            collections.deque
        )

    def arrive(self, call: Call) -> Operation:
        """Add a rank's call to the collective it belongs to; the last one completes it."""
        number = self._counts[call.rank]
        self._counts[call.rank] += 1
        operation = self._pending.setdefault(number, Operation(call.kind))
        if operation.calls:
            self._compare(next(iter(operation.calls.values())), call)
        operation.calls[call.rank] = call
        if len(operation.calls) == len(self.ranks):
            del self._pending[number]
            calls = [operation.calls[rank] for rank in range(len(self.ranks))]
            if call.kind == "all_to_all":
                self._check_splits(calls)
            with torch.no_grad():
                _COMPUTE[call.kind](calls)
            operation.done = True
            operation.calls = {}
        return operation

    def post(
        self, kind: str, rank: int, peer: int, tensor: torch.Tensor, site: CallSite
    ) -> tuple[Operation, list[Operation]]:
        """Queue a send from `rank` or a receive by it. Returns its operation, and those that are
        complete now."""
        is_send = kind == "send"
        direction = "to" if is_send else "from"
        operation = Operation(f"{kind} {direction} rank {self.ranks[peer]}")
        queue = self._queue(rank, peer)
        queue.append(_End(is_send, peer, tensor, site, operation))
        return operation, self._move(rank, peer) if len(queue) == 1 else []

    def _queue(self, rank: int, peer: int) -> collections.deque[_End]:
        """The queue of a rank's messages with a peer."""
        return self._queues[rank, None if self._one_queue else peer]

    def _move(self, rank: int, peer: int) -> list[Operation]:
        """Move every message that can move since `rank` has a new head in its queue for `peer`."""
        complete: list[Operation] = []
        changed = [(rank, peer)]
        while changed:
            rank, peer = changed.pop()
            mine = self._queue(rank, peer)
            while mine:
                head, theirs = mine[0], self._queue(mine[0].peer, rank)
                if not theirs or theirs[0].peer != rank or theirs[0].is_send is head.is_send:
                    break
                mine.popleft()
                other = theirs.popleft()
                self._copy(*((head, other) if head.is_send else (other, head)))
                complete += [head.operation, other.operation]
                changed.append((head.peer, rank))
        return complete

    def _copy(self, send: _End, recv: _End) -> None:
        if send.tensor.shape != recv.tensor.shape or send.tensor.dtype != recv.tensor.dtype:
            source, target = self.ranks[recv.peer], self.ranks[send.peer]
            raise self._error(
                f"rank {source} sends {form(send.tensor)}, rank {target} expects {form(recv.tensor)}",
                [(source, send.site), (target, recv.site)],
            )
        with torch.no_grad():
            recv.tensor.copy_(send.tensor)
        send.operation.done = recv.operation.done = True

    def describe(self, operation: Operation, rank: int, site: CallSite) -> str:
        """A line about a rank that waits for an operation."""
        missing = [self.ranks[r] for r in range(len(self.ranks)) if r not in operation.calls]
        absent = f"; not there: ranks {missing}" if operation.calls else ""
        behind = self._behind(operation)
        return f"{operation.what} of group {self.name} {_short(self.ranks)}, {site}{absent}{behind}"

    def _behind(self, operation: Operation) -> str:
        """What is ahead of a send or receive in its queue, or ahead of its other end in the
        peer's."""
        for (rank, _), queue in list(self._queues.items()):
            end = next((end for end in queue if end.operation is operation), None)
            if end is None:
                continue
            if queue[0] is not end:
                return f"; behind {queue[0]}"
            theirs = self._queue(end.peer, rank)
            if any(other.peer == rank and other.is_send is not end.is_send for other in theirs):
                return f"; its other end on rank {self.ranks[end.peer]} is behind {theirs[0]}"
        return ""

    def unfinished(self) -> list[str]:
        """Operations that were started and never completed."""
        lines = [
            f"{operation.what} of group {self.name} {_short(self.ranks)} by rank {self.ranks[call.rank]}, {call.site}"
            for operation in self._pending.values()
            for call in operation.calls.values()
        ]
        for queue in self._queues.values():
            lines += [f"{end.operation.what} in group {self.name}, {end.site}" for end in queue]
        return lines

    def refuse(self, call: Call, why: str) -> CommunicationError:
        """The error for a call that is wrong in itself."""
        return self._error(f"{call.kind}: {why}", [(self.ranks[call.rank], call.site)])

    def _compare(self, first: Call, call: Call) -> None:
        sites = [(self.ranks[first.rank], first.site), (self.ranks[call.rank], call.site)]
        if first.kind != call.kind:
            raise self._error(
                f"rank {self.ranks[first.rank]} calls {first.kind}, rank {self.ranks[call.rank]} calls {call.kind}",
                sites,
            )
        for name, value in first.arguments.items():
            if call.arguments[name] != value:
                raise self._error(
                    f"{call.kind} with {name} {value} on rank {self.ranks[first.rank]}, "
                    f"{call.arguments[name]} on rank {self.ranks[call.rank]}",
                    sites,
                )

    def _check_splits(self, calls: Sequence[Call]) -> None:
        for target, arriving in zip(
            calls, zip(*(call.in_splits for call in calls), strict=True), strict=True
        ):
            if arriving == target.out_splits:
                continue
            for source, sent, expected in zip(calls, arriving, target.out_splits, strict=True):
                if sent != expected:
                    ranks = self.ranks[source.rank], self.ranks[target.rank]
                    raise self._error(
                        f"all_to_all: rank {ranks[0]} sends {sent} entries to rank {ranks[1]}, which expects {expected}",
                        [(ranks[0], source.site), (ranks[1], target.site)],
                    )

    def _error(self, what: str, sites: Sequence[tuple[int, CallSite]]) -> CommunicationError:
        lines = "".join(f"\n  rank {rank} at {site}" for rank, site in sites)
        return CommunicationError(f"group {self.name} {_short(self.ranks)}: {what}{lines}")


def form(t: torch.Tensor) -> str:
    """Type and shape, for messages."""
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"


def _short(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"[{shown}, … {len(ranks)} ranks]" if len(ranks) > 8 else f"[{shown}]"


def _combine(tensors: Sequence[torch.Tensor], op: str) -> torch.Tensor:
    """Sum or maximum in rank order."""
    total = tensors[0].clone()
    for t in tensors[1:]:
        if op == "sum":
            total.add_(t)
        else:
            torch.maximum(total, t, out=total)
    return total


def _all_reduce(calls: Sequence[Call]) -> None:
    total = _combine([call.t for call in calls], calls[0].arguments["op"])
    for call in calls:
        call.out.copy_(total)


def _all_gather(calls: Sequence[Call]) -> None:
    for call in calls:
        parts = split_parts(call.out, call.out_splits)
        for part, source in zip(parts, calls, strict=True):
            if part.data_ptr() != source.t.data_ptr():
                part.copy_(source.t)


def _reduce_scatter(calls: Sequence[Call]) -> None:
    parts = [split_parts(call.t, call.in_splits) for call in calls]
    for call in calls:
        # The output may be this very part of the rank's own input, which nobody reads afterwards.
        call.out.copy_(_combine([parts[source][call.rank] for source in range(len(calls))], "sum"))


def _all_to_all(calls: Sequence[Call]) -> None:
    parts = [split_parts(call.t, call.in_splits) for call in calls]
    for call in calls:
        torch.cat([of_source[call.rank] for of_source in parts], out=call.out)


def _broadcast(calls: Sequence[Call]) -> None:
    root = calls[calls[0].arguments["root"]]
    for call in calls:
        if call is not root:
            call.out.copy_(root.t)


def _barrier(calls: Sequence[Call]) -> None:
    pass


_COMPUTE = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "barrier": _barrier,
}
