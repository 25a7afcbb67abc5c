"""Block-FP8 weights against the definition, element by element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.checkpoint.fp8_blocks import dequantize, scale_shape


@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    block=st.sampled_from([(128, 128), (64, 128), (1, 128), (7, 5)]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_every_element_is_its_value_times_the_scale_of_its_block(
    rows: int, columns: int, block: tuple[int, int], seed: int
) -> None:
    """The oracle indexes the block of each element; products are FP32 in both, so bits must
    agree."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    weight = raw.masked_fill((raw & 0x7F) == 0x7F, 0).view(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape((rows, columns), block), generator=generator) * 1e-3
    block_row = torch.arange(rows) // block[0]
    block_column = torch.arange(columns) // block[1]
    expected = (weight.float() * scale[block_row][:, block_column]).bfloat16()
    got = dequantize(weight, scale, block)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


def test_values_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 448.0], [-0.5, 0.0, 2.0**-9]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 0.25]])
    expected = torch.tensor([[2.0, 4.0, 112.0], [-1.0, 0.0, 2.0**-11]], dtype=torch.bfloat16)
    assert torch.equal(dequantize(weight, scale, (128, 2)), expected)


def test_a_nan_stays_a_nan() -> None:
    weight = torch.tensor([[math.nan, 1.0]]).to(torch.float8_e4m3fn)
    got = dequantize(weight, torch.ones(1, 1), (128, 128))
    assert got[0, 0].isnan()
    assert got[0, 1] == 1


def test_blocks_cover_edges_and_wrong_scales_are_refused() -> None:
    assert scale_shape((576, 7168), (128, 128)) == (5, 56)
    assert scale_shape((1, 129), (128, 128)) == (1, 2)
    with pytest.raises(ValueError, match="scales of shape"):
        dequantize(torch.zeros(129, 4, dtype=torch.float8_e4m3fn), torch.ones(1, 1), (128, 128))
