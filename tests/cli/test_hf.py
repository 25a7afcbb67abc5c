"""import-hf and export-hf as a user runs them, held against transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, Glm4MoeConfig, PreTrainedModel

from k2train.checkpoint import open_checkpoint, step_directory, write_checkpoint
from k2train.checkpoint.hf_config import to_hf_config, to_model_config
from k2train.cli.export_hf import run as export_hf
from k2train.cli.import_hf import run as import_hf
from k2train.cli.main import main
from k2train.config.convert import to_dict
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.layout.tensors import model_tensors
from k2train.model.model import Model, build_model
from k2train.model.model import logits as model_logits
from k2train.model.pieces import whole_model

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 0,
}
LATENT_WIDTHS = {"kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "k2": {
        **SIZES,
        "q_lora_rank": 12,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.827,
        "rope_parameters": YARN,
    },
    "deepseek_v3": {
        **SIZES,
        "q_lora_rank": 12,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 2,
        "n_shared_experts": 1,
        "rope_parameters": {**YARN, "beta_fast": 32.0},
    },
    "moonlight": {
        **SIZES,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    },
    "glm": {
        **{name: value for name, value in SIZES.items() if name not in LATENT_WIDTHS},
        "model_type": "glm4_moe",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5},
    },
}


NO_SHARED_EXPERTS: dict[str, Any] = {**FAMILIES["k2"], "n_shared_experts": 0}


def saved_by_transformers(directory: Path, config: dict, max_shard_size: str = "20KB") -> PreTrainedModel:
    """A random model that routing and attention matter in, saved as transformers saves it."""
    torch.manual_seed(0)
    given = dict(config)
    of_family = Glm4MoeConfig if given.pop("model_type", None) == "glm4_moe" else DeepseekV3Config
    theirs = AutoModelForCausalLM.from_config(of_family(**given)).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            tensor.normal_(std=0.05 if name.endswith("e_score_correction_bias") else 0.3)
    theirs.save_pretrained(directory, max_shard_size=max_shard_size)
    return theirs


def logits(model: torch.nn.Module, vocab_size: int = 61) -> Tensor:
    tokens = torch.randint(0, vocab_size, (2, 17), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        result: Tensor = model(tokens).logits
    return result


def opened(directory: Path) -> torch.nn.Module:
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    result: torch.nn.Module = model.eval()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_comes_back_with_the_same_logits(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same bytes and same config, so the logits are equal to the bit."""
    theirs = saved_by_transformers(tmp_path / "hf", FAMILIES[family])
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert main(["import-hf", str(tmp_path / "hf"), f"out={tmp_path}/ck", "verify=true"]) == 0
    assert main(["export-hf", str(tmp_path / "out"), f"checkpoint={tmp_path}/ck", "max_shard_bytes=2e4"]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    ours = opened(tmp_path / "out")
    assert torch.equal(logits(ours), logits(theirs))
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    assert all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )
    said = capsys.readouterr().out
    assert f"checkpoint: {tmp_path}/ck" in said
    assert f"model: {tmp_path}/out" in said
    total = sum(
        1 for _ in model_tensors(to_model_config(json.loads((tmp_path / "hf" / "config.json").read_text())))
    )
    assert re.search(rf"  import {total}/{total}  tensors ", said), "plain lines where there is no terminal"
    assert re.search(rf"  export {total}/{total}  tensors ", said)


def test_a_runs_newest_complete_checkpoint_is_exported(tmp_path: Path) -> None:
    saved_by_transformers(tmp_path / "hf", FAMILIES["k2"])
    model = to_model_config(json.loads((tmp_path / "hf" / "config.json").read_text()))
    root = tmp_path / "run" / "checkpoints"
    for step, value in [(5, 0.5), (10, 1.0), (20, 2.0)]:
        tensors = [(f"master/{spec.name}", torch.full(spec.shape, value)) for spec in model_tensors(model)]
        write_checkpoint(
            step_directory(root, step), tensors, {"model": to_dict(model), "dtype": "bfloat16", "step": step}
        )
    next((root / "step-000020").glob("*.safetensors")).unlink()
    assert export_hf([f"run_dir={tmp_path}/run", str(tmp_path / "out")]) == 0
    ours = opened(tmp_path / "out")
    assert ours.dtype == torch.bfloat16
    assert all((tensor == 1).all() for tensor in ours.state_dict().values())
    assert export_hf([str(tmp_path / "wide"), f"run_dir={tmp_path}/run", "dtype=float32"]) == 0
    assert opened(tmp_path / "wide").dtype == torch.float32


def test_a_run_without_a_complete_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        export_hf([str(tmp_path / "out"), f"run_dir={tmp_path}/run"])
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        export_hf([str(tmp_path / "out"), f"run_dir={tmp_path}/run"])
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"step-000001: there is no manifest\.json"):
        export_hf([str(tmp_path / "out"), f"run_dir={tmp_path}/run"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("run", "args", "words"),
    [
        (import_hf, [], "DIR=.*must be given"),
        (import_hf, ["out=x"], "DIR=.*must be given"),
        (import_hf, ["a", "b", "out=x"], "one directory"),
        (import_hf, ["a"], "out=.*must be given"),
        (import_hf, ["a", "out="], "must name a directory"),
        (import_hf, ["a", "ouput=x"], "ouput.*\n.*did you mean out"),
        (import_hf, ["a", "out=x", "out=y"], "out=y: is given twice"),
        (import_hf, ["a", "out=x", "verify=maybe"], "verify=maybe: must be true or false"),
        (import_hf, ["a", "out=x", "max_shard_bytes=0"], "max_shard_bytes=0: must be at least 1"),
        (import_hf, ["nowhere", "out=x"], r"nowhere: there is no config\.json"),
        (export_hf, ["run_dir=x"], "DIR=.*must be given"),
        (export_hf, ["new"], "one of run_dir and checkpoint"),
        (export_hf, ["new", "run_dir=a", "checkpoint=b"], "cannot be given together"),
        (export_hf, ["new", "checkpoint=a", "dtype=bf16"], "dtype=bf16: must be one of.*\n.*bfloat16"),
        (export_hf, ["new", "chekpoint=a"], "chekpoint.*\n.*did you mean checkpoint"),
        (export_hf, ["new", "checkpoint=nowhere"], "no such directory"),
    ],
)
def test_a_mistake_is_named_with_its_remedy_and_nothing_is_made(
    run: Callable[[list[str]], int],
    args: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        run(args)
    assert os.listdir(tmp_path) == []


def test_a_mistake_is_exit_status_2_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-hf", str(tmp_path), f"out={tmp_path}/ck"]) == 2
    said = capsys.readouterr().err
    assert "config.json" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 3


@pytest.mark.parametrize("command", ["import-hf", "export-hf"])
def test_help_explains_every_key(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    keys = {
        "import-hf": ["out", "verify", "max_shard_bytes"],
        "export-hf": ["run_dir", "checkpoint", "dtype", "max_shard_bytes"],
    }[command]
    assert all(re.search(rf"^  {key}  <", said, re.MULTILINE) for key in keys)
    assert f"usage: k2train {command} DIR" in said


def test_relative_paths_with_spaces_and_equal_signs_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra's sweeps make directories like `lr=0.1,seed=2`."""
    monkeypatch.chdir(tmp_path)
    saved_by_transformers(tmp_path / "my models" / "lr=0.1", FAMILIES["moonlight"])
    assert import_hf(["my models/lr=0.1", "out=made of/lr=0.1,x=2"]) == 0
    assert export_hf(["./out=1", "checkpoint=made of/lr=0.1,x=2"]) == 0
    assert (tmp_path / "out=1" / "config.json").is_file()


def test_multi_token_prediction_layers_are_left_out_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = saved_by_transformers(tmp_path / "hf", FAMILIES["k2"], "1GB")
    path = tmp_path / "hf" / "extra.safetensors"
    save_file({"model.layers.3.eh_proj.weight": torch.zeros(32, 64)}, path)
    single = tmp_path / "hf" / "model.safetensors"
    single.rename(tmp_path / "hf" / "first.safetensors")
    spec_names = [
        spec.name
        for spec in model_tensors(to_model_config(json.loads((tmp_path / "hf" / "config.json").read_text())))
    ]
    weight_map = dict.fromkeys(spec_names, "first.safetensors") | {
        "model.layers.3.eh_proj.weight": "extra.safetensors"
    }
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert import_hf([str(tmp_path / "hf"), f"out={tmp_path}/ck"]) == 0
    assert "note: model.layers.3 left out" in capsys.readouterr().out
    assert export_hf([str(tmp_path / "out"), f"checkpoint={tmp_path}/ck"]) == 0
    assert torch.equal(logits(opened(tmp_path / "out")), logits(theirs))


def lively(config: ModelConfig) -> Model:
    """Our own model with weights that spread the logits over several units and biases that change
    the choice of experts."""
    model = build_model(config, whole_model(config))
    generator = torch.Generator().manual_seed(11)
    for piece in model.pieces():
        values = torch.randn(piece.tensor.shape, generator=generator)
        if not piece.trained:
            piece.tensor.copy_(0.2 * values)
        elif values.dim() == 1:
            piece.tensor.copy_(1 + 0.3 * values)
        else:
            piece.tensor.copy_(1.5 * values / values.shape[1] ** 0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_an_exported_model_of_ours_the_same_logits(family: str, tmp_path: Path) -> None:
    """FP32 rounding in another order of sums is all that may differ: 1e-5 of the largest logit."""
    config = to_model_config(
        {
            "model_type": "deepseek_v3",
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            "routed_scaling_factor": 2.5,
            **FAMILIES[family],
        }
    )
    ours = lively(config)
    tensors = ((f"master/{p.name}" if p.trained else f"model/{p.name}", p.tensor) for p in ours.pieces())
    write_checkpoint(tmp_path / "ck", tensors, {"model": to_dict(config), "dtype": "float32"})
    assert export_hf([str(tmp_path / "out"), f"checkpoint={tmp_path}/ck", "max_shard_bytes=2e4"]) == 0
    tokens = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(5))
    mine, theirs = model_logits(ours, tokens), logits(opened(tmp_path / "out"))
    assert theirs.abs().max() > 1
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_model_without_shared_experts_goes_both_ways(tmp_path: Path) -> None:
    """transformers has projections of width zero there, in memory and on disk; we have none."""
    theirs = saved_by_transformers(tmp_path / "hf", NO_SHARED_EXPERTS)
    assert import_hf([str(tmp_path / "hf"), f"out={tmp_path}/ck"]) == 0
    assert not [name for name in open_checkpoint(tmp_path / "ck").names() if "shared_experts" in name]
    assert export_hf([str(tmp_path / "out"), f"checkpoint={tmp_path}/ck"]) == 0
    assert torch.equal(logits(opened(tmp_path / "out")), logits(theirs))


WIDE = ModelConfig(
    vocab_size=16,
    hidden_size=512,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=1024,
    moe_intermediate_size=1024,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_shared_experts=1,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)

MEASURED = """
import resource, sys
from k2train.cli import export_hf, import_hf
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hf, ck, out = sys.argv[1:]
before = peak()
import_hf.run([hf, f"out={ck}", "max_shard_bytes=5e7", "verify=true"])
export_hf.run([out, f"checkpoint={ck}", "max_shard_bytes=5e7"])
print("grew", peak() - before)
"""


def test_memory_stays_at_a_few_tensors_while_a_model_is_copied(tmp_path: Path) -> None:
    """110 MB of FP32 weights in shards of 50 MB, no matrix above 2.1 MB: the process may grow by 20
    MB at its peak."""
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(to_hf_config(WIDE, "float32")))
    save_file({spec.name: torch.zeros(spec.shape) for spec in model_tensors(WIDE)}, hf / "model.safetensors")
    assert (hf / "model.safetensors").stat().st_size > 110_000_000
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, hf, tmp_path / "ck", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(done.stdout.split("grew")[1]) < 20_000_000
    shards = open_checkpoint(tmp_path / "ck").manifest.shards
    assert max(shard.num_bytes for shard in shards) > 45_000_000
