"""Rotary position embedding with YaRN (arXiv 2309.00071), as transformers' DeepseekV3 applies it.

Features are rotated in interleaved pairs (0, 1), (2, 3), ...; tables are FP32 whatever the model's type, as published,
then cast. Letters: B sequences, S positions, H heads, K features of a query or key, P pairs of rotated features.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from k2train.config.model import ModelConfig, YarnConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature for a context stretched by `factor`."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(model: ModelConfig) -> float:
    """Factor on q.k before the softmax: 1/sqrt(head width), times YaRN's temperature squared."""
    scale = model.qk_head_dim**-0.5
    yarn = model.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """Radians a position turns each pair (P,), FP32."""
    dim = model.qk_rope_head_dim
    frequencies_P = model.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    yarn = model.rope_scaling
    if yarn is None:
        return 1.0 / frequencies_P
    keep_P = 1 - _yarn_ramp(yarn, dim, model.rope_theta)
    return 1.0 / (yarn.factor * frequencies_P) * (1 - keep_P) + 1.0 / frequencies_P * keep_P


def _yarn_ramp(yarn: YarnConfig, dim: int, theta: float) -> torch.Tensor:
    """0 for pairs that turn fast enough to keep their frequency, 1 for those fully stretched (P,)."""

    def pair_of(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = float(min(math.ceil(pair_of(yarn.beta_slow)), dim - 1))
    if high == low:
        high += 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp_(0, 1)


def rotary_tables(model: ModelConfig, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine (S, P) of positions 0 .. num_positions, FP32 on the host."""
    positions_S = torch.arange(num_positions, dtype=torch.float32, device="cpu")
    angles_SP = positions_S[:, None] * inverse_frequencies(model)
    factor = _table_factor(model.rope_scaling)
    return angles_SP.cos() * factor, angles_SP.sin() * factor


def _table_factor(yarn: YarnConfig | None) -> float:
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def _rotate(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Write x with its last 2P features rotated by the table's angles into `out`, those before as they are.

    A negated sine turns back.
    """
    pairs, nope = cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]
    if nope % 2 == 0 and _complex_pairs(x) and _complex_pairs(out):
        # A pair is a complex number and its turn one multiplication: one pass, no strides of two. Pairs that stay are
        # turned by nothing.
        turns = torch.ones(*cos.shape[:-1], nope // 2 + pairs, dtype=_as_complex(x).dtype, device=x.device)
        turns[..., nope // 2 :] = torch.complex(cos, sin)
        torch.mul(_as_complex(x), turns, out=_as_complex(out))
    else:
        out[..., :nope] = x[..., :nope]
        rotate_reference(out[..., nope:], x[..., nope:], cos, sin)


def rotate_reference(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """The same for every type and layout, evens and odds apart."""
    even, odd = x[..., 0::2], x[..., 1::2]
    torch.mul(even, cos, out=out[..., 0::2]).addcmul_(odd, sin, value=-1)
    torch.mul(odd, cos, out=out[..., 1::2]).addcmul_(even, sin)


def _complex_pairs(x: torch.Tensor) -> bool:
    """Whether torch can see x's pairs as complex numbers: FP32 or FP64, and pairs at even offsets."""
    wide_enough = x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"
    offsets = (x.storage_offset(), *x.stride()[:-1])
    return wide_enough and x.stride(-1) == 1 and all(offset % 2 == 0 for offset in offsets)


def _as_complex(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def rotary_queries(q_BSHK: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor) -> torch.Tensor:
    """Queries with their last 2P features rotated, as (B, H, S, K) in memory order. Tables in q's type."""
    return _RotaryQueries.apply(q_BSHK, cos_SP, sin_SP)


class _RotaryQueries(torch.autograd.Function):
    """Linear in q, so it saves nothing but the tables, which are constants of the model."""

    @staticmethod
    def forward(ctx: Any, q_BSHK: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor) -> torch.Tensor:
        ctx.tables = cos_SP, sin_SP
        x_BHSK = q_BSHK.transpose(1, 2)
        out_BHSK = x_BHSK.new_empty(x_BHSK.shape)
        _rotate(out_BHSK, x_BHSK, cos_SP, sin_SP)
        return out_BHSK

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos_SP, sin_SP = ctx.tables
        grad_BSHK = grads[0].transpose(1, 2)
        out_BSHK = grad_BSHK.new_empty(grad_BSHK.shape)
        # A table with the heads in it is as large as one sequence and lets the loop run over positions and heads at once.
        cos_SHP, sin_SHP = (t_SP.unsqueeze(1).expand(-1, grad_BSHK.shape[2], -1) for t_SP in (cos_SP, sin_SP))
        _rotate(out_BSHK, grad_BSHK, cos_SHP, -sin_SHP)
        return out_BSHK, None, None


def rotary_keys(
    kv_BSHC: torch.Tensor, k_rope_BSR: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor, nope: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (B, H, S, nope + 2P) and values (B, H, S, V) from the MLA up-projection and the shared rotary key.

    kv_BSHC holds each head's unrotated key (first `nope` features) and its value.
    """
    return _RotaryKeys.apply(kv_BSHC, k_rope_BSR, cos_SP, sin_SP, nope)


class _RotaryKeys(torch.autograd.Function):
    """Linear too: nothing saved but the tables."""

    @staticmethod
    def forward(
        ctx: Any,
        kv_BSHC: torch.Tensor,
        k_rope_BSR: torch.Tensor,
        cos_SP: torch.Tensor,
        sin_SP: torch.Tensor,
        nope: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.tables, ctx.nope = (cos_SP, sin_SP), nope
        batch, length, heads, _ = kv_BSHC.shape
        kv_BHSC = kv_BSHC.transpose(1, 2)
        rotated_BSR = torch.empty_like(k_rope_BSR, memory_format=torch.contiguous_format)
        _rotate(rotated_BSR, k_rope_BSR, cos_SP, sin_SP)
        k_BHSK = kv_BSHC.new_empty(batch, heads, length, nope + k_rope_BSR.shape[-1])
        k_BHSK[..., :nope] = kv_BHSC[..., :nope]
        k_BHSK[..., nope:] = rotated_BSR.unsqueeze(1)
        return k_BHSK, kv_BHSC[..., nope:].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dk_BHSK, dv_BHSV = grads
        (cos_SP, sin_SP), nope = ctx.tables, ctx.nope
        batch, heads, length, _ = dk_BHSK.shape
        dkv_BSHC = dk_BHSK.new_empty(batch, length, heads, nope + dv_BHSV.shape[-1])
        dkv_BSHC[..., :nope] = dk_BHSK[..., :nope].transpose(1, 2)
        dkv_BSHC[..., nope:] = dv_BHSV.transpose(1, 2)
        drotated_BSR = dk_BHSK[..., nope:].sum(1)
        dk_rope_BSR = torch.empty_like(drotated_BSR)
        _rotate(dk_rope_BSR, drotated_BSR, cos_SP, -sin_SP)
        return dkv_BSHC, dk_rope_BSR, None, None, None
