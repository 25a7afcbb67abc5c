"""Hydra words to frozen dataclasses: what composes, and how a mistake is named."""

import dataclasses

import pytest

from k2train.architecture.layer import mixer_of
from k2train.config.compose import expand_sweep, load_config
from k2train.config.convert import from_dict, to_dict
from k2train.config.errors import ConfigError
from k2train.config.folders import group_options
from k2train.config.schema import Config

GROUPS = group_options()


@pytest.mark.parametrize("word", [f"{group}={name}" for group, names in GROUPS.items() for name in names])
def test_every_file_of_every_group_composes(word: str) -> None:
    group, name = word.split("=")
    words = [word]
    if (group, name) == ("model", "moonlight_16b_a3b"):
        words.append("layout=single")
    assert isinstance(load_config(words), Config)


def test_overrides_reach_their_fields() -> None:
    config = load_config(
        ["train.steps=7", "model.n_routed_experts=32", "optim.qk_clip_tau=null", "run_dir=some/where"]
    )
    assert (config.train.steps, config.model.n_routed_experts) == (7, 32)
    assert config.optim.qk_clip_tau is None
    assert config.run_dir == "some/where"


def test_a_config_survives_the_round_trip_through_plain_dicts() -> None:
    config = load_config(["model=deepseek_v3", "layout.layers_per_virtual_stage=[61]"])
    assert from_dict(Config, to_dict(config)) == config


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().train.steps = 3  # type: ignore[misc]


def test_whole_floats_are_accepted_as_ints_and_nothing_else_is_coerced() -> None:
    assert load_config(["train.global_batch_tokens=16384.0"]).train.global_batch_tokens == 16384
    for word in ("train.steps=1.5", "train.steps=true", "train.steps=abc", "train.steps=null"):
        with pytest.raises(ConfigError, match="must be a whole number"):
            load_config([word])


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("train.stepz=1", "train.stepz=1: .*\n.*train.steps"),
        ("trian.steps=1", "is not a key of this program\n.*train"),
        ("model=k3", "there is no configs/model/k3.yaml\n.*k2"),
        ("model.hidden_sise=3", "hidden_sise.*\n.*model.hidden_size"),
        ("schedule.kind=1f1", "must be one of .*\n.*1f1b"),
        ("train.steps=0", "train.steps=0: must be at least 1"),
        ("train.steps=-3", "at least 1"),
        ("optim.weight_decay=nan", "finite"),
        ("train.steps", "not of the form key=value"),
        ("train.steps=[1", "cannot be read"),
        ("train=5", "must be a section"),
        ("data.split=95,5,0", "several values make a sweep.*\n.*quote"),
        ("train.steps=1,2", "add -m"),
        ("model.q_lora_rank=wide", "must be a whole number"),
        ("optim.lr_phases=[]", "needs at least one phase"),
        ("optim.lr_phases=[{kind: linear, to: 1e-3}]", "exactly one length"),
        ("optim.lr_phases=[{kind: linear, to: 1e-3, steps: 1, tokens: 5}]", "exactly one length"),
        ("optim.lr_phases=[{kind: bent, to: 1e-3, steps: 1}]", r"lr_phases\[0\].kind=bent: must be one of"),
        ("layout.ep=3", "must divide model.n_routed_experts=16\n.*nearest are 2 and 4"),
        ("train.global_batch_tokens=5000", r"multiple of .* = \d+ tokens\n.*nearest are \d+ and \d+"),
        ("train.seq_len=8192", "exceeds model.max_position_embeddings"),
        ("model.num_experts_per_tok=17", "cannot exceed model.n_routed_experts=16"),
        ("model.n_group=5", "must divide"),
        ("model.qk_rope_head_dim=15", "must be even"),
        ("model.head_dim=32", "belongs to model.mixer=grouped_query, not to latent\n.*model.head_dim=null"),
        ("model.mixer=grouped_query", "belongs to model.mixer=latent, not to grouped_query"),
        ("model.kv_lora_rank=null", r"=\(missing\): must be given\n.*give model.kv_lora_rank: latent: width"),
        ("~model.q_lora_rank", r"=\(missing\): must be given\n.*give model.q_lora_rank: latent: width"),
        ("model.first_k_dense_replace=9", "cannot exceed model.num_hidden_layers"),
        ("data.tokenizer.kind=tiktoken", "tokenizer.path"),
        ("model.rope_scaling.factor=4", "original_max_position_embeddings"),
    ],
)
def test_a_mistake_names_field_rule_and_remedy(word: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names) as caught:
        load_config([word])
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("model.num_key_value_heads=3", "must divide model.num_attention_heads=4\n.*use one of 1, 2, 4"),
        ("model.num_key_value_heads=null", r"model.num_key_value_heads=\(missing\): must be given"),
        ("model.partial_rotary_factor=0.35", "rotates 11 of model.head_dim=32 features, which must be even"),
        (
            "model.v_head_dim=32",
            "belongs to model.mixer=latent, not to grouped_query\n.*model.v_head_dim=null",
        ),
    ],
)
def test_a_mistake_in_grouped_query_attention_names_field_rule_and_remedy(word: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        load_config(["model=glm_tiny", word])


def test_pairing_needs_the_split() -> None:
    with pytest.raises(ConfigError, match="split_weight_grad=true"):
        load_config(["schedule=1f1b", "schedule.pair_forward_backward=true"])


def test_a_sweep_expands_to_its_product_in_order() -> None:
    jobs = expand_sweep(["layout.nodes=32,64", "model=k2", "model.num_attention_heads=64,128"])
    assert jobs[0] == ["layout.nodes=32", "model=k2", "model.num_attention_heads=64"]
    assert [job[0] for job in jobs] == ["layout.nodes=32"] * 2 + ["layout.nodes=64"] * 2
    assert len(jobs) == 4


def test_group_sizes_of_the_published_models_hold() -> None:
    k2, deepseek = load_config(["model=k2"]).model, load_config(["model=deepseek_v3"]).model
    assert (k2.sparsity, k2.num_moe_layers, mixer_of(k2).heads.query) == (48.0, 60, 192)
    assert (deepseek.n_group, deepseek.topk_group, deepseek.num_moe_layers) == (8, 4, 58)
