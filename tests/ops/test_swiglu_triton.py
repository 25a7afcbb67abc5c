"""The Triton kernels of SwiGLU against the reference in float64: under the interpreter everywhere,
and on a GPU.

Tests called interpreted run in a process of their own, which one test starts (conftest).
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from k2train.ops.swiglu import swiglu, swiglu_reference, weighted_swiglu

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Rows and width on both sides of a block's 4 and 256.
SHAPES = [(1, 1), (3, 255), (4, 256), (9, 257), (5, 600)]


@pytest.fixture
def kernels():
    from k2train.ops import swiglu_triton

    return swiglu_triton


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gates up to 30 in size, where a sigmoid is 0 or 1; one weight is 0."""
    generator = torch.Generator().manual_seed(rows * width)
    gate_up = torch.randn(rows, 2 * width, generator=generator)
    gate_up[:, :width] *= torch.tensor([1.0, 10.0])[torch.arange(width) % 2]
    weights = torch.rand(rows, generator=generator)
    weights[rows // 2] = 0.0 if rows > 1 else weights[rows // 2]
    return gate_up.to(dtype), weights, torch.randn(rows, width, generator=generator).to(dtype)


def expected(
    gate_up: torch.Tensor, weights: torch.Tensor | None, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output, the input's gradient and the weights', in float64."""
    leaf = gate_up.double().requires_grad_()
    if weights is None:
        out = swiglu_reference(leaf)
        return out, *torch.autograd.grad(out, leaf, dy.double()), None
    wide = weights.double().requires_grad_()
    out = swiglu_reference(leaf) * wide.unsqueeze(1)
    return out, *torch.autograd.grad(out, (leaf, wide), dy.double())


def close(got: torch.Tensor, want: torch.Tensor, terms: int = 1) -> None:
    """One rounding to the type (the interpreter truncates to BF16, a whole unit in the last place),
    FP32's on the way; a sum of so many terms."""
    tolerance = torch.finfo(got.dtype).eps + 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * terms)


def test_the_kernels_pass_their_tests_under_the_interpreter(pass_under_the_interpreter) -> None:
    pass_under_the_interpreter(__file__, 30)


@pytest.mark.parametrize(
    ("element", "weighted", "rows", "width"),
    [("bf16", True, 32768, 2048), ("bf16", False, 4096, 18432), ("fp16", True, 7, 33), ("fp32", False, 1, 1)],
)
def test_the_kernels_compile_for_an_h100(
    element: str, weighted: bool, rows: int, width: int, compile_for_h100, kernels
) -> None:
    """As launches of K2's experts and of its dense layer would, without a spilled register; and of
    other sizes."""
    tensors = {"gate_up_ptr": f"*{element}", "w_ptr": "*fp32" if weighted else f"*{element}"}
    sizes = {"num_rows": rows, "width": width}
    constants = {"WEIGHTED": weighted, "ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS}
    gradients = {"dy_ptr": f"*{element}", "dw_ptr": tensors["w_ptr"]}
    for kernel, arguments in (
        (kernels._swiglu, {**tensors, **sizes, "out_ptr": f"*{element}"}),
        (kernels._swiglu_gradients, {**tensors, **sizes, **gradients}),
    ):
        compiled = compile_for_h100(kernel, arguments, constants, enable_fp_fusion=True)
        assert compiled.spilled == 0
        # Four programs of four warps on a multiprocessor at least.
        assert compiled.registers <= 128


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_interpreted_kernels_equal_the_reference(rows, width, dtype, weighted: bool, kernels) -> None:
    gate_up, weights, dy = inputs(rows, width, dtype)
    w = weights if weighted else None
    out, dgate_up, dw = expected(gate_up, w, dy)
    close(kernels.swiglu_rows(gate_up, w), out)
    got = kernels.swiglu_gradients(dy, gate_up, w)
    close(gate_up, dgate_up)
    if weighted:
        close(got, dw, terms=width)
    else:
        assert got is None


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_interpreted_kernels_take_empty_tensors(shape: tuple[int, ...], kernels) -> None:
    rows, width = shape
    gate_up, weights = torch.empty(rows, 2 * width), torch.rand(rows)
    assert kernels.swiglu_rows(gate_up, weights).shape == shape
    assert torch.equal(kernels.swiglu_gradients(torch.empty(shape), gate_up, weights), torch.zeros(rows))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_on_a_gpu_swiglu_takes_the_kernels_and_equals_the_reference(
    rows, width, dtype, weighted: bool
) -> None:
    gate_up, weights, dy = inputs(rows, width, dtype)
    w = weights if weighted else None
    out, dgate_up, dw = (None if t is None else t.cuda() for t in expected(gate_up, w, dy))
    leaf = gate_up.cuda().requires_grad_()
    fed, leaf_w = leaf.clone(), weights.cuda().requires_grad_()
    got = weighted_swiglu(fed, leaf_w) if weighted else swiglu(fed)
    close(got, out)
    gradients = torch.autograd.grad(got, (fed, leaf_w) if weighted else fed, dy.cuda())
    assert gradients[0].data_ptr() == fed.data_ptr()
    close(gradients[0], dgate_up)
    if weighted:
        close(gradients[1], dw, terms=width)
