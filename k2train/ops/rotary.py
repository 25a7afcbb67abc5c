"""Rotary position embedding with YaRN (arXiv 2309.00071), as transformers' DeepseekV3 applies it.

Features are rotated in interleaved pairs (0, 1), (2, 3), ...; tables are FP32 whatever the model's
type, as published, then cast. Letters: B sequences, S positions, H heads, K features of a query or
key, P pairs of rotated features, R rotated features, N unrotated key features, V value features, C
= N + V, or P as complex numbers, F features of any kind, X sequences, alone or with heads.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from k2train.architecture.layer import mixer_of
from k2train.config.model import ModelConfig, YarnConfig

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature for a context stretched by `factor`."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(model: ModelConfig) -> float:
    """Factor on q.k before the softmax: 1/sqrt(head width), times YaRN's temperature squared."""
    scale = mixer_of(model).heads.query ** -0.5
    yarn = model.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(model: ModelConfig) -> torch.Tensor:
    """Radians a position turns each pair (P,), FP32."""
    dim = mixer_of(model).heads.rotated
    frequencies_P = model.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    yarn = model.rope_scaling
    if yarn is None:
        return 1.0 / frequencies_P
    keep_P = 1 - _yarn_ramp(yarn, dim, model.rope_theta)
    return 1.0 / (yarn.factor * frequencies_P) * (1 - keep_P) + 1.0 / frequencies_P * keep_P


def _yarn_ramp(yarn: YarnConfig, dim: int, theta: float) -> torch.Tensor:
    """0 for pairs that turn fast enough to keep their frequency, 1 for those fully stretched
    (P,)."""

    def pair_of(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = float(min(math.ceil(pair_of(yarn.beta_slow)), dim - 1))
    if high == low:
        high += 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp_(0, 1)


@dataclasses.dataclass(frozen=True)
class RotaryTables:
    """How far each position turns each pair, in the type it is used in.

    cos, sin: (S, P). turns: (S, nope / 2 + P), the same as complex numbers after as many ones as
    there are pairs of features before the rotated ones; None where a pair cannot be seen as a
    complex number (odd nope, types but FP32 and FP64, GPUs). turns_back: its conjugate.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    nope: int
    turns: torch.Tensor | None
    turns_back: torch.Tensor | None

    @classmethod
    def of(cls, cos_SP: torch.Tensor, sin_SP: torch.Tensor, nope: int) -> RotaryTables:
        """The tables for queries and keys whose first `nope` features stay as they are."""
        complex_dtype = _COMPLEX.get(cos_SP.dtype)
        if complex_dtype is None or nope % 2 or cos_SP.device.type != "cpu":
            return cls(cos_SP, sin_SP, nope, None, None)
        unturned = torch.ones(cos_SP.shape[0], nope // 2, dtype=complex_dtype)
        turns = torch.cat([unturned, torch.complex(cos_SP, sin_SP)], dim=1)
        return cls(cos_SP, sin_SP, nope, turns, turns.conj().resolve_conj())

    @property
    def length(self) -> int:
        return self.cos.shape[0]

    def first(self, length: int) -> RotaryTables:
        """The tables of the first `length` positions."""
        if length == self.length:
            return self
        turns, back = (None if t is None else t[:length] for t in (self.turns, self.turns_back))
        return RotaryTables(self.cos[:length], self.sin[:length], self.nope, turns, back)


def rotary_tables(
    model: ModelConfig, num_positions: int, dtype: torch.dtype, device: torch.device
) -> RotaryTables:
    """The tables of positions 0 .. num_positions: made in FP32 on the host, then cast."""
    positions_S = torch.arange(num_positions, dtype=torch.float32, device="cpu")
    angles_SP = positions_S[:, None] * inverse_frequencies(model)
    factor = _table_factor(model.rope_scaling)
    cos_SP, sin_SP = ((t_SP * factor).to(device, dtype) for t_SP in (angles_SP.cos(), angles_SP.sin()))
    return RotaryTables.of(cos_SP, sin_SP, mixer_of(model).heads.unrotated)


def _table_factor(yarn: YarnConfig | None) -> float:
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def _rotate(out_XSK: torch.Tensor, x_XSK: torch.Tensor, tables: RotaryTables, back: bool = False) -> None:
    """Write x, or only its rotated features where it holds no others, turned (back) by the tables
    into `out`."""
    turns_SC = tables.turns_back if back else tables.turns
    if turns_SC is not None and _paired(x_XSK) and _paired(out_XSK):
        # One multiplication a pair: one pass, no strides of two. Pairs that stay are multiplied by
        # one.
        pairs = x_XSK.shape[-1] // 2
        turns_SC = turns_SC.narrow(1, turns_SC.shape[1] - pairs, pairs)
        torch.mul(x_XSK.view(turns_SC.dtype), turns_SC, out=out_XSK.view(turns_SC.dtype))
        return
    rotated = 2 * tables.cos.shape[1]
    nope = x_XSK.shape[-1] - rotated
    out_XSK.narrow(-1, 0, nope).copy_(x_XSK.narrow(-1, 0, nope))
    sin_SP = -tables.sin if back else tables.sin
    rotate_reference(out_XSK.narrow(-1, nope, rotated), x_XSK.narrow(-1, nope, rotated), tables.cos, sin_SP)


def rotate_reference(out: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """All features of x, turned, for every type and layout: evens and odds apart."""
    even, odd = x[..., 0::2], x[..., 1::2]
    torch.mul(even, cos, out=out[..., 0::2]).addcmul_(odd, sin, value=-1)
    torch.mul(odd, cos, out=out[..., 1::2]).addcmul_(even, sin)


def _paired(x: torch.Tensor) -> bool:
    """Whether torch can view x's pairs as complex numbers: they lie together, at even offsets."""
    *outer, last = x.stride()
    return last == 1 and not x.storage_offset() % 2 and not any(stride % 2 for stride in outer)


def rotary_queries(q_BSHK: torch.Tensor, tables: RotaryTables, heads_inside: bool = False) -> torch.Tensor:
    """Queries with their last 2P features rotated, contiguous: (B, H, S, K), or (B, S, H, K) with
    heads_inside.

    Tables of S positions, in q's type.
    """
    return _RotaryQueries.apply(q_BSHK, tables, heads_inside)


def _empty_heads(like_BSHC: torch.Tensor, features: int, heads_inside: bool) -> torch.Tensor:
    """(B, H, S, features); in memory positions lie before heads with heads_inside, else behind
    them."""
    batch, length, heads, _ = like_BSHC.shape
    if heads_inside:
        return like_BSHC.new_empty(batch, length, heads, features).transpose(1, 2)
    return like_BSHC.new_empty(batch, heads, length, features)


def _swapped(t_BHSF: torch.Tensor, heads_inside: bool) -> torch.Tensor:
    """Between (B, H, S, F) and the order of memory, both ways."""
    return t_BHSF.transpose(1, 2) if heads_inside else t_BHSF


class _RotaryQueries(torch.autograd.Function):
    """Linear in q, so it saves nothing but the tables, which are constants of the model."""

    @staticmethod
    def forward(ctx: Any, q_BSHK: torch.Tensor, tables: RotaryTables, heads_inside: bool) -> torch.Tensor:
        ctx.tables, ctx.heads_inside = tables, heads_inside
        out_BHSK = _empty_heads(q_BSHK, q_BSHK.shape[-1], heads_inside)
        _rotate(out_BHSK, q_BSHK.transpose(1, 2), tables)
        return _swapped(out_BHSK, heads_inside)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_BHSK = _swapped(grads[0], ctx.heads_inside)
        batch, heads, length, features = grad_BHSK.shape
        out_BSHK = grad_BHSK.new_empty(batch, length, heads, features)
        _rotate(out_BSHK.transpose(1, 2), grad_BHSK, ctx.tables, back=True)
        return out_BSHK, None, None


def rotary_keys(
    kv_BSHC: torch.Tensor, k_rope_BSR: torch.Tensor, tables: RotaryTables, heads_inside: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (B, H, S, nope + 2P) and values (B, H, S, V) from the MLA up-projection and the shared
    rotary key.

    Contiguous; with heads_inside as (B, S, H, features). kv_BSHC holds each head's unrotated key
    (first `nope` features) and its value.
    """
    return _RotaryKeys.apply(kv_BSHC, k_rope_BSR, tables, heads_inside)


class _RotaryKeys(torch.autograd.Function):
    """Linear too: nothing saved but the tables."""

    @staticmethod
    def forward(
        ctx: Any, kv_BSHC: torch.Tensor, k_rope_BSR: torch.Tensor, tables: RotaryTables, heads_inside: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.tables, ctx.heads_inside, nope = tables, heads_inside, tables.nope
        width, rotary = kv_BSHC.shape[-1], k_rope_BSR.shape[-1]
        k_nope_BHSN, v_BHSV = kv_BSHC.transpose(1, 2).split([nope, width - nope], dim=-1)
        rotated_BSR = k_rope_BSR.new_empty(k_rope_BSR.shape)
        _rotate(rotated_BSR, k_rope_BSR, tables)
        k_BHSK = _empty_heads(kv_BSHC, nope + rotary, heads_inside)
        k_BHSK.narrow(-1, 0, nope).copy_(k_nope_BHSN)
        k_BHSK.narrow(-1, nope, rotary).copy_(rotated_BSR.unsqueeze(1))
        v_out_BHSV = _empty_heads(kv_BSHC, width - nope, heads_inside)
        v_out_BHSV.copy_(v_BHSV)
        return _swapped(k_BHSK, heads_inside), _swapped(v_out_BHSV, heads_inside)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        dk_BHSK, dv_BHSV = (_swapped(grad, ctx.heads_inside) for grad in grads)
        nope = ctx.tables.nope
        batch, heads, length, width = dk_BHSK.shape
        values = dv_BHSV.shape[-1]
        dkv_BSHC = dk_BHSK.new_empty(batch, length, heads, nope + values)
        dkv_BHSC = dkv_BSHC.transpose(1, 2)
        dk_nope_BHSN, drotated_BHSR = dk_BHSK.split([nope, width - nope], dim=-1)
        dkv_BHSC.narrow(-1, 0, nope).copy_(dk_nope_BHSN)
        dkv_BHSC.narrow(-1, nope, values).copy_(dv_BHSV)
        drotated_BSR = drotated_BHSR.sum(1)
        dk_rope_BSR = drotated_BSR.new_empty(drotated_BSR.shape)
        _rotate(dk_rope_BSR, drotated_BSR, ctx.tables, back=True)
        return dkv_BSHC, dk_rope_BSR, None, None
