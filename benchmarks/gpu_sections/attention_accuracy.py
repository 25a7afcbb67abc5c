"""Section 3: attention against the same in float64: output, gradients and the largest logits.

An error is the root mean square of the difference over that of the float64 values. What is expected is the error of the
number format: a BF16 value is off by up to 2^-9 of itself, and the probabilities and the result are both rounded, so
2^-8 is a bound that a sound kernel stays below. Largest logits are FP32 sums of exact products, so 2^-16 is generous.
"""

from __future__ import annotations

import torch

from . import adapter
from .attention_paths import paths
from .report import Report
from .setting import Setting
from .shapes import attention_inputs

BF16_ERROR = 2.0**-8
LOGIT_ERROR = 2.0**-16


def run(report: Report, setting: Setting) -> None:
    for length in setting.sizes.accuracy_lengths:
        q, k, v, dout = attention_inputs(setting, setting.sizes.accuracy_heads, length)
        scale = q.shape[-1] ** -0.5
        exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
        out, largest = adapter.attention_reference(*exact, scale)
        truth = [out.detach(), *torch.autograd.grad(out, exact, dout.double())]
        for name, make in paths(setting, length).items():
            label = f"{name}, {length} tokens"
            with report.attempt(label):
                ours = positions_first(make()(q, k, v, scale), out.shape)
                compare(report, label, [ours, *torch.autograd.grad(ours, (q, k, v), dout)], truth)
        with report.attempt(f"largest logits, {length} tokens"):
            worst = (adapter.attention(q, k, v, scale)[1] - largest).abs().max() / largest.abs().max()
            report.figure(f"largest logits, {length} tokens", worst.item(), "relative", LOGIT_ERROR)


def positions_first(out: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """An output as (B, S, H, V), whether it came so, with heads first, or with heads and values in one."""
    if out.dim() == 3:
        return out.view(shape)
    return out if out.shape == shape else out.transpose(1, 2)


def compare(report: Report, label: str, found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """A line for the output and each gradient."""
    for name, value, right in zip(("output", "dq", "dk", "dv"), found, truth, strict=True):
        error = (value.double() - right).square().mean().sqrt() / right.square().mean().sqrt()
        report.figure(f"{label}: {name}", error.item(), "relative", BF16_ERROR)
