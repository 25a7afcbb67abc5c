"""How long operations take: the roofline, max(FLOPs / rate, bytes / bandwidth), plus a fixed cost a
kernel.

Three kinds of kernel, three achievable rates: matrix products, fused attention, and elementwise
work that memory bandwidth bounds. Rates and the shares of them that are reached come from the
`cluster` config. Source: Williams, Waterman, Patterson, "Roofline" (2009).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from k2train.architecture.work import Kind, Op, accumulation_bytes
from k2train.config.sections import ClusterConfig, Dtype

MATMUL_SLOWDOWN: dict[Dtype, float] = {"bfloat16": 1.0, "float32": 2.0, "float64": 16.0}
"""Matrix rate of BF16 over that of the type: TF32 runs at half of it on Hopper, FP64 at a fifteenth
(H100 data sheet)."""


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

        A product's input gradient is a product of the same size. An elementwise kernel reads what
        it read, the incoming gradient too, and writes one: about one and a half times the bytes.
        """
        return sum(self._backward_input(op) for op in ops)

    def _backward_input(self, op: Op) -> float:
        flops = op.flops if op.backward_flops is None else op.backward_flops
        num_bytes = op.bytes * (1.0 if op.kind == "matmul" else 1.5)
        if op.backward_bytes is not None:
            num_bytes = op.backward_bytes
        return self.seconds(flops / op.relative_speed, num_bytes, op.kind)

    def weight_grad(self, ops: Iterable[Op]) -> float:
        """Seconds of their weight gradients, each summed into its FP32 buffer by the product itself
        (read and written)."""
        return sum(self._weight_grad(op) for op in ops if op.queued is not None)

    def _weight_grad(self, op: Op) -> float:
        assert op.queued is not None
        if not op.weight_elements:
            # A norm's gradient is read, its sum read and written.
            return self.seconds(0.0, 3 * op.queued[2], "elementwise")
        moved = op.bytes + 2 * accumulation_bytes(self.dtype) * op.weight_elements
        further = (op.weight_kernels - 1) * self.cluster.kernel_latency_seconds
        return op.weight_passes * (self.seconds(op.flops, moved, "matmul") + further)
