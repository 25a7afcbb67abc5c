"""The Triton kernels of attention against the reference in float64: under the interpreter
everywhere, and on a GPU.

Tests called interpreted run in a process of their own, which one test starts (conftest). The
interpreter cannot multiply BF16, so there the types are FP16 and FP32, for which the kernels are
the same.
"""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

from k2train.ops.attention import causal_attention, causal_attention_reference
from k2train.ops.backend import OpsBackend

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Positions on both sides of a block's 32, 64 and 128; features in one power of two, in two, and in
# less than their sum.
LENGTHS = [1, 5, 33, 64, 130, 257]
# Of a thread at K2's widths, outside the loops' products. Without them it would be half a block, or
# no load ahead.
SPILLED_BYTES = {"row_gradients": 24, "key_gradients": 72}
WIDTHS = [(64, 32), (48, 32), (192, 128), (12, 8), (40, 24)]


@pytest.fixture
def kernels():
    from k2train.ops import attention_triton

    return attention_triton


def inputs(
    length: int, widths: tuple[int, int], dtype: torch.dtype, device: str = "cpu"
) -> list[torch.Tensor]:
    """q, k, v of 2 sequences and 3 heads, and the output's gradient. Values in a layout that is not
    contiguous."""
    generator = torch.Generator().manual_seed(length)
    query, value = widths
    shapes = [(2, 3, length, query)] * 2 + [(2, length, 3, value)] * 2
    q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)
    return [q, k, v.transpose(1, 2), dout]


def check(attend, tensors: list[torch.Tensor], scale: float, largest: float = 1.0) -> None:
    """Logits up to `largest` are rounded in FP32, and the exponential makes a relative error of it.
    Output, largest logits and gradients against float64: a few roundings of the type of the largest
    number of each, or of 1."""
    *leaves, dout = tensors
    leaves = [t.detach().requires_grad_() for t in leaves]
    out, maxima = attend(*leaves, scale)[:2]
    got = torch.autograd.grad(out, leaves, dout)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wide_out, wide_maxima = causal_attention_reference(*wide, scale)
    want = torch.autograd.grad(wide_out, wide, dout.double())
    torch.testing.assert_close(maxima.double(), wide_maxima, rtol=1e-5, atol=1e-5)
    tolerance = 4 * torch.finfo(out.dtype).eps + 1e-5 + 4 * largest * torch.finfo(torch.float32).eps
    for one, other in zip((out, *got), (wide_out, *want), strict=True):
        assert (one.double() - other).abs().max() <= tolerance * max(other.abs().max().item(), 1.0)


def test_the_kernels_pass_their_tests_under_the_interpreter(pass_under_the_interpreter) -> None:
    pass_under_the_interpreter(__file__, 26)


@pytest.mark.parametrize(
    ("element", "widths", "heads", "length"),
    [
        ("bf16", (192, 128), 64, 4096),
        ("bf16", (192, 128), 3, 1001),
        ("fp16", (192, 128), 1, 1),
        ("bf16", (256, 256), 64, 4096),
        ("bf16", (64, 32), 16, 4096),
        ("fp16", (12, 8), 3, 1001),
    ],
)
def test_the_kernels_compile_for_an_h100(
    element: str, widths: tuple[int, ...], heads: int, length: int, compile_for_h100, kernels
) -> None:
    """As a launch of K2's sequences would, and of lengths and numbers of heads that are multiples
    of nothing, or 1."""
    for name, (kernel, arguments, constants, options) in launches(
        kernels, element, widths, heads, length
    ).items():
        compiled = compile_for_h100(kernel, arguments, constants, **options)
        # Hopper's own matrix instructions: without them it would run at a third of its rate.
        assert ("wgmma.mma_async" in compiled.ptx) == (name != "output_products")
        if widths == (192, 128) and heads == 64:
            assert compiled.registers <= 255
            assert compiled.spilled <= SPILLED_BYTES.get(name, 0), name


def launches(kernels, element, widths, heads, length):
    """Each kernel with the arguments, constants and options of its launch."""
    programs = kernels.attention_kernels
    inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{element}")
    common = {**inputs, "lse_ptr": "*fp32", "scale": "fp32", "heads": heads, "length": length}
    backward = {**common, "dout_ptr": f"*{element}", "sums_ptr": "*fp32"}
    fusion = {"enable_fp_fusion": True}

    def tiled(kernel, arguments, blocks, **more):
        constants = {"M": blocks.rows, "N": blocks.keys, **kernels.features(*widths), **more}
        return kernel, arguments, constants, blocks.options

    of_rows, of_keys = kernels.row_gradient_blocks(*widths), kernels.key_gradient_blocks(*widths)
    return {
        "forward": tiled(
            programs.forward, {**common, "out_ptr": f"*{element}", "maxima_ptr": "*fp32"}, kernels.FORWARD
        ),
        "output_products": (
            programs.output_products,
            {
                "out_ptr": f"*{element}",
                "dout_ptr": f"*{element}",
                "sums_ptr": "*fp32",
                "rows": heads * length,
                "heads": heads,
                "length": length,
            },
            {"ROWS": kernels.ROWS, **kernels.value_features(widths[1])},
            fusion,
        ),
        "row_gradients": tiled(programs.row_gradients, {**backward, "dq_ptr": f"*{element}"}, of_rows),
        "key_gradients": tiled(
            programs.key_gradients,
            {**backward, "dk_ptr": f"*{element}", "dv_ptr": f"*{element}"},
            of_keys,
            EVEN=length % of_keys.rows == 0,
        ),
    }


def test_features_are_cut_into_two_powers_of_two_that_hold_them(kernels) -> None:
    for query in range(1, 257):
        cut = kernels.features(query, query)
        parts = [part for part in (cut["K1"], cut["K2"]) if part]
        assert sum(parts) >= query
        assert all(part >= 16 and part & (part - 1) == 0 for part in (*parts, cut["VP"]))
        # Never more than the next power of two, in which a product of one part would be.
        assert sum(parts) <= max(16, 1 << (query - 1).bit_length(), 32 if 16 < query <= 32 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("length", LENGTHS)
def test_interpreted_kernels_equal_the_reference_at_every_length(length, dtype: torch.dtype, kernels) -> None:
    check(kernels.fused_attention, inputs(length, (48, 32), dtype), 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("widths", WIDTHS)
def test_interpreted_kernels_equal_the_reference_at_every_width(widths, dtype: torch.dtype, kernels) -> None:
    check(kernels.fused_attention, inputs(70, widths, dtype), widths[0] ** -0.5)


@pytest.mark.parametrize("largest", [1e-3, 30.0, 1000.0])
def test_interpreted_kernels_take_logits_of_any_size(largest: float, kernels) -> None:
    """K2's logits reach 1000 before QK-Clip."""
    q, k, v, dout = inputs(40, (16, 16), torch.float32)
    top = causal_attention_reference(q, k, v, 1.0)[1].abs().max()
    check(kernels.fused_attention, [q, k, v, dout], largest / top.item(), largest)


def test_interpreted_largest_logits_are_those_of_positions_that_see_each_other(kernels) -> None:
    q, k = torch.zeros(1, 2, 70, 16), torch.zeros(1, 2, 70, 16)
    q[0, 0, 3, 0], k[0, 0, 50, 0] = 9.0, 9.0  # row 3 does not see key 50
    q[0, 1, 50, 0], k[0, 1, 3, 0] = 9.0, 9.0
    maxima = kernels.fused_attention(q, k, k, 0.5)[1]
    assert maxima.tolist() == [0.0, 40.5]
    assert (kernels.fused_attention(-q, k, k, 0.5)[1] == 0.0).all()
    # Where all are negative, the zeros that fill a block up must not count.
    ones = torch.ones(1, 2, 70, 16)
    assert (kernels.fused_attention(-ones, ones, ones, 0.5)[1] == -8.0).all()


def test_interpreted_kernels_need_no_gradient(kernels) -> None:
    q, k, v, _ = inputs(5, (16, 16), torch.float32)
    with torch.no_grad():
        out, maxima, _ = kernels.fused_attention(q, k, v, 0.5)
    torch.testing.assert_close(out, causal_attention_reference(q, k, v, 0.5)[0])
    assert not maxima.requires_grad


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("length", [*LENGTHS, 2048])
def test_on_a_gpu_attention_takes_the_kernels_and_equals_the_reference(
    length, widths, dtype: torch.dtype
) -> None:
    tensors = inputs(length, widths, dtype, "cuda")
    attend = functools.partial(causal_attention, backend=OpsBackend("triton"))
    assert attend(*tensors[:3], 0.5).out.dtype == dtype
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    assert len(attend(*leaves, 0.5).extras) == 1
    check(attend, tensors, widths[0] ** -0.5)
