"""Section 4: attention at K2's shapes, forward and backward, by every path there is, and our
kernels with other blocks.

TFLOP/s count what a causal attention cannot do without (`predictions.useful_attention_flops`), the
same for all, so that they compare times.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch

from . import adapter
from .adapter import Attend
from .attention_paths import AttentionPath, fast_paths, flex_path, gradient_for
from .predictions import Predictions, useful_attention_flops
from .report import Report
from .setting import Setting
from .shapes import attention_inputs, k2_config
from .timing import Timing, timed

# Names of block sizes in our kernels' module, and what to try besides their own.
BLOCKS = {
    "FORWARD": ({"keys": 128}, {"num_stages": 3}, {"rows": 64, "num_warps": 4}),
    "row_gradient_blocks": ({"rows": 64}, {"num_warps": 4}),
    "key_gradient_blocks": ({"keys": 64}, {"num_warps": 4}),
}


def run(report: Report, setting: Setting) -> None:
    lengths = setting.sizes.attention_lengths
    for length in lengths:
        compare(report, setting, length, list(fast_paths(setting)))
    kernels = adapter.attention_kernels(setting.device)
    if kernels is None:
        report.skip("k2train, Triton kernels and their block sizes", "Triton is not installed")
    else:
        other_blocks(report, setting, kernels)
    for length in lengths:
        compare(report, setting, length, [flex_path(setting, length)])


def compare(report: Report, setting: Setting, length: int, paths: list[AttentionPath]) -> None:
    tensors = attention_inputs(setting, k2_config(setting).model.num_attention_heads, length)
    for path in paths:
        label = f"{path.name}, {length} tokens"
        with report.attempt(label, path.gpu_only, path.optional):
            measure(report, setting, label, path.make(), tensors)


def measure(
    report: Report, setting: Setting, label: str, attend: Attend, tensors: tuple[torch.Tensor, ...]
) -> None:
    """Two lines."""
    config, predictions = k2_config(setting), Predictions(setting.cluster)
    flops = useful_attention_flops(config, tensors[0].shape[2])
    timings = forward(setting, attend, tensors), backward(setting, attend, tensors)
    for direction, useful, timing in zip(("forward", "backward"), flops, timings, strict=True):
        report.figure(
            f"{label}, {direction}",
            useful / timing.seconds / 1e12,
            "TFLOP/s",
            predictions.rate(useful, kind="attention"),
            timing.n,
            f"{timing.seconds * 1e3:.2f} ms",
        )


def forward(setting: Setting, attend: Attend, tensors: tuple[torch.Tensor, ...]) -> Timing:
    """With gradients asked for, as in training."""
    q, k, v, _ = tensors
    return timed(
        lambda: attend(q, k, v, q.shape[-1] ** -0.5), setting.device, setting.sizes.repeats, most_seconds=1.0
    )


def backward(setting: Setting, attend: Attend, tensors: tuple[torch.Tensor, ...]) -> Timing:
    q, k, v, dout = tensors
    pair: list[torch.Tensor] = []

    def prepare() -> None:
        out = attend(q, k, v, q.shape[-1] ** -0.5)
        pair[:] = out, gradient_for(out, dout)

    def run_backward() -> None:
        out, gradient = pair
        torch.autograd.grad(out, (q, k, v), gradient)

    return timed(run_backward, setting.device, setting.sizes.repeats, prepare, most_seconds=1.0)


def other_blocks(report: Report, setting: Setting, kernels: ModuleType) -> None:
    """The time of the direction that a block size belongs to, in milliseconds; the program's own
    first."""
    length = setting.sizes.attention_lengths[0]
    tensors = attention_inputs(setting, k2_config(setting).model.num_attention_heads, length)
    attend = adapter.kernel_attention(kernels)
    for name, variants in BLOCKS.items():
        direction: Callable[..., Timing] = forward if name == "FORWARD" else backward
        for changes in ({}, *variants):
            words = ", ".join(f"{key} {value}" for key, value in changes.items()) or "the program's own"
            label = f"Triton blocks, {name}: {words}"
            with report.attempt(label), adapter.other_blocks(kernels, name, **changes):
                timing = direction(setting, attend, tensors)
                report.figure(label, timing.seconds * 1e3, "ms", n=timing.n)
