"""Weight gradients: taken at once or put off into the queue that the W action drains, and the sinks
they end in.

A linear layer's backward has two products. The input gradient is on the critical path of the
pipeline, the weight gradient is not (zero-bubble pipelines, arXiv 2401.10241; K2 puts it beside the
pipeline's sends, K2 report section 2.4.2). So the input gradient is computed at once and what the
weight gradient needs is queued under the (virtual_stage, microbatch) it belongs to.

Draining sums in FP32 (FP64 for float64 parameters). Where the products are BF16, each is added to
the sum by the kernel that computes it: no gradient of one microbatch is ever written, in any type
(`add_product_into`).

Letters: T tokens, I input and O output features, N rows, C columns of a part of I.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from k2train.ops import bf16_products
from k2train.ops.dtypes import accumulation_dtype, cast

Key = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class RowRun:
    """Rows [first, last) of one matrix of a parameter, and the buffer that their gradients are
    summed in.

    matrix: which one, where the parameter is a stack of matrices (L, O, I); 0 where it is one (O,
    I). buffer: (last - first, I), contiguous, FP32 (FP64 for float64 parameters), to be added into
    in place.
    """

    matrix: int
    first: int
    last: int
    buffer: torch.Tensor


class GradientSink(Protocol):
    """Where weight gradients end: FP32 or FP64 sums for every parameter. All of it is local to the
    rank."""

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a whole gradient, of any floating type."""
        ...

    def runs(self, parameter: torch.Tensor) -> Sequence[RowRun]:
        """The sums of a matrix, or of a stack of matrices, for products to be added to in place.

        In order, covering every row once. A matrix is one run, or several where its rows have
        different owners.
        """
        ...

    def add_rows(
        self, parameter: torch.Tensor, rows_N: torch.Tensor, gradient_NC: torch.Tensor, first_column: int = 0
    ) -> None:
        """Add to columns [first_column, first_column + C) of some rows of a matrix, in the type of
        its sums.

        A row may occur twice. On CUDA its sum then depends on the order of two additions, which is
        not fixed, unless all but one of them add zero.
        """
        ...


class PlainGradients:
    """One dense buffer a parameter, made at its first use. The reference sink, for one rank and for
    tests."""

    def __init__(self) -> None:
        self.buffers: dict[torch.Tensor, torch.Tensor] = {}
        self._runs: dict[torch.Tensor, tuple[RowRun, ...]] = {}

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        self.buffer(parameter).add_(gradient)

    def runs(self, parameter: torch.Tensor) -> tuple[RowRun, ...]:
        """One run a matrix."""
        found = self._runs.get(parameter)
        if found is None:
            rows, inner = parameter.shape[-2:]
            matrices = self.buffer(parameter).view(-1, rows, inner).unbind(0)
            found = tuple(RowRun(index, 0, rows, matrix) for index, matrix in enumerate(matrices))
            self._runs[parameter] = found
        return found

    def add_rows(
        self, parameter: torch.Tensor, rows_N: torch.Tensor, gradient_NC: torch.Tensor, first_column: int = 0
    ) -> None:
        columns_OC = self.buffer(parameter)[:, first_column : first_column + gradient_NC.shape[1]]
        columns_OC.index_add_(0, rows_N, gradient_NC)

    def buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter's sums, in its own shape."""
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
    """Put-off weight gradients by (virtual_stage, microbatch). Must be empty at the end of a
    step."""

    def __init__(self) -> None:
        self._entries: dict[Key, list[WeightGradEntry]] = {}

    def put(self, key: Key, entry: WeightGradEntry) -> None:
        self._entries.setdefault(key, []).append(entry)

    def slot(self, key: Key) -> Later:
        """The queue seen by one microbatch of one virtual stage."""
        return Later(self, key)

    def drain(self, key: Key, sink: GradientSink) -> int:
        """Accumulate every entry of `key` into the sink, in the order they came; returns how many
        there were."""
        entries = self._entries.pop(key, [])
        entries.reverse()
        count = len(entries)
        with torch.no_grad():
            while entries:
                # Popped before the next one is computed, so that its activations are freed one by
                # one.
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
        kept = (tensor.untyped_storage() for tensor in self.tensors(key))
        storages = {id(storage): storage.nbytes() for storage in kept}
        return sum(storages.values())

    def tensors(self, key: Key | None = None) -> Iterator[torch.Tensor]:
        """What it keeps alive; of one key, or of all. A tensor may come more than once."""
        for one in list(self._entries) if key is None else [key]:
            for entry in self._entries.get(one, ()):
                yield from entry.tensors


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
    """No delay: the output's gradient is still in a cache, and nothing is kept. Backward passes run
    without gradients."""

    sink: GradientSink

    def put(self, entry: WeightGradEntry) -> None:
        entry.accumulate(self.sink)


@dataclasses.dataclass(frozen=True)
class VectorWeightGrad:
    """The gradient of a norm's weight, which its backward has computed already; adding it to the
    sum is what waits.

    It comes in the type of the sums, so that nothing of a microbatch is rounded before it is added.
    """

    weight: torch.Tensor
    gradient: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.gradient,)

    def accumulate(self, sink: GradientSink) -> None:
        sink.add(self.weight, self.gradient)


def add_product(sink: GradientSink, weight: torch.Tensor, dy_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
    """Add dy^T x, the gradient of a weight (O, I), to its sums."""
    runs = sink.runs(weight)
    if len(runs) == 1 or dy_TO.is_cuda:
        for run in runs:
            add_product_into(run.buffer, dy_TO[:, run.first : run.last], x_TI)
    else:
        # One product and an addition a run: products of few rows are slow on a CPU.
        wide = runs[0].buffer.dtype
        sink.add(weight, torch.mm(cast(dy_TO.t(), wide), cast(x_TI, wide)))


def add_product_into(buffer_OI: torch.Tensor, dy_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
    """buffer += dy^T x, in place, without rounding the product below the buffer's type.

    dy may be FP32 where x is BF16, as the router's is: on CUDA three products of its BF16 parts are
    then the product exactly.
    """
    wide = buffer_OI.dtype
    if bf16_products.takes(dy_TO, x_TI, wide):
        for part_TO in bf16_products.bf16_parts(dy_TO, bf16_products.EXACT_PARTS):
            bf16_products.add_into(buffer_OI, part_TO.t(), x_TI)
    else:
        buffer_OI.addmm_(cast(dy_TO.t(), wide), cast(x_TI, wide))
