"""torch's FlexAttention with its largest scores, which nobody here wrote, beside the ways attention
is computed here."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.attention import flex_attention

from k2train.ops.attention import causal_attention, causal_attention_reference
from k2train.ops.backend import OpsBackend
from k2train.ops.row_max import stock_largest_logits

HAS_SCORES = getattr(flex_attention, "AuxRequest", None) is not None
needs_scores = pytest.mark.skipif(
    not HAS_SCORES, reason="this torch's FlexAttention returns no largest scores"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU it returns no largest scores")
SCALE = 0.3


def inputs(length: int, dtype: torch.dtype, device: str = "cpu"):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, 3, length, 16, generator=generator, dtype=torch.float64).to(dtype).to(device)
        for _ in range(3)
    ]


def flex(q, k, v, scale, **wanted):
    """FlexAttention, causal, eager: on a CPU it has neither a backward nor largest scores."""
    length = q.shape[2]
    causal = flex_attention.create_block_mask(
        lambda batch, head, row, column: row >= column, None, None, length, length, device=q.device
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*flex_attention.*")
        return flex_attention.flex_attention(q, k, v, block_mask=causal, scale=scale, **wanted)


@pytest.mark.parametrize("length", [3, 40])
def test_the_output_is_flex_attentions(length: int) -> None:
    """In float64 both sum the same products in other orders."""
    q, k, v = inputs(length, torch.float64)
    out = causal_attention(q, k, v, SCALE).out
    torch.testing.assert_close(out.transpose(1, 2), flex(q, k, v, SCALE))


@needs_scores
@pytest.mark.parametrize("length", [3, 40])
def test_largest_logits_are_what_flex_attentions_log_sums_come_to_when_it_is_cold(length: int) -> None:
    """lse(t x) / t lies between the largest x and ln(n) / t above it: 4e-6 for 40 numbers and t of
    a million."""
    q, k, v = inputs(length, torch.float64)
    sharpness = 1e6
    _, aux = flex(q, k, v, SCALE * sharpness, return_aux=flex_attention.AuxRequest(lse=True))
    largest = aux.lse.amax((0, 2)) / sharpness
    reference = causal_attention_reference(q, k, v, SCALE)[1]
    for found in (causal_attention(q, k, v, SCALE).max_logits, reference, stock_largest_logits(q, k, SCALE)):
        torch.testing.assert_close(found, largest.to(found.dtype), rtol=1e-6, atol=5e-6)


@pytest.mark.gpu
@needs_gpu
@needs_scores
@pytest.mark.parametrize("length", [40, 1000])
def test_on_a_gpu_largest_logits_are_flex_attentions_largest_scores(length: int) -> None:
    """Both from BF16 products with FP32 sums."""
    q, k, v = inputs(length, torch.bfloat16, "cuda")
    _, aux = flex(q, k, v, SCALE, return_aux=flex_attention.AuxRequest(max_scores=True))
    found = causal_attention(q, k, v, SCALE, backend=OpsBackend("triton")).max_logits
    torch.testing.assert_close(found, aux.max_scores.amax((0, 2)), rtol=1e-3, atol=1e-3)
