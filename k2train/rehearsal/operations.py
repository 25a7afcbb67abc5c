"""What an operation of torch costs on the device: its FLOPs, the bytes it moves, and its kernel's
kind.

Products come from torch's own table (`torch.utils.flop_counter`); a fused attention kernel skips
what causality hides, which that table does not know. Everything else is bounded by memory: inputs
read once, outputs written once. An operation that only makes a view or allocates launches nothing.

Letters: B sequences, H heads, S positions, K query and key features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from k2train.architecture.work import Kind

HOST_COPY = "copy to or from the host"
_ALLOCATING = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "_unsafe_view",
    "set_",
    "lift_fresh",
    "record_stream",
    "resize_",
    "nonzero_static_size",
}
_FILLING = {
    "zeros",
    "zeros_like",
    "new_zeros",
    "zero_",
    "ones",
    "ones_like",
    "full",
    "full_like",
    "new_full",
    "fill_",
    "arange",
}
_SCATTERING = {"index_add_", "scatter_add_", "scatter_"}
_FORMULAS = {str(packet).rsplit(".", 1)[-1]: formula for packet, formula in flop_registry.items()}
_GATHERING = {"index_select", "embedding", "gather", "index"}


@dataclass(frozen=True)
class Work:
    """One launch. dtype: of a product's factors, else of the first output. shapes: of a product's
    factors, for reports."""

    name: str
    kind: Kind
    flops: float
    bytes: float
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def title(self) -> str:
        """The operation, and for a product its type and sizes."""
        sizes = " x ".join("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {sizes}".strip()


def measure(function: Any, arguments: Sequence[Any], keywords: dict[str, Any], result: Any) -> Work | None:
    """The work of one call of an operation; None where nothing is launched."""
    packet = function.overloadpacket
    name = str(packet.__name__)
    if function.namespace == "prim" or name in _ALLOCATING or _is_view(function):
        return None
    inputs = _tensors((arguments, keywords))
    outputs = _tensors(result)
    on_device = [t for t in (*outputs, *inputs) if t.is_cuda]
    if not on_device:
        return None
    if len({t.device.type for t in (*inputs, *outputs) if t.numel()}) > 1:
        return Work(HOST_COPY, "elementwise", 0.0, _bytes(outputs[:1]), on_device[0].dtype)
    moved = _moved(name, inputs, outputs)
    if name in ATTENTION_FLOPS:
        return Work(name, "attention", ATTENTION_FLOPS[name](arguments), moved, inputs[0].dtype)
    flops = _product_flops(name, arguments, result)
    if flops is None:
        return Work(name, "elementwise", 0.0, moved, on_device[0].dtype)
    factors = _tensors(arguments)
    a, b = factors[:2] if name == "_grouped_mm" else factors[-2:]
    return Work(name, "matmul", flops, moved, a.dtype, (tuple(a.shape), tuple(b.shape)))


def _product_flops(name: str, arguments: Sequence[Any], result: Any) -> float | None:
    """FLOPs of a matrix product, None for anything else. An operation in place counts as the one it
    is made of."""
    if name == "_grouped_mm":
        # Rows times their group's matrix, or, where both are flat, every group's rows times its
        # rows.
        a, b = arguments[:2]
        return 2.0 * a.shape[0] * a.shape[1] * b.shape[-1]
    formula = _FORMULAS.get(name.removesuffix("_"))
    if formula is None:
        return None
    # Types and scales among the arguments are not the formulas' concern.
    return float(formula(*_tensors(arguments), out_val=result))


def _moved(name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> float:
    if name in _FILLING:
        return _bytes(outputs)
    if name in _GATHERING:
        return 2.0 * _bytes(outputs) + sum(_bytes([t]) for t in inputs[1:] if not t.is_floating_point())
    if name in ("attention_best_blocks", "attention_other_blocks"):
        # Queries and keys are read where a head's logits may pass the limit; a rehearsal's never
        # do.
        return _bytes(inputs[2:])
    if name in _SCATTERING:
        # What is added is read, and its targets are read and written.
        return 3.0 * _bytes(inputs[-1:])
    return _bytes([*inputs, *(t for t in outputs if not any(t is other for other in inputs))])


def _bytes(tensors: Sequence[torch.Tensor]) -> float:
    """Each tensor once, however often it is named."""
    return float(sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values()))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    return bool(returns) and any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _visible_pairs(q_BHSK: torch.Tensor) -> float:
    """Query and key pairs that causal attention keeps."""
    batch, heads, length, _ = q_BHSK.shape
    return batch * heads * length * (length + 1) / 2


def _products(queries: int, values: int, first: int = 0) -> Callable[[Sequence[Any]], float]:
    """So many products over query features and so many over value features for every visible pair;
    the query is argument `first`."""

    def count(arguments: Sequence[Any]) -> float:
        q, _, v = arguments[first : first + 3]
        return 2.0 * _visible_pairs(q) * (queries * q.shape[-1] + values * v.shape[-1])

    return count


def _scores_wanted_exactly(arguments: Sequence[Any]) -> float:
    """All scores once more, where every head's largest logit is to be exact; else none."""
    q_BHSK, exact_above = arguments[0], arguments[-1]
    return 2.0 * _visible_pairs(q_BHSK) * q_BHSK.shape[-1] if exact_above == -math.inf else 0.0


ATTENTION_FLOPS: dict[str, Callable[[Sequence[Any]], float]] = {
    "attention_forward": _products(1, 1),
    "attention_row_gradients": _products(2, 1),
    "attention_key_gradients": _products(2, 2),
    "attention_other_blocks": _scores_wanted_exactly,
    "cudnn_attention": _products(1, 1),
    "cudnn_attention_backward": _products(3, 2, first=1),
}
