"""Where the Triton kernels of these operations can run. Triton is an optional dependency (the `gpu` extra)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch


# Asked several times a layer; looking for a package that is not there searches the disk.
@functools.cache
def gpu_kernels(module: str, device: torch.device, capability: tuple[int, int] = (8, 0)) -> ModuleType | None:
    """The module of this package whose kernels run on `device`, imported at first use; None where they cannot run.

    capability: the oldest compute capability they are made for; BF16 begins with 8.0.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < capability:
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"k2train.ops.{module}")
