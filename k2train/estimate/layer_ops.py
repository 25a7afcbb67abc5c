"""The operations of a layer's phases, forward, for one microbatch on one rank.

    MoE layer     attention (compute) | dispatch | experts (compute) | combine
    dense layer   attention (compute) | mlp (compute)

Behind the combine the experts' outputs are added, weighted, to the residual stream (`merge_ops`). Routing is taken as even: every rank gets as many
rows as it sends. Shapes: T tokens, N = T * num_experts_per_tok routed rows. Source: DeepSeek-V3 (arXiv 2412.19437),
sections 2.1.1 and 2.1.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from k2train.config.model import ModelConfig
from k2train.config.sections import Dtype, TrainConfig
from k2train.estimate.work import ELEMENT_BYTES, Op, accumulation_bytes
from k2train.layout.weights import attention_flops


@dataclass(frozen=True)
class Workload:
    """One microbatch of one rank."""

    model: ModelConfig
    seq_len: int
    microbatch_size: int
    dtype: Dtype
    ep: int
    balance_loss: bool = True
    """Whether the sequence-wise balance loss is on, which keeps every sequence's loads."""
    fused_attention: bool = False
    """Whether attention takes its GPU kernels (ops.attention), which keep a number of each head and token."""
    relay_ranks: int | None = None
    """`Layout.relay_ranks`: whether a token's copies are passed on, and among how many ranks."""
    deepep: bool = False
    """Whether DeepEP's kernels carry the tokens, which keep tables of their own."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.seq_len * self.microbatch_size

    @property
    def rows(self) -> int:
        """N, the (token, expert) pairs a rank sends, and with even routing receives."""
        return self.tokens * self.model.num_experts_per_tok

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]


def workload(
    model: ModelConfig, train: TrainConfig, ep: int, relay_ranks: int | None = None, deepep: bool = False
) -> Workload:
    """The microbatch that `train` asks for."""
    balance_loss = train.balance_loss_alpha > 0
    fused_attention = train.device != "cpu" and train.dtype == "bfloat16"
    return Workload(
        model,
        train.seq_len,
        train.microbatch_size,
        train.dtype,
        ep,
        balance_loss,
        fused_attention,
        relay_ranks,
        deepep and ep > 1,
    )


def hit_probability(w: Workload, num_ranks: int) -> float:
    """Chance that at least one of a token's experts is on given ranks, if every choice of experts is as likely."""
    experts, chosen = w.model.n_routed_experts, w.model.num_experts_per_tok
    held = min(experts, num_ranks * (experts // w.ep))
    missed = 1.0
    for drawn in range(chosen):
        missed *= max(0, experts - held - drawn) / (experts - drawn)
    return 1.0 - missed


def product(
    w: Workload,
    name: str,
    rows: int,
    inner: int,
    outer: int,
    reads: str,
    produces: str | None = None,
    copies: int = 1,
    gradient_bytes: int | None = None,
) -> Op:
    """rows x inner times inner x outer; `copies` weights, among which the rows are divided (grouped experts).

    reads: the activation it multiplies. gradient_bytes: of one number of the output's gradient, None for the compute type.
    """
    weight = copies * inner * outer
    moved = w.element_bytes * (rows * (inner + outer) + weight)
    queued = (reads, rows * inner * w.element_bytes, rows * outer * (gradient_bytes or w.element_bytes))
    return Op(name, "matmul", moved, 2.0 * rows * inner * outer, produces, weight, queued=queued)


def elementwise(w: Workload, name: str, numbers: float, produces: str | None = None) -> Op:
    """A kernel that reads and writes so many numbers of the compute type in all."""
    return Op(name, "elementwise", numbers * w.element_bytes, produces=produces)


def attention_phase(w: Workload, moe: bool) -> list[Op]:
    """Norm, MLA, residual, norm; in a MoE layer also router and the copies of tokens for the dispatch, counted as one for
    every expert however they are sent."""
    model, tokens = w.model, w.tokens
    hidden = model.hidden_size
    ops = [
        elementwise(w, "input_norm", 2 * tokens * hidden, "input_norm_output"),
        *_queries(w),
        *_keys_values(w),
    ]
    ops += _core_attention(w)
    width = model.num_attention_heads * model.v_head_dim
    ops += [
        product(w, "o_proj", tokens, width, hidden, "attention_output"),
        elementwise(w, "residual", 3 * tokens * hidden, "attention_residual"),
        elementwise(w, "post_norm", 2 * tokens * hidden, "post_norm_output"),
    ]
    return ops + (_routing(w) if moe else [])


def _queries(w: Workload) -> list[Op]:
    model, tokens = w.model, w.tokens
    width = model.num_attention_heads * model.qk_head_dim
    if model.q_lora_rank is None:
        return [product(w, "q_proj", tokens, model.hidden_size, width, "input_norm_output", "query")]
    rank = model.q_lora_rank
    return [
        product(w, "q_a_proj", tokens, model.hidden_size, rank, "input_norm_output", "q_latent"),
        elementwise(w, "q_a_norm", 2 * tokens * rank, "q_latent_norm_output"),
        product(w, "q_b_proj", tokens, rank, width, "q_latent_norm_output", "query"),
    ]


def _keys_values(w: Workload) -> list[Op]:
    model, tokens = w.model, w.tokens
    rank = model.kv_lora_rank
    width = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)
    latent = rank + model.qk_rope_head_dim
    return [
        product(w, "kv_a_proj", tokens, model.hidden_size, latent, "input_norm_output", "kv_latent"),
        elementwise(w, "kv_a_norm", 2 * tokens * rank, "kv_latent_norm_output"),
        product(w, "kv_b_proj", tokens, rank, width, "kv_latent_norm_output", "key_value"),
    ]


def _core_attention(w: Workload) -> list[Op]:
    model, tokens = w.model, w.tokens
    heads = model.num_attention_heads
    forward = tokens * attention_flops(model, w.seq_len)
    # The backward rebuilds the scores and takes gradients of scores, values, queries and keys: three products of the
    # query-key width and two of the value width, where the forward has one of each (FlashAttention, arXiv 2307.08691). The
    # kernels take queries and keys apart, and rebuild scores and their gradients for each.
    query, value = model.qk_head_dim, model.v_head_dim
    twice = 1 if w.fused_attention else 0
    backward = forward * ((3 + twice) * query + (2 + twice) * value) / (query + value)
    moved = w.element_bytes * tokens * heads * (2 * query + 2 * value)
    return [
        # Queries and keys are written once more, rotated and put together with their unrotated part.
        elementwise(w, "rotary", 4 * tokens * heads * query),
        Op("attention", "attention", moved, forward, "attention_output", backward_flops=backward),
    ]


def _routing(w: Workload) -> list[Op]:
    model, tokens = w.model, w.tokens
    experts, wide = model.n_routed_experts, accumulation_bytes(w.dtype)
    return [
        product(
            w,
            "router",
            tokens,
            model.hidden_size,
            experts,
            "post_norm_output",
            "routing",
            gradient_bytes=wide,
        ),
        elementwise(w, "top_k", 4 * tokens * model.n_routed_experts),
        elementwise(w, "permute", 2 * w.rows * model.hidden_size),
    ]


def experts_phase(w: Workload) -> list[Op]:
    """Routed experts on the rows that arrived, shared experts on the rank's own tokens."""
    model, rows = w.model, w.rows
    hidden, width, local = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts // w.ep
    ops = [
        # Rows arrive by sender and are put in order of expert, and back.
        elementwise(w, "sort_by_expert", 4 * rows * hidden),
        product(w, "experts_up", rows, hidden, 2 * width, "expert_input", "swiglu_input", local),
        elementwise(w, "swiglu", 3 * rows * width, "swiglu_output"),
        product(w, "experts_down", rows, width, hidden, "swiglu_output", copies=local),
    ]
    if model.n_shared_experts:
        ops += _swiglu_mlp(w, "shared", model.n_shared_experts * width)
    return ops


def merge_ops(w: Workload) -> list[Op]:
    """Weighted sum of what the experts returned, and the residual stream."""
    hidden = w.model.hidden_size
    return [elementwise(w, "merge", w.rows * hidden + 3 * w.tokens * hidden)]


def mlp_phase(w: Workload) -> list[Op]:
    """The feed-forward of a dense layer and its residual addition."""
    ops = _swiglu_mlp(w, "mlp", w.model.intermediate_size)
    return [*ops, elementwise(w, "residual", 3 * w.tokens * w.model.hidden_size)]


def _swiglu_mlp(w: Workload, name: str, width: int) -> list[Op]:
    tokens, hidden = w.tokens, w.model.hidden_size
    return [
        product(w, f"{name}_up", tokens, hidden, 2 * width, "post_norm_output", f"{name}_swiglu_input"),
        elementwise(w, f"{name}_swiglu", 3 * tokens * width, f"{name}_swiglu_output"),
        product(w, f"{name}_down", tokens, width, hidden, f"{name}_swiglu_output"),
    ]


def embedding_ops(w: Workload) -> list[Op]:
    """The look-up."""
    return [elementwise(w, "embedding", 2 * w.tokens * w.model.hidden_size)]


def embedding_grad_bytes(w: Workload) -> float:
    """The scatter-add of the gradient into the FP32 buffer: rows read, sums read and written."""
    return w.tokens * w.model.hidden_size * (w.element_bytes + 8.0)


def head_ops(w: Workload, num_chunks: int = 1) -> tuple[Op, Op, Op]:
    """Final norm, logits, and the loss, which passes over FP32 logits three times (maximum, sum, gradient).

    num_chunks: times the head's weight is read, and its gradient sum updated.
    """
    tokens, hidden, vocab = w.tokens, w.model.hidden_size, w.model.vocab_size
    logits = product(w, "lm_head", tokens, hidden, vocab, "head_input")
    again = (num_chunks - 1) * w.element_bytes * logits.weight_elements
    logits = dataclasses.replace(
        logits, bytes=logits.bytes + again, weight_elements=num_chunks * logits.weight_elements
    )
    loss = Op("loss", "elementwise", 3 * 4.0 * tokens * vocab)
    return elementwise(w, "final_norm", 2 * tokens * hidden), logits, loss
