"""Our safetensors files against the safetensors library, in both directions, and damaged files."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import weakref
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from k2train.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    FormatError,
    LazyTensor,
    lazy,
    read_header,
    read_tensor,
    write_file,
)

# The types that the installed library's reader gives back too.
COMMON = [dtype for dtype in DTYPE_NAMES if dtype != torch.float8_e8m0fnu]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern of the type, NaNs and infinities among them."""
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(
        st.lists(
            st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
            max_size=6,
            unique=True,
        )
    )
    shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    return {
        name: random_tensor(draw(shapes), draw(st.sampled_from(COMMON)), draw(st.integers(0, 2**31)))
        for name in names
    }


@given(held=tensors())
@settings(max_examples=60, deadline=None)
def test_the_library_reads_what_we_write_and_so_do_we(held: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        written = write_file(path, [(name, lazy(tensor)) for name, tensor in held.items()], {"format": "pt"})
        assert written.num_bytes == path.stat().st_size
        assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert written.crc32 == {name: zlib.crc32(bits(tensor)) for name, tensor in held.items()}
        slots = read_header(path)
        assert slots.keys() == held.keys()
        for name, slot in slots.items():
            tensor, crc32 = read_tensor(path, slot)
            assert same(tensor, held[name])
            assert crc32 == written.crc32[name]
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == held.keys()
            assert all(same(file.get_tensor(name), tensor) for name, tensor in held.items())


@given(held=tensors())
@settings(max_examples=40, deadline=None)
def test_we_read_what_the_library_writes(held: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        save_file(held, path)
        slots = read_header(path)
        assert slots.keys() == held.keys()
        assert all(same(read_tensor(path, slot)[0], held[name]) for name, slot in slots.items())


def test_strided_views_and_parameters_are_written_as_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    held = {
        "transposed": base.t(),
        "column": base[:, 2],
        "expanded": base[0].expand(3, 6),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    path = tmp_path / "a.safetensors"
    write_file(path, [(name, lazy(tensor)) for name, tensor in held.items()])
    for name, slot in read_header(path).items():
        assert torch.equal(read_tensor(path, slot)[0], held[name])


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    held = [
        ("a", torch.ones(3, dtype=torch.uint8)),
        ("b", torch.ones(3, dtype=torch.bfloat16)),
        ("c", torch.ones(3, dtype=torch.float64)),
        ("d", torch.ones(1)),
    ]
    path = tmp_path / "a.safetensors"
    write_file(path, [(name, lazy(tensor)) for name, tensor in held])
    assert all(slot.offset % slot.dtype.itemsize == 0 for slot in read_header(path).values())


def test_one_tensor_at_a_time_is_alive_while_a_file_is_written(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def load() -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    write_file(tmp_path / "a", [(f"t{i}", LazyTensor((1000,), torch.float32, load)) for i in range(8)])
    assert len(alive) == 8
    assert most == 0


def test_a_load_that_breaks_its_promise_is_refused(tmp_path: Path) -> None:
    for index, wrong in enumerate([torch.zeros(3), torch.zeros(2, dtype=torch.float16)]):
        with pytest.raises(ValueError, match="announced"):
            write_file(
                tmp_path / str(index), [("a", LazyTensor((2,), torch.float32, lambda wrong=wrong: wrong))]
            )


def test_two_writers_of_one_file_are_a_bug_that_shows(tmp_path: Path) -> None:
    write_file(tmp_path / "a", [("x", lazy(torch.zeros(2)))])
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", [("x", lazy(torch.zeros(2)))])


def test_a_file_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, [("x", lazy(torch.arange(5))), ("y", lazy(torch.ones(2, 2)))])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"x": 3},
        {"x": {"dtype": "F32", "shape": [2]}},
        {"x": {"dtype": "F77", "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"x": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(FormatError):
        read_header(tmp_path / "a")


def test_a_header_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes((4).to_bytes(8, "little") + b"\xff{{{")
    with pytest.raises(FormatError, match="JSON"):
        read_header(tmp_path / "a")
