"""Operations and how long they take: the roofline, max(FLOPs / rate, bytes / bandwidth), plus a fixed cost a kernel.

Three kinds of kernel, three achievable rates: matrix products, fused attention, and elementwise work that memory
bandwidth bounds. Rates and the shares of them that are reached come from the `cluster` config.
Source: Williams, Waterman, Patterson, "Roofline" (2009).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from k2train.config.sections import ClusterConfig, Dtype

ELEMENT_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of one number of the compute type."""
MATMUL_SLOWDOWN: dict[Dtype, float] = {"bfloat16": 1.0, "float32": 2.0, "float64": 16.0}
"""Matrix rate of BF16 over that of the type: TF32 runs at half of it on Hopper, FP64 at a fifteenth (H100 data sheet)."""

Kind = Literal["matmul", "attention", "elementwise"]


@dataclass(frozen=True)
class Op:
    """One kernel of a microbatch on one rank, forward. produces: the activation it writes, if it has a name."""

    name: str
    kind: Kind
    bytes: float
    flops: float = 0.0
    produces: str | None = None
    weight_elements: int = 0
    """Entries of the weight it multiplies by; 0 where there is none."""
    backward_flops: float | None = None
    """FLOPs of the input gradient; None where they equal the forward's."""
    backward_bytes: float | None = None
    """Bytes that the input gradient moves; None for the usual multiple of the forward's."""
    extra_flops: float = 0.0
    """FLOPs of the forward that the model itself does not need: they take time and count for no utilisation."""
    relative_speed: float = 1.0
    """Share of what its kind reaches on the cluster."""
    queued: tuple[str, int, int] | None = None
    """What waits for the weight gradient: the input's name, its bytes, and the bytes of the output's gradient.

    For a norm, whose weight's gradient waits ready to be added: its own name, 0, and the bytes of that gradient.
    """
    weight_kernels: int = 1
    """Kernels among which the weight gradient is divided: one for each expert, or for each run of rows."""
    weight_passes: int = 1
    """Times the product of the weight gradient is computed: once for each BF16 part of an FP32 gradient."""


def accumulation_bytes(dtype: Dtype) -> int:
    """Bytes of a gradient sum, a master weight or a moment: FP32, FP64 in float64 runs."""
    return 8 if dtype == "float64" else 4


@dataclass(frozen=True)
class Machine:
    """A device of a cluster running one compute type."""

    cluster: ClusterConfig
    dtype: Dtype

    def seconds(self, flops: float, num_bytes: float, kind: Kind) -> float:
        """One kernel."""
        cluster = self.cluster
        share = cluster.attention_efficiency if kind == "attention" else cluster.matmul_efficiency
        rate = cluster.matmul_flops_per_second * share / MATMUL_SLOWDOWN[self.dtype]
        bandwidth = cluster.memory_bytes_per_second * cluster.memory_efficiency
        return max(flops / rate, num_bytes / bandwidth) + cluster.kernel_latency_seconds

    def forward(self, ops: Iterable[Op]) -> float:
        """Seconds of these operations one after another."""
        return sum(
            self.seconds((op.flops + op.extra_flops) / op.relative_speed, op.bytes, op.kind) for op in ops
        )

    def backward_input(self, ops: Iterable[Op]) -> float:
        """Seconds of their input gradients.

        A product's input gradient is a product of the same size. An elementwise kernel reads what it read, the
        incoming gradient too, and writes one: about one and a half times the bytes.
        """
        return sum(self._backward_input(op) for op in ops)

    def _backward_input(self, op: Op) -> float:
        flops = op.flops if op.backward_flops is None else op.backward_flops
        num_bytes = op.bytes * (1.0 if op.kind == "matmul" else 1.5)
        if op.backward_bytes is not None:
            num_bytes = op.backward_bytes
        return self.seconds(flops / op.relative_speed, num_bytes, op.kind)

    def weight_grad(self, ops: Iterable[Op]) -> float:
        """Seconds of their weight gradients, each summed into its FP32 buffer by the product itself (read and written)."""
        return sum(self._weight_grad(op) for op in ops if op.queued is not None)

    def _weight_grad(self, op: Op) -> float:
        assert op.queued is not None
        if not op.weight_elements:
            # A norm's gradient is read, its sum read and written.
            return self.seconds(0.0, 3 * op.queued[2], "elementwise")
        moved = op.bytes + 2 * accumulation_bytes(self.dtype) * op.weight_elements
        further = (op.weight_kernels - 1) * self.cluster.kernel_latency_seconds
        return op.weight_passes * (self.seconds(op.flops, moved, "matmul") + further)
