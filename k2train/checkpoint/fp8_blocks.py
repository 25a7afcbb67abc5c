"""The block-FP8 form in which DeepSeek-V3 and K2 are published: E4M3 weights, one FP32 scale for
128 x 128 elements.

The scale is stored as `<weight name>_scale_inv`; despite its name the weight is the E4M3 value
times it (DeepSeek-V3, arXiv 2412.19437, section 3.3, and the conversion published with its
weights). Edge blocks are smaller. R rows, C columns of the weight; I, J blocks of rows and columns.

Letters: R rows, C columns, I rows of blocks, J columns of blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """The shape of the scales of a (rows, columns) weight."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize(weight_RC: Tensor, scale_IJ: Tensor, block: tuple[int, int]) -> Tensor:
    """The BF16 weight: E4M3 values times their block's scale in FP32, rounded once. Peak memory is
    that of the result and one row of blocks in FP32."""
    rows, columns = weight_RC.shape
    if tuple(scale_IJ.shape) != scale_shape((rows, columns), block):
        raise ValueError(f"scales of shape {tuple(scale_IJ.shape)} for a weight of shape {(rows, columns)}")
    out_RC = torch.empty(rows, columns, dtype=torch.bfloat16)
    for index, start in enumerate(range(0, rows, block[0])):
        scale_C = scale_IJ[index].float().repeat_interleave(block[1])[:columns]
        out_RC[start : start + block[0]] = weight_RC[start : start + block[0]].float() * scale_C
    return out_RC
