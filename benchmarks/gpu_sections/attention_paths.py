"""The attentions that are compared: ours and those of libraries, each as (q, k, v, scale) ->
output.

q, k are (B, H, S, K), v is (B, H, S, V); all are causal. A library's output may have heads first,
or heads and values in one; `gradient_for` and `positions_first` know, and nobody is charged for the
turning.

Letters: B sequences, S positions, H heads, V value features.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from . import adapter
from .adapter import Attend
from .setting import Setting
from .shapes import k2_config


@dataclass(frozen=True)
class AttentionPath:
    """make: raises where the machine cannot run it. optional: whether a torch may refuse K2's
    widths."""

    name: str
    make: Callable[[], Attend]
    gpu_only: bool = True
    optional: bool = False


def fast_paths(setting: Setting) -> Iterator[AttentionPath]:
    yield AttentionPath("k2train, its own choice", lambda: _ours(setting), gpu_only=False)
    kernels = adapter.attention_kernels(setting.device)
    if kernels is not None:
        yield AttentionPath(
            "k2train, Triton kernels", lambda: adapter.kernel_attention(kernels), gpu_only=False
        )
    yield AttentionPath("torch, cuDNN", lambda: _sdpa(SDPBackend.CUDNN_ATTENTION))
    yield AttentionPath("torch, flash", lambda: _sdpa(SDPBackend.FLASH_ATTENTION), optional=True)
    if not setting.on_gpu:
        yield AttentionPath("torch, math", lambda: _sdpa(SDPBackend.MATH), gpu_only=False)
    yield AttentionPath("Transformer Engine", _transformer_engine)


def flex_path(setting: Setting, length: int) -> AttentionPath:
    """Compiled for each length, which takes long: to be measured last."""
    return AttentionPath("FlexAttention", lambda: _flex(setting, length))


def positions_first(out: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """An output in the shape (B, S, H, V)."""
    if out.dim() == 3:
        return out.view(shape)
    return out if out.shape == shape else out.transpose(1, 2)


def gradient_for(out: torch.Tensor, dout_BSHV: torch.Tensor) -> torch.Tensor:
    """The output's gradient in the output's own shape."""
    if out.dim() == 3:
        return dout_BSHV.flatten(2)
    return dout_BSHV if out.shape == dout_BSHV.shape else dout_BSHV.transpose(1, 2).contiguous()


def _ours(setting: Setting) -> Attend:
    taken = adapter.backend(k2_config(setting), setting.device)
    return lambda q, k, v, scale: adapter.attention(q, k, v, scale, taken)[0]


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return attend


def flex_available() -> str:
    """Raises AttributeError or TypeError in a torch whose FlexAttention does not give the largest
    scores."""
    flex_attention.AuxRequest(max_scores=True)
    return "yes"


def _flex(setting: Setting, length: int) -> Attend:
    """Compiled on a GPU, with the largest score of each row; as it is elsewhere, where compiling
    needs a compiler."""
    mask = flex_attention.create_block_mask(_causal, None, None, length, length, device=str(setting.device))
    function = (
        torch.compile(flex_attention.flex_attention) if setting.on_gpu else flex_attention.flex_attention
    )
    wanted = flex_attention.AuxRequest(max_scores=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return function(q, k, v, block_mask=mask, scale=scale, return_aux=wanted)[0]

    return attend


def _causal(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return row >= column


def _transformer_engine() -> Attend:
    """Fused attention in the order (B, S, H, ...). The turning of q, k and v is in its time."""
    if importlib.util.find_spec("transformer_engine") is None:
        raise ModuleNotFoundError("transformer_engine is not installed")
    from transformer_engine.pytorch import DotProductAttention

    @functools.cache
    def module(heads: int, widths: tuple[int, int], scale: float) -> torch.nn.Module:
        return DotProductAttention(
            heads,
            widths,
            attn_mask_type="causal",
            softmax_scale=scale,
            qkv_format="bshd",
            attention_dropout=0.0,
        )

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        core = module(q.shape[1], (q.shape[-1], v.shape[-1]), scale)
        return core(*(t.transpose(1, 2).contiguous() for t in (q, k, v)))

    return attend
