"""Softmax that needs no memory of its own where the kernel allows it."""

from __future__ import annotations

import torch


def consuming_softmax(scores: torch.Tensor, wide: torch.dtype | None = None) -> torch.Tensor:
    """Softmax of the last dimension in type `wide`, by default the scores' own; the caller must not
    use `scores` again.

    On a CPU, and in the scores' own type, the result is written over them: its kernel has read a
    row before it writes it.
    """
    in_place = scores.device.type == "cpu" and wide in (None, scores.dtype)
    return torch.softmax(scores, -1, dtype=wide, out=scores if in_place else None)
