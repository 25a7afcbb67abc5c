"""The words in which a block says what it does: operations of a microbatch, and what they leave
saved.

An operation is one kernel: its FLOPs, its bytes, the activation that it writes. How long that takes
is for the estimate to say. T is the tokens of a microbatch, N = T * num_experts_per_tok its routed
rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from k2train.config.model import ModelConfig
from k2train.config.ops import AttentionKernel
from k2train.config.sections import Dtype

ELEMENT_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of one number of the compute type."""

Kind = Literal["matmul", "attention", "elementwise"]


def accumulation_bytes(dtype: Dtype) -> int:
    """Bytes of a gradient sum, a master weight or a moment: FP32, FP64 in float64 runs."""
    return 8 if dtype == "float64" else 4


@dataclass(frozen=True)
class Op:
    """One kernel of a microbatch on one rank, forward. produces: the activation it writes, if it
    has a name."""

    name: str
    kind: Kind
    bytes: float
    flops: float = 0.0
    produces: str | None = None
    weight_elements: int = 0
    """Entries of the weight it multiplies by; 0 where there is none."""
    backward_flops: float | None = None
    """FLOPs of the input gradient; None where they equal the forward's."""
    backward_bytes: float | None = None
    """Bytes that the input gradient moves; None for the usual multiple of the forward's."""
    extra_flops: float = 0.0
    """FLOPs of the forward that the model itself does not need: they take time and count for no
    utilisation."""
    relative_speed: float = 1.0
    """Share of what its kind reaches on the cluster."""
    queued: tuple[str, int, int] | None = None
    """What waits for the weight gradient: the input's name, its bytes, and the bytes of the
    output's gradient.

    For a norm, whose weight's gradient waits ready to be added: its own name, 0, and the bytes of
    that gradient.
    """
    weight_kernels: int = 1
    """Kernels among which the weight gradient is divided: one for each expert, or for each run of
    rows."""
    weight_passes: int = 1
    """Times the product of the weight gradient is computed: once for each BF16 part of an FP32
    gradient."""


@dataclass(frozen=True)
class Saved:
    """What a layer keeps of one named activation until its backward.

    parts: its tensors, each (rows of the microbatch, numbers in a row), as FP8 tiles lie along
    rows. extra_bytes: small numbers that share the name's fate, whole: a norm's inverse RMS in the
    type of the sums, the log-sum-exp of fused attention, the routing.
    """

    parts: tuple[tuple[int, int], ...] = ()
    extra_bytes: int = 0


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
        """Whether attention keeps a number of each head and token instead of making its scores
        again from nothing."""
        return self.attention != "tiles"

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def norm_statistics(self) -> int:
        """Bytes of a norm's inverse RMS of every token, in the type of the sums."""
        return accumulation_bytes(self.dtype) * self.tokens


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
    """rows x inner times inner x outer; `copies` weights, among which the rows are divided (grouped
    experts).

    reads: the activation it multiplies. gradient_bytes: of one number of the output and of its
    gradient, None for the compute type. The weight gradient of each copy is a product of its own.
    """
    weight = copies * inner * outer
    output = rows * outer * (gradient_bytes or w.element_bytes)
    moved = w.element_bytes * (rows * inner + weight) + output
    queued = (reads, rows * inner * w.element_bytes, output)
    flops = 2.0 * rows * inner * outer
    return Op(name, "matmul", moved, flops, produces, weight, queued=queued, weight_kernels=copies)


def norm(w: Workload, name: str, features: int, produces: str | None = None) -> Op:
    """An RMSNorm of every token.

    Its backward leaves the weight's gradient, in the type of the sums, for W to add.
    """
    op = elementwise(w, name, 2 * w.tokens * features, produces)
    return dataclasses.replace(op, queued=(name, 0, features * accumulation_bytes(w.dtype)))


def elementwise(w: Workload, name: str, numbers: float, produces: str | None = None) -> Op:
    """A kernel that reads and writes so many numbers of the compute type in all."""
    return Op(name, "elementwise", numbers * w.element_bytes, produces=produces)
