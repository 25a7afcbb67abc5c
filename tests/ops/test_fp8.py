"""FP8 storage in stock operations: torch's own cast tile by tile, E4M3's error bound, and what is
not finite."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.ops.fp8 import DTYPES, dequantise, num_tiles, quantise

WIDTHS = (1, 5, 127, 128, 129, 300)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def counter() -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_codes_and_scales_are_those_of_a_loop_over_tiles_bit_for_bit(dtype, width, looped) -> None:
    x = normal(7, width, dtype=dtype) * torch.logspace(-20, 4, 7, base=2, dtype=dtype)[:, None]
    stored = quantise(x)
    codes, scales = looped(x)
    assert torch.equal(stored.codes, codes)
    assert torch.equal(stored.scales, scales)
    assert stored.codes.is_contiguous()
    assert stored.scales.is_contiguous()


@settings(max_examples=150, deadline=None)
@given(
    width=st.sampled_from(WIDTHS),
    rows=st.sampled_from((0, 1, 7)),
    dtype=st.sampled_from(DTYPES),
    exponents=st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_no_element_errs_by_more_than_the_bound_of_its_tile(
    width, rows, dtype, exponents, zeros, seed, bound
) -> None:
    """Magnitudes spread over 10^low to 10^high within one tile, cut to float16's range there; zeros
    stay zeros."""
    generator = torch.Generator().manual_seed(seed)
    low, high = sorted(exponents)
    powers = low + (high - low) * torch.rand(rows, width, dtype=torch.float64, generator=generator)
    kept = torch.rand(rows, width, dtype=torch.float64, generator=generator) >= zeros
    wide = 10.0**powers * kept * normal(rows, width, seed=seed).sign()
    x = wide.clamp(-65504, 65504).to(dtype) if dtype == torch.float16 else wide.to(dtype)
    count = counter()
    stored = quantise(x, count)
    back = dequantise(stored)
    assert back.dtype == dtype
    assert ((back.double() - x.double()).abs() <= bound(x, stored.scales)).all()
    assert (back[x == 0] == 0).all()
    assert count == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_every_dtype_come_back(dtype, bound) -> None:
    info = torch.finfo(dtype if dtype != torch.float64 else torch.float32)
    values = (info.max, info.tiny, info.tiny * info.eps)
    x = torch.tensor(values, dtype=torch.float64)[:, None].expand(3, 130).to(dtype)
    stored = quantise(x)
    back = dequantise(stored)
    assert back.isfinite().all()
    assert stored.scales.min() >= torch.finfo(torch.float32).tiny
    assert ((back.double() - x.double()).abs() <= bound(x, stored.scales)).all()


def test_a_small_number_among_ones_survives_where_a_cast_without_scale_loses_it() -> None:
    """0.0009 is under half of E4M3's smallest step, 2^-10; with the scale 1/448 it is 0.4032, a
    normal code."""
    x = torch.ones(1, 128)
    x[0, 5] = 0.0009
    assert x.to(torch.float8_e4m3fn).float()[0, 5] == 0
    back = dequantise(quantise(x))[0, 5]
    assert abs(back - 0.0009) <= 0.0009 * 2**-4


def test_an_outlier_costs_precision_in_its_own_tile_alone() -> None:
    """Beside 2^20 the step is 2^-9 of 2^20 / 448, over 4, so a one vanishes; the tile next to it is
    exact."""
    x = torch.ones(1, 256)
    x[0, 3] = 2.0**20
    back = dequantise(quantise(x))
    assert back[0, 4] == 0
    assert torch.equal(back[0, 128:], x[0, 128:])


def test_numbers_past_448_do_not_become_nan() -> None:
    """torch 2.11 casts what is past 464 to NaN; scaled and clamped, no finite number gets there."""
    x = torch.tensor([[1e4, -1e4, 500.0, -465.0, 449.0]])
    back = dequantise(quantise(x))
    assert (back / x - 1).abs().max() <= 2**-4


def test_tiles_of_zeros_come_back_as_zeros() -> None:
    x = normal(3, 300)
    x[1], x[2, 128:256] = 0, 0
    back = dequantise(quantise(x))
    assert torch.equal(back == 0, x == 0)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tile_that_is_not_finite_comes_back_as_nan_and_is_counted(bad, dtype) -> None:
    x = normal(4, 300, dtype=dtype)
    clean = dequantise(quantise(x))
    x[1, 130], x[1, 131], x[3, 299] = bad, bad, bad
    count = counter() + 5
    back = dequantise(quantise(x, count))
    assert count == 5 + 2
    assert back[1, 128:256].isnan().all()
    assert back[3, 256:].isnan().all()
    poisoned = torch.zeros(4, 300, dtype=torch.bool)
    poisoned[1, 128:256], poisoned[3, 256:] = True, True
    assert torch.equal(back[~poisoned], clean[~poisoned])


def test_a_float64_beyond_float32_poisons_its_tile() -> None:
    count = counter()
    back = dequantise(quantise(torch.tensor([[1e300, 1.0]], dtype=torch.float64), count))
    assert back.isnan().all()
    assert count == 1


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4, 130), (2, 0, 7), (0, 128), (3, 0), (0,)])
def test_any_shape_is_rows_of_its_last_dimension(shape: tuple[int, ...]) -> None:
    x = normal(*shape, dtype=torch.bfloat16)
    stored = quantise(x)
    rows, width = math.prod(shape[:-1]), shape[-1]
    assert stored.codes.shape == (rows, width)
    assert stored.scales.shape == (rows, num_tiles(width))
    assert stored.num_bytes == rows * (width + 4 * num_tiles(width))
    back = dequantise(stored)
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    assert back.is_contiguous()
    flat = quantise(x.reshape(rows, width))
    assert torch.equal(stored.codes, flat.codes)


def test_views_are_quantised_as_their_contiguous_copies() -> None:
    x = normal(6, 5, 140)
    for view in (x.transpose(0, 2), x[:, 1:4, 3:], x[::2], x[0, 0].expand(4, 140)):
        stored, copied = quantise(view), quantise(view.clone(memory_format=torch.contiguous_format))
        assert torch.equal(stored.codes, copied.codes)
        assert torch.equal(stored.scales, copied.scales)
        assert stored.shape == tuple(view.shape)
        assert dequantise(stored).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storing_a_second_time_changes_nothing(dtype: torch.dtype) -> None:
    """A tile's largest number comes back exactly, 448 times the scale being off by 2^-24, so the
    scale is the same; the others moved by eps / 2 <= 2^-8 of themselves from a code, and codes are
    2^-4 apart. Away from subnormals."""
    first = quantise(normal(20, 300, dtype=dtype))
    second = quantise(dequantise(first))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


def test_nothing_stored_refers_to_the_original_or_its_graph() -> None:
    x = normal(2, 130).requires_grad_()
    stored = quantise(x * 2)
    before = dequantise(stored)
    assert not stored.codes.requires_grad
    assert not before.requires_grad
    with torch.no_grad():
        x.zero_()
    assert torch.equal(dequantise(stored), before)


def test_a_copy_of_codes_and_scales_is_the_same_tensor() -> None:
    stored = quantise(normal(2, 3, 130, dtype=torch.bfloat16))
    copied = stored.form.over(*(tensor.clone() for tensor in stored.tensors))
    assert copied.codes.data_ptr() != stored.codes.data_ptr()
    assert torch.equal(dequantise(copied), dequantise(stored))
    with pytest.raises(AssertionError):
        stored.form.over(stored.codes[:1], stored.scales)


@pytest.mark.parametrize("rows", range(4))
@pytest.mark.parametrize("width", [*WIDTHS, 256, 384, 1000])
def test_whatever_the_rows_and_the_width_the_tensor_comes_back_with_its_shape_and_strides(
    rows: int, width
) -> None:
    """No rows at all included: a rank may receive none, and a slice of no rows counts as contiguous
    with any strides."""
    x = normal(rows, width, dtype=torch.bfloat16)
    stored = quantise(x)
    for tensor in (stored.codes, dequantise(stored)):
        assert tensor.stride() == torch.empty(tensor.shape).stride()
    assert dequantise(stored).shape == x.shape


def test_the_form_of_a_stored_tensor_keeps_none_of_its_memory() -> None:
    stored = quantise(normal(4, 200))
    form = stored.form
    codes, scales = (weakref.ref(tensor.untyped_storage()) for tensor in stored.tensors)
    del stored
    assert (codes(), scales(), form.shape) == (None, None, (4, 200))


def test_a_scalar_or_an_integer_tensor_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="scalar"):
        quantise(torch.tensor(1.0))
    with pytest.raises(AssertionError, match="int64"):
        quantise(torch.arange(3))
