"""`world=processes` without a launcher: the layout's ranks as processes of this machine.

torchrun starts each rank as a new program, which imports torch and megatron-core for itself; four
of them on two cores took 12 seconds to their first step. Here ranks are forked from a server that
has imported once (multiprocessing's forkserver). It does nothing else, so a fork of it is sound.
Ranks on GPUs are new programs here, too: whatever an import asks of a driver would not outlive a
fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from types import FrameType

from k2train.cli.main import run_told
from k2train.config.schema import Config

RankMain = Callable[[Config, list[str]], int]
IMPORTED_ONCE = ["k2train.trainer.loop", "k2train.data.megatron"]
PATIENCE_SECONDS = 30.0
"""How long the others may go on after a rank has failed.

They notice for themselves, unless they hang.
"""


def is_wanted(config: Config, environment: Mapping[str, str]) -> bool:
    """Whether the ranks are still to be started: processes are asked for, and no launcher has
    started this one.
    """
    return config.world == "processes" and "WORLD_SIZE" not in environment


def launch(main: RankMain, config: Config, words: list[str]) -> int:
    """Start the ranks of `config`, wait for them and return their exit status: that of the first to
    fail, else 0.

    main: what each rank calls with `config` and `words`, the user's; a function of a module, which
    returns an exit status. Raises ConfigError, before any rank starts, for what
    `trainer.loop.prepare` or `check_start` refuses. SIGTERM and Ctrl-C go to every rank.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    ensure_running()  # it imports while this process does
    from torch.distributed import TCPStore

    from k2train.trainer.check_start import check_start
    from k2train.trainer.loop import prepare

    ready = prepare(config)
    check_start(ready.program.config, ready.program.layout)
    num_ranks = ready.program.layout.world
    # Kept here, where it outlives every rank, and on a port that is taken from the start.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context: ForkServerContext | SpawnContext = multiprocessing.get_context("forkserver")
    if ready.device.type != "cpu":
        context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(
            target=run_rank, args=(rank_environment(rank, num_ranks, store.port), main, config, words)
        )
        for rank in range(num_ranks)
    ]
    with passing_signals_to(ranks):
        for rank in ranks:
            rank.start()
        return wait(ranks)


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank of one node."""
    from k2train.trainer.worlds import LOCAL_RUN

    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": LOCAL_RUN,
    }


def run_rank(environment: Mapping[str, str], main: RankMain, config: Config, words: list[str]) -> None:
    """One rank, in its process, whose exit status is the command's."""
    # In a session of its own a Ctrl-C in the terminal does not reach it beside the one that is
    # passed on.
    os.setsid()
    os.environ.update(environment)
    threading.Thread(target=_stop_when_left_alone, daemon=True).start()
    sys.exit(run_told("train", lambda: main(config, words)))


def _stop_when_left_alone() -> None:
    """Stop as SIGTERM does, with a checkpoint, when the launching process was killed."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def passing_signals_to(ranks: Sequence[BaseProcess]) -> Iterator[None]:
    """Within this context SIGTERM and SIGINT go to every rank that runs, and do nothing else
    here."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        _signal(ranks, number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait(ranks: Sequence[BaseProcess]) -> int:
    """Wait for all; when one fails, stop the others.

    The first failure's exit status, 0 without one.
    """
    running = {rank.sentinel: number for number, rank in enumerate(ranks)}
    status, deadline = 0, None
    while running:
        ended = wait_for(list(running), deadline and max(0.0, deadline - time.monotonic()))
        if not ended:
            _signal(ranks, signal.SIGKILL)
            deadline = None
        for sentinel in ended:
            assert isinstance(sentinel, int)
            number = running.pop(sentinel)
            ranks[number].join()
            if status == 0 and ranks[number].exitcode:
                status = told_status(number, ranks[number].exitcode or 0)
                deadline = time.monotonic() + PATIENCE_SECONDS
                _signal(ranks, signal.SIGTERM)
    return status


def _signal(ranks: Sequence[BaseProcess], number: int) -> None:
    """Send a signal to every rank that still runs."""
    for rank in ranks:
        if rank.pid is not None and rank.exitcode is None:
            os.kill(rank.pid, number)


def told_status(rank: int, exitcode: int) -> int:
    """The exit status for a failed rank; a rank that a signal ended could not say so itself."""
    if exitcode > 0:
        return exitcode
    print(f"k2train train: rank {rank} was ended by {signal.Signals(-exitcode).name}", file=sys.stderr)
    return 1
