"""Watches a program run on tensors without memory: what it launches, what is alive, and where it
was at its fullest.

One `Observer` is a dispatch mode of torch, so it sees every operation below autograd. Storages are
followed by weak references (`device.living`). torch's allocator hands memory out again only when
every stream that uses it has passed; so memory whose last reference has gone, but which another
stream may still be using, is occupied on. Where the program is at a moment is a place,
"F/attention": the kind of action, and the phase of the model within it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from k2train.device.living import Birth, LivingStorages
from k2train.device.rehearsed import RehearsedDevice
from k2train.rehearsal.operations import Work, measure
from k2train.rehearsal.source import package_line

# A new peak is looked into only where it exceeds the last one looked into by this share: looking
# takes time.
_WORTH_LOOKING = 1.002
OFFLOADS = "offload"
"""The stream of copies out (activations/offload.py)."""


@dataclasses.dataclass(frozen=True)
class Living:
    """A storage that is alive, the line of the package that made it, the number of the action
    during which it did, the stream it belongs to and the others that have used it."""

    birth: Birth
    line: str
    number: int
    stream: str
    users: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Tally:
    """Launches of one operation at one place."""

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Peak:
    """The fullest moment so far. number: of the action it came in; in_use_bytes: without
    references, but perhaps in use."""

    num_bytes: int = 0
    place: str = ""
    number: int = -1
    in_use_bytes: int = 0
    alive: tuple[Living, ...] = ()


class MemoryEvent(NamedTuple):
    """For the allocator: a storage is made (num_bytes > 0) or its memory can be used again (0)."""

    serial: int
    num_bytes: int
    stream: str


class Observer(LivingStorages):
    """Counts and remembers; changes nothing. Entered inside the mode that makes tensors fake;
    follows the device's tensors."""

    def __init__(self, device: RehearsedDevice) -> None:
        super().__init__(lambda tensor: tensor.device == device.torch_device)
        self.device = device
        self.number = -1
        self.work: dict[tuple[str, str], dict[Work, Tally]] = collections.defaultdict(dict)
        self.bytes_alive = 0
        self.peak = Peak()
        self.levels: list[tuple[str, int, int]] = []
        self.memory_events: list[MemoryEvent] = []
        self._alive: dict[int, Living] = {}
        self._in_use: list[tuple[Living, int]] = []
        self._highest = self._looked_at = self._in_use_bytes = 0
        self._seen: tuple[Living, ...] = ()
        device.on_use = self._used
        device.clock, device.on_host_wait = lambda: len(self.memory_events), self._host_waited

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        work = measure(func, args, kwargs or {}, result)
        if work is not None:
            tally = self.work[self.place, self.device.current.name].setdefault(work, Tally())
            tally.launches += 1
            tally.flops += work.flops
            tally.bytes += work.bytes
        return result

    @property
    def occupied(self) -> int:
        """Bytes that the allocator cannot hand out."""
        return self.bytes_alive + self._in_use_bytes

    @property
    def alive(self) -> tuple[Living, ...]:
        """What is alive now, oldest first."""
        return tuple(self._alive.values())

    def forget_peak(self) -> None:
        """Begin to look for a peak anew, from what is alive now."""
        self.peak, self._highest, self._looked_at = Peak(), self.occupied, 0

    def forget_work(self) -> None:
        """Count launches and waits of the host anew."""
        self.work.clear()
        self.device.host_waits.clear()

    def watch(self, steps: Iterable[Any], kind: Callable[[Any], str]) -> Iterator[Any]:
        """The steps of an action list, one after the other; the level of memory is noted after
        each."""
        for number, step in enumerate(steps):
            self.number, self._highest = number, self.occupied
            with self.at(kind(step)):
                yield step
            self.levels.append((str(step), self.occupied, self._highest))
        self.number = -1

    def made(self, birth: Birth) -> None:
        stream = self.device.current.name
        self._alive[birth.key] = Living(birth, package_line(), self.number, stream)
        self.bytes_alive += birth.num_bytes
        self._highest = max(self._highest, self.occupied)
        self.memory_events.append(MemoryEvent(birth.serial, max(birth.num_bytes, 1), stream))
        if self.occupied > self.peak.num_bytes:
            self._note_peak()

    def gone(self, birth: Birth) -> None:
        living = self._alive.pop(birth.key)
        self.bytes_alive -= birth.num_bytes
        if living.users:
            self._in_use.append((living, len(self.memory_events)))
            self._in_use_bytes += birth.num_bytes
        else:
            self.memory_events.append(MemoryEvent(birth.serial, 0, ""))

    def _host_waited(self, what: str, moment: int) -> None:
        """Streams have passed what was let go before that moment.

        A route is read on the exchange's stream and says nothing of copies out; the end of a
        compute step does, since a copy takes less than a step (docs/plan.md), and so does the end
        of everything.
        """
        copies, kept = what != "route", []
        for living, since in self._in_use:
            if since > moment or (OFFLOADS in living.users and not copies):
                kept.append((living, since))
                continue
            self._in_use_bytes -= living.birth.num_bytes
            self.memory_events.append(MemoryEvent(living.birth.serial, 0, ""))
        self._in_use = kept

    def _note_peak(self) -> None:
        if self.occupied > _WORTH_LOOKING * self._looked_at:
            self._seen, self._looked_at = self.alive, self.occupied
        self.peak = Peak(self.occupied, self.place, self.number, self._in_use_bytes, self._seen)

    def _used(self, tensor: torch.Tensor, stream: str) -> None:
        birth = self.birth_of(tensor)
        living = None if birth is None else self._alive.get(birth.key)
        if living is not None and stream != living.stream:
            living.users.add(stream)
