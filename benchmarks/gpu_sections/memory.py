"""Bytes of the device's memory, as torch's allocator counts them; 0 on a CPU, where nobody
counts."""

from __future__ import annotations

import torch

from .setting import Setting
from .timing import synchronize


def allocated(setting: Setting) -> int:
    """Held by tensors now."""
    return torch.cuda.memory_allocated(setting.device) if setting.on_gpu else 0


def start_peak(setting: Setting) -> int:
    """Held now; `peak` is counted from here."""
    if setting.on_gpu:
        synchronize(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
    return allocated(setting)


def peak(setting: Setting) -> int:
    """The most held since `start_peak`, or since the start."""
    return torch.cuda.max_memory_allocated(setting.device) if setting.on_gpu else 0


def note(setting: Setting) -> str:
    """What goes beside a figure of bytes."""
    return "" if setting.on_gpu else "not counted on a CPU"
