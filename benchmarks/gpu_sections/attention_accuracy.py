"""Section 3: attention against the same in float64: output, gradients and the largest logits.

An error is the root mean square of the difference over that of the float64 values. What is expected
is the error of the number format: a BF16 value is off by up to 2^-9 of itself, and the
probabilities and the result are both rounded, so 2^-8 is a bound that a sound kernel stays below.
Largest logits are FP32 sums of exact products, so 2^-16 is generous.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from . import adapter
from .attention_paths import AttentionPath, fast_paths, flex_path, gradient_for, positions_first
from .report import Report
from .setting import Setting
from .shapes import attention_inputs, k2_config

BF16_ERROR = 2.0**-8
LOGIT_ERROR = 2.0**-16


def run(report: Report, setting: Setting) -> None:
    first, *_ = setting.sizes.accuracy_lengths
    for length in setting.sizes.accuracy_lengths:
        check(report, setting, length, list(fast_paths(setting)))
        with report.attempt(f"largest logits, {length} tokens"):
            largest_logits(report, setting, length)
    check(report, setting, first, [flex_path(setting, first)])


def check(report: Report, setting: Setting, length: int, paths: list[AttentionPath]) -> None:
    """Output and gradients of each path."""
    q, k, v, dout = attention_inputs(setting, setting.sizes.accuracy_heads, length)
    scale = q.shape[-1] ** -0.5
    exact = tuple(t.detach().double().requires_grad_() for t in (q, k, v))
    out = adapter.attention_reference(exact[0], exact[1], exact[2], scale)[0]
    truth = [out.detach(), *torch.autograd.grad(out, exact, dout.double())]
    for path in paths:
        label = f"{path.name}, {length} tokens"
        with report.attempt(label, path.gpu_only, path.optional):
            found = path.make()(q, k, v, scale)
            grads = torch.autograd.grad(found, (q, k, v), gradient_for(found, dout))
            compare(report, label, [positions_first(found, out.shape), *grads], truth)


def largest_logits(report: Report, setting: Setting, length: int) -> None:
    q, k, v, _ = (t.detach() for t in attention_inputs(setting, setting.sizes.accuracy_heads, length))
    scale = q.shape[-1] ** -0.5
    # cuDNN's may be bounds where logits are small, so a limit below all of them asks for the exact
    # ones.
    taken = dataclasses.replace(adapter.backend(k2_config(setting), setting.device), exact_above=-math.inf)
    right = adapter.attention_reference(q.double(), k.double(), v.double(), scale)[1]
    worst = (adapter.attention(q, k, v, scale, taken)[1] - right).abs().max() / right.abs().max()
    report.figure(f"largest logits, {length} tokens", worst.item(), "relative", LOGIT_ERROR)


def compare(report: Report, label: str, found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    """A line for the output and each gradient."""
    for name, value, right in zip(("output", "dq", "dk", "dv"), found, truth, strict=True):
        error = (value.double() - right).square().mean().sqrt() / right.square().mean().sqrt()
        report.figure(f"{label}: {name}", error.item(), "relative", BF16_ERROR)
