"""Copies between host and device memory, in order, beside the computation.

A lane makes its copies one after the other. A copy waits for the moments it is given and gives the moment at which it is
done; the computation and the host wait for moments only where they are told to. On CUDA lanes are streams and moments
are events. On a CPU there is one memory and no stream, so a copy happens at once and every moment has already passed;
whoever uses lanes is the same code on both.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

# A point in time that copies, the computation and the host can wait for; None has already passed.
Moment = Any


class Lane(Protocol):
    """Copies in one direction."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: Moment) -> Moment:
        """Copy once every `after` has passed and this lane's earlier copies are done; the moment at which it is done.

        Neither tensor may be freed or used otherwise before that: the memory allocator does not know of the lane.
        """

    def finish(self) -> None:
        """Let the host wait for every copy of this lane."""


class Copies(Protocol):
    """Lanes, and waiting for them."""

    def lane(self) -> Lane:
        """A new lane."""

    def now(self) -> Moment:
        """The moment at which everything computed so far is done."""

    def compute_after(self, moment: Moment) -> None:
        """What is computed from now on comes after `moment`."""

    def host_after(self, moment: Moment) -> None:
        """Return when `moment` has passed."""


class ImmediateCopies:
    """For a CPU: every copy is done when it returns."""

    def lane(self) -> Lane:
        return _ImmediateLane()

    def now(self) -> Moment:
        return None

    def compute_after(self, moment: Moment) -> None:
        """Has passed."""

    def host_after(self, moment: Moment) -> None:
        """Has passed."""


class _ImmediateLane:
    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: Moment) -> Moment:
        target.copy_(source)

    def finish(self) -> None:
        """Is done."""


class CudaCopies:
    """Streams and events of one device. Host tensors must be pinned, or copies wait for the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def lane(self) -> Lane:
        return _CudaLane(torch.cuda.Stream(self._device))

    def now(self) -> Moment:
        return torch.cuda.current_stream(self._device).record_event()

    def compute_after(self, moment: Moment) -> None:
        if moment is not None:
            torch.cuda.current_stream(self._device).wait_event(moment)

    def host_after(self, moment: Moment) -> None:
        if moment is not None:
            moment.synchronize()


class _CudaLane:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def copy(self, target: torch.Tensor, source: torch.Tensor, *after: Moment) -> Moment:
        for moment in after:
            if moment is not None:
                self._stream.wait_event(moment)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def finish(self) -> None:
        self._stream.synchronize()


def copies_for(device: torch.device) -> Copies:
    """How a device and its host copy."""
    return CudaCopies(device) if device.type == "cuda" else ImmediateCopies()
