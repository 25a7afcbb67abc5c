"""What the program may ask of a group of ranks. It never talks to a default group; every group is
one Communicator.

Two worlds implement it: processes.py over torch.distributed (NCCL, gloo, and a single process),
threads.py over logical ranks of one process. The same property tests hold for both.

Rules that all operations share. Tensors are contiguous. Ranks, peers and roots are positions in the
group, 0 .. size. Every rank of the group calls the same operations in the same order. Splits count
entries of the first dimension. Each operation has an asynchronous form, `start_x`, which returns a
Work; until its `wait()` returns, the tensors belong to the operation. Reductions add in an order
that depends on the group alone, so equal inputs give equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from k2train.schedule.channels import ChannelForm

ReduceOp = Literal["sum", "max"]


class CommunicationError(RuntimeError):
    """An operation failed, ran into the timeout, or does not fit the other ranks'; the message
    names it, group and rank."""


class JoinError(CommunicationError):
    """Not every rank came to the start; the message says how long this one waited."""


class Work(Protocol):
    """A started operation."""

    def wait(self) -> None:
        """Return when the operation's tensors may be used again (on CUDA: by the current
        stream)."""

    def wait_host(self) -> None:
        """Return when the operation has ended, so that an error of it shows here."""

    def done(self) -> bool:
        """Whether the operation has ended, so that `wait()` would not wait. Returns at once.

        False may also mean that the backend does not say: gloo's messages have ended when `wait()`
        has returned. An operation that failed has ended too; its `wait()` raises.
        """


class CompletedWork:
    """The Work of an operation that ended before it returned."""

    def wait(self) -> None:
        pass

    def wait_host(self) -> None:
        pass

    def done(self) -> bool:
        return True


class Communicator(Protocol):
    """A group of ranks, seen by one of them. The synchronous forms are the asynchronous ones waited
    for."""

    name: str
    rank: int
    size: int

    def start_all_reduce(self, t: torch.Tensor, op: ReduceOp = "sum") -> Work:
        """Replace t by the elementwise sum or maximum of all ranks' t."""

    def start_all_gather(
        self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None
    ) -> Work:
        """Concatenate all ranks' t into out. Rank r gives splits[r] entries; None means equal
        parts.

        t may be the rank's own part of out.
        """

    def start_reduce_scatter(
        self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None
    ) -> Work:
        """Sum all ranks' t and leave rank r with its part, splits[r] entries; None means equal
        parts.

        out may be the rank's own part of t; the rest of t is scratch afterwards.
        """

    def start_all_to_all(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Work:
        """Send the p-th part of t to rank p and receive rank p's part for us as the p-th of out;
        parts may be empty."""

    def start_broadcast(self, t: torch.Tensor, root: int) -> Work:
        """Replace t by the root's t."""

    def start_send(self, t: torch.Tensor, peer: int) -> Work:
        """Send t; messages between two ranks arrive in the order they were sent in (there are no
        tags).

        Sends and receives with one peer are one queue, in the order in which this rank starts them.
        A message moves when both of its ends are at the head of their queues. So a group in which
        two ranks both send to each other can deadlock where two groups would not.
        """

    def start_recv(self, t: torch.Tensor, peer: int) -> Work:
        """Receive into t."""

    def barrier(self) -> None:
        """Return when every rank of the group has called it."""

    def all_reduce(self, t: torch.Tensor, op: ReduceOp = "sum") -> None:
        self.start_all_reduce(t, op).wait()

    def all_gather(self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None) -> None:
        self.start_all_gather(out, t, splits).wait()

    def reduce_scatter(self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None) -> None:
        self.start_reduce_scatter(out, t, splits).wait()

    def all_to_all(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> None:
        self.start_all_to_all(out, t, out_splits, in_splits).wait()

    def broadcast(self, t: torch.Tensor, root: int) -> None:
        self.start_broadcast(t, root).wait()

    def send(self, t: torch.Tensor, peer: int) -> None:
        self.start_send(t, peer).wait()

    def recv(self, t: torch.Tensor, peer: int) -> None:
        self.start_recv(t, peer).wait()


class World(Protocol):
    """A run seen by one of its ranks: who it is, where its tensors live, and how it makes
    groups."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def channel_form(self) -> ChannelForm:
        """Which messages of a pipeline share a communicator in this world."""
        ...

    def group(self, name: str, ranks: Sequence[int]) -> Communicator:
        """A new group of these ranks, this one among them. Every member calls it, with the same
        arguments.

        It must be every member's n-th group, with one n for all: torch names a group by its ranks
        and by how many groups the caller has made, and members with different names wait for each
        other for ever. So ranks that have no part in a round of groups make one of their own.
        """


def equal_splits(num_entries: int, size: int) -> tuple[int, ...]:
    """The splits that None stands for."""
    assert num_entries % size == 0, f"{num_entries} entries do not divide among {size} ranks; give splits"
    return (num_entries // size,) * size


def split_parts(t: torch.Tensor, splits: Sequence[int]) -> list[torch.Tensor]:
    """Views of t's parts along the first dimension."""
    assert sum(splits) == t.shape[0], f"splits {tuple(splits)} do not add up to {t.shape[0]} entries"
    return list(t.split(list(splits)))
