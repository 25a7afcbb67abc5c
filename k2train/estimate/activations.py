"""What a layer saves between forward and backward: bytes of every named activation, by policy.

Names are the fields of `ActivationsConfig`. A policy splits a tensor's bytes into what stays on the device, what goes to
the host, and what is rebuilt. FP8 is one byte a number and an FP32 scale for every 128 of a row. Source: K2 report,
section 2.4.3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from k2train.config.errors import ConfigError
from k2train.config.sections import ActivationsConfig, Policy
from k2train.estimate.layer_ops import Workload

FP8_TILE = 128
"""Numbers that share a scale."""
_FP8 = ("fp8", "fp8_offload")
_OFFLOADED = ("offload", "fp8_offload")
NOT_REBUILDABLE = {
    "layer_input": "it comes from the previous layer or stage",
    "expert_input": "it comes from other ranks, by an all-to-all",
}
"""Activations that no local operation produces."""


@dataclass(frozen=True)
class SavedTensor:
    """One named activation of one layer and microbatch. Bytes on one rank."""

    name: str
    policy: Policy
    numbers: int
    """Numbers in it, extras included."""
    full_bytes: int
    """As computed."""
    stored_bytes: int
    """As kept between forward and backward, wherever that is; 0 where it is rebuilt."""

    @property
    def device_bytes(self) -> int:
        """On the device between forward and backward."""
        return 0 if self.policy in _OFFLOADED else self.stored_bytes

    @property
    def host_bytes(self) -> int:
        """In host memory between forward and backward."""
        return self.stored_bytes if self.policy in _OFFLOADED else 0

    @property
    def is_fp8(self) -> bool:
        return self.policy in _FP8


def check_policies(policies: ActivationsConfig) -> None:
    """Raise ConfigError for a policy that cannot be carried out."""
    for name, why in NOT_REBUILDABLE.items():
        if getattr(policies, name) == "recompute":
            raise ConfigError(f"activations.{name}", "recompute", f"cannot be rebuilt: {why}",
                              "use keep, fp8, offload or fp8_offload")  # fmt: skip
    for name in ("routing",):
        if getattr(policies, name) in _FP8:
            raise ConfigError(f"activations.{name}", getattr(policies, name), "holds indices, which FP8 would destroy",
                              "use keep, offload or recompute")  # fmt: skip


def saved_tensors(w: Workload, policies: ActivationsConfig, moe: bool) -> tuple[SavedTensor, ...]:
    """Every activation of one layer, in the order of `ActivationsConfig`; those the layer does not have are left out."""
    widths = {**_attention_widths(w), **(_moe_widths(w) if moe else _mlp_widths(w))}
    extras = _extra_bytes(w, moe)
    saved = []
    for field in fields(policies):
        name = field.name
        if widths.get(name) or extras.get(name):
            saved.append(_saved(w, name, getattr(policies, name), widths.get(name, ()), extras.get(name, 0)))
    return tuple(saved)


_Widths = dict[str, tuple[int, int]]
"""(rows of the microbatch, numbers in a row)."""


def _saved(w: Workload, name: str, policy: Policy, shape: tuple[int, ...], extra_bytes: int) -> SavedTensor:
    rows, width = shape if shape else (0, 0)
    full = rows * width * w.element_bytes + extra_bytes
    stored = full
    if policy == "recompute":
        stored = 0
    elif policy in _FP8:
        stored = rows * (width + 4 * -(-width // FP8_TILE)) + extra_bytes
    return SavedTensor(name, policy, rows * width, full, stored)


def _attention_widths(w: Workload) -> _Widths:
    model, tokens = w.model, w.tokens
    heads, hidden = model.num_attention_heads, model.hidden_size
    rotary = model.qk_rope_head_dim
    widths = {
        "layer_input": (tokens, hidden),
        "input_norm_output": (tokens, hidden),
        "kv_latent": (tokens, model.kv_lora_rank + rotary),
        "kv_latent_norm_output": (tokens, model.kv_lora_rank),
        "query": (tokens, heads * model.qk_head_dim),
        # Keys are saved as attention reads them, every head with its copy of the rotary part.
        "key_value": (tokens, heads * (model.qk_head_dim + model.v_head_dim)),
        "attention_output": (tokens, heads * model.v_head_dim),
        "attention_residual": (tokens, hidden),
        "post_norm_output": (tokens, hidden),
    }
    if model.q_lora_rank is not None:
        widths["q_latent"] = widths["q_latent_norm_output"] = (tokens, model.q_lora_rank)
    return widths


def _moe_widths(w: Workload) -> _Widths:
    model, rows, tokens = w.model, w.rows, w.tokens
    hidden, width = model.hidden_size, model.moe_intermediate_size
    widths = {
        "expert_input": (rows, hidden),
        "swiglu_input": (rows, 2 * width),
        "swiglu_output": (rows, width),
        "expert_output": (rows, hidden),
    }
    if model.n_shared_experts:
        shared = model.n_shared_experts * width
        widths["shared_swiglu_input"] = (tokens, 2 * shared)
        widths["shared_swiglu_output"] = (tokens, shared)
    return widths


def _mlp_widths(w: Workload) -> _Widths:
    width = w.model.intermediate_size
    return {"mlp_swiglu_input": (w.tokens, 2 * width), "mlp_swiglu_output": (w.tokens, width)}


def _extra_bytes(w: Workload, moe: bool) -> dict[str, int]:
    """Numbers that do not have the compute type: log-sum-exps, scores and weights in FP32, indices of 8 bytes."""
    extras = {"attention_output": 4 * w.tokens * w.model.num_attention_heads}
    if moe:
        # Scores of all experts; for every pair its weight, its expert and its place in the permutation.
        extras["routing"] = 4 * w.tokens * w.model.n_routed_experts + (4 + 8 + 8) * w.rows
    return extras
