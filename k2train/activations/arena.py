"""Host buffers for offloaded activations, by size class, reused from step to step.

Locking memory for copy engines takes milliseconds and stops the device's queue, so it must not
happen in mid-step: `reserve` makes the buffers that the schedule predicts, and a step then only
takes and gives back.

A buffer may be given back while a copy that reads or writes it is still queued. It carries that
copy's event (`ready`), and whoever takes it next makes their own copy wait for it. The alternative,
to poll the event and hand the buffer out only when it has come, would make the number of buffers
depend on how fast the device happens to be; this way it follows from the order of calls alone,
which is the schedule. The oldest free buffer goes first, so its event has mostly come.

Sizes are bytes. Everything here is called from one thread, `abandon` excepted.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping

from k2train.config.errors import ConfigError
from k2train.device.protocol import Device, Event, HostPages

SMALLEST_BYTES = 512


class HostMemoryError(ConfigError):
    """Offloaded activations do not fit into host memory.

    asked_bytes: what was to be taken; used_bytes: what was in use; limit_bytes: what may be, None
    where the system itself refused.
    """

    def __init__(self, asked_bytes: int, used_bytes: int, limit_bytes: int | None) -> None:
        self.asked_bytes = asked_bytes
        self.used_bytes = used_bytes
        self.limit_bytes = limit_bytes
        limit = "the system gives no more" if limit_bytes is None else f"the limit is {limit_bytes:,}"
        super().__init__(
            "activations",
            "offload",
            f"{asked_bytes:,} bytes of host memory were asked for, {used_bytes:,} are in use and {limit}",
            "keep or recompute some activations instead of offloading them, store them as fp8_offload, or have fewer or "
            "smaller microbatches in flight",
        )

    def _arguments(self) -> tuple[object, ...]:
        return self.asked_bytes, self.used_bytes, self.limit_bytes


def class_bytes(num_bytes: int, smallest: int = SMALLEST_BYTES) -> int:
    """The size class of a request: four for each power of two, all multiples of `smallest`.

    A class exceeds the request by less than a quarter of the request, or by less than `smallest`
    where that is more.
    """
    assert num_bytes > 0, "nothing to take"
    step = max(smallest, 1 << max(0, (num_bytes - 1).bit_length() - 3))
    return -(-num_bytes // step) * step


class _Block:
    """A piece of host memory of a class, and the event of the last copy that touched it."""

    def __init__(self, pages: HostPages) -> None:
        self.pages = pages
        self.num_bytes = pages.bytes.numel()
        self.ready: Event | None = None


class HostBuffer:
    """A block while somebody has it. Every take makes a new one, so that an old one cannot give
    back the new holder's."""

    def __init__(self, block: _Block, num_bytes: int) -> None:
        self._block = block
        self.num_bytes = num_bytes
        self.bytes = block.pages.bytes[:num_bytes]

    @property
    def class_bytes(self) -> int:
        """What it occupies, at least `num_bytes`."""
        return self._block.num_bytes

    @property
    def ready(self) -> Event | None:
        """The event of the last copy from or to it, which the next copy has to wait for; None where
        there was none."""
        return self._block.ready

    @ready.setter
    def ready(self, event: Event) -> None:
        self._block.ready = event


class HostArena:
    """Buffers of host memory.

    device: whose copies are to reach them. limit_bytes: the most that is allocated at once, None
    for no limit.
    """

    def __init__(self, device: Device, limit_bytes: int | None = None) -> None:
        self._device = device
        self._smallest = max(SMALLEST_BYTES, device.page_bytes)
        self._limit_bytes = limit_bytes
        self._free: dict[int, deque[_Block]] = {}
        self._taken: dict[HostBuffer, _Block] = {}
        self._abandoned: deque[HostBuffer] = deque()
        self._allocated_bytes = 0
        self._used_bytes = 0
        self._peak_bytes = 0
        self.num_allocations = 0
        """Pieces of memory asked of the system so far; a step for which enough was reserved adds
        none."""

    @property
    def used_bytes(self) -> int:
        """Taken and not given back, counted by class."""
        self._settle()
        return self._used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most `used_bytes` since the arena was made or `reset_peak` called."""
        return self._peak_bytes

    @property
    def allocated_bytes(self) -> int:
        """Used and free together."""
        return self._allocated_bytes

    def reset_peak(self) -> None:
        """Start measuring `peak_bytes` again, from what is in use now."""
        self._peak_bytes = self.used_bytes

    def take(self, num_bytes: int) -> HostBuffer:
        """A buffer of at least `num_bytes` (> 0), contents undefined. Raises HostMemoryError."""
        self._settle()
        size = class_bytes(num_bytes, self._smallest)
        free = self._free.get(size)
        block = free.popleft() if free else self._allocate(size, keep={})
        buffer = HostBuffer(block, num_bytes)
        self._taken[buffer] = block
        self._used_bytes += size
        self._peak_bytes = max(self._peak_bytes, self._used_bytes)
        return buffer

    def give_back(self, buffer: HostBuffer) -> None:
        """The end of a take. Copies may still be queued, if `buffer.ready` is the event of the last
        of them."""
        block = self._taken.pop(buffer, None)
        assert block is not None, "a host buffer was given back twice, or to an arena that did not lend it"
        self._used_bytes -= block.num_bytes
        self._free.setdefault(block.num_bytes, deque()).append(block)

    def abandon(self, buffers: Iterable[HostBuffer]) -> None:
        """Give back from a finaliser, which may run in the middle of any other call and in any
        thread."""
        self._abandoned.extend(buffers)

    def reserve(self, counts: Mapping[int, int]) -> None:
        """Have free, for each size in bytes, at least so many buffers. Raises HostMemoryError, over
        the limit before it starts."""
        self._settle()
        wanted: Counter[int] = Counter()
        for num_bytes, count in counts.items():
            wanted[class_bytes(num_bytes, self._smallest)] += count
        total = sum(size * count for size, count in wanted.items())
        if self._limit_bytes is not None and self._used_bytes + total > self._limit_bytes:
            raise HostMemoryError(total, self._used_bytes, self._limit_bytes)
        for size, count in wanted.items():
            free = self._free.setdefault(size, deque())
            while len(free) < count:
                free.append(self._allocate(size, keep=wanted))

    def release_free(self) -> None:
        """Give every free buffer back to the system."""
        self._settle()
        self._make_room(self._allocated_bytes, keep={})

    def _settle(self) -> None:
        while self._abandoned:
            self.give_back(self._abandoned.popleft())

    def _allocate(self, size: int, keep: Mapping[int, int]) -> _Block:
        if self._limit_bytes is not None:
            self._make_room(self._allocated_bytes + size - self._limit_bytes, keep)
            if self._allocated_bytes + size > self._limit_bytes:
                raise HostMemoryError(size, self._used_bytes, self._limit_bytes)
        try:
            block = _Block(self._device.pages(size))
        # Torch's allocator and CUDA raise RuntimeError.
        except (OSError, MemoryError, RuntimeError) as error:
            raise HostMemoryError(size, self._used_bytes, None) from error
        self._allocated_bytes += size
        self.num_allocations += 1
        return block

    def _make_room(self, missing_bytes: int, keep: Mapping[int, int]) -> None:
        """Give free buffers back to the system, the largest first, until `missing_bytes` are gained
        or none is left.

        keep: how many free ones of a class have to stay.
        """
        for size in sorted(self._free, reverse=True):
            free = self._free[size]
            while missing_bytes > 0 and len(free) > keep.get(size, 0):
                free.popleft()
                self._allocated_bytes -= size
                missing_bytes -= size
