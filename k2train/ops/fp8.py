"""FP8 storage: E4M3 codes with one FP32 scale for each 1 x 128 tile of the last dimension.

For what is kept between forward and backward only: computation stays BF16 (K2 report 2.4.3). An
activation is quantised where it is saved and dequantised where it is used, and takes 1 + 4/128
bytes an element in between.

A tile of 128 neighbours shares scale = amax / 448, so its largest magnitude lands on E4M3's largest
number and an outlier costs precision in its own tile alone. The error of an element x of a tile
with scale s is at most max(2^-4 |x|, 2^-10 s), and the rounding to the original dtype on top: E4M3
keeps 4 significant bits down to 2^-6, and steps of 2^-9 below. The scale is divided by and
multiplied with in FP32, float64 tensors included.

A tile with an infinity or a NaN, or a float64 beyond FP32's range, comes back as all NaN: it is
poisoned through its scale, because E4M3 has no infinity and a clamp would hide the accident.
Counting such tiles needs no host sync.

`quantise` and `dequantise` take the Triton kernels (`fp8_triton`) where there is a GPU for them,
the `*_reference` functions in stock operations otherwise.

Letters: R rows (all leading dimensions, flattened), W width, N tiles of a row.
"""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

import torch
import torch.nn.functional as F

from k2train.ops.kernels import gpu_kernels

TILE = 128
E4M3_MAX = 448.0
# A smaller scale would lose bits as a subnormal, or be 0 and divide by zero. No upper end is
# needed: 448 fl(amax / 448) never rounds past FP32's largest number, which is 448 times a number of
# FP32.
MIN_SCALE = torch.finfo(torch.float32).tiny
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Fp8Form:
    """What a tensor was before it was quantised. Holds no memory: whoever moves codes and scales
    keeps this."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def over(self, codes_RW: torch.Tensor, scales_RN: torch.Tensor) -> Fp8Tensor:
        """The tensor of these codes and scales."""
        width = self.shape[-1]
        rows = math.prod(self.shape[:-1])
        assert (codes_RW.shape, codes_RW.dtype) == ((rows, width), torch.uint8), codes_RW.shape
        assert (scales_RN.shape, scales_RN.dtype) == ((rows, num_tiles(width)), torch.float32), (
            scales_RN.shape
        )
        assert codes_RW.is_contiguous() and scales_RN.is_contiguous()  # noqa: PT018
        return Fp8Tensor(codes_RW, scales_RN, self.shape, self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Fp8Tensor:
    """A quantised tensor: what `dequantise` needs, and nothing that refers to the original."""

    codes: torch.Tensor
    """E4M3 bits (R, W), uint8: collectives and copies know no float8. Contiguous."""

    scales: torch.Tensor
    """FP32 (R, N) with N = ceil(W / 128). Contiguous. NaN for a tile that was not finite, whose
    codes mean nothing then."""

    shape: tuple[int, ...]
    """Of the original."""

    dtype: torch.dtype
    """Of the original."""

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, scales), what has to be moved to move this tensor."""
        return self.codes, self.scales

    @property
    def form(self) -> Fp8Form:
        """What remains to be known of it when its tensors have been moved."""
        return Fp8Form(self.shape, self.dtype)


def num_tiles(width: int) -> int:
    """Tiles in a row of `width` elements; the last may be shorter than the others."""
    return -(-width // TILE)


def quantise(x: torch.Tensor, non_finite_tiles: torch.Tensor | None = None) -> Fp8Tensor:
    """x (..., W) of one of DTYPES in FP8, outside any autograd graph.

    Where `non_finite_tiles`, an int64 scalar on x's device, is given, the number of poisoned tiles
    is added to it.
    """
    kernels = _kernels(x.device)
    if kernels is None:
        return quantise_reference(x, non_finite_tiles)
    x_RW = as_rows(x)
    codes_RW, scales_RN = kernels.quantise_rows(x_RW, non_finite_tiles)
    return Fp8Tensor(codes_RW, scales_RN, tuple(x.shape), x.dtype)


def dequantise(stored: Fp8Tensor) -> torch.Tensor:
    """The tensor back in its shape and dtype, contiguous: code times scale in FP32, then cast."""
    kernels = _kernels(stored.codes.device)
    if kernels is None:
        return dequantise_reference(stored)
    return kernels.dequantise_rows(stored.codes, stored.scales, stored.dtype).view(stored.shape)


def quantise_reference(x: torch.Tensor, non_finite_tiles: torch.Tensor | None = None) -> Fp8Tensor:
    """`quantise` from stock operations, on any device."""
    x_RW = as_rows(x)
    x_RNt = _tiles(x_RW).to(torch.float32)
    amax_RN = x_RNt.abs().amax(-1)  # NaN where the tile has one
    finite_RN = amax_RN.isfinite()
    scales_RN = (amax_RN / E4M3_MAX).clamp_min_(MIN_SCALE).masked_fill_(~finite_RN, math.nan)
    if non_finite_tiles is not None:
        non_finite_tiles.add_((~finite_RN).sum())
    # torch 2.11 turns what rounds past 448 into NaN, later versions saturate: the clamp makes them
    # agree.
    scaled_RNt = (x_RNt / scales_RN.unsqueeze(-1)).clamp_(-E4M3_MAX, E4M3_MAX)
    codes_RNt = scaled_RNt.to(torch.float8_e4m3fn).view(torch.uint8)
    return Fp8Tensor(_untile(codes_RNt, x_RW.shape[1]), scales_RN, tuple(x.shape), x.dtype)


def dequantise_reference(stored: Fp8Tensor) -> torch.Tensor:
    """`dequantise` from stock operations, on any device."""
    codes_RNt = _tiles(stored.codes).view(torch.float8_e4m3fn)
    x_RNt = codes_RNt.to(torch.float32).mul_(stored.scales.unsqueeze(-1))
    return _untile(x_RNt.to(stored.dtype), stored.codes.shape[1]).view(stored.shape)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., W) as contiguous rows (R, W), detached; a copy only where x is not contiguous."""
    assert x.dim() > 0, "a scalar has no last dimension to cut into tiles"
    assert x.dtype in DTYPES, x.dtype
    return x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()


def _tiles(rows_RW: torch.Tensor) -> torch.Tensor:
    """(R, N, TILE); a short last tile is filled up with zeros, which change no maximum."""
    num_rows, width = rows_RW.shape
    tiles = num_tiles(width)
    missing = tiles * TILE - width
    padded = F.pad(rows_RW, (0, missing)) if missing else rows_RW
    return padded.view(num_rows, tiles, TILE)


def _untile(tiles_RNt: torch.Tensor, width: int) -> torch.Tensor:
    """The rows (R, W) of `_tiles`, contiguous."""
    num_rows, tiles, _ = tiles_RNt.shape
    rows = tiles_RNt.view(num_rows, tiles * TILE)[:, :width]
    # `contiguous` would not do: one row or none counts as contiguous whatever its strides are.
    return rows if rows.stride() == (width, 1) else rows.clone(memory_format=torch.contiguous_format)


def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels where they can run on `device`; E4M3 in hardware begins with compute
    capability 8.9."""
    return gpu_kernels("fp8_triton", device, (8, 9))
