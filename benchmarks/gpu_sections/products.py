"""Section 5: the experts' products at 24 experts of some 1300 rows, and sums in FP32 of BF16
products.

    forward     x W_e^T        grouped_mm, a loop
    gradient    dy^T x         into an FP32 buffer: addmm with FP32 output in place, mm and add,
                FP32 products, grouped_mm

The widths are those of K2's gate and up projections together: 7168 to 4096.

Letters: M rows of all experts, L experts, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from k2train.config.sections import Dtype

from . import adapter
from .predictions import Predictions
from .report import Report
from .setting import Setting
from .shapes import expert_ends, k2_config
from .timing import timed


class Operands:
    """Rows sorted by expert, the experts' weights, a gradient of the output, and an FP32 buffer of
    the weights' shape."""

    def __init__(self, setting: Setting) -> None:
        model = k2_config(setting).model
        self.ends = expert_ends(setting)
        self.bounds = list(zip([0, *self.ends.tolist()[:-1]], self.ends.tolist(), strict=True))
        rows, width, hidden = self.bounds[-1][1], 2 * model.moe_intermediate_size, model.hidden_size
        self.x_MI = setting.random(rows, hidden)
        self.dy_MO = setting.random(rows, width, seed=1)
        self.weight_LOI = setting.random(len(self.bounds), width, hidden, seed=2)
        self.buffer_LOI = torch.zeros(self.weight_LOI.shape, device=setting.device)
        self.flops = 2.0 * rows * width * hidden

    def each(self, product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]) -> None:
        """product(buffer, dy, x) of every expert."""
        for expert, (start, end) in enumerate(self.bounds):
            product(self.buffer_LOI[expert], self.dy_MO[start:end], self.x_MI[start:end])


def run(report: Report, setting: Setting) -> None:
    operands = Operands(setting)
    for name, function in {**forwards(operands), **weight_gradients(operands)}.items():
        with report.attempt(name, gpu_only="FP32 output" in name):
            # The roofline charges a gradient with reading and writing the buffer besides.
            num_bytes = 2.0 * operands.buffer_LOI.nbytes if "gradient" in name else 0.0
            dtype: Dtype = "float32" if "FP32 x FP32" in name else "bfloat16"
            predicted = Predictions(setting.cluster).rate(operands.flops, num_bytes, dtype=dtype)
            timing = timed(function, setting.device, setting.sizes.repeats)
            report.figure(
                name,
                operands.flops / timing.seconds / 1e12,
                "TFLOP/s",
                predicted,
                timing.n,
                f"{timing.seconds * 1e3:.2f} ms",
            )
    with report.attempt("addmm in place, error"):
        in_place_error(report, operands)


def forwards(o: Operands) -> dict[str, Callable[[], object]]:
    gradients = adapter.new_gradients()
    turned_LIO = o.weight_LOI.transpose(1, 2)

    def loop() -> None:
        for expert, (start, end) in enumerate(o.bounds):
            torch.mm(o.x_MI[start:end], turned_LIO[expert])

    def ours() -> None:
        with torch.no_grad():
            adapter.grouped(o.x_MI, o.weight_LOI, o.ends, gradients)

    return {
        "forward: grouped_mm": lambda: F.grouped_mm(o.x_MI, turned_LIO, offs=o.ends),
        "forward: a loop over experts": loop,
        "forward: k2train's grouped_linear": ours,
    }


def weight_gradients(o: Operands) -> dict[str, Callable[[], object]]:
    def in_place(buffer: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
        torch.addmm(buffer, dy.t(), x, out_dtype=torch.float32, out=buffer)

    def product_and_sum(buffer: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
        buffer.add_(torch.mm(dy.t(), x, out_dtype=torch.float32))

    def wide(buffer: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
        buffer.addmm_(dy.t().float(), x.float())

    return {
        "gradient: addmm, FP32 output in place, a loop": lambda: o.each(in_place),
        "gradient: mm with FP32 output, then add, a loop": lambda: o.each(product_and_sum),
        "gradient: FP32 x FP32, a loop": lambda: o.each(wide),
        "gradient: k2train's own product, a loop": lambda: o.each(adapter.add_weight_gradient),
        "gradient: grouped_mm in BF16, then add": lambda: o.buffer_LOI.add_(
            F.grouped_mm(o.dy_MO.t(), o.x_MI, offs=o.ends)
        ),
    }


def in_place_error(report: Report, o: Operands) -> None:
    """Two products added into one buffer beside the same in FP64: FP32 sums of exact products, not
    BF16 roundings.

    An FP32 sum of n random terms is off by some sqrt(n) 2^-24 of its size, which 2^-16 bounds for
    65,536 rows.
    """
    start, end = o.bounds[0]
    dy, x = o.dy_MO[start:end], o.x_MI[start:end]
    buffer = torch.zeros(dy.shape[1], x.shape[1], device=x.device)
    for _ in range(2):
        adapter.add_weight_gradient(buffer, dy, x)
    right = 2.0 * dy.double().t() @ x.double()
    error = (buffer - right).square().mean().sqrt() / right.square().mean().sqrt()
    report.figure("gradient: k2train's own product twice, error", error.item(), "relative", 2.0**-16)
