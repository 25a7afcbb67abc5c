"""config.json both ways, for the published files and for what transformers writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config

from k2train.checkpoint.hf_config import fp8_block_size, read_config_file, to_hf_config, to_model_config
from k2train.config.compose import compose_dict
from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError
from k2train.config.model import OPTIONAL_BY_MIXER, REQUIRED_BY_MIXER, ModelConfig

COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "num_hidden_layers": 61,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "ep_size": 1,
    "torch_dtype": "bfloat16",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-6,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "pretraining_tp": 1,
}

# The figures of docs/k2.md in the form of the published files.
PUBLISHED: dict[str, dict[str, Any]] = {
    "k2": {
        **COMMON,
        "model_type": "kimi_k2",
        "vocab_size": 163840,
        "n_routed_experts": 384,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.827,
        "rope_theta": 50000.0,
        "max_position_embeddings": 131072,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    },
    "deepseek_v3": {
        **COMMON,
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "n_routed_experts": 256,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "rope_theta": 10000,
        "max_position_embeddings": 163840,
        "num_nextn_predict_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    },
    "moonlight_16b_a3b": {
        **COMMON,
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.446,
        "rope_theta": 50000.0,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "quantization_config": None,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_are_the_models_of_our_configs(name: str) -> None:
    ours = from_dict(ModelConfig, compose_dict([f"model={name}"])["model"], "model")
    assert to_model_config(PUBLISHED[name]) == ours


@pytest.mark.parametrize("name", PUBLISHED)
def test_there_and_back_keeps_every_field(name: str) -> None:
    """hf -> ours -> hf keeps every field of the published file that describes the architecture or
    its tokens."""
    hf = PUBLISHED[name]
    back = to_hf_config(to_model_config(hf), "bfloat16", hf)
    dropped = {
        "quantization_config",
        "auto_map",
        "aux_loss_alpha",
        "seq_aux",
        "pretraining_tp",
        "num_nextn_predict_layers",
    }
    changed = {"model_type", "rope_scaling"}
    assert {key: back.get(key) for key in hf.keys() - dropped - changed} == {
        key: value for key, value in hf.items() if key not in dropped | changed
    }
    kept = {key: value for key, value in (back["rope_scaling"] or {}).items() if key != "rope_type"}
    assert kept == (hf["rope_scaling"] or {})
    assert to_model_config(back) == to_model_config(hf)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_our_file_as_it_reads_the_published_one(name: str) -> None:
    hf = {
        key: value
        for key, value in PUBLISHED[name].items()
        if key not in ("model_type", "quantization_config", "auto_map")
    }
    theirs = DeepseekV3Config(**hf)
    ours = DeepseekV3Config(**to_hf_config(to_model_config(PUBLISHED[name]), "bfloat16", hf))
    ignored = {
        "num_nextn_predict_layers",
        "aux_loss_alpha",
        "seq_aux",
        "rope_parameters",
        "transformers_version",
    }
    left, right = theirs.to_dict(), ours.to_dict()
    assert {k: left[k] for k in left.keys() - ignored} == {k: right.get(k) for k in left.keys() - ignored}
    drop = {"type", "partial_rotary_factor"}
    assert {k: v for k, v in theirs.rope_parameters.items() if k not in drop} == {
        k: v for k, v in ours.rope_parameters.items() if k not in drop
    }


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("spelling", ["version 4", "version 5"])
def test_what_transformers_saves_is_read(name: str, spelling: str, tmp_path: Path) -> None:
    hf = {
        key: value
        for key, value in PUBLISHED[name].items()
        if key not in ("model_type", "quantization_config", "auto_map")
    }
    DeepseekV3Config(**hf).save_pretrained(tmp_path)
    saved = read_config_file(tmp_path)
    assert "rope_scaling" not in saved, "the installed transformers writes the new spelling"
    if spelling == "version 4":
        rope = saved.pop("rope_parameters")
        saved["rope_theta"] = rope.pop("rope_theta")
        saved["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    assert to_model_config(saved) == to_model_config(PUBLISHED[name])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("moe_layer_freq", 2),
        ("tie_word_embeddings", True),
        ("model_type", "llama"),
        ("num_key_value_heads", 8),
        ("rope_interleave", False),
        ("attention_dropout", 0.1),
    ],
)
def test_a_feature_we_lack_is_an_error_that_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        to_model_config({**PUBLISHED["k2"], field: value})


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"type": "linear", "factor": 2.0}, "linear"),
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"attention_factor": 1.3}, "attention_factor"),
        ({"truncate": False}, "truncate"),
        ({"surprise": 1}, "surprise"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_a_rope_we_lack_is_an_error_that_names_its_key(section: str, rope: dict, words: str) -> None:
    hf = {**PUBLISHED["k2"], "rope_scaling": None}
    base = PUBLISHED["k2"]["rope_scaling"] if "type" not in rope and "rope_type" not in rope else {}
    with pytest.raises(ConfigError, match=f"{section}.*{words}"):
        to_model_config({**hf, section: {**base, **rope}})


OF_A_FILE = {f.name for f in dataclasses.fields(ModelConfig)} - {
    "mixer",
    *REQUIRED_BY_MIXER["grouped_query"],
    *OPTIONAL_BY_MIXER["grouped_query"],
}


@pytest.mark.parametrize("field", sorted(OF_A_FILE))
def test_an_absent_field_is_named_or_has_the_default_all_versions_share(field: str) -> None:
    hf = {key: value for key, value in PUBLISHED["moonlight_16b_a3b"].items() if key != field}
    if field in ("rope_theta", "rope_scaling", "max_position_embeddings", "initializer_range"):
        defaults = {
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
        }
        assert getattr(to_model_config(hf), field) == defaults[field]
    else:
        with pytest.raises(ConfigError, match=field):
            to_model_config(hf)


def test_a_value_of_the_wrong_kind_is_named() -> None:
    for field, value in [
        ("hidden_size", "wide"),
        ("hidden_size", -3),
        ("n_group", 5),
        ("rms_norm_eps", None),
    ]:
        with pytest.raises(ConfigError, match=field):
            to_model_config({**PUBLISHED["k2"], field: value})


def test_absent_groups_and_shared_experts_may_be_null() -> None:
    got = to_model_config({**PUBLISHED["k2"], "n_group": None, "topk_group": None, "n_shared_experts": None})
    assert (got.n_group, got.topk_group, got.n_shared_experts) == (1, 1, 0)


def test_yarn_without_its_optional_keys_takes_transformers_defaults() -> None:
    hf = {**PUBLISHED["k2"], "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
    yarn = to_model_config(hf).rope_scaling
    assert yarn is not None
    assert (yarn.original_max_position_embeddings, yarn.beta_fast, yarn.beta_slow) == (131072, 32.0, 1.0)


def test_the_base_inside_the_rotary_section_wins_as_it_does_in_transformers() -> None:
    sections: list[dict[str, Any]] = [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
        {"rope_parameters": {"rope_theta": 777.0}, "rope_scaling": None},
        {
            "rope_scaling": {"rope_type": "default", "rope_theta": 777.0},
            "rope_parameters": {"rope_theta": 5.0},
        },
    ]
    for section in sections:
        hf = {**PUBLISHED["moonlight_16b_a3b"], "rope_scaling": None, **section}
        del hf["model_type"]
        assert DeepseekV3Config(**hf).rope_parameters["rope_theta"] == 777.0
        assert to_model_config({**hf, "model_type": "deepseek_v3"}).rope_theta == 777.0


def test_block_sizes_of_the_published_quantisation_and_refusal_of_others() -> None:
    assert fp8_block_size({}) == (128, 128)
    assert fp8_block_size(PUBLISHED["k2"]) == (128, 128)
    assert fp8_block_size(
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}}
    ) == (64, 32)
    for bad in (
        {"quant_method": "compressed-tensors"},
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": "fp8", "weight_block_size": [0, 1]},
    ):
        with pytest.raises(ConfigError, match="quantization_config"):
            fp8_block_size({"quantization_config": bad})


def test_a_directory_without_a_readable_config_is_said(tmp_path: Path) -> None:
    for text, words in [(None, "no config.json"), ("{", "JSON"), ("[]", "object")]:
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_config_file(tmp_path)
