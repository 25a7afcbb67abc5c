"""Section 1: versions, what the device can do at best, and which fused paths this torch has.

Ceilings are measured on random values; zeros switch fewer transistors and run faster than any real
data.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import adapter
from .attention_paths import flex_available
from .predictions import Predictions
from .report import Report, first_line
from .setting import Setting
from .shapes import k2_config
from .timing import timed

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "transformer-engine",
    "megatron-core",
    "hydra-core",
    "numpy",
    "pytest",
)


def run(report: Report, setting: Setting) -> None:
    versions(report)
    device_facts(report, setting)
    report.fact("k2train's attention here", adapter.backend(k2_config(setting), setting.device).words)
    ceilings(report, setting)
    for name, probe in paths(setting).items():
        try:
            report.fact(f"has {name}", probe() or "yes")
        except Exception as error:
            report.fact(f"has {name}", f"no: {first_line(error)}")


def versions(report: Report) -> None:
    report.fact("python", f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} -")
    report.fact("packages", ", ".join(found))


def device_facts(report: Report, setting: Setting) -> None:
    report.fact("plan's device", setting.cluster_name or "none for this device: predictions are n/a")
    if not setting.on_gpu:
        report.skip("device", "no GPU asked for")
        return
    facts = torch.cuda.get_device_properties(setting.device)
    report.fact(
        "device",
        f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, compute capability {facts.major}.{facts.minor}, "
        f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
    )


def ceilings(report: Report, setting: Setting) -> None:
    predictions, sizes = Predictions(setting.cluster), setting.sizes
    source = setting.random(sizes.copy_bytes // 2)
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source), setting.device, sizes.repeats)
    bandwidth = predictions.memory_bandwidth
    report.figure(
        "copy on the device, read and written",
        2 * source.nbytes / copied.seconds / 1e9,
        "GB/s",
        bandwidth and bandwidth / 1e9,
        copied.n,
    )
    side = sizes.product_side
    a, b = setting.random(side, side), setting.random(side, side, seed=1)
    product = timed(lambda: a @ b, setting.device, sizes.repeats)
    flops = 2.0 * side**3
    report.figure(
        f"product of {side} cubed, {setting.dtype}",
        flops / product.seconds / 1e12,
        "TFLOP/s",
        predictions.rate(flops),
        product.n,
    )


def paths(setting: Setting) -> dict[str, Callable[[], str | None]]:
    """A probe of each path: it raises where the path is not there, and may say more than yes."""
    x, y = setting.random(64, 64), setting.random(64, 64, seed=1)

    def grouped() -> None:
        ends = torch.tensor([32, 64], dtype=torch.int32, device=setting.device)
        F.grouped_mm(x, torch.stack([y, y]), offs=ends)

    def wide_product() -> None:
        torch.mm(x, y, out_dtype=torch.float32)

    def wide_sum() -> str:
        buffer = setting.random(64, 64, dtype=torch.float32)
        expected = buffer + x.float() @ y.float()
        torch.addmm(buffer, x, y, out_dtype=torch.float32, out=buffer)
        return f"yes, in place, off by {(buffer - expected).abs().max().item():.1g}"

    return {
        "cuDNN attention, 192 and 128 wide, with backward": lambda: fused_attention(
            setting, SDPBackend.CUDNN_ATTENTION
        ),
        "flash attention, 192 and 128 wide, with backward": lambda: fused_attention(
            setting, SDPBackend.FLASH_ATTENTION
        ),
        "grouped_mm": grouped,
        "mm with out_dtype": wide_product,
        "addmm with out_dtype and out=self": wide_sum,
        "FlexAttention with largest scores": flex_available,
        "Triton": lambda: package("triton"),
        "Transformer Engine": lambda: package("transformer_engine"),
    }


def fused_attention(setting: Setting, backend: SDPBackend) -> None:
    q, k = (setting.random(1, 2, 128, 192, seed=seed).requires_grad_() for seed in (0, 1))
    v = setting.random(1, 2, 128, 128, seed=2).requires_grad_()
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.autograd.grad(out.sum(), (q, k, v))


def package(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"{name} is not installed")
    return "yes"
