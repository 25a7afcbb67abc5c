"""A world of one rank whose peers are only said to be there: calls are checked and counted, and
nothing arrives.

What one rank can get wrong by itself is refused as the threads world refuses it: splits that do not
add up, types or devices that differ, a tensor that is not contiguous. What the peers would have
sent has no value here, so buffers are left as they are, which for tensors without memory is all
there is.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from k2train.parallel.communicator import (
    CommunicationError,
    Communicator,
    CompletedWork,
    ReduceOp,
    Work,
    equal_splits,
)
from k2train.schedule.channels import ChannelForm


class Traffic(NamedTuple):
    """What is counted by: the place in the program, the group, the operation."""

    place: str
    group: str
    operation: str


class Counts:
    """Calls, and the bytes this rank hands in, of every operation with other ranks."""

    def __init__(self, place: Callable[[], str]) -> None:
        """place: where the program is."""
        self.calls: collections.Counter[Traffic] = collections.Counter()
        self.bytes: collections.Counter[Traffic] = collections.Counter()
        self._place = place

    def clear(self) -> None:
        """Count anew."""
        self.calls.clear()
        self.bytes.clear()

    def add(self, group: str, operation: str, tensor: torch.Tensor) -> None:
        key = Traffic(self._place(), group, operation)
        self.calls[key] += 1
        self.bytes[key] += tensor.numel() * tensor.element_size()


class UnfinishedWork(CompletedWork):
    """A message of which the host, which runs ahead as far as it may, does not know that it has
    left."""

    def done(self) -> bool:
        return False


class RehearsedCommunicator(Communicator):
    """A group seen by one of its ranks."""

    def __init__(
        self, name: str, ranks: Sequence[int], rank: int, device: torch.device, counts: Counts
    ) -> None:
        self.name, self.ranks = name, tuple(ranks)
        self.rank, self.size = self.ranks.index(rank), len(self.ranks)
        self._device, self._counts = device, counts

    def start_all_reduce(self, t: torch.Tensor, op: ReduceOp = "sum") -> Work:
        return self._call("all_reduce", t)

    def start_all_gather(
        self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None
    ) -> Work:
        self._check_splits("all_gather", out, splits)
        return self._call("all_gather", t, out)

    def start_reduce_scatter(
        self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None
    ) -> Work:
        self._check_splits("reduce_scatter", t, splits)
        return self._call("reduce_scatter", t, out)

    def start_all_to_all(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Work:
        self._check_splits("all_to_all", out, out_splits)
        self._check_splits("all_to_all", t, in_splits)
        return self._call("all_to_all", t, out)

    def start_broadcast(self, t: torch.Tensor, root: int) -> Work:
        return self._call("broadcast", t)

    def start_send(self, t: torch.Tensor, peer: int) -> Work:
        self._check_peer("send", peer)
        self._call("send", t)
        return UnfinishedWork()

    def start_recv(self, t: torch.Tensor, peer: int) -> Work:
        self._check_peer("recv", peer)
        return self._call("recv", t)

    def barrier(self) -> None:
        """Everybody is here."""

    def _call(self, operation: str, t: torch.Tensor, out: torch.Tensor | None = None) -> Work:
        for tensor in (t,) if out is None else (t, out):
            if tensor.device != self._device:
                raise self._error(
                    f"{operation}: a tensor lives on {tensor.device}, the group on {self._device}"
                )
            if not tensor.is_contiguous():
                raise self._error(f"{operation}: a tensor of shape {tuple(tensor.shape)} is not contiguous")
        if out is not None and (out.dtype != t.dtype or out.shape[1:] != t.shape[1:]):
            raise self._error(
                f"{operation}: output {out.dtype} {tuple(out.shape)} does not fit input {t.dtype} "
                f"{tuple(t.shape)}"
            )
        if self.size > 1:
            self._counts.add(self.name, operation, t)
        return CompletedWork()

    def _check_splits(self, operation: str, t: torch.Tensor, splits: Sequence[int] | None) -> None:
        given = equal_splits(t.shape[0], self.size) if splits is None else tuple(splits)
        if len(given) != self.size or sum(given) != t.shape[0] or min(given) < 0:
            raise self._error(f"{operation}: {tuple(t.shape)} does not have splits {given}")

    def _check_peer(self, operation: str, peer: int) -> None:
        if not 0 <= peer < self.size or peer == self.rank:
            raise self._error(f"{operation}: {peer} is not another rank of the group")

    def _error(self, what: str) -> CommunicationError:
        return CommunicationError(f"group {self.name}, rank {self.rank} of {self.size}: {what}")


class RehearsedWorld:
    """The run, seen by rank `rank`. Implements parallel.communicator.World."""

    channel_form = ChannelForm.ORDERED_PAIR

    def __init__(self, rank: int, size: int, device: torch.device, counts: Counts) -> None:
        self.rank, self.size, self.device, self.counts = rank, size, device, counts

    def group(self, name: str, ranks: Sequence[int]) -> RehearsedCommunicator:
        return RehearsedCommunicator(name, ranks, self.rank, self.device, self.counts)
