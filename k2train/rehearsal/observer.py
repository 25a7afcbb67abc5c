"""Watches a program run on tensors without memory: what it launches, what is alive, and where it was at its fullest.

One `Observer` is a dispatch mode of torch, so it sees every operation below autograd, with the tensors that it makes. A
storage lives from the operation that made it until its last reference goes, which a weak reference tells; no book is kept
by hand. Where the program is at a moment is a place: the step of the action list and the phase of the model within it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from k2train.device.rehearsed import RehearsedDevice
from k2train.rehearsal.operations import Work, measure
from k2train.rehearsal.source import package_line

# A new peak is looked into only where it exceeds the last one looked into by this share: looking takes time.
_WORTH_LOOKING = 1.002


class Place(NamedTuple):
    """Where the program is. kind: of the action (F, I, W, OFFLOAD, ...), or "states", "update"; phase: within it."""

    kind: str
    phase: str = ""


@dataclasses.dataclass(frozen=True)
class Birth:
    """A storage that is alive. serial: its number among all; line: of the package, that made it; number: of the action
    during which it did."""

    serial: int
    num_bytes: int
    place: Place
    operation: str
    line: str
    number: int


@dataclasses.dataclass
class Tally:
    """Launches of one operation at one place."""

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Peak:
    """The fullest moment so far. number: of the action it came in."""

    num_bytes: int = 0
    place: Place = Place("states")
    number: int = -1
    alive: tuple[Birth, ...] = ()


class MemoryEvent(NamedTuple):
    """For the allocator: a storage made (num_bytes > 0), let go (0), used by another stream (-1), or a host wait (serial
    -1)."""

    serial: int
    num_bytes: int
    stream: str


class Observer(TorchDispatchMode):
    """Counts and remembers; changes nothing. Entered inside the mode that makes tensors fake."""

    def __init__(self, device: RehearsedDevice) -> None:
        super().__init__()
        self.device = device
        self.place = Place("states")
        self.number = -1
        self.work: dict[tuple[Place, str], dict[Work, Tally]] = collections.defaultdict(dict)
        self.alive: dict[int, Birth] = {}
        self.bytes_alive = 0
        self.peak = Peak()
        self.levels: list[tuple[str, int, int]] = []
        self.memory_events: list[MemoryEvent] = []
        self._highest = self._looked_at = self._serial = 0
        self._seen: tuple[Birth, ...] = ()
        device.on_use = self._used
        device.on_host_wait = lambda: self.memory_events.append(MemoryEvent(-1, 0, ""))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        work = measure(func, args, kwargs or {}, result)
        stream = self.device.current.name
        if work is not None:
            tally = self.work[self.place, stream].setdefault(work, Tally())
            tally.launches += 1
            tally.flops += work.flops
            tally.bytes += work.bytes
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
                self._made(leaf, func.overloadpacket.__name__, stream)
        return result

    @contextlib.contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """What is done inside happens at `place`."""
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before

    def forget_peak(self) -> None:
        """Begin to look for a peak anew, from what is alive now."""
        self.peak, self._highest, self._looked_at = Peak(), self.bytes_alive, 0

    def forget_work(self) -> None:
        """Count launches and waits of the host anew."""
        self.work.clear()
        self.device.host_waits.clear()

    def watch(self, steps: Iterable[Any], kind: Callable[[Any], str]) -> Iterator[Any]:
        """The steps of an action list, one after the other; the level of memory is noted after each."""
        for number, step in enumerate(steps):
            self.number, self._highest = number, self.bytes_alive
            with self.at(Place(kind(step))):
                yield step
            self.levels.append((str(step), self.bytes_alive, self._highest))
        self.number = -1

    def _made(self, tensor: torch.Tensor, operation: str, stream: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        num_bytes = storage.nbytes()
        birth = Birth(self._serial, num_bytes, self.place, operation, package_line(), self.number)
        self.alive[key], self._serial = birth, self._serial + 1
        weakref.finalize(storage, self._gone, key)
        self.bytes_alive += num_bytes
        self._highest = max(self._highest, self.bytes_alive)
        self.memory_events.append(MemoryEvent(birth.serial, max(num_bytes, 1), stream))
        if self.bytes_alive > self.peak.num_bytes:
            self._note_peak()

    def _note_peak(self) -> None:
        if self.bytes_alive > _WORTH_LOOKING * self._looked_at:
            self._seen, self._looked_at = tuple(self.alive.values()), self.bytes_alive
        self.peak = Peak(self.bytes_alive, self.place, self.number, self._seen)

    def _gone(self, key: int) -> None:
        birth = self.alive.pop(key)
        self.bytes_alive -= birth.num_bytes
        self.memory_events.append(MemoryEvent(birth.serial, 0, ""))

    def _used(self, tensor: torch.Tensor, stream: str) -> None:
        birth = self.alive.get(tensor.untyped_storage()._cdata)
        if birth is not None:
            self.memory_events.append(MemoryEvent(birth.serial, -1, stream))
