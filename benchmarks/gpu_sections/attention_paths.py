"""The attentions that are compared: ours and those of libraries, each as (q, k, v, scale) -> output.

q, k are (B, H, S, K), v is (B, H, S, V); all are causal. Where a library gives (B, H, S, V) and ours (B, S, H, V), the
axes are left as they come: nobody downstream is charged for turning them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel, flex_attention

from . import adapter
from .adapter import Attend
from .setting import Setting

MakeAttend = Callable[[], Attend]


def paths(setting: Setting, length: int) -> dict[str, MakeAttend]:
    """By name, what makes each; making raises where the machine cannot run it."""
    found: dict[str, MakeAttend] = {"k2train, its own choice": lambda: _ours}
    kernels = adapter.attention_kernels(setting.device)
    if kernels is not None:
        found["k2train, Triton kernels"] = lambda: adapter.kernel_attention(kernels)
    found["torch, cuDNN"] = lambda: _sdpa(SDPBackend.CUDNN_ATTENTION)
    found["torch, flash"] = lambda: _sdpa(SDPBackend.FLASH_ATTENTION)
    if not setting.on_gpu:
        found["torch, math"] = lambda: _sdpa(SDPBackend.MATH)
    found["Transformer Engine"] = lambda: _transformer_engine(setting)
    found["FlexAttention"] = lambda: _flex(setting, length)
    return found


def _ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return adapter.attention(q, k, v, scale)[0]


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    return attend


def flex_available() -> str:
    if not flex_attention.AuxRequest(max_scores=True).max_scores:
        raise RuntimeError("AuxRequest does not take max_scores")
    return "yes"


def _flex(setting: Setting, length: int) -> Attend:
    """Compiled on a GPU, with the largest score of each row; as it is elsewhere, where compiling needs a compiler."""
    mask = flex_attention.create_block_mask(_causal, None, None, length, length, device=str(setting.device))
    function = torch.compile(flex_attention.flex_attention) if setting.on_gpu else flex_attention.flex_attention
    wanted = flex_attention.AuxRequest(max_scores=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return function(q, k, v, block_mask=mask, scale=scale, return_aux=wanted)[0]

    return attend


def _causal(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return row >= column


def _transformer_engine(setting: Setting) -> Attend:
    """Fused attention in the order (S, B, H, ...), as Transformer Engine likes it; the turning is outside of it."""
    if importlib.util.find_spec("transformer_engine") is None:
        raise ModuleNotFoundError("transformer_engine is not installed")
    from transformer_engine.pytorch import DotProductAttention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        module = DotProductAttention(
            q.shape[1], (q.shape[-1], v.shape[-1]), attn_mask_type="causal", softmax_scale=scale,
            qkv_format="bshd", attention_dropout=0.0,
        )  # fmt: skip
        return module(*(t.transpose(1, 2).contiguous() for t in (q, k, v)))

    return attend
