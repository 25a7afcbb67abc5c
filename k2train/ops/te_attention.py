"""Transformer Engine's fused attention, which returns the largest logits itself
(`return_max_logit`).

An optional dependency, imported when a run asks for `ops.backend=te`. Its attention saves tensors
of its own beside queries, keys, values and output (the softmax's statistics, a random generator's
state). Activation storage must know every saved tensor by name, so its graph is wrapped: what it
saves is handed out and saved by one node of ours. Not yet run on a GPU: tested with a stand-in that
has the signature of Transformer Engine's documentation.

Letters: B sequences, H heads, S positions, K query and key features, V value features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from k2train.config.errors import ConfigError

# (B, S, H, K), (B, S, H, K), (B, S, H, V) -> output (B, S, H * V), largest logits (H,).
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class TeAttended(NamedTuple):
    """out (B, S, H, V); max_logits (H,), FP32; extras: what its backward saves beside q, k, v and
    out."""

    out: torch.Tensor
    max_logits: torch.Tensor
    extras: tuple[torch.Tensor, ...]


class TeAttention:
    """Causal attention of one shape of head, by Transformer Engine. It has no state that a call
    changes."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(self, q_BHSK: torch.Tensor, k_BHSK: torch.Tensor, v_BHSV: torch.Tensor) -> TeAttended:
        """In memory, positions lie before heads. Only the output has a gradient."""
        inputs = tuple(t.transpose(1, 2) for t in (q_BHSK, k_BHSK, v_BHSV))
        shape_BSHV = (*inputs[0].shape[:3], v_BHSV.shape[-1])
        if not torch.is_grad_enabled():
            out, max_H = self._attend(*inputs)
            return TeAttended(out.view(shape_BSHV), max_H.float(), ())
        extras: list[torch.Tensor] = []
        out, max_H = _Wrapped.apply(self._attend, extras, *inputs)
        return TeAttended(out.view(shape_BSHV), max_H, tuple(extras))


def build_te_attention(heads: int, query_width: int, value_width: int, scale: float) -> TeAttention:
    """Raises ConfigError where Transformer Engine is missing, or too old to return the largest
    logits."""
    try:
        import transformer_engine.pytorch as te
    except ImportError as error:
        raise ConfigError(
            "ops.backend",
            "te",
            f"transformer-engine cannot be imported: {error}",
            "install it (pip install 'k2train[gpu]'), or set ops.backend=auto",
        ) from error
    return TeAttention(dot_product_attention(te, heads, query_width, value_width, scale))


def dot_product_attention(
    te: ModuleType, heads: int, query_width: int, value_width: int, scale: float
) -> Attend:
    """`transformer_engine.pytorch.DotProductAttention` for this program's tensors."""
    known = inspect.signature(te.DotProductAttention.__init__).parameters
    if "return_max_logit" not in known:
        raise ConfigError(
            "ops.backend",
            "te",
            "this transformer-engine has no return_max_logit, which QK-Clip needs",
            "install a newer one, or set ops.backend=auto",
        )
    return te.DotProductAttention(
        num_attention_heads=heads,
        kv_channels=(query_width, value_width),
        attention_dropout=0.0,
        attn_mask_type="causal",
        qkv_format="bshd",
        softmax_scale=scale,
        return_max_logit=True,
    )


class _Wrapped(torch.autograd.Function):
    """Another library's graph as one node, which saves what that graph saves.

    Between forward and backward the inner graph holds numbers in place of tensors; the tensors are
    this node's.
    """

    @staticmethod
    def forward(
        ctx: Any, attend: Attend, extras: list[torch.Tensor], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> int:
            kept.append(tensor.detach())
            return len(kept) - 1

        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda index: kept[index]),
        ):
            entered = _Enter.apply(inputs[0].new_empty(0).requires_grad_(), *inputs)
            out, max_H = attend(*entered)
        ctx.inner = _Inner([_entry(t) for t in entered], get_gradient_edge(out), kept)
        known = {id(t.untyped_storage()) for t in (*inputs, out)}
        extras += [t for t in kept if id(t.untyped_storage()) not in known]
        ctx.save_for_backward(*kept)
        kept.clear()
        out, max_H = out.detach(), max_H.detach().float()
        ctx.mark_non_differentiable(max_H)
        ctx.set_materialize_grads(False)
        return out, max_H

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return None, None, None, None, None
        return None, None, *ctx.inner.backward(ctx.saved_tensors, grads[0])


class _Inner:
    """The ends of the inner graph. kept: where its saved tensors are read from while its backward
    runs."""

    def __init__(self, inputs: list[GradientEdge], output: GradientEdge, kept: list[torch.Tensor]) -> None:
        self._inputs, self._output, self._kept = inputs, output, kept

    def backward(self, saved: Sequence[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._kept.extend(saved)
        try:
            return torch.autograd.grad(self._output, self._inputs, grad)
        finally:
            self._kept.clear()


def _entry(tensor: torch.Tensor) -> GradientEdge:
    assert tensor.grad_fn is not None
    return GradientEdge(tensor.grad_fn, tensor.output_nr)


class _Enter(torch.autograd.Function):
    """The tensors unchanged, as outputs of one node: a leaf's node would keep its tensor alive."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None,) * (1 + len(grads))
