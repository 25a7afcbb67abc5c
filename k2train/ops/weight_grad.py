"""Weight gradients: taken at once or put off into the queue that the W action drains, and the sinks they end in.

A linear layer's backward has two products. The input gradient is on the critical path of the pipeline, the weight
gradient is not (zero-bubble pipelines, arXiv 2401.10241; K2 puts it beside the pipeline's sends, K2 report section
2.4.2). So the input gradient is computed at once and what the weight gradient needs is queued under the (virtual_stage,
microbatch) it belongs to. Draining accumulates in FP32 (FP64 for float64 parameters).
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Protocol

import torch

from k2train.ops.dtypes import accumulation_dtype

Key = tuple[int, int]


class GradientSink(Protocol):
    """Where weight gradients end: it adds `gradient` (any float type) into an FP32 or FP64 buffer of `parameter`."""

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None: ...


class BufferedSink(abc.ABC):
    """A GradientSink whose buffer has the parameter's own shape, so that products accumulate in it with no temporary."""

    @abc.abstractmethod
    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add `gradient` into the parameter's buffer."""

    @abc.abstractmethod
    def buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter's accumulation buffer: same shape, FP32 (FP64 for float64), to be added into in place."""


class PlainGradients(BufferedSink):
    """One dense buffer a parameter, made at its first use. The reference sink, for one rank and for tests."""

    def __init__(self) -> None:
        self.buffers: dict[torch.Tensor, torch.Tensor] = {}

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        self.buffer(parameter).add_(gradient)

    def buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        found = self.buffers.get(parameter)
        if found is None:
            found = torch.zeros_like(
                parameter, dtype=accumulation_dtype(parameter.dtype), requires_grad=False
            )
            self.buffers[parameter] = found
        return found

    def zero(self) -> None:
        """Set every buffer to zero, keeping the memory."""
        for buffer in self.buffers.values():
            buffer.zero_()


class WeightGradEntry(Protocol):
    """One put-off weight gradient."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors it keeps alive."""
        ...

    def accumulate(self, sink: GradientSink) -> None:
        """Compute the gradient and add it to the sink."""
        ...


class WeightGradQueue:
    """Put-off weight gradients by (virtual_stage, microbatch). Must be empty at the end of a step."""

    def __init__(self) -> None:
        self._entries: dict[Key, list[WeightGradEntry]] = {}

    def put(self, key: Key, entry: WeightGradEntry) -> None:
        self._entries.setdefault(key, []).append(entry)

    def slot(self, key: Key) -> Later:
        """The queue seen by one microbatch of one virtual stage."""
        return Later(self, key)

    def drain(self, key: Key, sink: GradientSink) -> int:
        """Accumulate every entry of `key` into the sink, in the order they came; returns how many there were."""
        entries = self._entries.pop(key, [])
        entries.reverse()
        count = len(entries)
        with torch.no_grad():
            while entries:
                # Popped before the next one is computed, so that its activations are freed one by one.
                entries.pop().accumulate(sink)
        return count

    def keys(self) -> tuple[Key, ...]:
        """The keys that still hold entries."""
        return tuple(self._entries)

    @property
    def empty(self) -> bool:
        return not self._entries

    def clear(self) -> None:
        """Drop everything, after an interrupted step."""
        self._entries.clear()

    def num_bytes(self, key: Key | None = None) -> int:
        """Bytes of the storages the queue keeps alive, each counted once; of one key, or of all."""
        keys = self._entries if key is None else (key,)
        storages = {}
        for entry in (entry for one in keys for entry in self._entries.get(one, ())):
            for tensor in entry.tensors:
                storage = tensor.untyped_storage()
                storages[id(storage)] = storage.nbytes()
        return sum(storages.values())


class WeightGradSlot(Protocol):
    """Where linear layers put their weight gradients in the backward."""

    def put(self, entry: WeightGradEntry) -> None: ...


@dataclasses.dataclass(frozen=True)
class Later:
    """A WeightGradQueue bound to one key."""

    queue: WeightGradQueue
    key: Key

    def put(self, entry: WeightGradEntry) -> None:
        self.queue.put(self.key, entry)


@dataclasses.dataclass(frozen=True)
class AtOnce:
    """No delay: the output's gradient is still in a cache, and nothing is kept. Backward passes run without gradients."""

    sink: GradientSink

    def put(self, entry: WeightGradEntry) -> None:
        entry.accumulate(self.sink)


def add_product(sink: GradientSink, weight: torch.Tensor, dy_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
    """Add dy^T x, the weight gradient (O, I) of a linear layer, in the sink's precision."""
    if isinstance(sink, BufferedSink):
        add_product_into(sink.buffer(weight), dy_TO, x_TI)
    else:
        wide = accumulation_dtype(weight.dtype)
        sink.add(weight, torch.mm(dy_TO.t().to(wide), x_TI.to(wide)))


def add_product_into(buffer_OI: torch.Tensor, dy_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
    """buffer += dy^T x without rounding the product below the buffer's type."""
    wide = buffer_OI.dtype
    if dy_TO.is_cuda and dy_TO.dtype == x_TI.dtype and wide == torch.float32 != x_TI.dtype:
        # Tensor cores accumulate in FP32 anyway; asking for that output type costs nothing.
        buffer_OI.add_(torch.mm(dy_TO.t(), x_TI, out_dtype=wide))
    elif dy_TO.dtype == x_TI.dtype == wide:
        buffer_OI.addmm_(dy_TO.t(), x_TI)
    else:
        buffer_OI.addmm_(dy_TO.t().to(wide), x_TI.to(wide))
