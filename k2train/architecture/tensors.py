"""`TensorSpec`: what a block says about one of its tensors.

Names are those of transformers' models on disk, where every expert's projections are separate
tensors.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Role = Literal["matrix", "embedding", "head", "norm", "bias"]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One named tensor of the model.

    layer is None for the embedding, the final norm and the head; expert is None for everything but
    routed experts. role `bias` is the router's correction bias: a buffer that no gradient touches.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layer: int | None = None
    expert: int | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def trained(self) -> bool:
        """Whether gradients and an optimizer apply to it."""
        return self.role != "bias"

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies: matrices, embedding and head, not the norms."""
        return len(self.shape) == 2


def layer_prefix(layer: int) -> str:
    """How the names of a layer's tensors begin."""
    return f"model.layers.{layer}"
