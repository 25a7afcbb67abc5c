"""Tiled causal attention against SDPA and against full scores."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from k2train.ops.attention import causal_attention, causal_attention_reference
from k2train.ops.attention_tiles import AttentionScratch


def inputs(
    batch,
    heads,
    length,
    width,
    value_width,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    spread: float = 1.0,
):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, width)] * 2 + [(batch, heads, length, value_width)]
    return [
        (torch.randn(s, generator=generator, dtype=torch.float64) * spread).to(dtype).requires_grad_()
        for s in shapes
    ]


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 90), st.integers(1, 9), st.integers(1, 9)
    ),
    tile=st.sampled_from([1, 40, 700, 10**6]),
    seed=st.integers(0, 100),
)
def test_output_maxima_and_gradients_are_those_of_full_scores_for_any_tile(shape, tile, seed) -> None:
    q, k, v = inputs(*shape, seed=seed, spread=2.0)
    out, maxima, _ = causal_attention(q, k, v, 0.3, tile)
    expected, expected_maxima = causal_attention_reference(q, k, v, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(maxima, expected_maxima)
    assert not maxima.requires_grad
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    for one, other in zip(got, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
def test_output_is_that_of_torch_sdpa(dtype: torch.dtype, tolerance: float) -> None:
    """SDPA rounds the probabilities to bfloat16 before the second product, which costs up to half a
    unit of 2^-8."""
    q, k, v = inputs(2, 4, 150, 24, 24, dtype=dtype)
    out, maxima, _ = causal_attention(q, k, v, 0.25)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    assert out.dtype == dtype
    assert maxima.dtype == torch.float32


def test_maxima_ignore_the_future_and_may_be_negative() -> None:
    """Only the last query meets its large partner; every earlier product with that key lies in the
    future."""
    q, k = torch.ones(1, 1, 5, 2), -torch.ones(1, 1, 5, 2)
    k[0, 0, 4] = 100.0
    _, maxima, _ = causal_attention(q[:, :, :4], k[:, :, :4], k[:, :, :4], 1.0)
    assert maxima.tolist() == [-2.0]
    _, maxima, _ = causal_attention(q, k, k, 1.0)
    assert maxima.tolist() == [200.0]


def test_gradcheck() -> None:
    q, k, v = inputs(1, 2, 37, 3, 2)
    assert torch.autograd.gradcheck(lambda *t: causal_attention(*t, 0.5, 64)[0], (q, k, v))


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor any operation returned, in elements of its storage."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.largest = max(self.largest, size)
        return out


class LargestEmpty(LargestTensor):
    """The same among tensors that are asked for by their size."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "empty" in func.name():
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tile", [2**12, 2**14])
def test_no_more_than_a_tile_of_scores_is_ever_allocated(tile: int) -> None:
    """4 heads x 512 x 512 scores are 2^20; q, k, v and their gradients are 2^13 each."""
    q, k, v = inputs(1, 4, 512, 4, 4, dtype=torch.float32)
    with LargestTensor() as seen:
        out, _, _ = causal_attention(q, k, v, 0.5, tile)
        torch.autograd.grad(out.sum(), (q, k, v))
    assert seen.largest <= max(tile, 32 * 512)
    with LargestTensor() as full:
        causal_attention_reference(q, k, v, 0.5)
    assert full.largest == 4 * 512 * 512


def test_calls_of_any_shape_and_type_share_a_scratch_and_change_nothing() -> None:
    """Forwards before backwards, as a layer's calls come, and shapes whose tiles differ in number,
    size and type."""
    scratch = AttentionScratch()
    shapes = [(3, 2, 70), (1, 4, 33), (3, 2, 70), (2, 2, 130)]
    calls = []
    for (batch, heads, length), dtype in itertools.product(shapes, (torch.float32, torch.float64)):
        tensors = inputs(batch, heads, length, 4, 3, dtype=dtype)
        calls.append((tensors, causal_attention(*tensors, 0.5, 2**12, scratch)))
    for tensors, (out, maxima, _) in reversed(calls):
        own, own_maxima, _ = causal_attention(*tensors, 0.5, 2**12)
        assert torch.equal(out, own)
        assert torch.equal(maxima, own_maxima)
        dout = torch.randn_like(out)
        got, want = (torch.autograd.grad(o, tensors, dout) for o in (out, own))
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_scratch_is_kept_for_calls_of_the_same_shape() -> None:
    scratch, tensors = AttentionScratch(), inputs(1, 4, 512, 4, 4, dtype=torch.float32)
    out, _, _ = causal_attention(*tensors, 0.5, 2**14, scratch)
    with LargestEmpty() as seen:
        torch.autograd.grad(out.sum(), tensors)
        causal_attention(*tensors, 0.5, 2**14, scratch)
    assert 0 < seen.largest <= 2**13
    with LargestEmpty() as fresh:
        causal_attention(*tensors, 0.5, 2**14)
    assert fresh.largest == 32 * 512


def test_only_queries_keys_and_values_are_saved() -> None:
    q, k, v = inputs(1, 2, 20, 4, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        causal_attention(q, k, v, 1.0)
    assert saved == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
