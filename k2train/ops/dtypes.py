"""Floating types: those a config can name, those that sums are kept in, and changing from one to
another."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """FP64 for float64, FP32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in `dtype`. Where it has that already nothing is called: a step of a small model has
    hundreds of such casts."""
    return x if x.dtype == dtype else x.to(dtype)
