"""`run_distributed_test`: run a function on every rank of a small world, as threads or as gloo
processes.

The processes are forked from the caller after torch was imported, which starts 32 ranks in seconds
where torchrun needs half a minute, and meet in a file instead of a port, so tests may run side by
side.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import io
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from k2train.parallel.communicator import World
from k2train.parallel.processes import ProcessWorld
from k2train.parallel.threads import run_threads

T = TypeVar("T")


class RankFailedError(RuntimeError):
    """A forked rank raised or died; the message holds its traceback."""


def run_distributed_test(
    fn: Callable[[World], T],
    world_size: int,
    backend: Literal["threads", "processes"],
    timeout_seconds: float = 60.0,
) -> list[T]:
    """What fn returned on every rank, by rank. Raises the first rank's exception (from a process,
    RankFailedError)."""
    if backend == "threads":
        return run_threads(world_size, fn)
    return run_forked(fn, world_size, timeout_seconds)


def run_forked(fn: Callable[[World], T], world_size: int, timeout_seconds: float) -> list[T]:
    """fn on forked gloo processes. Results must be picklable; all ranks end when one fails or the
    time is up."""
    # What is left of earlier groups waits here for threads that a fork does not have, should a rank
    # collect it.
    gc.collect()
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        processes, pipes = [], []
        try:
            for rank in range(world_size):
                process, pipe = _fork(fn, rank, world_size, store, timeout_seconds)
                processes.append(process)
                pipes.append(pipe)
            return _collect(pipes, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _fork(
    fn: Callable[[World], Any], rank: int, world_size: int, store: str, timeout_seconds: float
) -> tuple[ForkProcess, Connection]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_rank, args=(fn, rank, world_size, store, timeout_seconds, sender))
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads; ours (pytest's at most) hold no lock a child
        # needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sender.close()
    return process, receiver


def _run_rank(
    fn: Callable[[World], Any],
    rank: int,
    world_size: int,
    store: str,
    timeout_seconds: float,
    sender: Connection,
) -> None:
    gc.freeze()
    try:
        with _file_world(rank, world_size, store, timeout_seconds) as world:
            result = fn(world)
        buffer = io.BytesIO()
        torch.save(result, buffer)
        sender.send_bytes(b"+" + buffer.getvalue())
    except BaseException:
        sender.send_bytes(b"-" + traceback.format_exc().encode())


@contextlib.contextmanager
def _file_world(rank: int, world_size: int, store: str, timeout_seconds: float) -> Iterator[ProcessWorld]:
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timeout
    )
    try:
        # Without it a rank with little to do could leave before the others have connected to it.
        dist.barrier()
        yield ProcessWorld(rank, world_size, torch.device("cpu"), timeout)
    finally:
        dist.destroy_process_group()


def _collect(pipes: Sequence[Connection], deadline: float) -> list[Any]:
    """Results by rank, or the first failure."""
    results: dict[int, Any] = {}
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailedError(f"ranks {sorted(waiting.values())} did not end in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            results[rank] = _result(pipe, rank)
    return [results[rank] for rank in range(len(pipes))]


def _result(pipe: Connection, rank: int) -> Any:
    try:
        answer = pipe.recv_bytes()
    except EOFError:
        raise RankFailedError(f"rank {rank} died without a word") from None
    if answer[:1] == b"-":
        raise RankFailedError(f"rank {rank} failed:\n{answer[1:].decode()}")
    return torch.load(io.BytesIO(answer[1:]), weights_only=False)
