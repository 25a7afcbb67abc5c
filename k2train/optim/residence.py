"""Where optimizer states live from step to step: on the device, or in host memory.

Host states pass through three slots of device memory. While one matrix (or batch of equal ones) is
updated in its slot, the next is copied in and the last copied out, so the bus is busy both ways and
nothing waits for it alone:

    slot 0   in 0 | update 0 | out 0  |  in 3  | update 3
    slot 1        |   in 1   | update 1 | out 1 | in 4
    slot 2                   |  in 2  | update 2 | out 2

The three slots are all that host-resident states hold on the device. Elementwise updates (AdamW)
need no device: their gradients come to the host in bounded pieces, two buffers in turn, and the CPU
updates states where they lie. Why the two ways: docs/decisions/0008-host-states.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from k2train.config.errors import ConfigError
from k2train.device.protocol import Device, Event, HostPages
from k2train.layout.staging import NUM_SLOTS

T = TypeVar("T")


class Residence(Protocol):
    """What optimizer states need from the place they live in."""

    @property
    def on_host(self) -> bool: ...

    @property
    def staging(self) -> list[torch.Tensor]:
        """Device memory that states pass through; none where they live there."""

    def new_state(self, num_elements: int) -> torch.Tensor:
        """Memory for a flat state, zero."""

    def stream(self, batches: Sequence[tuple[torch.Tensor, ...]]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Each batch's tensors in turn, on the device, to be changed in place.

        Changes are kept in the states.
        """

    def upload(self, state: torch.Tensor) -> Iterator[torch.Tensor]:
        """A flat state's consecutive pieces on the device, to be read."""

    def gradients(self, gradient: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """A flat device tensor's consecutive pieces where the states are.

        A piece is good until the next is asked for.
        """

    def drain(self) -> None:
        """Return when no copy from or to a state is under way.

        Then the host may read and write states.
        """


class OnDevice:
    """States beside the gradients; nothing is ever copied."""

    on_host = False

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like

    @property
    def staging(self) -> list[torch.Tensor]:
        return []

    def new_state(self, num_elements: int) -> torch.Tensor:
        return self._like.new_zeros(num_elements)

    def stream(self, batches: Sequence[tuple[torch.Tensor, ...]]) -> Iterator[tuple[torch.Tensor, ...]]:
        return iter(batches)

    def upload(self, state: torch.Tensor) -> Iterator[torch.Tensor]:
        yield state

    def gradients(self, gradient: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        yield slice(0, gradient.numel()), gradient

    def drain(self) -> None:
        """Nothing is under way."""


@dataclasses.dataclass
class _Buffer:
    """Flat memory for one thing in transit. free: when it may be filled again."""

    memory: torch.Tensor
    free: Event | None = None


@dataclasses.dataclass(frozen=True)
class _Staged:
    """Tensors in a buffer, and their way home. ready: when they have arrived."""

    buffer: _Buffer
    tensors: tuple[torch.Tensor, ...]
    home: tuple[torch.Tensor, ...]
    ready: Event


class OnHost:
    """States in host memory that the device's copies can reach by themselves.

    like: a tensor with the type of the states, on the device they are streamed to.
    slot_elements: entries of the largest batch that will be streamed (all its tensors together).
    piece_elements: entries of a gradient that come to the host at once; 0 where none ever does.
    """

    on_host = True

    def __init__(self, device: Device, like: torch.Tensor, slot_elements: int, piece_elements: int) -> None:
        self._device, self._like = device, like
        # New device memory may be what a computation under way has just given back.
        self._slots = [
            _Buffer(like.new_empty(slot_elements), device.current.record()) for _ in range(NUM_SLOTS)
        ]
        self._turns = itertools.cycle(self._slots)
        self._pages: list[HostPages] = []  # states are views of these
        self._pieces = [self.new_state(piece_elements) for _ in range(2)]
        self._inward, self._outward = device.stream("states in"), device.stream("states out")
        self._gradients = device.stream("gradients out")
        self._stored: Event | None = None

    @property
    def staging(self) -> list[torch.Tensor]:
        """The slots' memory, flat."""
        return [slot.memory for slot in self._slots]

    def new_state(self, num_elements: int) -> torch.Tensor:
        """Raises ConfigError where the system locks no more memory."""
        if num_elements == 0:
            return torch.zeros(0, dtype=self._like.dtype)
        num_bytes = num_elements * self._like.element_size()
        try:
            pages = self._device.pages(num_bytes)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                "optim.states",
                "host",
                f"the system locks no {num_bytes:,} bytes of host memory: {error}",
                "set optim.states=device, use more nodes, or raise the limit on locked memory",
            ) from error
        self._pages.append(pages)
        return pages.bytes.view(self._like.dtype)

    def stream(self, batches: Sequence[tuple[torch.Tensor, ...]]) -> Iterator[tuple[torch.Tensor, ...]]:
        for staged in _one_ahead(map(self._load, batches)):
            self._device.current.wait(staged.ready)
            yield staged.tensors
            self._store(staged)

    def upload(self, state: torch.Tensor) -> Iterator[torch.Tensor]:
        stored = self._stored
        pieces = ((piece,) for piece in state.split(max(1, self._slots[0].memory.numel())))
        for staged in _one_ahead(self._load(piece, stored) for piece in pieces):
            self._device.current.wait(staged.ready)
            yield staged.tensors[0]
            staged.buffer.free = self._device.current.record()

    def gradients(self, gradient: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        turns = itertools.cycle(self._pieces)
        self._gradients.wait(self._device.current.record())
        size = max(1, self._pieces[0].numel())

        def fetch(start: int) -> tuple[slice, torch.Tensor, Event]:
            # The host asks for the next piece when it has done with the last but one, whose buffer
            # this is.
            part = slice(start, min(start + size, gradient.numel()))
            arrived = next(turns)[: part.stop - part.start]
            self._gradients.copy(arrived, gradient[part])
            return part, arrived, self._gradients.record()

        for part, arrived, ready in _one_ahead(map(fetch, range(0, gradient.numel(), size))):
            ready.wait_host()
            yield part, arrived

    def drain(self) -> None:
        for stream in (self._inward, self._outward, self._gradients):
            stream.wait_host()

    def _load(self, home: tuple[torch.Tensor, ...], after: Event | None = None) -> _Staged:
        buffer = next(self._turns)
        sizes = [tensor.numel() for tensor in home]
        assert sum(sizes) <= buffer.memory.numel(), (
            f"{sum(sizes)} entries in a slot of {buffer.memory.numel()}"
        )
        flat = buffer.memory[: sum(sizes)].split(sizes)
        tensors = tuple(part.view(tensor.shape) for part, tensor in zip(flat, home, strict=True))
        self._inward.wait(buffer.free, after)
        for target, source in zip(tensors, home, strict=True):
            self._inward.copy(target, source)
        return _Staged(buffer, tensors, home, self._inward.record())

    def _store(self, staged: _Staged) -> None:
        self._outward.wait(self._device.current.record())
        for target, source in zip(staged.home, staged.tensors, strict=True):
            self._outward.copy(target, source)
        staged.buffer.free = self._stored = self._outward.record()


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each given out when the next has been made.

    So the next one's copy begins before this one's work.
    """
    sentinel = object()
    for item, _ in itertools.pairwise(itertools.chain(items, [sentinel])):
        yield item  # type: ignore[misc]
