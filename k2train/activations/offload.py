"""Moving saved tensors to host memory and back while other microbatches compute (K2 report, section 2.4.3).

    offloaded = engine.offload(tensors)      the schedule's OFFLOAD; the caller drops its tensors at once
    offloaded.reload()                       RELOAD, some slots ahead of the backward
    offloaded.tensors()                      in the backward

Nothing here waits on the host. Four queues of work touch a tensor's values, and each hand-over is an event:

    compute    | produce |. . . . . . . . . . . . . . . . | allocate |. . . . . .| read |
                          \\ 1                                        \\ 4        / 5
    out          2 ->       | device to host |                         \\        /
                            ^                 \\ 3                       \\      /
    back       | last user's host to device |  . . . . . . . . . . . .  | host to device |

1: the values are there before they are copied. 2: a host buffer that is used again still holds its last user's values
until these are back (`HostBuffer.ready`). 3: the copy back starts after the copy out (the same `ready`). 4: new device
memory may be a block that kernels already queued still use. 5: the backward reads after the copy. Host buffers return to
the arena when the copy back is *queued*; 2 makes that safe.

The engine and an `Offloaded` hold no reference to the tensors that were copied out. Nobody may write to them in place
after `offload`: they were saved for a backward.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from k2train.activations.arena import HostArena, HostBuffer
from k2train.activations.copies import Copies, Queue, build_copies
from k2train.activations.geometry import Packing, plan_packing, rebuild, stretch_bytes


@dataclasses.dataclass(frozen=True)
class CopySeconds:
    """Device seconds: of copies out, of copies back, and those in which compute stood still waiting for a copy back.

    `1 - exposed / (out + back)` is the share of the copying that compute has hidden; copies out are never waited for.
    """

    out: float
    back: float
    exposed: float


class OffloadEngine:
    """Copies of one device's tensors to an arena and back.

    device: of the tensors, with its index where it is a CUDA device. timed: record what `copy_seconds` reports.
    copies: the device's queues; None for the real ones.
    """

    def __init__(
        self, device: torch.device, arena: HostArena, timed: bool = False, copies: Copies | None = None
    ) -> None:
        self.device = device
        self.arena = arena
        self.copies = build_copies(device, timed) if copies is None else copies
        self._timed = timed
        self._intervals: list[tuple[Queue, Any, Any]] = []
        self._alive: weakref.WeakSet[Offloaded] = weakref.WeakSet()
        self.bytes_out = 0
        self.bytes_back = 0

    @property
    def in_flight_bytes(self) -> int:
        """On the host now: copied out (or on the way) and not yet reloaded, dropped or collected."""
        return sum(offloaded.host_bytes for offloaded in self._alive)

    def offload(self, tensors: Sequence[torch.Tensor]) -> Offloaded:
        """Start copying; the tensors may be dropped when this returns. Raises HostMemoryError, having copied nothing."""
        assert all(t.device == self.device for t in tensors), f"a tensor to offload is not on {self.device}"
        packing = plan_packing(tensors)
        buffers = self._take(packing)
        self.copies.wait("out", self.copies.mark("compute"))
        for buffer in buffers:
            if buffer.ready is not None:
                self.copies.wait("out", buffer.ready)
        start = self._start("out")
        for storage, buffer in zip(packing.storages, buffers, strict=True):
            for stretch in storage.stretches:
                host = buffer.bytes[stretch.position : stretch.position + stretch.num_bytes]
                self.copies.copy_out(host, stretch_bytes(tensors[storage.source], stretch))
        done = self._stop("out", start)
        for buffer in buffers:
            buffer.ready = done
        offloaded = Offloaded(self, packing, buffers)
        self._alive.add(offloaded)
        self.bytes_out += offloaded.host_bytes
        return offloaded

    def copy_back(self, buffers: Sequence[HostBuffer]) -> tuple[tuple[torch.Tensor, ...], Any]:
        """Start copying the buffers into new device memory and give them back; (bytes, event). For `Offloaded`."""
        targets = tuple(self.copies.empty(buffer.num_bytes) for buffer in buffers)
        self.copies.wait("back", self.copies.mark("compute"))
        for buffer in buffers:
            self.copies.wait("back", buffer.ready)
        start = self._start("back")
        for target, buffer in zip(targets, buffers, strict=True):
            self.copies.copy_back(target, buffer.bytes)
        done = self._stop("back", start)
        for buffer in buffers:
            buffer.ready = done
            self.bytes_back += buffer.num_bytes
            self.arena.give_back(buffer)
        return targets, done

    def wait_for(self, event: Any) -> None:
        """Let compute wait for a copy back. For `Offloaded`."""
        start = self._start("compute")
        self.copies.wait("compute", event)
        if self._timed:
            self._stop("compute", start)

    def copy_seconds(self) -> CopySeconds:
        """Since the last `reset_counters`; waits for what it measures. Only of an engine that is `timed`."""
        assert self._timed, "build the engine with timed=True to measure its copies"
        seconds = {"out": 0.0, "back": 0.0, "compute": 0.0}
        for queue, start, stop in self._intervals:
            seconds[queue] += self.copies.seconds_between(start, stop)
        return CopySeconds(seconds["out"], seconds["back"], seconds["compute"])

    def reset_counters(self) -> None:
        """Start `bytes_out`, `bytes_back` and `copy_seconds` again, for a new step."""
        self.bytes_out = 0
        self.bytes_back = 0
        self._intervals.clear()

    def _take(self, packing: Packing) -> tuple[HostBuffer, ...]:
        buffers: list[HostBuffer] = []
        try:
            for storage in packing.storages:
                buffers.append(self.arena.take(storage.num_bytes))
        except BaseException:
            for buffer in buffers:
                self.arena.give_back(buffer)
            raise
        return tuple(buffers)

    def _start(self, queue: Queue) -> Any:
        return self.copies.mark(queue) if self._timed else None

    def _stop(self, queue: Queue, start: Any) -> Any:
        done = self.copies.mark(queue)
        if self._timed:
            self._intervals.append((queue, start, done))
        return done


class Offloaded:
    """A group of tensors on its way out, on the host, on its way back or back; made by `OffloadEngine.offload`.

    One that is simply forgotten, in whichever state, returns its host buffers: a finaliser hands them to
    `HostArena.abandon`. Do not count on it for memory in a step, since an exception's traceback may hold it; `drop` is for
    that.
    """

    def __init__(self, engine: OffloadEngine, packing: Packing, buffers: tuple[HostBuffer, ...]) -> None:
        self._engine = engine
        self._packing = packing
        self._buffers = buffers
        self._state: Literal["out", "back", "read", "dropped"] = "out"
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._targets: tuple[torch.Tensor, ...] = ()
        self._event: Any = None
        self._finaliser = _finaliser(self, engine.arena.abandon, buffers)

    @property
    def host_bytes(self) -> int:
        """What it holds in host memory, without the size classes' surplus."""
        return sum(buffer.num_bytes for buffer in self._buffers)

    def reload(self) -> None:
        """Start copying back into new device memory. Once only."""
        assert self._state != "dropped", "RELOAD of offloaded tensors that were dropped"
        assert self._state == "out", "a second RELOAD of the same offloaded tensors"
        self._targets, self._event = self._engine.copy_back(self._buffers)
        self._finaliser.detach()
        self._finaliser = _finaliser(self, _let_go, self._engine.copies, self._targets)
        self._buffers = ()
        self._tensors = tuple(
            rebuild(form, self._targets, self._engine.device) for form in self._packing.forms
        )
        self._state = "back"

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors, in the order given to `offload`, with sizes, strides, values and sharing as they were.

        They live as long as this object or the caller's references, so drop this object to free them one by one.
        The current stream waits for the copy. It must be the one that was current at `reload`; another stream that reads
        them has to be told so with `record_stream`, as for any tensor.
        """
        assert self._state != "out", "offloaded tensors were read before their RELOAD"
        assert self._state != "dropped", "offloaded tensors were read after they were dropped"
        if self._state == "back":
            self._finaliser.detach()
            self._engine.wait_for(self._event)
            self._targets = ()
            self._state = "read"
        return self._tensors

    def drop(self) -> None:
        """Forget the tensors, in whichever state and with copies still running; for a step that ends early. May be repeated."""
        if self._state == "out":
            for buffer in self._buffers:
                self._engine.arena.give_back(buffer)
        elif self._state == "back":
            _let_go(self._engine.copies, self._targets)
        self._finaliser.detach()
        self._buffers = self._targets = self._tensors = ()
        self._state = "dropped"


def _finaliser(
    owner: Offloaded, function: Callable[..., object], *arguments: object
) -> weakref.finalize[..., Any]:
    finaliser = weakref.finalize(owner, function, *arguments)
    finaliser.atexit = False
    return finaliser


def _let_go(copies: Copies, targets: Sequence[torch.Tensor]) -> None:
    for target in targets:
        copies.let_go(target)
