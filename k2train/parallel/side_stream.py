"""Work beside a device's main stream: an exchange in several steps goes on while the main stream computes.

On CUDA the work is issued to a stream of its own; on a CPU, which has none, it is done at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from k2train.model.dispatcher import Arrived, Pending, Tensors


class SideStream:
    """One stream of a device. What is issued to it runs in the order it was issued in."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, work: Callable[..., Tensors], inputs: Tensors, reads: Tensors = ()) -> Pending:
        """Start work(*inputs) behind what the current stream has been given so far. reads: what else it reads."""
        if self._stream is None:
            return Arrived(work(*inputs))
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            results = work(*inputs)
        for tensor in (*inputs, *reads):
            # The allocator must not hand the memory out again before the side stream has read it.
            tensor.record_stream(self._stream)
        return _Aside(results, self._stream.record_event())


@dataclasses.dataclass(frozen=True)
class _Aside:
    """Results that the side stream is still working on."""

    results: Tensors
    done: torch.cuda.Event

    def wait(self) -> Tensors:
        """The results, which the current stream may use from here on."""
        for tensor in self.results:
            current = torch.cuda.current_stream(tensor.device)
            current.wait_event(self.done)
            tensor.record_stream(current)
        return self.results
