"""A damaged, cut or killed checkpoint is never taken for a good one, and the message names the file
at fault."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.checkpoint import (
    CheckpointError,
    RowPiece,
    begin,
    checkpoint_problem,
    clean_leftovers,
    commit,
    latest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    step_directory,
    write_checkpoint,
    write_shards,
)
from k2train.config.errors import ConfigError

TENSORS = {
    "model/a": torch.arange(6.0),
    "model/b": torch.ones(2, 3, dtype=torch.bfloat16),
    "step": torch.tensor(4),
}


def write_sample(directory: Path) -> None:
    temporary = begin(directory)
    rows = torch.arange(10.0).reshape(5, 2)
    entries = write_shards(temporary, "r0", [*TENSORS.items(), ("cut", RowPiece(rows[:2], 0, 5))])
    entries += write_shards(temporary, "r1", [("cut", RowPiece(rows[2:], 2, 5))])
    commit(temporary, directory, entries, {"step": 1})


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_flipped_bit_is_found_by_verify_and_no_load_returns_wrong_values(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "c"
        write_sample(directory)
        good = {name: open_checkpoint(directory).load(name) for name in open_checkpoint(directory).names()}
        shard = data.draw(st.sampled_from(sorted(directory.glob("*.safetensors"))))
        raw = bytearray(shard.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        shard.write_bytes(raw)
        checkpoint = open_checkpoint(directory)
        with pytest.raises(CheckpointError, match=shard.name):
            checkpoint.verify()
        for name, tensor in good.items():
            try:
                loaded = checkpoint.load(name)
            except CheckpointError as error:
                assert shard.name in str(error)  # noqa: PT017
            else:
                assert torch.equal(loaded, tensor)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_damaged_row_piece_is_found_in_every_range_that_touches_it(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "c"
        write_sample(directory)
        shard = directory / "r1-00000.safetensors"
        raw = bytearray(shard.read_bytes())
        raw[-1 - data.draw(st.integers(0, 23))] ^= 0xFF
        shard.write_bytes(raw)
        checkpoint = open_checkpoint(directory)
        for start in range(5):
            for stop in range(start + 1, 6):
                if stop <= 2:
                    assert torch.equal(
                        checkpoint.load("cut", (start, stop)).flatten(), torch.arange(start * 2.0, stop * 2.0)
                    )
                    continue
                with pytest.raises(CheckpointError, match=r"cut in this shard are damaged"):
                    checkpoint.load("cut", (start, stop))


def test_a_missing_or_cut_shard_is_named_by_load_and_verify(tmp_path: Path) -> None:
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
    ):
        directory = tmp_path / "c"
        shutil.rmtree(directory, ignore_errors=True)
        write_sample(directory)
        damage(directory / "r0-00000.safetensors")
        checkpoint = open_checkpoint(directory)
        for read in (
            lambda c=checkpoint: c.load("model/a"),
            checkpoint.verify,
            lambda c=checkpoint: c.load("cut"),
        ):
            with pytest.raises(CheckpointError, match=r"r0-00000\.safetensors") as caught:
                read()
            assert isinstance(caught.value, ConfigError)
        assert "r0-00000.safetensors" in checkpoint_problem(directory)


def test_a_shard_cut_after_its_header_was_read_is_an_error_not_garbage(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", [("a", torch.zeros(4)), ("b", torch.ones(4))], {})
    checkpoint = open_checkpoint(tmp_path / "c")
    checkpoint.load("a")
    shard = next((tmp_path / "c").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="ends before"):
        checkpoint.load("b")


def test_shards_that_were_swapped_are_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", [("a", torch.zeros(4)), ("b", torch.ones(4))], {}, max_shard_bytes=16)
    first, second = sorted((tmp_path / "c").glob("*.safetensors"))
    first.rename(tmp_path / "x")
    second.rename(first)
    (tmp_path / "x").rename(second)
    for name in "ab":
        with pytest.raises(CheckpointError, match="does not hold"):
            open_checkpoint(tmp_path / "c").load(name)


def damaged_manifests(good: dict) -> list[object]:
    return [
        [],
        {**good, "format": "something else"},
        {**good, "version": 99},
        {name: value for name, value in good.items() if name != "tensors"},
        {**good, "shards": []},
        {**good, "shards": [{**good["shards"][0], "file": "../escape"}]},
        {**good, "tensors": {"a": {"dtype": "F32", "shape": [4], "pieces": []}}},
        {**good, "tensors": {"a": {"dtype": "??", "shape": [4], "pieces": [{"shard": 0, "crc32": 1}]}}},
        {
            **good,
            "tensors": {
                "a": {
                    "dtype": "F32",
                    "shape": [4],
                    "pieces": [{"shard": 0, "crc32": 1, "start": 0, "rows": 3}],
                }
            },
        },
        {**good, "tensors": "none"},
        {**good, "meta": 3},
    ]


def test_a_shard_with_other_shapes_or_types_than_were_written_is_found(tmp_path: Path) -> None:
    """As many bytes and the same ones, so that neither the size nor the CRC-32 tells."""
    for index, (old, new) in enumerate(
        [(b'"shape":[2,3]', b'"shape":[3,2]'), (b'"dtype":"F32"', b'"dtype":"I32"')]
    ):
        write_checkpoint(tmp_path / str(index), [("a", torch.ones(2, 3))], {})
        shard = next((tmp_path / str(index)).glob("*.safetensors"))
        assert old in shard.read_bytes()
        shard.write_bytes(shard.read_bytes().replace(old, new))
        with pytest.raises(CheckpointError, match="does not hold a as"):
            open_checkpoint(tmp_path / str(index)).load("a")


def signed(manifest: object) -> str:
    """The text of a manifest whose own checksum is right, so that only its content is wrong."""
    if not isinstance(manifest, dict):
        return json.dumps(manifest)
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    return json.dumps({"sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest(), **body})


def test_a_damaged_manifest_is_an_error_that_names_the_directory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", [("a", torch.zeros(4))], {})
    path = tmp_path / "c" / "manifest.json"
    good = path.read_text()
    texts = [signed(bad) for bad in damaged_manifests(json.loads(good))]
    for text in [*texts, "", "{", good[:-3], good.replace('"a"', '"b"'), good.replace("[4]", "[5]")]:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=str(tmp_path / "c")):
            open_checkpoint(tmp_path / "c")
        assert checkpoint_problem(tmp_path / "c")


def test_what_is_not_there_or_not_a_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for place, words in [
        ("nowhere", "no such directory"),
        ("hf", "import-hf"),
        (".", "manifest.json"),
        ("file", "manifest.json"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path / place)


def test_the_newest_complete_checkpoint_is_latest(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert latest_checkpoint(root) is None
    for step in (2, 10, 9, 1_000_000):
        write_checkpoint(step_directory(root, step), TENSORS.items(), {"step": step})
    (root / "step-000300").mkdir()
    (root / "best").mkdir()
    (root / "step-final").mkdir()
    (root / "step-2000000").write_text("not a directory")
    write_checkpoint(root / "step-11", TENSORS.items(), {"step": 11})
    begin(step_directory(root, 400))
    assert latest_checkpoint(root) == root / "step-1000000"
    next((root / "step-1000000").glob("*.safetensors")).unlink()
    assert latest_checkpoint(root) == root / "step-11"
    shutil.rmtree(root / "step-11")
    assert latest_checkpoint(root) == root / "step-000010"
    shard = next((root / "step-000010").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert latest_checkpoint(root) == root / "step-000009"


def test_pruning_keeps_the_newest_complete_checkpoints(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4, 5):
        write_checkpoint(step_directory(root, step), TENSORS.items(), {"step": step})
    next((root / "step-000004").glob("*.safetensors")).unlink()
    (root / "notes").mkdir()
    begin(step_directory(root, 7))
    prune_checkpoints(root, 2)
    assert sorted(path.name for path in root.iterdir()) == [
        "notes",
        "step-000003",
        "step-000004",
        "step-000005",
    ]
    prune_checkpoints(root, 1)
    assert sorted(path.name for path in root.iterdir()) == ["notes", "step-000005"]
    with pytest.raises(ValueError, match="every checkpoint"):
        prune_checkpoints(root, 0)
    assert prune_checkpoints(tmp_path / "none", 1) == []


KILLED_WRITER = """
import sys, time, torch
from pathlib import Path
from k2train.checkpoint import LazyTensor, write_checkpoint
def load(index):
    if index == int(sys.argv[2]):
        print("here", flush=True)
        time.sleep(600)
    return torch.full((1000,), float(index))
tensors = [(f"t{i}", LazyTensor((1000,), torch.float32, lambda i=i: load(i))) for i in range(6)]
write_checkpoint(Path(sys.argv[1]), tensors, {"step": 2}, max_shard_bytes=8000)
"""


@pytest.mark.parametrize("index", [0, 3, 5])
def test_a_writer_killed_in_the_middle_leaves_nothing_that_counts(tmp_path: Path, index: int) -> None:
    root = tmp_path / "checkpoints"
    write_checkpoint(step_directory(root, 1), TENSORS.items(), {"step": 1})
    target = step_directory(root, 2)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, target, str(index)], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        child.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert latest_checkpoint(root) == step_directory(root, 1)
    left = [path for path in root.iterdir() if path.name != "step-000001"]
    assert [path.name for path in left] == ["step-000002.partial"]
    assert checkpoint_problem(left[0])
    if index == 3:
        assert clean_leftovers(root) == left
    write_checkpoint(target, TENSORS.items(), {"step": 2})
    assert sorted(path.name for path in root.iterdir()) == ["step-000001", "step-000002"]
    assert latest_checkpoint(root) == target


def test_the_error_comes_back_whole_from_another_process(tmp_path: Path) -> None:
    """Worker processes hand their exceptions over pickled."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "none")
    error = caught.value
    error.local = True
    back = pickle.loads(pickle.dumps(error))
    assert isinstance(back, CheckpointError)
    assert (str(back), back.path, back.rule, back.remedy, back.local) == (
        str(error),
        error.path,
        error.rule,
        error.remedy,
        True,
    )
