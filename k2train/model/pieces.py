"""Which part of the model a rank's virtual stage holds, and how named tensors lie in its
parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from k2train.architecture.tensors import TensorSpec
from k2train.config.model import ModelConfig

Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class ModelPart:
    """What one virtual stage holds. local_experts are the same ids in every MoE layer, in the order
    they are stored."""

    layers: tuple[int, ...]
    embedding: bool
    head: bool
    local_experts: tuple[int, ...]


def whole_model(model: ModelConfig) -> ModelPart:
    """The part of one rank that holds everything."""
    return ModelPart(tuple(range(model.num_hidden_layers)), True, True, tuple(range(model.n_routed_experts)))


@dataclasses.dataclass(frozen=True)
class Piece:
    """The named tensor `name` is `parameter[index]`. Fused parameters have many pieces; together
    they cover it once."""

    name: str
    parameter: torch.Tensor
    index: Index = ()

    def view(self, like: torch.Tensor) -> torch.Tensor:
        """The same piece of a tensor of the parameter's shape, a gradient or a master copy."""
        return like[self.index] if self.index else like

    @property
    def tensor(self) -> torch.Tensor:
        """The named tensor itself, detached, sharing memory with the parameter."""
        return self.view(self.parameter.detach())

    @property
    def trained(self) -> bool:
        """Whether it has a gradient; the router's correction bias has none."""
        return self.parameter.requires_grad


def swiglu_pieces(
    tensors: Sequence[TensorSpec], gate_up: torch.Tensor, down: torch.Tensor, leading: Index = ()
) -> list[Piece]:
    """Gate, up and down projection, the first two the halves of a fused one ([leading,] 2F, D)."""
    gate, up, out = (spec.name for spec in tensors)
    width = gate_up.shape[len(leading)] // 2
    return [
        Piece(gate, gate_up, (*leading, slice(0, width))),
        Piece(up, gate_up, (*leading, slice(width, 2 * width))),
        Piece(out, down, leading),
    ]


@dataclasses.dataclass(frozen=True)
class Allocator:
    """Makes empty parameters of one type on one device."""

    dtype: torch.dtype
    device: torch.device

    def parameter(self, *shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))

    def whole(self, spec: TensorSpec) -> Piece:
        """A named tensor that is a parameter of its own."""
        return Piece(spec.name, self.parameter(*spec.shape))

    def bias(self, size: int) -> torch.Tensor:
        """A correction bias: FP32 whatever the model's type, no gradient, zero."""
        return torch.zeros(size, dtype=torch.float32, device=self.device)
