"""Export gives back what was imported, and a training run's masters in the type it computed in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from k2train.checkpoint import (
    CheckpointError,
    RowPiece,
    begin,
    commit,
    open_checkpoint,
    write_checkpoint,
    write_shards,
)
from k2train.checkpoint.hf_config import to_hf_config, to_model_config
from k2train.checkpoint.hf_export import export_model, plan_export
from k2train.checkpoint.hf_import import import_model, open_hf_model
from k2train.config.convert import to_dict
from k2train.config.errors import ConfigError
from k2train.layout.tensors import model_tensors


def same(left: Tensor, right: Tensor) -> bool:
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


def exported(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory, read by the safetensors library through the index."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(directory / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            assert all(weight_map[name] == file for name in shard.keys())  # noqa: SIM118
    assert found.keys() == weight_map.keys()
    return found


@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("max_shard_bytes", [2000, 10**9])
def test_import_then_export_is_byte_equal_for_every_tensor(
    write_hf, weights, tmp_path: Path, files: int, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    tensors = weights if dtype is None else {name: tensor.to(dtype) for name, tensor in weights.items()}
    checkpoint = import_model(open_hf_model(write_hf(tensors, files)), tmp_path / "ck", max_shard_bytes=1500)
    out = export_model(
        plan_export(open_checkpoint(checkpoint)), tmp_path / "out", max_shard_bytes=max_shard_bytes
    )
    got = exported(out)
    assert got.keys() == tensors.keys()
    assert all(same(got[name], tensors[name]) for name in tensors)
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert (len(shards) == 1) == (max_shard_bytes > 2000)


def test_export_then_import_is_byte_equal_and_the_same_model(
    write_hf, weights, model, tmp_path: Path
) -> None:
    first = open_checkpoint(import_model(open_hf_model(write_hf(weights)), tmp_path / "a"))
    out = export_model(plan_export(first), tmp_path / "out", max_shard_bytes=5000)
    second = open_checkpoint(import_model(open_hf_model(out), tmp_path / "b"))
    assert second.names() == first.names()
    assert second.meta == first.meta
    assert all(same(first.load(name), second.load(name)) for name in first.names())
    assert to_model_config(json.loads((out / "config.json").read_text())) == model


def test_tokens_and_generation_settings_come_through(write_hf, weights, model, tmp_path: Path) -> None:
    config = {
        **to_hf_config(model, "bfloat16"),
        "bos_token_id": 5,
        "eos_token_id": [6, 7],
        "pad_token_id": None,
    }
    directory = write_hf(weights, config=config)
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 6}')
    out = export_model(
        plan_export(open_checkpoint(import_model(open_hf_model(directory), tmp_path / "ck"))),
        tmp_path / "out",
    )
    written = json.loads((out / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (5, [6, 7])
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": 6}


def training_checkpoint(directory: Path, model, dtype: str = "bfloat16") -> dict[str, Tensor]:
    """What a run writes: FP32 masters (norms, embedding and head cut by rows over two ranks),
    momenta, the bias buffer."""
    generator = torch.Generator().manual_seed(3)
    masters, parts = {}, [list[tuple[str, object]](), list[tuple[str, object]]()]
    for index, spec in enumerate(model_tensors(model)):
        tensor = masters[spec.name] = torch.randn(spec.shape, generator=generator)
        if spec.role == "bias":
            parts[0].append((f"model/{spec.name}", tensor))
            continue
        if spec.role == "matrix":
            parts[index % 2] += [(f"master/{spec.name}", tensor), (f"momentum/{spec.name}", tensor * 2)]
            continue
        for rank, (start, stop) in enumerate([(0, 7), (7, spec.shape[0])]):
            piece = RowPiece(tensor[start:stop], start, spec.shape[0])
            parts[rank] += [(f"master/{spec.name}", piece), (f"exp_avg/{spec.name}", piece)]
    temporary = begin(directory)
    entries = [
        entry for rank, own in enumerate(parts) for entry in write_shards(temporary, f"r{rank}", own, 4000)
    ]
    commit(temporary, directory, entries, {"model": to_dict(model), "dtype": dtype, "step": 9})
    return masters


@pytest.mark.parametrize(
    ("computed", "asked", "expected"),
    [
        ("bfloat16", None, torch.bfloat16),
        ("float32", None, torch.float32),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("float64", "float64", torch.float64),
    ],
)
def test_masters_are_cast_to_the_runs_type_or_the_one_asked_for(
    model, tmp_path: Path, computed: str, asked: str | None, expected: torch.dtype
) -> None:
    masters = training_checkpoint(tmp_path / "ck", model, computed)
    export = plan_export(open_checkpoint(tmp_path / "ck"), asked)
    got = exported(export_model(export, tmp_path / "out", max_shard_bytes=5000))
    assert got.keys() == masters.keys()
    for name, tensor in masters.items():
        kept = torch.float32 if name.endswith("e_score_correction_bias") else expected
        assert same(got[name], tensor.to(kept)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == str(expected).removeprefix("torch.")
    assert config["bos_token_id"] is None
    assert config["eos_token_id"] is None
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_a_master_is_preferred_to_the_rounded_copy_beside_it(model, tmp_path: Path) -> None:
    masters = {spec.name: torch.full(spec.shape, 1.001) for spec in model_tensors(model)}
    tensors = [(f"master/{name}", tensor) for name, tensor in masters.items()]
    tensors += [(f"model/{name}", torch.zeros_like(tensor).bfloat16()) for name, tensor in masters.items()]
    write_checkpoint(tmp_path / "ck", tensors, {"model": to_dict(model), "dtype": "float32"})
    got = exported(export_model(plan_export(open_checkpoint(tmp_path / "ck")), tmp_path / "out"))
    assert all(same(got[name], masters[name]) for name in masters)


def test_a_checkpoint_that_is_no_whole_model_is_refused(model, tmp_path: Path) -> None:
    tensors = [(f"model/{spec.name}", torch.zeros(spec.shape)) for spec in model_tensors(model)]
    write_checkpoint(tmp_path / "few", tensors[:-3], {"model": to_dict(model)})
    with pytest.raises(CheckpointError, match=r"lacks 3 tensors of its model: .*lm_head\.weight"):
        plan_export(open_checkpoint(tmp_path / "few"))
    write_checkpoint(
        tmp_path / "wide",
        [("model/lm_head.weight", torch.zeros(2, 2)), *tensors[:-1]],
        {"model": to_dict(model)},
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[2, 2\]"):
        plan_export(open_checkpoint(tmp_path / "wide"))
    write_checkpoint(tmp_path / "nameless", tensors, {"step": 1})
    with pytest.raises(CheckpointError, match="architecture"):
        plan_export(open_checkpoint(tmp_path / "nameless"))
    write_checkpoint(tmp_path / "odd", tensors, {"model": {**to_dict(model), "n_group": 3}})
    with pytest.raises(CheckpointError, match="n_group"):
        plan_export(open_checkpoint(tmp_path / "odd"))


def test_a_damaged_shard_or_ctrl_c_leaves_nothing(model, tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "ck", model)
    shard = tmp_path / "ck" / "r1-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    export = plan_export(open_checkpoint(tmp_path / "ck"))
    with pytest.raises(CheckpointError, match=r"r1-00001\.safetensors"):
        export_model(export, tmp_path / "out", max_shard_bytes=3000)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_model(export, tmp_path / "out", on_bytes=interrupt)
    assert os.listdir(tmp_path) == ["ck"]


def test_a_model_directory_that_is_not_empty_is_kept(model, tmp_path: Path) -> None:
    training_checkpoint(tmp_path / "ck", model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        export_model(plan_export(open_checkpoint(tmp_path / "ck")), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
