"""Import checks everything before it copies, keeps every byte, and leaves nothing behind when it
fails."""

from __future__ import annotations

import collections
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from k2train.checkpoint import CheckpointError, open_checkpoint
from k2train.checkpoint.fp8_blocks import scale_shape
from k2train.checkpoint.hf_config import to_hf_config
from k2train.checkpoint.hf_import import import_model, open_hf_model
from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig

EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"


def same(left: Tensor, right: Tensor) -> bool:
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


def refused(directory: Path, out: Path, *words: str) -> str:
    """Import must fail with a ConfigError that holds `words`, and write nothing."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(ConfigError) as caught:
        import_model(open_hf_model(directory), out)
    assert sorted(os.listdir(out.parent)) == before
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_tensor_keeps_its_bytes_and_type(
    write_hf, weights, model, tmp_path: Path, files: int, dtype: torch.dtype | None
) -> None:
    tensors = weights if dtype is None else {name: tensor.to(dtype) for name, tensor in weights.items()}
    source = open_hf_model(write_hf(tensors, files))
    assert source.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    checkpoint = open_checkpoint(import_model(source, tmp_path / "ck", verify=True, max_shard_bytes=3000))
    assert checkpoint.names() == sorted(f"model/{name}" for name in tensors)
    assert all(same(checkpoint.load(f"model/{name}"), tensor) for name, tensor in tensors.items())
    assert from_dict(ModelConfig, checkpoint.meta["model"]) == model


def test_block_fp8_becomes_the_bf16_it_stands_for(write_hf, weights, model, tmp_path: Path) -> None:
    """Blocks of 8 x 16 on matrices whose sides are no multiples of either; norms, gate and biases
    stay as they are."""
    block, generator = (8, 16), torch.Generator().manual_seed(1)
    tensors, expected = dict(weights), dict(weights)
    for name, tensor in weights.items():
        if not any(part in name for part in ("experts.", "o_proj", "kv_b_proj", "mlp.down_proj")):
            continue
        scale = torch.rand(scale_shape(tuple(tensor.shape), block), generator=generator)
        tensors[name] = tensor.to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = scale
        rows, columns = (torch.arange(size) // edge for size, edge in zip(tensor.shape, block, strict=True))
        expected[name] = (tensors[name].float() * scale[rows][:, columns]).bfloat16()
    config = to_hf_config(model, "bfloat16")
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    source = open_hf_model(write_hf(tensors, 2, config))
    assert source.checked.num_dequantized == len(tensors) - len(weights) > 20
    checkpoint = open_checkpoint(import_model(source, tmp_path / "ck"))
    assert all(same(checkpoint.load(f"model/{name}"), tensor) for name, tensor in expected.items())


def test_fp8_without_its_scales_or_scales_without_fp8_are_named(write_hf, weights, tmp_path: Path) -> None:
    quantized = {**weights, EXPERT: weights[EXPERT].to(torch.float8_e4m3fn)}
    refused(write_hf(quantized, name="a"), tmp_path / "ck", "missing (1)", EXPERT + "_scale_inv")
    refused(
        write_hf({**weights, EXPERT + "_scale_inv": torch.ones(1, 1)}, name="b"),
        tmp_path / "ck",
        "extra (1)",
        EXPERT,
    )
    wrong = {**quantized, EXPERT + "_scale_inv": torch.ones(2, 1)}
    refused(write_hf(wrong, name="c"), tmp_path / "ck", "misshapen (1)", "[2, 1]", "[1, 1]")
    integers = {**quantized, EXPERT + "_scale_inv": torch.ones(1, 1, dtype=torch.int32)}
    refused(write_hf(integers, name="d"), tmp_path / "ck", EXPERT + "_scale_inv", "I32")


def test_missing_extra_and_misshapen_tensors_are_all_named_and_counted(
    write_hf, weights, tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in weights.items() if "experts.3." not in name}
    tensors["model.layers.0.self_attn.surprise.weight"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(37, 21)
    text = refused(
        write_hf(tensors),
        tmp_path / "ck",
        "missing (6)",
        "experts.3.down_proj",
        "and 1 more",
        "extra (1)",
        "surprise",
        "misshapen (1)",
        "lm_head.weight is [37, 21], not [37, 20]",
    )
    assert len(text.splitlines()) < 8


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_each_single_missing_tensor_is_found(write_hf, weights, tmp_path: Path, name: str) -> None:
    refused(
        write_hf({n: t for n, t in weights.items() if n != name}, 2), tmp_path / "ck", "missing (1)", name
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e5m2])
def test_a_type_that_is_no_weights_is_named(write_hf, weights, tmp_path: Path, dtype: torch.dtype) -> None:
    refused(write_hf({**weights, EXPERT: weights[EXPERT].to(dtype)}), tmp_path / "ck", EXPERT)


def test_multi_token_prediction_layers_are_left_aside(write_hf, weights, tmp_path: Path) -> None:
    extra = {
        name.replace("layers.2.", "layers.3."): tensor
        for name, tensor in weights.items()
        if "layers.2." in name
    }
    extra |= {
        "model.layers.3.eh_proj.weight": torch.zeros(20, 40),
        "model.layers.12.enorm.weight": torch.zeros(20),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    source = open_hf_model(write_hf({**weights, **extra}, 2))
    assert source.checked.skipped_layers == ("model.layers.12", "model.layers.3")
    checkpoint = open_checkpoint(import_model(source, tmp_path / "ck"))
    assert checkpoint.names() == sorted(f"model/{name}" for name in weights)


def test_a_file_the_index_names_must_be_there_and_whole(write_hf, weights, tmp_path: Path) -> None:
    file = "model-2-of-3.safetensors"
    directory = write_hf(weights, 3)
    whole = (directory / file).read_bytes()
    (directory / file).unlink()
    refused(directory, tmp_path / "ck", file, "missing")
    for cut in (0, 7, 100, len(whole) - 1):
        (directory / file).write_bytes(whole[:cut])
        refused(directory, tmp_path / "ck", file, "damaged")


def test_an_index_that_does_not_match_its_files_is_refused(write_hf, weights, tmp_path: Path) -> None:
    directory = write_hf(weights, 2)
    index = directory / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    for bad in ("{", "[]", "{}", json.dumps({"weight_map": 3})):
        index.write_text(bad)
        refused(directory, tmp_path / "ck", "model.safetensors.index.json")
    swapped = {
        **good,
        "lm_head.weight": next(file for file in good.values() if file != good["lm_head.weight"]),
    }
    index.write_text(json.dumps({"weight_map": swapped}))
    refused(directory, tmp_path / "ck", "lm_head.weight", "lacks")
    save_file({"lm_head.weight": weights["lm_head.weight"]}, directory / "third.safetensors")
    index.write_text(json.dumps({"weight_map": {**good, "model.norm.weight": "third.safetensors"}}))
    refused(directory, tmp_path / "ck", "third.safetensors")


def test_a_directory_without_safetensors_is_refused(tmp_path: Path, model) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(to_hf_config(model, "float32")))
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path / "hf", tmp_path / "ck", "safetensors")


def test_an_output_that_is_not_empty_is_refused_and_kept(write_hf, weights, tmp_path: Path) -> None:
    source = open_hf_model(write_hf(weights))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(ConfigError, match="not empty"):
            import_model(source, tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == "x"
    (tmp_path / "empty").mkdir()
    import_model(source, tmp_path / "empty")
    open_checkpoint(tmp_path / "empty").verify()


def test_too_small_a_disk_is_said_before_anything_is_written(
    write_hf, weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_hf_model(write_hf(weights))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2000, 1000, 1000))
    with pytest.raises(ConfigError, match=r"needs .* MB but its disk has 0\.00 MB free"):
        import_model(source, tmp_path / "new" / "deeper" / "ck")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_while_writing_leaves_nothing(write_hf, weights, tmp_path: Path) -> None:
    """The kernel itself refuses the bytes: a limit on the size of files stands in for the full
    disk."""
    source = open_hf_model(write_hf(weights))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"out=.*cannot be written"):
            import_model(source, tmp_path / "ck")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_no_space_left_is_named_as_such(write_hf, weights, tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="disk is full"):
        import_model(open_hf_model(write_hf(weights)), tmp_path / "ck", on_bytes=fail)
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_ctrl_c_in_the_middle_leaves_nothing(write_hf, weights, tmp_path: Path) -> None:
    calls = []

    def interrupt(num_bytes: int) -> None:
        calls.append(num_bytes)
        if len(calls) == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_model(
            open_hf_model(write_hf(weights)), tmp_path / "ck", max_shard_bytes=1000, on_bytes=interrupt
        )
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_a_source_that_is_cut_while_it_is_copied_leaves_nothing(write_hf, weights, tmp_path: Path) -> None:
    directory = write_hf(weights)
    source = open_hf_model(directory)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=r"model\.safetensors.*ends before"):
        import_model(source, tmp_path / "ck")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


def test_verify_finds_bytes_that_the_disk_changed(write_hf, weights, tmp_path: Path) -> None:
    """The last shard is complete when the callback sees the last tensor of it, so flip a byte of an
    earlier one."""
    seen = 0

    def corrupt(num_bytes: int) -> None:
        nonlocal seen
        seen += 1
        if seen == len(weights):
            shard = tmp_path / "ck.partial" / "model-00000.safetensors"
            raw = bytearray(shard.read_bytes())
            raw[-1] ^= 1
            shard.write_bytes(raw)

    with pytest.raises(CheckpointError, match="model-00000"):
        import_model(
            open_hf_model(write_hf(weights)),
            tmp_path / "ck",
            verify=True,
            max_shard_bytes=2000,
            on_bytes=corrupt,
        )
    assert sorted(os.listdir(tmp_path)) == ["hf"]
