"""Ranks as threads of one process: any layout on one machine, deterministic, and with errors that
say where.

K2's 16 x 16 layout is 256 ranks; as processes that is 256 interpreters, as threads it is one. One
rank runs at a time (baton.py); what ranks tell each other goes through shared tensors
(thread_group.py). Nothing is gained in speed, all in certainty: two runs are equal bit for bit, a
missing or mismatched collective is named in milliseconds, and an exception in one rank ends the
others. What would hang over NCCL stands still here and is reported: messages queue up as they do
there (thread_group.py), and groups must be made in step, which torch's names for groups ask for.

What threads do not inherit in torch: grad mode (set here to the caller's), autocast and default
device (not set). The random generator and the default type are the process's: use explicit
generators.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from k2train.parallel.baton import AbortedRank, Baton
from k2train.parallel.communicator import CommunicationError, Communicator, ReduceOp, Work, equal_splits
from k2train.parallel.thread_group import Call, CallSite, GroupState, Operation, call_site, form
from k2train.schedule.channels import ChannelForm

T = TypeVar("T")
# Enough for torch's kernels and backward; 256 default stacks would reserve 2 GiB.
STACK_BYTES = 512 * 1024


@dataclasses.dataclass
class _Shared:
    """What all ranks of a run have in common."""

    baton: Baton
    size: int
    device: torch.device
    channel_form: ChannelForm
    groups: dict[tuple[str, tuple[int, ...], int], GroupState] = dataclasses.field(default_factory=dict)


class ThreadWorld:
    """One rank's view of a threads world (a World)."""

    def __init__(self, shared: _Shared, rank: int) -> None:
        self._shared = shared
        self.rank = rank
        self.size = shared.size
        self.device = shared.device
        self.channel_form = shared.channel_form
        self._made: dict[tuple[str, tuple[int, ...]], int] = {}

    def group(self, name: str, ranks: Sequence[int]) -> Communicator:
        """A new group. Every member calls it, as its n-th with one n for all.

        Raises CommunicationError for ranks that cannot be a group, or where a member has made more
        or fewer groups before this one: over torch.distributed such members never meet.
        """
        key = (name, tuple(ranks))
        if (
            self.rank not in key[1]
            or len(set(key[1])) != len(key[1])
            or not set(key[1]) <= set(range(self.size))
        ):
            raise CommunicationError(f"rank {self.rank} cannot make group {name} of ranks {list(ranks)}")
        number = self._made[key] = self._made.get(key, 0) + 1
        count = sum(self._made.values())
        fresh = GroupState(*key, self._shared.channel_form, count)
        state = self._shared.groups.setdefault((*key, number), fresh)
        if state.count != count:
            raise CommunicationError(
                f"rank {self.rank} makes group {name} of ranks {list(ranks)[:8]} as its group number {count}, another "
                f"rank as its number {state.count}; torch.distributed names groups by that number, and these would not meet"
            )
        return ThreadCommunicator(state, self.rank, self._shared.baton)


class _ThreadWork:
    """Waiting for an operation: others run until it is complete."""

    def __init__(self, owner: ThreadCommunicator, operation: Operation, site: CallSite) -> None:
        self._owner = owner
        self._operation = operation
        self._site = site

    def wait(self) -> None:
        self._owner.wait_for(self._operation, self._site)

    def wait_host(self) -> None:
        self.wait()

    def done(self) -> bool:
        return self._operation.done


class ThreadCommunicator(Communicator):
    """A group of a threads world, seen by one rank."""

    def __init__(self, state: GroupState, global_rank: int, baton: Baton) -> None:
        self.name = state.name
        self.rank = state.ranks.index(global_rank)
        self.size = len(state.ranks)
        self._global_rank = global_rank
        self._state = state
        self._baton = baton

    def start_all_reduce(self, t: torch.Tensor, op: ReduceOp = "sum") -> Work:
        return self._start("all_reduce", t, t, {"op": op, "shape": tuple(t.shape)})

    def start_all_gather(
        self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None
    ) -> Work:
        splits = tuple(splits) if splits is not None else equal_splits(len(out), self.size)
        ins = tuple(splits[self.rank] if rank == self.rank else 0 for rank in range(self.size))
        return self._start("all_gather", out, t, {"splits": splits}, splits, ins)

    def start_reduce_scatter(
        self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None
    ) -> Work:
        splits = tuple(splits) if splits is not None else equal_splits(len(t), self.size)
        outs = tuple(splits[self.rank] if rank == self.rank else 0 for rank in range(self.size))
        return self._start("reduce_scatter", out, t, {"splits": splits}, outs, splits)

    def start_all_to_all(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Work:
        outs = tuple(out_splits) if out_splits is not None else equal_splits(len(out), self.size)
        ins = tuple(in_splits) if in_splits is not None else equal_splits(len(t), self.size)
        return self._start("all_to_all", out, t, {}, outs, ins)

    def start_broadcast(self, t: torch.Tensor, root: int) -> Work:
        return self._start("broadcast", t, t, {"root": root, "shape": tuple(t.shape)})

    def start_send(self, t: torch.Tensor, peer: int) -> Work:
        return self._post("send", t, peer)

    def start_recv(self, t: torch.Tensor, peer: int) -> Work:
        return self._post("recv", t, peer)

    def barrier(self) -> None:
        token = torch.empty(0)
        self._start("barrier", token, token, {}).wait()

    def wait_for(self, operation: Operation, site: CallSite) -> None:
        """Let other ranks run until the operation is complete."""
        self._baton.check()
        if not operation.done:
            operation.waiters.append(self._global_rank)
            self._baton.block(
                self._global_rank, lambda: self._state.describe(operation, self._global_rank, site)
            )

    def _start(
        self,
        kind: str,
        out: torch.Tensor,
        t: torch.Tensor,
        arguments: dict[str, object],
        out_splits: tuple[int, ...] = (),
        in_splits: tuple[int, ...] = (),
    ) -> Work:
        self._baton.check()
        common = {"dtype": t.dtype, "row shape": tuple(t.shape[1:]), **arguments}
        call = Call(kind, self.rank, call_site(), common, out.detach(), t.detach(), out_splits, in_splits)
        self._check(call)
        operation = self._state.arrive(call)
        self._wake(operation)
        return _ThreadWork(self, operation, call.site)

    def _post(self, kind: str, t: torch.Tensor, peer: int) -> Work:
        self._baton.check()
        site = call_site()
        operation, complete = self._state.post(kind, self.rank, peer, t.detach(), site)
        for each in complete:
            self._wake(each)
        return _ThreadWork(self, operation, site)

    def _wake(self, operation: Operation) -> None:
        if operation.done:
            self._baton.wake(operation.waiters)
            operation.waiters = []

    def _check(self, call: Call) -> None:
        """What a rank can get wrong without the others."""
        if call.out.dtype != call.t.dtype or call.out.shape[1:] != call.t.shape[1:]:
            raise self._state.refuse(call, f"output {form(call.out)} does not fit input {form(call.t)}")
        for name, t, splits in (("output", call.out, call.out_splits), ("input", call.t, call.in_splits)):
            if splits and (len(splits) != self.size or sum(splits) != len(t) or min(splits) < 0):
                raise self._state.refuse(call, f"{name} {form(t)} does not have splits {splits}")
            if not t.is_contiguous():
                raise self._state.refuse(call, f"{name} {form(t)} is not contiguous")


def run_threads(
    world_size: int,
    fn: Callable[[ThreadWorld], T],
    device: torch.device | None = None,
    channel_form: ChannelForm = ChannelForm.ORDERED_PAIR,
) -> list[T]:
    """Run fn on every rank of a threads world and return what they returned, by rank.

    channel_form: which messages of a pipeline share a communicator; other forms than the default
    are for tests.

    The first exception of any rank ends all and is raised as it is, its cause naming the rank.
    Raises CommunicationError (a DeadlockError where nobody can run) for operations that do not fit
    together or were started and never completed.
    """
    shared = _Shared(Baton(world_size), world_size, device or torch.device("cpu"), channel_form)
    results: dict[int, T] = {}
    grad_mode = torch.is_grad_enabled()

    def run(rank: int) -> None:
        try:
            shared.baton.enter(rank)
            torch.set_grad_enabled(grad_mode)
            results[rank] = fn(ThreadWorld(shared, rank))
        except AbortedRank:
            pass
        except BaseException as error:
            shared.baton.fail(error, rank)
        finally:
            shared.baton.end(rank)

    with _one_core():
        threads = _start_threads(run, world_size)
    shared.baton.start()
    try:
        shared.baton.wait_for_end()
    except BaseException as interrupt:  # Ctrl-C: every rank ends at its next operation
        shared.baton.error = interrupt
        shared.baton.wait_for_end()
    for thread in threads:
        thread.join()
        _wait_for_native_exit(thread)
    _raise_error(shared)
    return [results[rank] for rank in range(world_size)]


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Threads started inside stay on one core, where torch's kernels use one thread and the
    platform can say so.

    Only one rank runs at a time; on one core the baton passes without waking another, which costs
    several times less.
    """
    if torch.get_num_threads() > 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    # Spread over the cores, so that two runs side by side need not share one.
    core = sorted(allowed)[os.getpid() % len(allowed)]
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _start_threads(run: Callable[[int], None], world_size: int) -> list[threading.Thread]:
    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(world_size)
    ]
    usual = threading.stack_size(STACK_BYTES)
    try:
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(usual)
    return threads


def _wait_for_native_exit(thread: threading.Thread) -> None:
    """Python's join returns while the thread still runs its native clean-up, in which it may hold a
    lock of the math library; a process forked in that instant would inherit the lock and hang in
    its first product.
    """
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):
        time.sleep(1e-4)


def _raise_error(shared: _Shared) -> None:
    error, rank = shared.baton.error, shared.baton.failed_rank
    if error is not None:
        if rank is not None and error.__cause__ is None and error.__context__ is None:
            raise error from CommunicationError(f"rank {rank} of {shared.size} failed")
        raise error
    unfinished = [line for state in shared.groups.values() for line in state.unfinished()]
    if unfinished:
        raise CommunicationError("started and never completed:\n  " + "\n  ".join(unfinished[:16]))
