"""Tensors of every kind that a layer may save."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The values, bit for bit, in the tensor's own order; equal bytes are equal bits, NaNs
    included."""
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def random_storage(generator: torch.Generator, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Random bits of a type, one dimension."""
    if dtype is torch.bool:
        return torch.randint(0, 2, (num_elements,), generator=generator).bool()
    raw = torch.randint(0, 256, (num_elements * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)


def views_of(flat: torch.Tensor) -> list[torch.Tensor]:
    """A storage's usual views: whole, transposed, strided, offset, expanded, cut in two, with no
    elements, a scalar."""
    n = flat.numel()
    rows = flat[: n - n % 3].view(3, -1)
    return [
        flat,
        rows.t(),
        rows[:, ::2],
        rows[1:],
        flat[n // 2 : n // 2 + 1].expand(4, 1),
        *rows.chunk(2, dim=1),
        flat[n // 2 : n // 2],
        flat[n - 1],
    ]


@pytest.fixture
def bits() -> Callable[[torch.Tensor], bytes]:
    return raw_bytes


@pytest.fixture
def storage_of() -> Callable[[torch.Generator, int, torch.dtype], torch.Tensor]:
    return random_storage


@pytest.fixture
def all_views() -> Callable[[torch.Tensor], list[torch.Tensor]]:
    return views_of


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def dtypes() -> tuple[torch.dtype, ...]:
    return DTYPES
