"""The operations of a layer's phases, forward, for one microbatch on one rank.

    MoE layer     attention (compute) | dispatch | experts (compute) | combine
    dense layer   attention (compute) | mlp (compute)

Copies of tokens are made and added up in dispatch and combine (`exchange`). Routing is taken as even: every rank gets as
many rows as it sends. Shapes: T tokens, N = T * num_experts_per_tok routed rows. Source: DeepSeek-V3 (arXiv 2412.19437),
sections 2.1.1 and 2.1.2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from k2train.config.model import ModelConfig
from k2train.config.ops import (
    DEFAULT_OPS,
    AttentionKernel,
    AttentionSite,
    OpsConfig,
    attention_kernel,
)
from k2train.config.sections import Dtype, TrainConfig
from k2train.estimate.work import ELEMENT_BYTES, Op, accumulation_bytes
from k2train.layout.weights import attention_flops

EMBEDDING_COLUMNS = 1024
"""Columns of the embedding's gradient that are summed at a time."""
TRITON_SPEED = 0.7
"""Of cuDNN's attention, whose share of the matrix rate the cluster file has. Public figures for a forward on an H100 at 4096
positions and width 128, in TFLOP/s: cuDNN 609, FlashAttention-3 590 to 638, Triton 389 to 458 (pytorch/benchmark, #2391)."""


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
    attention: AttentionKernel = "tiles"
    """Whose attention is taken (`config.ops.attention_kernel`, which the program asks too)."""
    exact_max_logits: bool = False
    """Whether the largest logits beside cuDNN's attention are found exactly, whatever they are."""
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
    def fused_attention(self) -> bool:
        """Whether attention keeps a number of each head and token instead of making its scores again from nothing."""
        return self.attention != "tiles"

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]


def workload(
    model: ModelConfig,
    train: TrainConfig,
    ep: int,
    relay_ranks: int | None = None,
    ops: OpsConfig = DEFAULT_OPS,
    deepep: bool = False,
) -> Workload:
    """The microbatch that `train` asks for. Raises ConfigError for an `ops.backend` that cannot run there.

    deepep: whether the layout leaves the exchange to DeepEP.
    """
    balance_loss = train.balance_loss_alpha > 0
    on_gpu = train.device != "cpu" and train.dtype == "bfloat16"
    site = AttentionSite(on_gpu, train.dtype, model.qk_head_dim, model.v_head_dim)
    return Workload(
        model,
        train.seq_len,
        train.microbatch_size,
        train.dtype,
        ep,
        balance_loss,
        attention_kernel(ops.backend, site),
        ops.exact_max_logits,
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

    reads: the activation it multiplies. gradient_bytes: of one number of the output and of its gradient, None for the
    compute type. The weight gradient of each copy is a product of its own.
    """
    weight = copies * inner * outer
    output = rows * outer * (gradient_bytes or w.element_bytes)
    moved = w.element_bytes * (rows * inner + weight) + output
    queued = (reads, rows * inner * w.element_bytes, output)
    flops = 2.0 * rows * inner * outer
    return Op(name, "matmul", moved, flops, produces, weight, queued=queued, weight_kernels=copies)


def norm(w: Workload, name: str, features: int, produces: str | None = None) -> Op:
    """An RMSNorm of every token. Its backward leaves the weight's gradient, in the type of the sums, for W to add."""
    op = elementwise(w, name, 2 * w.tokens * features, produces)
    return dataclasses.replace(op, queued=(name, 0, features * accumulation_bytes(w.dtype)))


def elementwise(w: Workload, name: str, numbers: float, produces: str | None = None) -> Op:
    """A kernel that reads and writes so many numbers of the compute type in all."""
    return Op(name, "elementwise", numbers * w.element_bytes, produces=produces)


def attention_phase(w: Workload, moe: bool) -> list[Op]:
    """Norm, MLA, residual, norm; in a MoE layer also router and the copies of tokens for the dispatch, counted as one for
    every expert however they are sent."""
    model, tokens = w.model, w.tokens
    hidden = model.hidden_size
    ops = [
        norm(w, "input_norm", hidden, "input_norm_output"),
        *_queries(w),
        *_keys_values(w),
    ]
    ops += _core_attention(w)
    width = model.num_attention_heads * model.v_head_dim
    ops += [
        product(w, "o_proj", tokens, width, hidden, "attention_output"),
        elementwise(w, "residual", 3 * tokens * hidden, "attention_residual"),
        norm(w, "post_norm", hidden, "post_norm_output"),
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
        norm(w, "q_a_norm", rank, "q_latent_norm_output"),
        product(w, "q_b_proj", tokens, rank, width, "q_latent_norm_output", "query"),
    ]


def _keys_values(w: Workload) -> list[Op]:
    model, tokens = w.model, w.tokens
    rank = model.kv_lora_rank
    width = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)
    latent = rank + model.qk_rope_head_dim
    return [
        product(w, "kv_a_proj", tokens, model.hidden_size, latent, "input_norm_output", "kv_latent"),
        norm(w, "kv_a_norm", rank, "kv_latent_norm_output"),
        product(w, "kv_b_proj", tokens, rank, width, "kv_latent_norm_output", "key_value"),
    ]


def _core_attention(w: Workload) -> list[Op]:
    model, tokens = w.model, w.tokens
    heads = model.num_attention_heads
    forward = tokens * attention_flops(model, w.seq_len)
    # The backward rebuilds the scores and takes gradients of scores, values, queries and keys: three products of the
    # query-key width and two of the value width, where the forward has one of each (FlashAttention, arXiv 2307.08691). The
    # Triton kernels take queries and keys apart, and rebuild scores and their gradients for each.
    query, value = model.qk_head_dim, model.v_head_dim
    twice = 1 if w.attention == "triton" else 0
    backward = forward * ((3 + twice) * query + (2 + twice) * value) / (query + value)
    moved = w.element_bytes * tokens * heads * (2 * query + 2 * value)
    attention = Op(
        "attention",
        "attention",
        moved,
        forward,
        "attention_output",
        backward_flops=backward,
        relative_speed=TRITON_SPEED if w.attention == "triton" else 1.0,
    )
    # Queries and keys are written once more, rotated and put together with their unrotated part.
    rotary = elementwise(w, "rotary", 4 * tokens * heads * query)
    return [rotary, attention, *([_row_statistics(w)] if w.fused_attention else [])]


def _row_statistics(w: Workload) -> Op:
    """A number of each row: in the forward the largest logits, in the backward the sum of output times gradient.

    The largest logits are the attention's own but for cuDNN's. There a kernel reads every row's log-sum-exp, and that is
    all while no head's passes QK-Clip's tau; wanted exactly whatever they are, they may need all scores once more.
    """
    model, rows = w.model, w.tokens * w.model.num_attention_heads
    outputs = 2 * w.element_bytes * rows * model.v_head_dim
    scores = 0.0
    if w.attention == "cudnn" and w.exact_max_logits:
        share = model.qk_head_dim / (model.qk_head_dim + model.v_head_dim)
        scores = share * w.tokens * attention_flops(model, w.seq_len)
    return Op(
        "row_statistics",
        "attention" if scores else "elementwise",
        4.0 * rows,
        backward_flops=0.0,
        backward_bytes=outputs + 4.0 * rows,
        extra_flops=scores,
        relative_speed=TRITON_SPEED,
    )


def _routing(w: Workload) -> list[Op]:
    model = w.model
    return [
        _router(w),
        elementwise(w, "top_k", 4 * w.tokens * model.n_routed_experts),
    ]


def _router(w: Workload) -> Op:
    """Scores in the type of the sums. From BF16 their gradient is FP32 beside BF16 factors, so it is multiplied in parts:
    two, side by side, for the input gradient and three, one after another, for the weight gradient (ops.linear)."""
    op = product(
        w,
        "router",
        w.tokens,
        w.model.hidden_size,
        w.model.n_routed_experts,
        "post_norm_output",
        "routing",
        gradient_bytes=accumulation_bytes(w.dtype),
    )
    if w.dtype != "bfloat16":
        return op
    return dataclasses.replace(op, backward_flops=2 * op.flops, weight_passes=3)


def experts_phase(w: Workload) -> list[Op]:
    """Routed experts on the rows that arrived, shared experts on the rank's own tokens."""
    model, rows = w.model, w.rows
    hidden, width, local = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts // w.ep
    ops = [
        product(w, "experts_up", rows, hidden, 2 * width, "expert_input", "swiglu_input", local),
        elementwise(w, "swiglu", 3 * rows * width, "swiglu_output"),
        product(w, "experts_down", rows, width, hidden, "swiglu_output", copies=local),
    ]
    if model.n_shared_experts:
        ops += _swiglu_mlp(w, "shared", model.n_shared_experts * width)
    return ops


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
    """The gradient into the sums of its rows: a cast (read, written in the type of the sums), the sums of equal tokens (read,
    written), their addition (read; the weight's sums read and written)."""
    return w.tokens * w.model.hidden_size * (w.element_bytes + 6.0 * accumulation_bytes(w.dtype))


def embedding_grad_kernels(w: Workload) -> int:
    """A cast, a sum and an addition for some columns at a time; a sort, two searches and a choice before them."""
    return 3 * -(-w.model.hidden_size // EMBEDDING_COLUMNS) + 4


def head_ops(w: Workload, num_chunks: int = 1, num_owners: int = 1) -> tuple[Op, Op, Op]:
    """Final norm, logits, and the loss: largest logit, softmax in the type of sums, its largest, scaled, and cast back.

    num_chunks: times the head's weight is read, and its gradient sum updated. num_owners: ranks that the weight's rows are
    cut among; the gradient of each one's rows is a product of its own.
    """
    tokens, hidden, vocab = w.tokens, w.model.hidden_size, w.model.vocab_size
    logits = product(w, "lm_head", tokens, hidden, vocab, "head_input")
    again = (num_chunks - 1) * w.element_bytes * logits.weight_elements
    logits = dataclasses.replace(
        logits,
        bytes=logits.bytes + again,
        weight_elements=num_chunks * logits.weight_elements,
        weight_kernels=num_chunks * num_owners,
    )
    bytes_of_logit = 3.0 * w.element_bytes + 5.0 * accumulation_bytes(w.dtype)
    loss = Op("loss", "elementwise", bytes_of_logit * tokens * vocab)
    return norm(w, "final_norm", hidden), logits, loss
