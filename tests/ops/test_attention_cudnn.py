"""cuDNN's attention: what is asked of it and what is made of its answer, with a stand-in on the
host; and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from k2train.ops.attention import causal_attention, causal_attention_reference
from k2train.ops.attention_cudnn import cudnn_attention, cudnn_attention_backward, cudnn_takes
from k2train.ops.backend import OpsBackend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDNN = OpsBackend("cudnn")


def inputs(length: int, widths: tuple[int, int], dtype: torch.dtype, device: str = "cpu"):
    """q, k, v (B, H, S, features) that lie as (B, S, H, features), and the output's gradient (B, S,
    H, V)."""
    generator = torch.Generator().manual_seed(length)
    query, value = widths
    shapes = [(2, length, 3, width) for width in (query, query, value, value)]
    q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)
    return *(t.requires_grad_() for t in (q, k, v)), dout


def attend(q, k, v, scale, backend=CUDNN):
    return causal_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale, backend=backend)


@pytest.mark.parametrize("widths", [(24, 16), (16, 16)])
@pytest.mark.parametrize("length", [1, 2, 33])
def test_output_gradients_and_largest_logits_are_those_of_full_scores(
    length: int, widths: tuple[int, ...], cudnn_on_the_host
) -> None:
    """The stand-in rounds to FP32 once; one position alone, which cuDNN refuses, takes tiles."""
    q, k, v, dout = inputs(length, widths, torch.float32)
    out, maxima, extras = attend(q, k, v, 0.3)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected, expected_maxima = causal_attention_reference(*(t.transpose(1, 2) for t in wide), 0.3)
    assert out.is_contiguous()
    assert len(extras) == (length > 1)
    torch.testing.assert_close(out, expected.float())
    torch.testing.assert_close(maxima, expected_maxima.float())
    got = torch.autograd.grad(out, (q, k, v), dout)
    want = torch.autograd.grad(expected, wide, dout.double())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)
        assert one.is_contiguous()


def test_queries_with_heads_before_positions_give_the_same(cudnn_on_the_host) -> None:
    q, k, v, dout = inputs(33, (24, 16), torch.float32)
    other = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]
    out = attend(q, k, v, 0.3).out
    again = causal_attention(*other, 0.3, backend=CUDNN).out
    assert again.is_contiguous()
    assert torch.equal(out, again)
    got = torch.autograd.grad(again, other, dout)
    for one, gradient in zip(torch.autograd.grad(out, (q, k, v), dout), got, strict=True):
        torch.testing.assert_close(one, gradient.transpose(1, 2))


def test_what_its_backward_needs_is_saved_once_and_handed_out_to_be_named(cudnn_on_the_host) -> None:
    q, k, v, _ = inputs(8, (24, 16), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, _, extras = attend(q, k, v, 1.0)
    storages = [t.untyped_storage().data_ptr() for t in saved]
    assert storages == [t.untyped_storage().data_ptr() for t in (q, k, v, out, *extras)]
    with torch.no_grad():
        assert attend(q, k, v, 1.0).extras == ()


def test_nothing_is_asked_of_it_when_no_gradient_reaches_the_output(cudnn_on_the_host) -> None:
    q, k, v, _ = inputs(8, (24, 16), torch.float32)
    out, maxima, _ = attend(q, k, v, 1.0)
    assert not maxima.requires_grad
    assert out.requires_grad


def test_tensors_without_memory_come_out_as_those_of_the_operations_it_calls() -> None:
    """torch's own shapes, types and strides of cuDNN's attention, at K2's size, where no GPU is."""
    with FakeTensorMode():
        shape = (1, 4096, 64)
        q, k, v, dout = (
            torch.empty(*shape, width, dtype=torch.bfloat16, device="cuda:0").transpose(1, 2)
            for width in (192, 192, 128, 128)
        )
        out, sums = cudnn_attention(q, k, v, 0.1)
        asked = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=0.1
        )
        for ours, theirs in zip((out, sums), asked[:2], strict=True):
            assert geometry(ours) == geometry(theirs)
        gradients = cudnn_attention_backward(dout, q, k, v, out, sums, 0.1)
        state = q.new_empty((), dtype=torch.int64)
        asked = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, sums, state, state, None, None, None, 4096, 4096, 0.0, True, scale=0.1
        )
        for ours, theirs in zip(gradients, asked, strict=True):
            assert geometry(ours) == geometry(theirs)


def geometry(t: torch.Tensor):
    return t.shape, t.stride(), t.dtype, t.device


def test_torch_says_that_no_tensor_of_the_host_is_for_cudnn() -> None:
    q, k, v, _ = inputs(8, (24, 16), torch.bfloat16)
    assert not cudnn_takes(*(t.transpose(1, 2) for t in (q, k, v)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("exact_above", [-math.inf, 3.0, math.inf])
@pytest.mark.parametrize("widths", [(192, 128), (128, 128), (64, 32)])
@pytest.mark.parametrize("length", [2, 65, 1000, 4096])
def test_on_a_gpu_cudnn_equals_full_scores_in_float64(
    length: int, widths: tuple[int, ...], exact_above
) -> None:
    """A few roundings to BF16 of the largest number of each. Largest logits: where above
    `exact_above` exact to FP32's rounding of 192 products, else between the exact and the row's
    log-sum-exp."""
    q, k, v, dout = (t.detach().requires_grad_() for t in inputs(length, widths, torch.bfloat16, "cuda"))
    if not cudnn_takes(*(t.transpose(1, 2) for t in (q, k, v))):
        pytest.skip("this cuDNN does not take these widths")
    scale = widths[0] ** -0.5
    out, maxima, _ = attend(q, k, v, scale, OpsBackend("cudnn", exact_above, triton=True))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected, expected_maxima = causal_attention_reference(*(t.transpose(1, 2) for t in wide), scale)
    got = torch.autograd.grad(out, (q, k, v), dout)
    want = torch.autograd.grad(expected, wide, dout.double())
    for one, other in zip((out, *got), (expected, *want), strict=True):
        assert (one.double() - other).abs().max() <= 4 * 2.0**-8 * max(other.abs().max().item(), 1.0)
    above = expected_maxima > exact_above
    torch.testing.assert_close(maxima[above].double(), expected_maxima[above], rtol=1e-4, atol=1e-4)
    assert (maxima >= expected_maxima - 1e-3).all()
    assert (maxima[~above] <= max(exact_above, 0) + 1e-3).all() or exact_above == math.inf
