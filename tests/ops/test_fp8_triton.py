"""The Triton kernels of FP8 storage against the reference: under the interpreter everywhere, and on
a GPU.

Tests called interpreted run in a process of their own, which one test starts (conftest).
"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from k2train.ops import fp8
from k2train.ops.fp8 import (
    DTYPES,
    E4M3_MAX,
    MIN_SCALE,
    TILE,
    dequantise_reference,
    num_tiles,
    quantise_reference,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [(1, 1), (7, 5), (16, 127), (17, 128), (3, 129), (33, 300)]


@pytest.fixture
def kernels():
    from k2train.ops import fp8_triton

    return fp8_triton


def scaled_rows(rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Normal values in rows of very different size, one row of zeros."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows * width), dtype=torch.float64)
    x *= torch.logspace(-12, 12, rows, base=2, dtype=torch.float64)[:, None]
    x[rows // 2] = 0 if rows > 1 else x[rows // 2]
    return x.to(dtype).to(device)


def exact_rows(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that E4M3 holds exactly, times a power of two for each row, 448 in every tile: no
    cast has to round."""
    codes = torch.randint(0, 256, (rows, width), generator=torch.Generator().manual_seed(width)).to(
        torch.uint8
    )
    codes[(codes & 0x7F) == 0x7F] = 0x08  # NaN
    codes[:, ::128] = 0x7E  # 448
    powers = torch.arange(rows, dtype=torch.float32)[:, None] % 8 - 4
    return (codes.view(torch.float8_e4m3fn).float() * 2**powers).to(dtype)


def test_the_kernels_pass_their_tests_under_the_interpreter(pass_under_the_interpreter) -> None:
    pass_under_the_interpreter(__file__, 30)


@pytest.mark.parametrize(
    ("element", "rows", "width"),
    [("bf16", 32768, 4096), ("bf16", 32768, 7168), ("fp16", 7, 33), ("fp32", 4096, 7168), ("fp64", 1, 1)],
)
def test_the_kernels_compile_for_an_h100(
    element: str, rows: int, width: int, compile_for_h100, kernels
) -> None:
    """As launches of what K2 stores would, without a spilled register; and of sizes that are
    multiples of nothing."""
    sizes = {"num_rows": rows, "width": width, "tiles": num_tiles(width)}
    stored = {"codes_ptr": "*u8", "scales_ptr": "*fp32", "x_ptr": f"*{element}", **sizes}
    shape = {"ROWS": kernels.ROWS, "TILE": TILE}
    limits = {"COUNT": True, "E4M3_MAX": E4M3_MAX, "MIN_SCALE": MIN_SCALE}
    for kernel, arguments, constants in (
        (kernels._quantise, {**stored, "count_ptr": "*i64"}, {**shape, **limits}),
        (kernels._dequantise, stored, shape),
    ):
        compiled = compile_for_h100(kernel, arguments, constants, enable_fp_fusion=False)
        assert compiled.spilled == 0
        assert compiled.registers <= 128


def test_tensors_of_the_host_take_the_reference() -> None:
    assert fp8._kernels(torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_interpreted_kernels_equal_the_reference_bit_for_bit_where_no_cast_rounds(
    rows, width, dtype, kernels
) -> None:
    """Signs of zeros included."""
    x = exact_rows(rows, width, dtype)
    stored = quantise_reference(x)
    codes, scales = kernels.quantise_rows(x)
    assert torch.equal(scales, stored.scales)
    assert torch.equal(codes, stored.codes)
    back = kernels.dequantise_rows(codes, scales, dtype)
    assert torch.equal(back, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_interpreted_codes_differ_only_where_the_interpreters_cast_does(
    rows, width, dtype, kernels, spread
) -> None:
    """Its cast loses the carry of a fraction that rounds up to 2 (at 1 + 15/16 and above) and
    rounds ties and what is below 2^-6 differently; all else, scales first, must be the reference's
    bits."""
    x = scaled_rows(rows, width, dtype)
    stored = quantise_reference(x)
    codes, scales = kernels.quantise_rows(x)
    assert torch.equal(scales, stored.scales)
    scaled = (x.float() / spread(scales, width)).abs()
    fraction = torch.frexp(scaled).mantissa * 2
    tie = (fraction * 16) % 2 == 1
    same = (fraction < 1 + 15 / 16) & ~tie & (scaled >= 2**-6)
    assert torch.equal(codes[same], stored.codes[same])
    assert (codes[x == 0] & 0x7F == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_interpreted_kernels_read_what_the_reference_wrote(rows, width, dtype, kernels) -> None:
    """Exact but for BF16, which the interpreter truncates: one unit in the last place, eps of the
    value."""
    stored = quantise_reference(scaled_rows(rows, width, dtype))
    back = kernels.dequantise_rows(stored.codes, stored.scales, dtype).double()
    expected = dequantise_reference(stored).double()
    allowed = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    assert ((back - expected).abs() <= allowed * expected.abs()).all()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_interpreted_kernels_poison_and_count_tiles_that_are_not_finite(bad, kernels) -> None:
    x = scaled_rows(40, 300, torch.float32)
    x[1, 130], x[1, 131], x[39, 299] = bad, bad, bad
    count = torch.full((), 5, dtype=torch.int64)
    codes, scales = kernels.quantise_rows(x, count)
    assert count == 5 + 2
    assert torch.equal(scales.isnan(), quantise_reference(x).scales.isnan())
    back = kernels.dequantise_rows(codes, scales, torch.float32)
    assert back[1, 128:256].isnan().all()
    assert back[39, 256:].isnan().all()
    assert back.isnan().sum() == 128 + 44


@pytest.mark.parametrize("shape", [(0, 128), (3, 0)])
def test_interpreted_kernels_take_empty_tensors(shape: tuple[int, ...], kernels) -> None:
    codes, scales = kernels.quantise_rows(torch.empty(shape))
    assert codes.shape == shape
    assert scales.shape == (shape[0], num_tiles(shape[1]))
    assert kernels.dequantise_rows(codes, scales, torch.bfloat16).shape == shape


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_kernels_on_a_gpu_equal_the_reference_bit_for_bit(rows, width, dtype, kernels) -> None:
    x = scaled_rows(rows, width, dtype, "cuda")
    stored = quantise_reference(x)
    codes, scales = kernels.quantise_rows(x)
    assert torch.equal(scales, stored.scales)
    assert torch.equal(codes, stored.codes)
    assert torch.equal(
        kernels.dequantise_rows(codes, scales, dtype).view(-1), dequantise_reference(stored).view(-1)
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_on_a_gpu_tiles_that_are_not_finite_are_poisoned_and_counted(bad) -> None:
    x = scaled_rows(40, 300, torch.bfloat16, "cuda")
    x[1, 130], x[39, 299] = bad, bad
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    back = fp8.dequantise(fp8.quantise(x, count))
    assert count.item() == 2
    assert back.isnan().sum().item() == 128 + 44
