"""Matrix products of BF16 values with an FP32 result, as tensor cores give them.

The product of two BF16 numbers is exact in FP32, and tensor cores add products up in FP32. So a
product of BF16 matrices with FP32 output is what an FP32 product of the same values gives, up to
the order of its sums, at the rate of BF16 (five to eight times that of FP32 on Hopper). A factor
that is FP32 itself is cut into parts of 8 significant bits, `bf16_parts`.

These products exist on CUDA alone. Whoever calls them asks `takes` first, and computes in FP32
where it says no.

Letters: M rows and N columns of a product, K what is summed over.
"""

from __future__ import annotations

import torch

WIDE = torch.float32
BITS = 8
"""Significant bits of a BF16 number, the hidden one counted."""
EXACT_PARTS = 3
"""Parts that hold the 24 significant bits of an FP32 number."""
ADDS_IN_PLACE = True
"""Whether `add_into` lets the product itself add to the sum (`addmm` with `out=` its own summand).

torch's CUDA code copies the summand into `out` first, which is nothing where both are one tensor,
and then calls cuBLAS with beta = 1. That was read, and has not yet been run on a GPU;
tests/ops/test_bf16_products.py has the test. Where it fails, False is the way that makes a
temporary as large as the sum: the product by itself, then an addition.
"""


def takes(x: torch.Tensor, other: torch.Tensor, result: torch.dtype = WIDE) -> bool:
    """Whether the product of x, BF16 or FP32, and `other`, BF16, with such a result is taken
    here."""
    narrow = other.dtype == torch.bfloat16 and x.dtype in (torch.bfloat16, WIDE)
    return narrow and x.is_cuda and result == WIDE


def multiply(x_MK: torch.Tensor, y_KN: torch.Tensor) -> torch.Tensor:
    """x y (M, N) in FP32, of BF16 matrices."""
    return torch.mm(x_MK, y_KN, out_dtype=WIDE)


def add_into(sum_MN: torch.Tensor, x_MK: torch.Tensor, y_KN: torch.Tensor) -> None:
    """sum += x y, where x and y are BF16 and the sum is FP32."""
    if ADDS_IN_PLACE:
        torch.addmm(sum_MN, x_MK, y_KN, out_dtype=WIDE, out=sum_MN)
    else:
        sum_MN.add_(multiply(x_MK, y_KN))


def bf16_parts(x: torch.Tensor, num_parts: int) -> list[torch.Tensor]:
    """BF16 tensors whose sum is x; x alone if it is BF16 already.

    Each part is what the ones before it left, rounded to 8 significant bits. One part leaves at
    most 2^-8 of x, two leave 2^-17, and three, which have 24 bits, nothing. (Numbers below 2^-110
    may lose bits to BF16's smallest.)
    """
    if x.dtype == torch.bfloat16:
        return [x]
    parts, rest = [], x
    for index in range(num_parts):
        parts.append(rest.to(torch.bfloat16))
        if index + 1 < num_parts:
            # Exact: the two are so close that their difference has no more bits than x.
            rest = rest - parts[-1]
    return parts
