"""Ranks as processes: Communicators over torch.distributed, NCCL on GPUs and gloo on CPUs.

`process_world("single")` is the same with one process, which needs no launcher, no port and no
network.

What this file smooths over: torch 2.13 renamed the flat all-gather and reduce-scatter; no
collective takes float8 (it travels as bytes); gloo's all-gather and reduce-scatter take equal parts
only (uneven ones become a broadcast or reduce per part, which moves as many bytes); a failed
operation says which one it was, in which group.

Over NCCL `Work.wait()` makes the current stream wait and returns at once, so a failure cannot be
raised there. It comes from torch's watchdog thread, which ends the process when an operation fails
or runs into the timeout (TORCH_NCCL_ASYNC_ERROR_HANDLING=3, torch's default). Its message has the
kind of the operation, the rank, and the description of the group; therefore a group's description
is its name and its ranks, and the two ends of a channel between stages are a group of their own.
TORCH_NCCL_BLOCKING_WAIT must stay off: every wait would hold the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from k2train.config.errors import ConfigError
from k2train.parallel.communicator import (
    CommunicationError,
    Communicator,
    CompletedWork,
    JoinError,
    ReduceOp,
    Work,
    equal_splits,
    split_parts,
)
from k2train.schedule.channels import ChannelForm

try:  # torch 2.13 and later; the old names warn there, and warnings are errors here
    from torch.distributed import all_gather_single, reduce_scatter_single
except ImportError:  # torch 2.11 and 2.12
    from torch.distributed import all_gather_into_tensor as all_gather_single
    from torch.distributed import reduce_scatter_tensor as reduce_scatter_single

# Ranks come up seconds or, from a shared file system, minutes apart, which says nothing of how long
# a collective may take.
JOIN_SECONDS = 120.0

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_BYTE_TYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


@dataclasses.dataclass(frozen=True)
class _ProcessWork:
    """Handles of one operation of a group, and what it is for errors."""

    handles: tuple[dist.Work, ...]
    operation: str
    group: ProcessCommunicator

    def wait(self) -> None:
        for handle in self.handles:
            try:
                handle.wait()
            except RuntimeError as error:
                raise self.group.failure(self.operation, error) from error

    def wait_host(self) -> None:
        self.wait()
        if self.group.device.type == "cuda":
            torch.cuda.current_stream(self.group.device).synchronize()

    def done(self) -> bool:
        return all(handle.is_completed() for handle in self.handles)


class ProcessCommunicator(Communicator):
    """A torch.distributed group. ranks: its global ranks, in group order."""

    def __init__(
        self, name: str, ranks: Sequence[int], group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self._group = group
        self.device = device
        self._uneven = dist.get_backend(group) == "nccl"

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group itself, for libraries that bring their own collectives."""
        return self._group

    def start_all_reduce(self, t: torch.Tensor, op: ReduceOp = "sum") -> Work:
        if self.size == 1:
            return CompletedWork()
        return self._start("all_reduce", partial(dist.all_reduce, t, _OPS[op]))

    def start_all_gather(
        self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None
    ) -> Work:
        out, t = _as_bytes(out), _as_bytes(t)
        splits = tuple(splits) if splits is not None else equal_splits(out.shape[0], self.size)
        parts = split_parts(out, splits)
        if self.size == 1:
            _copy(out, t)
            return CompletedWork()
        if _even(splits):
            return self._start("all_gather", partial(all_gather_single, out, t))
        if self._uneven:
            return self._start("all_gather", partial(dist.all_gather, parts, t))
        _copy(parts[self.rank], t)
        calls = [
            partial(dist.broadcast, part, self.ranks[root]) for root, part in enumerate(parts) if len(part)
        ]
        return self._start("all_gather", *calls)

    def start_reduce_scatter(
        self, out: torch.Tensor, t: torch.Tensor, splits: Sequence[int] | None = None
    ) -> Work:
        splits = tuple(splits) if splits is not None else equal_splits(t.shape[0], self.size)
        parts = split_parts(t, splits)
        if self.size == 1:
            _copy(out, t)
            return CompletedWork()
        if _even(splits):
            return self._start("reduce_scatter", partial(reduce_scatter_single, out, t))
        if self._uneven:
            return self._start("reduce_scatter", partial(dist.reduce_scatter, out, parts))
        _copy(out, parts[self.rank])
        parts[self.rank] = out
        calls = [partial(dist.reduce, part, self.ranks[root]) for root, part in enumerate(parts) if len(part)]
        return self._start("reduce_scatter", *calls)

    def start_all_to_all(
        self,
        out: torch.Tensor,
        t: torch.Tensor,
        out_splits: Sequence[int] | None = None,
        in_splits: Sequence[int] | None = None,
    ) -> Work:
        out, t = _as_bytes(out), _as_bytes(t)
        outs = list(out_splits if out_splits is not None else equal_splits(out.shape[0], self.size))
        ins = list(in_splits if in_splits is not None else equal_splits(t.shape[0], self.size))
        if self.size == 1:
            _copy(out, t)
            return CompletedWork()
        return self._start("all_to_all", partial(dist.all_to_all_single, out, t, outs, ins))

    def start_broadcast(self, t: torch.Tensor, root: int) -> Work:
        return self._start("broadcast", partial(dist.broadcast, _as_bytes(t), self.ranks[root]))

    def start_send(self, t: torch.Tensor, peer: int) -> Work:
        operation = f"send to rank {self.ranks[peer]}"
        return self._message(operation, dist.isend, t, peer)

    def start_recv(self, t: torch.Tensor, peer: int) -> Work:
        operation = f"receive from rank {self.ranks[peer]}"
        return self._message(operation, dist.irecv, t, peer)

    def barrier(self) -> None:
        token = torch.zeros(1, device=self.device)
        self._start("barrier", partial(dist.all_reduce, token)).wait()
        token.item()

    @property
    def description(self) -> str:
        """What torch calls the group in its own messages."""
        return str(self._group.group_desc)

    def failure(self, operation: str, error: RuntimeError) -> CommunicationError:
        """What is raised when `operation` of this rank failed."""
        return CommunicationError(
            f"rank {self.ranks[self.rank]}: {operation} in group {_described(self.name, self.ranks)} failed: {error}"
        )

    def _start(self, operation: str, *calls: Callable[..., dist.Work | None]) -> Work:
        """Start collectives that together are `operation`."""
        try:
            handles = [call(group=self._group, async_op=True) for call in calls]
        except RuntimeError as error:
            raise self.failure(operation, error) from error
        return _ProcessWork(tuple(handle for handle in handles if handle is not None), operation, self)

    def _message(
        self, operation: str, call: Callable[..., dist.Work | None], t: torch.Tensor, peer: int
    ) -> Work:
        try:
            handle = call(_as_bytes(t), self.ranks[peer], group=self._group)
        except RuntimeError as error:
            raise self.failure(operation, error) from error
        return _ProcessWork((handle,) if handle is not None else (), operation, self)


@dataclasses.dataclass(frozen=True)
class ProcessWorld:
    """One process's view of the run: its rank, its device, and how to make groups."""

    rank: int
    size: int
    device: torch.device
    timeout: datetime.timedelta

    @property
    def channel_form(self) -> ChannelForm:
        """Every group has communicators of its own, so a group for every ordered pair is a
        communicator for each.

        That holds with and without a `device_id` in `init_process_group`. None is given there:
        torch would then make each group by splitting the communicator of the whole world, which
        every rank of the world must take part in.
        """
        return ChannelForm.ORDERED_PAIR

    def group(self, name: str, ranks: Sequence[int]) -> ProcessCommunicator:
        """A new group of these global ranks, this one among them. Every member, and nobody else,
        must call it.

        It must be every member's n-th group, with one n for all (`World.group`).
        """
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            group = dist.new_group(
                list(ranks),
                timeout=self.timeout,
                backend=backend,
                pg_options=_nccl_options(self.timeout) if backend == "nccl" else None,
                use_local_synchronization=True,
                group_desc=_described(name, ranks),
            )
        except RuntimeError as error:
            raise CommunicationError(f"rank {self.rank}: forming group {name} failed: {error}") from error
        return ProcessCommunicator(name, ranks, group, self.device)


@contextlib.contextmanager
def process_world(
    kind: Literal["single", "processes"], device: torch.device, timeout_seconds: float = 600.0
) -> Iterator[ProcessWorld]:
    """Join the run's processes, and leave them at the end.

    kind: `single` is one process on its own; `processes` reads what torchrun sets (RANK,
    WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and raises ConfigError where it is not there, JoinError
    where the others do not come. Collective: every process of the run must enter and leave.
    timeout_seconds is a collective's; joining may take JOIN_SECONDS where that is more.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    join_timeout = datetime.timedelta(seconds=max(timeout_seconds, JOIN_SECONDS))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if kind == "single":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        check_launched()
        try:
            dist.init_process_group(backend, init_method="env://", timeout=join_timeout)
        except RuntimeError as error:
            raise JoinError(
                f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: joining the run failed, which may take "
                f"{join_timeout.total_seconds():g} s: {error}"
            ) from error
    try:
        yield ProcessWorld(dist.get_rank(), dist.get_world_size(), device, timeout)
    finally:
        dist.destroy_process_group()


def check_launched() -> None:
    """world=processes needs a launcher."""
    missing = [
        name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ConfigError(
            "world",
            "processes",
            f"needs a launcher; {', '.join(missing)} not set",
            "start with torchrun --nproc-per-node=N -m k2train train ..., or set world=single",
        )


def _described(name: str, ranks: Sequence[int]) -> str:
    """A group in words."""
    others = f"{len(ranks)} ranks" if len(ranks) > 16 else f"ranks {list(ranks)}"
    return f"{name} ({others})"


def _nccl_options(timeout: datetime.timedelta) -> Any:
    """Communication on streams of high priority: its kernels are few and small, and what they bring
    is waited for.

    A build of torch without NCCL has no such class, so it is imported here.
    """
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # torch warns where it differs from the group's
    return options


def _even(splits: Sequence[int]) -> bool:
    return len(set(splits)) == 1


def _copy(out: torch.Tensor, t: torch.Tensor) -> None:
    if out.data_ptr() != t.data_ptr():
        out.copy_(t)


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    """float8 as bytes, everything else as it is."""
    return t.view(torch.uint8) if t.dtype in _BYTE_TYPES else t
