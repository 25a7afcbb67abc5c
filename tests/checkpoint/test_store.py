"""A checkpoint holds what was written, whoever wrote it, and appears whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2train.checkpoint import (
    CheckpointError,
    LazyTensor,
    RowPiece,
    begin,
    clean_leftovers,
    commit,
    open_checkpoint,
    read_entries,
    write_checkpoint,
    write_shards,
)
from k2train.checkpoint.staging import partial_path

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.float8_e4m3fn, torch.uint8]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same(left: Tensor, right: Tensor) -> bool:
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(
        st.lists(st.from_regex(r"(model|master)/[a-z.@]{1,8}", fullmatch=True), max_size=7, unique=True)
    )
    shapes = st.lists(st.integers(0, 6), max_size=3).map(tuple)
    return {
        name: values(draw(shapes), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
        for name in names
    }


@given(tensors=named_tensors(), max_shard_bytes=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back_bit_for_bit(tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    meta = {"step": 7, "nested": {"a": [1, 2.5, None]}}
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "runs" / "step-000007"
        write_checkpoint(directory, iter(tensors.items()), meta, max_shard_bytes=max_shard_bytes)
        checkpoint = open_checkpoint(directory)
        checkpoint.verify()
        assert checkpoint.meta == meta
        assert checkpoint.names() == sorted(tensors)
        for name, tensor in tensors.items():
            assert name in checkpoint
            assert checkpoint.shape(name) == tensor.shape
            assert checkpoint.dtype(name) == tensor.dtype
            assert same(checkpoint.load(name), tensor)
        for shard in checkpoint.manifest.shards:
            held = sum(tensors[piece.name].nbytes for piece in shard.pieces)
            assert held <= max_shard_bytes or len(shard.pieces) == 1
        assert os.listdir(directory.parent) == ["step-000007"]


@given(data=st.data(), rows=st.integers(1, 9), columns=st.integers(0, 3), writers=st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_rows_cut_over_any_writers_load_as_one_tensor_or_any_range(
    data: st.DataObject, rows: int, columns: int, writers: int
) -> None:
    shape = (rows, columns) if columns else (rows,)
    tensor = values(shape, torch.float32, rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=writers - 1, max_size=writers - 1)))
    bounds = [0, *cuts, rows]
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "c"
        temporary = begin(directory)
        prefixes = [f"rank{rank}" for rank in range(writers)]
        for rank in data.draw(st.permutations(range(writers))):
            start, stop = bounds[rank], bounds[rank + 1]
            own = [("cut", RowPiece(tensor[start:stop], start, rows)), (f"whole{rank}", tensor + rank)]
            write_shards(temporary, prefixes[rank], own, max_shard_bytes=data.draw(st.integers(1, 100)))
        commit(temporary, directory, read_entries(temporary, prefixes), {})
        checkpoint = open_checkpoint(directory)
        checkpoint.verify()
        assert same(checkpoint.load("cut"), tensor)
        for start in range(rows + 1):
            for stop in range(start, rows + 1):
                assert same(checkpoint.load("cut", rows=(start, stop)), tensor[start:stop])
                assert same(checkpoint.load("whole0", rows=(start, stop)), tensor[start:stop])
        assert all(same(checkpoint.load(f"whole{rank}"), tensor + rank) for rank in range(writers))
        assert not list(directory.glob("*.entries.json"))


def test_nothing_written_depends_on_who_wrote_it(tmp_path: Path) -> None:
    """The same tensors from one writer and from three give the same table of tensors and the same
    meta."""
    tensor = torch.arange(12.0).reshape(6, 2)
    write_checkpoint(tmp_path / "one", [("a", tensor), ("b", tensor)], {"step": 1})
    temporary = begin(tmp_path / "many")
    entries = []
    for rank, (start, stop) in enumerate([(0, 1), (1, 4), (4, 6)]):
        own = [("a", RowPiece(tensor[start:stop], start, 6))] + ([("b", tensor)] if rank == 1 else [])
        entries += write_shards(temporary, f"r{rank}", own)
    commit(temporary, tmp_path / "many", entries, {"step": 1})
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert one.names() == many.names()
    assert one.meta == many.meta
    assert all(same(one.load(name), many.load(name)) for name in one.names())


@pytest.mark.parametrize("ranges", [[(0, 2), (3, 6)], [(0, 4), (3, 6)], [(1, 6)], [(0, 5)], [(0, 6), (0, 6)]])
def test_rows_missing_or_written_twice_are_never_committed(
    tmp_path: Path, ranges: list[tuple[int, int]]
) -> None:
    tensor = torch.zeros(6, 2)
    temporary = begin(tmp_path / "c")
    entries = []
    for rank, (start, stop) in enumerate(ranges):
        entries += write_shards(temporary, f"r{rank}", [("a", RowPiece(tensor[start:stop], start, 6))])
    with pytest.raises(ValueError, match=r"a\b.*(missing|twice|2 times)"):
        commit(temporary, tmp_path / "c", entries, {})
    assert not (tmp_path / "c").exists()


def test_pieces_that_disagree_about_their_tensor_are_never_committed(tmp_path: Path) -> None:
    temporary = begin(tmp_path / "c")
    pieces = [RowPiece(torch.zeros(2), 0, 4), RowPiece(torch.zeros(2, dtype=torch.float64), 2, 4)]
    entries = [
        entry
        for rank, piece in enumerate(pieces)
        for entry in write_shards(temporary, f"r{rank}", [("a", piece)])
    ]
    with pytest.raises(ValueError, match="different types or shapes"):
        commit(temporary, tmp_path / "c", entries, {})


def test_rows_beyond_the_tensor_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", [("a", torch.zeros(4, 2))], {})
    checkpoint = open_checkpoint(tmp_path / "c")
    for rows in [(-1, 2), (0, 5), (3, 2)]:
        with pytest.raises(ValueError, match="rows"):
            checkpoint.load("a", rows=rows)
    with pytest.raises(ValueError, match="rows"):
        write_shards(begin(tmp_path / "d"), "r", [("a", RowPiece(torch.zeros(3), 2, 4))])


def test_a_writer_that_did_not_finish_is_named(tmp_path: Path) -> None:
    temporary = begin(tmp_path / "c")
    write_shards(temporary, "rank0", [("a", torch.zeros(2))])
    with pytest.raises(CheckpointError, match="rank1 did not finish"):
        read_entries(temporary, ["rank0", "rank1"])


def test_an_older_checkpoint_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "step-000001"
    write_checkpoint(
        directory, [("a", torch.zeros(3)), ("old", torch.zeros(1))], {"try": 1}, max_shard_bytes=1
    )
    write_checkpoint(directory, [("a", torch.ones(3))], {"try": 2})
    checkpoint = open_checkpoint(directory)
    assert checkpoint.meta == {"try": 2}
    assert checkpoint.names() == ["a"]
    assert torch.equal(checkpoint.load("a"), torch.ones(3))
    assert os.listdir(tmp_path) == ["step-000001"]
    assert len(list(directory.iterdir())) == 2


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    (tmp_path / "file").write_text("also mine")
    (tmp_path / "empty").mkdir()
    for name in ("thesis", "file"):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            write_checkpoint(tmp_path / name, [("a", torch.zeros(1))], {})
    write_checkpoint(tmp_path / "empty", [("a", torch.zeros(1))], {})
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "also mine"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_while_writing_leaves_the_older_checkpoint_and_nothing_else(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    directory = tmp_path / "c"
    write_checkpoint(directory, [("a", torch.zeros(3))], {"try": 1})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.ones(3)
        yield "b", torch.ones(3)
        raise failure("in the middle")

    with pytest.raises(failure, match="in the middle"):
        write_checkpoint(directory, tensors(), {"try": 2}, max_shard_bytes=12)
    assert os.listdir(tmp_path) == ["c"]
    assert open_checkpoint(directory).meta == {"try": 1}


def test_a_meta_that_json_cannot_hold_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path / "c", [("a", torch.zeros(3))], {"model": object()})
    assert os.listdir(tmp_path) == []


def test_a_killed_replacement_gives_the_old_checkpoint_back(tmp_path: Path) -> None:
    """Killed between the two renames: the old one has moved aside, the new one has not come."""
    write_checkpoint(tmp_path / "c", [("a", torch.zeros(3))], {"try": 1})
    (tmp_path / "c").rename(tmp_path / "c.replaced")
    begin(tmp_path / "other")
    assert clean_leftovers(tmp_path) == [partial_path(tmp_path / "other")]
    assert open_checkpoint(tmp_path / "c").meta == {"try": 1}
    assert os.listdir(tmp_path) == ["c"]


def test_a_replacement_killed_before_the_old_one_was_deleted_is_finished(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", [("a", torch.zeros(3))], {"try": 2})
    write_checkpoint(tmp_path / "c.replaced", [("a", torch.zeros(3))], {"try": 1})
    assert clean_leftovers(tmp_path) == [tmp_path / "c.replaced"]
    assert open_checkpoint(tmp_path / "c").meta == {"try": 2}
    assert os.listdir(tmp_path) == ["c"]


def test_lazy_tensors_are_loaded_in_turn_and_let_go(tmp_path: Path) -> None:
    """Bounded memory: when a tensor is loaded, none of those before it is alive any more."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def load() -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = torch.zeros(100)
        alive.append(weakref.ref(tensor))
        return tensor

    tensors = [(f"t{i}", LazyTensor((100,), torch.float32, load)) for i in range(9)]
    write_checkpoint(tmp_path / "c", tensors, {}, max_shard_bytes=1000)
    assert len(alive) == 9
    assert most == 0


def test_at_most_one_shard_of_the_tensors_an_iterator_makes_is_alive(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for i in range(12):
            most = max(most, sum(ref() is not None for ref in alive))
            tensor = torch.zeros(100)
            alive.append(weakref.ref(tensor))
            yield f"t{i}", tensor
            del tensor

    write_checkpoint(tmp_path / "c", tensors(), {}, max_shard_bytes=3 * 400)
    assert len(alive) == 12
    assert most == 3


def test_the_manifest_names_every_file_with_size_and_checksum(tmp_path: Path) -> None:
    """What docs/huggingface.md promises to people without k2train: names and SHA-256 as sha256sum
    prints them."""
    write_checkpoint(
        tmp_path / "c", [("a", torch.zeros(3)), ("b", torch.ones(2))], {"step": 3}, max_shard_bytes=12
    )
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    files = {path.name for path in (tmp_path / "c").iterdir()} - {"manifest.json"}
    assert {shard["file"] for shard in manifest["shards"]} == files
    assert all(
        (tmp_path / "c" / s["file"]).stat().st_size == s["bytes"] and len(s["sha256"]) == 64
        for s in manifest["shards"]
    )
    assert manifest["tensors"]["b"]["dtype"] == "F32"
    assert manifest["tensors"]["b"]["shape"] == [2]


def test_an_unknown_tensor_is_named_with_its_nearest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", [("model/lm_head.weight", torch.zeros(3))], {})
    with pytest.raises(CheckpointError, match=r"did you mean model/lm_head\.weight"):
        open_checkpoint(tmp_path / "c").load("model/lm_head.wieght")
