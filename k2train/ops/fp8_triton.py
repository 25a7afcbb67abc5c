"""FP8 storage in one pass over memory each way: Triton kernels for `fp8.quantise` and
`fp8.dequantise`.

A program takes one tile (128 columns) of a block of rows. Every operation is the reference's, in
FP32, the divisions correctly rounded (Triton's `/` is not), so that scales and codes agree bit for
bit. Triton's interpreter, which runs these kernels on CPU tensors, casts to E4M3 in its own way: it
loses the carry where a fraction rounds up to 2, and rounds ties and subnormals differently. It also
truncates to BF16. Tests step around that.

Needs triton (the `gpu` extra), so only `fp8` imports this module, and only where there is a GPU.

Letters: R rows, W numbers of a row, N tiles of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from k2train.ops.fp8 import E4M3_MAX, MIN_SCALE, TILE, num_tiles
from k2train.ops.kernels import launchable

# 16 rows x 128 columns are 16 elements for each thread of 4 warps, and two 128-byte lines a row in
# BF16.
ROWS = 16


def quantise_rows(
    x_RW: torch.Tensor, non_finite_tiles: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (R, W) and scales (R, N) of contiguous rows; adds poisoned tiles to `non_finite_tiles`
    (int64 scalar)."""
    assert x_RW.is_contiguous()
    codes_RW = torch.empty_like(x_RW, dtype=torch.uint8)
    scales_RN = x_RW.new_empty((x_RW.shape[0], num_tiles(x_RW.shape[1])), dtype=torch.float32)
    if codes_RW.numel() == 0:
        return codes_RW, scales_RN
    if non_finite_tiles is not None:
        assert non_finite_tiles.dtype == torch.int64
        assert non_finite_tiles.device == x_RW.device
    fp8_quantise(x_RW, codes_RW, scales_RN, non_finite_tiles)
    return codes_RW, scales_RN


def dequantise_rows(codes_RW: torch.Tensor, scales_RN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes times their tile's scale in FP32, as `dtype` (R, W)."""
    assert codes_RW.is_contiguous()
    assert scales_RN.is_contiguous()
    x_RW = torch.empty_like(codes_RW, dtype=dtype)
    if x_RW.numel():
        fp8_dequantise(codes_RW, scales_RN, x_RW)
    return x_RW


@launchable("codes_RW", "scales_RN", "non_finite_tiles")
def fp8_quantise(
    x_RW: torch.Tensor, codes_RW: torch.Tensor, scales_RN: torch.Tensor, non_finite_tiles: torch.Tensor | None
) -> None:
    num_rows, width = x_RW.shape
    tiles = num_tiles(width)
    count = non_finite_tiles is not None
    with torch.cuda.device_of(x_RW):
        _quantise[(triton.cdiv(num_rows, ROWS), tiles)](
            x_RW,
            codes_RW,
            scales_RN,
            non_finite_tiles if count else scales_RN,
            num_rows,
            width,
            tiles,
            COUNT=count,
            E4M3_MAX=E4M3_MAX,
            MIN_SCALE=MIN_SCALE,
            ROWS=ROWS,
            TILE=TILE,
            enable_fp_fusion=False,
        )


@launchable("x_RW")
def fp8_dequantise(codes_RW: torch.Tensor, scales_RN: torch.Tensor, x_RW: torch.Tensor) -> None:
    num_rows, width = codes_RW.shape
    tiles = num_tiles(width)
    with torch.cuda.device_of(codes_RW):
        _dequantise[(triton.cdiv(num_rows, ROWS), tiles)](
            codes_RW, scales_RN, x_RW, num_rows, width, tiles, ROWS=ROWS, TILE=TILE, enable_fp_fusion=False
        )


@triton.jit
def _tile_offsets(num_rows, width, tiles, ROWS: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of this program: offsets and mask of the elements (ROWS, TILE), offsets and mask of the
    scales (ROWS,)."""
    tile = tl.program_id(1)
    # 64 bits: a microbatch's rows times their width may pass 2^31.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile * TILE + tl.arange(0, TILE)
    inside = row < num_rows
    mask = inside[:, None] & (column < width)[None, :]
    return row[:, None] * width + column[None, :], mask, row * tiles + tile, inside


@triton.jit
def _quantise(  # type: ignore[no-untyped-def]
    x_ptr,
    codes_ptr,
    scales_ptr,
    count_ptr,
    num_rows,
    width,
    tiles,
    COUNT: tl.constexpr,
    E4M3_MAX: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    offsets, mask, scale_offsets, inside = _tile_offsets(num_rows, width, tiles, ROWS, TILE)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    size = tl.abs(x)
    # A maximum drops NaN, so non-finite elements are looked for one by one; a comparison with NaN
    # is false.
    poisoned = tl.max((size < float("inf")).to(tl.int32) ^ 1, axis=1)
    amax = tl.max(size, axis=1)
    scale = tl.div_rn(amax, tl.full((ROWS,), E4M3_MAX, tl.float32))
    scale = tl.maximum(scale, MIN_SCALE)
    scale = tl.where(poisoned > 0, float("nan"), scale)
    scaled = tl.div_rn(x, tl.broadcast_to(scale[:, None], (ROWS, TILE)))
    scaled = tl.minimum(tl.maximum(scaled, -E4M3_MAX), E4M3_MAX)
    codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(codes_ptr + offsets, codes, mask=mask)
    tl.store(scales_ptr + scale_offsets, scale, mask=inside)
    if COUNT:
        num_poisoned = tl.sum(poisoned, axis=0).to(tl.int64)
        tl.atomic_add(count_ptr, num_poisoned, mask=num_poisoned > 0)


@triton.jit
def _dequantise(  # type: ignore[no-untyped-def]
    codes_ptr, scales_ptr, x_ptr, num_rows, width, tiles, ROWS: tl.constexpr, TILE: tl.constexpr
):
    offsets, mask, scale_offsets, inside = _tile_offsets(num_rows, width, tiles, ROWS, TILE)
    codes = tl.load(codes_ptr + offsets, mask=mask, other=0)
    scale = tl.load(scales_ptr + scale_offsets, mask=inside, other=0.0)
    x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, None]
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=mask)
