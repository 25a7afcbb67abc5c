"""Moving saved tensors to host memory and back while other microbatches compute (K2 report, section
2.4.3).

    offloaded = engine.offload(tensors)      the schedule's OFFLOAD; the caller drops its tensors at
                                             once
    offloaded.reload()                       RELOAD, some slots ahead of the backward
    offloaded.tensors()                      in the backward

Nothing here waits on the host. Four queues of work touch a tensor's values, and each hand-over is
an event:

    compute    | produce |. . . . . . . . . . . . . . . . | allocate |. . . . . .| read |
                          \\ 1                                        \\ 4        / 5
    out          2 ->       | device to host |                         \\        /
                            ^                 \\ 3                       \\      /
    back       | last user's host to device |  . . . . . . . . . . . .  | host to device |

1: the values are there before they are copied. 2: a host buffer that is used again still holds its
last user's values until these are back (`HostBuffer.ready`). 3: the copy back starts after the copy
out (the same `ready`). 4: new device memory may be a block that kernels already queued still use.
5: the backward reads after the copy. Host buffers return to the arena when the copy back is
*queued*; 2 makes that safe.

The engine and an `Offloaded` hold no reference to the tensors that were copied out. Nobody may
write to them in place after `offload`: they were saved for a backward.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from k2train.activations.arena import HostArena, HostBuffer
from k2train.activations.geometry import Packing, plan_packing, rebuild, stretch_bytes
from k2train.device.protocol import Device, Event, Stream

_Interval = Literal["out", "back", "exposed"]


@dataclasses.dataclass(frozen=True)
class CopySeconds:
    """Device seconds: of copies out, of copies back, and those in which compute stood still waiting
    for a copy back.

    `1 - exposed / (out + back)` is the share of the copying that compute has hidden; copies out are
    never waited for.
    """

    out: float
    back: float
    exposed: float


class OffloadEngine:
    """Copies of one device's tensors to an arena and back.

    device: of the tensors. timed: record what `copy_seconds` reports; the device must be timed,
    too. A stream for each direction, as each has a copy engine of its own; compute is whatever
    stream is current.
    """

    def __init__(self, device: Device, arena: HostArena, timed: bool = False) -> None:
        self.device = device
        self.arena = arena
        self._out, self._back = device.stream("offload"), device.stream("reload")
        self._timed = timed
        self._intervals: list[tuple[_Interval, Event, Event]] = []
        self._alive: weakref.WeakSet[Offloaded] = weakref.WeakSet()
        self.bytes_out = 0
        self.bytes_back = 0

    @property
    def in_flight_bytes(self) -> int:
        """On the host now: copied out (or on the way) and not yet reloaded, dropped or
        collected."""
        return sum(offloaded.host_bytes for offloaded in self._alive)

    def offload(self, tensors: Sequence[torch.Tensor]) -> Offloaded:
        """Start copying; the tensors may be dropped when this returns. Raises HostMemoryError,
        having copied nothing."""
        here = self.device.torch_device
        assert all(t.device == here for t in tensors), f"a tensor to offload is not on {here}"
        packing = plan_packing(tensors)
        buffers = self._take(packing)
        self._out.wait(self.device.current.record(), *(buffer.ready for buffer in buffers))
        start = self._start(self._out)
        for storage, buffer in zip(packing.storages, buffers, strict=True):
            for stretch in storage.stretches:
                host = buffer.bytes[stretch.position : stretch.position + stretch.num_bytes]
                source = stretch_bytes(tensors[storage.source], stretch)
                self._out.copy(host, source)
                self._out.uses(source)
        done = self._stop("out", self._out, start)
        for buffer in buffers:
            buffer.ready = done
        offloaded = Offloaded(self, packing, buffers)
        self._alive.add(offloaded)
        self.bytes_out += offloaded.host_bytes
        return offloaded

    def copy_back(self, buffers: Sequence[HostBuffer]) -> tuple[tuple[torch.Tensor, ...], Event]:
        """Start copying the buffers into new device memory and give them back; (bytes, event). For
        `Offloaded`.

        The new memory belongs to the current stream, which waits for the copy before it reads. So
        the allocator need not be told of the copy in the normal course, and memory use does not
        depend on timing there; see `let_go`.
        """
        targets = tuple(self.device.empty(buffer.num_bytes) for buffer in buffers)
        self._back.wait(self.device.current.record(), *(buffer.ready for buffer in buffers))
        start = self._start(self._back)
        for target, buffer in zip(targets, buffers, strict=True):
            self._back.copy(target, buffer.bytes)
        done = self._stop("back", self._back, start)
        for buffer in buffers:
            buffer.ready = done
            self.bytes_back += buffer.num_bytes
            self.arena.give_back(buffer)
        return targets, done

    def wait_for(self, event: Event) -> None:
        """Let compute wait for a copy back. For `Offloaded`."""
        compute = self.device.current
        start = self._start(compute)
        compute.wait(event)
        if self._timed:
            self._stop("exposed", compute, start)

    def let_go(self, targets: Sequence[torch.Tensor]) -> None:
        """Targets of a copy back are dropped though compute never waited for it. Any thread may
        call it."""
        self._back.uses(*targets)

    def copy_seconds(self) -> CopySeconds:
        """Since the last `reset_counters`; waits for what it measures. Only of an engine that is
        `timed`."""
        assert self._timed, "build the engine with timed=True to measure its copies"
        seconds: dict[_Interval, float] = {"out": 0.0, "back": 0.0, "exposed": 0.0}
        for what, start, stop in self._intervals:
            seconds[what] += stop.seconds_since(start)
        return CopySeconds(**seconds)

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

    def _start(self, stream: Stream) -> Event | None:
        return stream.record() if self._timed else None

    def _stop(self, what: _Interval, stream: Stream, start: Event | None) -> Event:
        done = stream.record()
        if start is not None:
            self._intervals.append((what, start, done))
        return done


class Offloaded:
    """A group of tensors on its way out, on the host, on its way back or back; made by
    `OffloadEngine.offload`.

    One that is simply forgotten, in whichever state, returns its host buffers: a finaliser hands
    them to `HostArena.abandon`. Do not count on it for memory in a step, since an exception's
    traceback may hold it; `drop` is for that.
    """

    def __init__(self, engine: OffloadEngine, packing: Packing, buffers: tuple[HostBuffer, ...]) -> None:
        self._engine = engine
        self._packing = packing
        self._buffers = buffers
        self._state: Literal["out", "back", "read", "dropped"] = "out"
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._targets: tuple[torch.Tensor, ...] = ()
        self._event: Event | None = None
        self._finaliser = _finaliser(self, engine.arena.abandon, buffers)

    @property
    def host_bytes(self) -> int:
        """What it holds in host memory, without the size classes' surplus."""
        return sum(buffer.num_bytes for buffer in self._buffers)

    @property
    def returning(self) -> tuple[torch.Tensor, ...]:
        """The tensors that are being copied back and that nobody has read yet."""
        return self._tensors if self._state == "back" else ()

    def reload(self) -> None:
        """Start copying back into new device memory. Once only."""
        assert self._state != "dropped", "RELOAD of offloaded tensors that were dropped"
        assert self._state == "out", "a second RELOAD of the same offloaded tensors"
        self._targets, self._event = self._engine.copy_back(self._buffers)
        self._finaliser.detach()
        self._finaliser = _finaliser(self, self._engine.let_go, self._targets)
        self._buffers = ()
        self._tensors = tuple(
            rebuild(form, self._targets, self._engine.device.torch_device) for form in self._packing.forms
        )
        self._state = "back"

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors, in the order given to `offload`, with sizes, strides, values and sharing as
        they were.

        They live as long as this object or the caller's references, so drop this object to free
        them one by one. The current stream waits for the copy. It must be the one that was current
        at `reload`; another stream that reads them has to be told so with `record_stream`, as for
        any tensor.
        """
        assert self._state != "out", "offloaded tensors were read before their RELOAD"
        assert self._state != "dropped", "offloaded tensors were read after they were dropped"
        if self._state == "back":
            assert self._event is not None
            self._finaliser.detach()
            self._engine.wait_for(self._event)
            self._targets = ()
            self._state = "read"
        return self._tensors

    def drop(self) -> None:
        """Forget the tensors, in whichever state and with copies still running; for a step that
        ends early. May be repeated."""
        if self._state == "out":
            for buffer in self._buffers:
                self._engine.arena.give_back(buffer)
        elif self._state == "back":
            self._engine.let_go(self._targets)
        self._finaliser.detach()
        self._buffers = self._targets = self._tensors = ()
        self._state = "dropped"


def _finaliser(
    owner: Offloaded, function: Callable[..., object], *arguments: object
) -> weakref.finalize[..., Any]:
    finaliser = weakref.finalize(owner, function, *arguments)
    finaliser.atexit = False
    return finaliser
