"""The device a rank computes on, from torch's name for it."""

from __future__ import annotations

import torch

from k2train.device.cpu import CpuDevice
from k2train.device.cuda import CudaDevice
from k2train.device.protocol import Device

# Tensors on "cuda" of a torch that finds no CUDA are a rehearsal's, which rehearses a Hopper GPU.
_REHEARSED_CAPABILITY = (9, 0)


def build_device(torch_device: torch.device, timed: bool = False) -> Device:
    """timed: events can be compared by `seconds_since`."""
    return CudaDevice(torch_device, timed) if torch_device.type == "cuda" else CpuDevice(torch_device)


def compute_capability(torch_device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device."""
    if not torch.cuda.is_available():
        return _REHEARSED_CAPABILITY
    return torch.cuda.get_device_capability(torch_device)
