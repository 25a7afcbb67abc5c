"""What a layer saves between forward and backward: bytes of every named activation, by policy.

Names are the fields of `ActivationsConfig`. A policy splits a tensor's bytes into what stays on the device, what goes to
the host, and what is rebuilt. FP8 is one byte a number and an FP32 scale for every 128 of a row. Source: K2 report,
section 2.4.3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from k2train.config.errors import ConfigError
from k2train.config.sections import FP8_POLICIES, OFFLOAD_POLICIES, ActivationsConfig, Policy
from k2train.estimate.layer_ops import Workload, hit_probability
from k2train.estimate.work import accumulation_bytes
from k2train.layout.build import DEEPEP_NODE

FP8_TILE = 128
"""Numbers that share a scale."""
NOT_REBUILDABLE = {
    "layer_input": "it comes from the previous layer or stage",
    "expert_input": "it comes from other ranks, by an all-to-all",
    "routing": "rows have already gone where it said, and a choice made again from rounded inputs could differ",
}
"""Activations that are not recomputed, and why."""


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
    """As kept between forward and backward, wherever that is; where it is rebuilt, the few numbers that go with it."""

    @property
    def device_bytes(self) -> int:
        """On the device between forward and backward."""
        return 0 if self.policy in OFFLOAD_POLICIES else self.stored_bytes

    @property
    def host_bytes(self) -> int:
        """In host memory between forward and backward."""
        return self.stored_bytes if self.policy in OFFLOAD_POLICIES else 0

    @property
    def is_fp8(self) -> bool:
        return self.policy in FP8_POLICIES


def check_policies(policies: ActivationsConfig) -> None:
    """Raise ConfigError for a policy that cannot be carried out."""
    for name, why in NOT_REBUILDABLE.items():
        if getattr(policies, name) == "recompute":
            allowed = "keep or offload" if name == "routing" else "keep, fp8, offload or fp8_offload"
            raise ConfigError(
                f"activations.{name}", "recompute", f"cannot be rebuilt: {why}", f"use {allowed}"
            )
    if policies.routing in FP8_POLICIES:
        raise ConfigError("activations.routing", policies.routing, "holds indices, which FP8 would destroy",
                          "use keep or offload")  # fmt: skip


def saved_tensors(w: Workload, policies: ActivationsConfig, moe: bool) -> tuple[SavedTensor, ...]:
    """Every activation of one layer, in the order of `ActivationsConfig`; those the layer does not have are left out."""
    shapes = {**_attention_shapes(w), **(_moe_shapes(w) if moe else _mlp_shapes(w))}
    extras = _extra_bytes(w, moe)
    names = [field.name for field in fields(policies)]
    return tuple(
        _saved(w, name, getattr(policies, name), shapes.get(name, ()), extras.get(name, 0))
        for name in names
        if name in shapes or name in extras
    )


_Shapes = dict[str, tuple[tuple[int, int], ...]]
"""The tensors of a name: (rows of the microbatch, numbers in a row), as FP8 tiles lie along rows."""


def _saved(
    w: Workload, name: str, policy: Policy, shapes: tuple[tuple[int, int], ...], extra_bytes: int
) -> SavedTensor:
    numbers = sum(rows * width for rows, width in shapes)
    stored = full = numbers * w.element_bytes
    if policy == "recompute":
        stored = 0
    elif policy in FP8_POLICIES:
        stored = sum(rows * (width + 4 * -(-width // FP8_TILE)) for rows, width in shapes)
    return SavedTensor(name, policy, numbers, full + extra_bytes, stored + extra_bytes)


def _attention_shapes(w: Workload) -> _Shapes:
    model, tokens = w.model, w.tokens
    heads, hidden = model.num_attention_heads, model.hidden_size
    shapes: _Shapes = {
        "layer_input": ((tokens, hidden),),
        "input_norm_output": ((tokens, hidden),),
        "kv_latent": ((tokens, model.kv_lora_rank + model.qk_rope_head_dim),),
        "kv_latent_norm_output": ((tokens, model.kv_lora_rank),),
        "query": ((tokens * heads, model.qk_head_dim),),
        # Keys are saved as attention reads them, every head with its copy of the rotary part.
        "key_value": ((tokens * heads, model.qk_head_dim), (tokens * heads, model.v_head_dim)),
        "attention_output": ((tokens, heads * model.v_head_dim),),
        "attention_residual": ((tokens, hidden),),
        "post_norm_output": ((tokens, hidden),),
    }
    if model.q_lora_rank is not None:
        shapes["q_latent"] = shapes["q_latent_norm_output"] = ((tokens, model.q_lora_rank),)
    return shapes


def _moe_shapes(w: Workload) -> _Shapes:
    model, rows, tokens = w.model, w.rows, w.tokens
    hidden, width = model.hidden_size, model.moe_intermediate_size
    shapes: _Shapes = {
        "expert_input": ((rows, hidden),),
        "swiglu_input": ((rows, 2 * width),),
        "swiglu_output": ((rows, width),),
    }
    if model.n_shared_experts:
        shared = model.n_shared_experts * width
        shapes["shared_swiglu_input"] = ((tokens, 2 * shared),)
        shapes["shared_swiglu_output"] = ((tokens, shared),)
    return shapes


def _mlp_shapes(w: Workload) -> _Shapes:
    width = w.model.intermediate_size
    return {"mlp_swiglu_input": ((w.tokens, 2 * width),), "mlp_swiglu_output": ((w.tokens, width),)}


def _extra_bytes(w: Workload, moe: bool) -> dict[str, int]:
    """Small numbers that share a name's fate, whole: each norm's inverse RMS in the accumulation type, the log-sum-exp that
    fused attention keeps, and the routing."""
    wide = accumulation_bytes(w.dtype)
    normed = ["layer_input", "kv_latent", "attention_residual"] + ["q_latent"] * (
        w.model.q_lora_rank is not None
    )
    extras = dict.fromkeys(normed, wide * w.tokens)
    if w.fused_attention:
        extras["attention_output"] = wide * w.tokens * w.model.num_attention_heads
    if moe:
        extras["routing"] = _routing_bytes(w, wide)
    return extras


def _routing_bytes(w: Workload, wide: int) -> int:
    """Scores of all experts; of every (token, expert) pair its expert (8 bytes) and, at the expert, its weight; the tables of
    the route; the row after each local expert's last; with a balance loss, every sequence's loads."""
    experts = w.model.n_routed_experts
    loads = 8 * w.microbatch_size * experts if w.balance_loss else 0
    return wide * w.tokens * experts + (8 + wide) * w.rows + table_bytes(w) + 4 * (experts // w.ep) + loads


def table_bytes(w: Workload) -> int:
    """A route's index tables, 4 bytes an entry.

    Of every (token, expert) pair its row and its token, and with other ranks, of every row that arrives, its place
    among the experts' rows and back. Where tokens are passed on: of every copy in every hop its row and its place
    in the order of sums, and of every row where its copies begin there; of every pair that arrives its
    place among the choices and its place in the order of sums; as many as are to be expected.
    """
    if w.deepep:
        return _deepep_table_bytes(w)
    if w.relay_ranks is None:
        return 8 * w.rows if w.ep == 1 else 16 * w.rows
    arrived = w.tokens * w.ep * hit_probability(w, 1)
    if w.relay_ranks == w.ep:
        of_hops = 2 * arrived + w.tokens
    else:
        crossed = w.tokens * (w.ep // w.relay_ranks) * hit_probability(w, w.relay_ranks)
        of_hops = 2 * crossed + w.tokens + 2 * arrived + crossed
    return round(4 * (of_hops + arrived)) + 8 * w.rows


def _deepep_table_bytes(w: Workload) -> int:
    """Our three tables of the rows that arrive, and the handle, from DeepEP's sources: of every token which ranks need it
    (1 byte each); inside a node a number for each rank and the source of each row (4 bytes each); between nodes a number
    for each node, one for each of a node's ranks of every token that reached the node, and 8 bytes for each row. The small
    matrices of ranks and channels are left out."""
    arrived = w.tokens * w.ep * hit_probability(w, 1)
    ours = 8 * w.rows + 4 * arrived
    if w.ep <= DEEPEP_NODE:
        return round(ours + 5 * w.tokens * w.ep + 4 * arrived)
    nodes = w.ep // DEEPEP_NODE
    reached = w.tokens * nodes * hit_probability(w, DEEPEP_NODE)
    handle = w.tokens * w.ep + 4 * w.tokens * nodes + 4 * DEEPEP_NODE * reached + 8 * arrived
    return round(ours + handle)
