"""torch's FlexAttention with its largest scores, which nobody here wrote, beside the ways attention is computed here."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.attention import flex_attention

from k2train.ops.attention import causal_attention, causal_attention_reference
from k2train.ops.row_max import stock_largest_logits

pytestmark = pytest.mark.skipif(
    getattr(flex_attention, "AuxRequest", None) is None, reason="this torch's FlexAttention returns no scores"
)


@pytest.mark.parametrize("length", [3, 40])
def test_output_and_largest_logits_are_flex_attentions(length):
    """Eager, in float64: both sum the same products in other orders. On a CPU it has no backward."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 3, length, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    causal = flex_attention.create_block_mask(
        lambda batch, head, row, column: row >= column, None, None, length, length, device="cpu"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*flex_attention.*without torch.compile")
        expected, aux = flex_attention.flex_attention(
            q, k, v, block_mask=causal, scale=0.3, return_aux=flex_attention.AuxRequest(max_scores=True)
        )
    out, maxima, _ = causal_attention(q, k, v, 0.3)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    largest = aux.max_scores.amax((0, 2))
    reference = causal_attention_reference(q, k, v, 0.3)[1]
    for found in (maxima, reference, stock_largest_logits(q, k, 0.3)):
        torch.testing.assert_close(found, largest.to(found.dtype), rtol=1e-6, atol=1e-6)
