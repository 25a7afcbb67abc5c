"""The Triton kernels of RMSNorm against the reference in float64: under the interpreter everywhere,
and on a GPU.

Tests called interpreted run in a process of their own, which one test starts (conftest).
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from k2train.ops.norm import inverse_rms, rms_norm, rms_norm_reference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Widths on both sides of a power of two; more tokens than programs in the backward.
SHAPES = [(1, 1), (5, 64), (7, 65), (300, 96), (2, 1536)]


@pytest.fixture
def kernels():
    from k2train.ops import norm_triton

    return norm_triton


def inputs(
    tokens: int, features: int, dtype: torch.dtype, gap: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of very different size with `gap` other features between them; weights about 1; the
    output's gradient."""
    generator = torch.Generator().manual_seed(tokens * features)
    x = torch.randn(tokens, features + gap, generator=generator) * torch.logspace(-2, 2, tokens)[:, None]
    weight = 1 + 0.3 * torch.randn(features, generator=generator)
    dy = torch.randn(tokens, features, generator=generator)
    return x.to(dtype)[:, :features], weight.to(dtype), dy.to(dtype)


def expected(
    x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and both gradients, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    out = rms_norm_reference(*leaves, EPS)
    return out, *torch.autograd.grad(out, leaves, dy.double())


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Two roundings to the type (the interpreter truncates to BF16, a whole unit in the last place
    each), relative to each row's largest number, as a gradient's parts cancel."""
    tolerance = 2.1 * torch.finfo(got.dtype).eps + 1e-5
    largest = want.abs().amax(-1, keepdim=True).clamp_min(1e-2)
    assert ((got.double() - want).abs() <= tolerance * largest).all()


def test_the_kernels_pass_their_tests_under_the_interpreter(pass_under_the_interpreter) -> None:
    pass_under_the_interpreter(__file__, 30)


@pytest.mark.parametrize(
    ("element", "features", "tokens"),
    [
        ("bf16", 7168, 4096),
        ("bf16", 1536, 4096),
        ("bf16", 512, 4096),
        ("fp32", 8192, 4096),
        ("bf16", 96, 7),
        ("fp32", 33, 1),
    ],
)
def test_the_kernels_compile_for_an_h100(
    element: str, features: int, tokens: int, compile_for_h100, kernels
) -> None:
    """As launches of K2's hidden size and latents would, without a spilled register, and of sizes
    that are multiples of nothing."""
    options = kernels.options(features)
    block = {"BLOCK": options.pop("BLOCK")}
    common = {"x_ptr": f"*{element}", "rstd_ptr": "*fp32", "stride": features, "features": features}
    weighted = {**common, "weight_ptr": f"*{element}"}
    backward = {
        **weighted,
        "dy_ptr": f"*{element}",
        "dx_ptr": f"*{element}",
        "sums_ptr": "*fp32",
        "tokens": tokens,
    }
    for kernel, arguments in (
        (kernels._inverse_rms, {**common, "eps": "fp32"}),
        (kernels._rms_norm, {**weighted, "out_ptr": f"*{element}"}),
        (kernels._rms_norm_gradients, backward),
    ):
        compiled = compile_for_h100(kernel, arguments, block, **options)
        assert compiled.spilled == 0
        # The backward at 8192 features, the largest, leaves a multiprocessor's 65536 registers to
        # one program.
        assert compiled.registers * 32 * options["num_warps"] <= 65536


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features"), SHAPES)
def test_interpreted_kernels_equal_the_reference(tokens, features, dtype, gap: int, kernels) -> None:
    x, weight, dy = inputs(tokens, features, dtype, gap)
    out, dx, dweight = expected(x, weight, dy)
    rstd = kernels.inverse_rms_rows(x, EPS)
    torch.testing.assert_close(rstd, inverse_rms(x.float(), EPS))
    close(kernels.rms_norm_rows(x, rstd, weight), out)
    got_dx, got_dweight = kernels.rms_norm_gradients(dy, x, rstd, weight)
    assert (got_dx.dtype, got_dweight.dtype) == (dtype, torch.float32)
    close(got_dx, dx)
    torch.testing.assert_close(got_dweight.double(), dweight, rtol=1e-4, atol=1e-4)


def test_interpreted_kernels_take_no_tokens(kernels) -> None:
    x, weight = torch.empty(0, 8), torch.rand(8)
    rstd = kernels.inverse_rms_rows(x, EPS)
    assert rstd.shape == (0, 1)
    assert kernels.rms_norm_rows(x, rstd, weight).shape == (0, 8)
    dx, dweight = kernels.rms_norm_gradients(x, x, rstd, weight)
    assert dx.shape == (0, 8)
    assert torch.equal(dweight, torch.zeros(8))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "features"), [*SHAPES, (2000, 7168)])
def test_on_a_gpu_the_norm_takes_the_kernels_and_equals_the_reference(
    tokens, features, dtype, gap: int
) -> None:
    x, weight, dy = (t.cuda() for t in inputs(tokens, features, dtype, gap))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    out = rms_norm(x, inverse_rms(x, EPS), weight)
    got = torch.autograd.grad(out, (x, weight), dy)
    for one, other in zip((out, *got), expected(x, weight, dy), strict=True):
        assert one.dtype == dtype
        close(one, other)
