"""A model, a corpus and a run small enough to train in a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2train.cli.main import main

TINY_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}


@pytest.fixture(scope="session")
def corpus_prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level dataset of 40 documents that a model can learn something from."""
    directory = tmp_path_factory.mktemp("corpus")
    for index in range(40):
        words = " ".join(
            f"{word} {index * 7 % 13}" for word in ("the", "quick", "brown", "fox", "jumps") * 12
        )
        (directory / f"{index:02}.txt").write_text(words)
    assert main(["data", "build", f"input=[{directory}]", f"output={directory}/text", "workers=1"]) == 0
    return f"{directory}/text"


@pytest.fixture
def words(corpus_prefix: str, tmp_path: Path) -> list[str]:
    """Overrides of a 6-step run in tmp_path/run, with clipping, QK-Clip and an evaluation in the
    middle."""
    return [
        *(f"model.{key}={value}" for key, value in TINY_MODEL.items()),
        f"data.blend=[{{prefix: {corpus_prefix}}}]",
        "data.split='80,20,0'",
        f"data.cache_dir={tmp_path}/cache",
        "train.steps=6",
        "train.seq_len=32",
        "train.microbatch_size=2",
        "train.global_batch_tokens=256",
        "train.eval_every_steps=2",
        "train.eval_tokens=256",
        "train.final_eval_tokens=512",
        "train.checkpoint_every_steps=2",
        "train.keep_checkpoints=10",
        "optim.lr_phases=[{kind: linear, to: 1e-2, steps: 2},{kind: constant, to: 1e-2, fraction: 1}]",
        "optim.qk_clip_tau=0.02",
        "telemetry.tensorboard=false",
        f"run_dir={tmp_path}/run",
    ]
