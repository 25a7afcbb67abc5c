"""The tokenizer beside an exported model: the run's ids, and a model that stops at the end of a
text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from k2train.checkpoint import open_checkpoint, write_checkpoint
from k2train.checkpoint.hf_tokenizer import tokenizer_meta, write_tokenizer
from k2train.cli.export_hf import run as export_hf
from k2train.config.convert import to_dict
from k2train.config.data import TokenizerConfig
from k2train.config.model import ModelConfig
from k2train.data.tokenizer import ByteTokenizer, build_tokenizer
from k2train.model.model import build_model
from k2train.model.pieces import whole_model

MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=40,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
)
TEXTS = ["", "plain text", "Ünïcode, 漢字 and 🙂\n\ttabs", "<|endoftext|> quoted", "\x00\x7f bytes"]


def checkpoint_that_ends_every_text(directory: Path, tokenizer: TokenizerConfig, eod_id: int) -> Path:
    """Layers add nothing to a stream of ones, and the head answers it with the end-of-document
    id."""
    model = build_model(MODEL, whole_model(MODEL), torch.float32, torch.device("cpu"))
    for piece in model.pieces():
        piece.tensor.data.fill_(1.0 if "norm" in piece.name or "embed" in piece.name else 0.0)
        if piece.name == "lm_head.weight":
            piece.tensor.data[eod_id] = 1.0
    tensors = ((f"master/{p.name}" if p.trained else f"model/{p.name}", p.tensor) for p in model.pieces())
    meta = {
        "model": to_dict(MODEL),
        "dtype": "float32",
        "optimizer": "adamw",
        "tokenizer": tokenizer_meta(tokenizer, eod_id),
    }
    return write_checkpoint(directory, tensors, meta)


def test_generation_stops_at_the_end_of_a_text(tmp_path: Path) -> None:
    checkpoint = checkpoint_that_ends_every_text(tmp_path / "ck", TokenizerConfig(), ByteTokenizer.eod_id)
    assert export_hf([str(tmp_path / "out"), f"checkpoint={checkpoint}"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("ab", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=20, do_sample=False).tolist() == [[97, 98, 256]]
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 256


@pytest.mark.parametrize("text", TEXTS)
def test_the_byte_tokenizer_of_transformers_gives_our_ids(text: str, tmp_path: Path) -> None:
    """Special tokens in a text are the one difference: ours never recognises any."""
    write_tokenizer(tokenizer_meta(TokenizerConfig(), ByteTokenizer.eod_id), tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), ByteTokenizer()
    ids = theirs(text, split_special_tokens=True).input_ids
    np.testing.assert_array_equal(ids, ours.encode(text))
    assert theirs.decode(ids) == text


def test_a_hugging_face_tokenizer_is_copied_and_its_end_of_text_named(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["</s>"])
    made.save(str(source / "tokenizer.json"))
    config = TokenizerConfig("huggingface", str(source))
    checkpoint = checkpoint_that_ends_every_text(tmp_path / "ck", config, build_tokenizer(config).eod_id)
    assert export_hf([str(tmp_path / "out"), f"checkpoint={checkpoint}"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer("a b").input_ids, tokenizer.eos_token, tokenizer.eos_token_id) == ([0, 1], "</s>", 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2


def test_a_tokenizer_that_has_gone_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = checkpoint_that_ends_every_text(
        tmp_path / "ck", TokenizerConfig("tiktoken", "/gone/tiktoken.model"), 7
    )
    assert export_hf([str(tmp_path / "out"), f"checkpoint={checkpoint}"]) == 0
    assert "the tiktoken tokenizer /gone/tiktoken.model was not found" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 7


def test_a_checkpoint_of_before_takes_the_tokenizer_of_its_run(tmp_path: Path) -> None:
    made = checkpoint_that_ends_every_text(tmp_path / "made", TokenizerConfig(), 256)
    tensors = [(name, open_checkpoint(made).load(name)) for name in open_checkpoint(made).names()]
    meta = {key: value for key, value in open_checkpoint(made).meta.items() if key != "tokenizer"}
    write_checkpoint(tmp_path / "run/checkpoints/step-000001", tensors, meta)
    (tmp_path / "run" / "config.yaml").write_text(
        "data: {tokenizer: {kind: byte, path: null, pattern: null}}"
    )
    assert export_hf([str(tmp_path / "out"), f"run_dir={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 256
