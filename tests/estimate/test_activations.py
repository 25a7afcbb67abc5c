"""Bytes between forward and backward, by hand for single names and by rule for all policies."""

import dataclasses

import pytest

from k2train.architecture.layer import layer_of
from k2train.architecture.microbatch import workload
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.config.ops import OpsConfig
from k2train.config.sections import ActivationsConfig
from k2train.estimate.activations import check_policies, saved_tensors

NAMES = [field.name for field in dataclasses.fields(ActivationsConfig)]


def by_name(w, policies, kind: str = "moe"):
    return {tensor.name: tensor for tensor in saved_tensors(w, policies, kind)}


def test_every_name_belongs_to_a_dense_or_a_moe_layer(model, train, policies) -> None:
    w = workload(model, train, 1)
    moe, dense = by_name(w, policies()), by_name(w, policies(), kind="dense")
    assert set(moe) | set(dense) == set(NAMES)
    assert set(moe) - set(dense) == {
        "routing",
        "expert_input",
        "swiglu_input",
        "swiglu_output",
        "shared_swiglu_input",
        "shared_swiglu_output",
    }


def test_bytes_of_single_names_by_hand(model, train, policies) -> None:
    w = workload(model, train, 2)
    saved = by_name(w, policies(expert_input="fp8", query="recompute", layer_input="offload"))
    tokens, rows = 1024, 4096
    # The norm's inverse RMS goes with its input: an FP32 a token.
    assert saved["layer_input"].full_bytes == saved["layer_input"].host_bytes == tokens * (256 * 2 + 4)
    assert saved["layer_input"].device_bytes == 0
    assert saved["query"].full_bytes == tokens * 4 * 48 * 2
    assert saved["query"].stored_bytes == 0
    # FP8: one byte a number, four bytes for each of a row's two tiles of 128.
    assert saved["expert_input"].device_bytes == rows * (256 + 2 * 4)
    assert saved["swiglu_input"].device_bytes == rows * 2 * 128 * 2
    # Keys and values are two tensors, and FP8 tiles lie along a head's features.
    stored = by_name(w, policies(key_value="fp8"))["key_value"].stored_bytes
    assert stored == tokens * 4 * (48 + 4 + 24 + 4)
    # Scores and weights in FP32, three indices of 8 bytes a row, 12 local experts' offsets, 2
    # sequences' loads.
    assert saved["routing"].full_bytes == tokens * 24 * 4 + rows * (4 + 3 * 8) + 12 * 4 + 2 * 24 * 8


@pytest.mark.parametrize("policy", ["keep", "fp8", "offload", "fp8_offload", "recompute"])
def test_policies_only_move_bytes_or_drop_them(model, train, policies, policy: str) -> None:
    w = workload(model, train, 1)
    for name in set(NAMES) - {
        "layer_input",
        "expert_input",
        "routing",
        "mlp_swiglu_input",
        "mlp_swiglu_output",
    }:
        tensor = by_name(w, policies(**{name: policy}))[name]
        assert tensor.device_bytes + tensor.host_bytes == tensor.stored_bytes <= tensor.full_bytes
        assert (tensor.host_bytes > 0) == (policy in ("offload", "fp8_offload"))
        # FP32: a norm's inverse RMS a token, fused attention's log-sum-exp a token and head.
        statistics = 4 * w.tokens if name in ("q_latent", "kv_latent", "attention_residual") else 0
        statistics += 4 * w.tokens * model.num_attention_heads if name == "attention_output" else 0
        assert (tensor.stored_bytes == statistics) == (policy == "recompute")
        if policy in ("fp8", "fp8_offload"):
            assert tensor.stored_bytes < 0.75 * tensor.full_bytes


@pytest.mark.parametrize(
    ("device", "dtype", "backend", "kernel"),
    [
        ("cuda", "bfloat16", "auto", "cudnn"),
        ("auto", "bfloat16", "triton", "triton"),
        ("cuda", "bfloat16", "te", "te"),
        ("cpu", "bfloat16", "auto", "tiles"),
        ("cuda", "float32", "torch", "tiles"),
    ],
)
def test_fused_attention_keeps_a_log_sum_and_triton_rebuilds_scores_twice(
    model, train, policies, device: str, dtype: str, backend: str, kernel: str
) -> None:
    w = workload(model, dataclasses.replace(train, device=device, dtype=dtype), 1, ops=OpsConfig(backend))
    assert w.attention == kernel
    fused = kernel != "tiles"
    output = by_name(w, policies())["attention_output"]
    statistics = 4 * w.tokens * model.num_attention_heads if fused else 0
    assert output.full_bytes == output.numbers * w.element_bytes + statistics
    (attention,) = (op for op in layer_of(model, "dense").attention_ops(w) if op.name == "attention")
    heads = layer_of(model, "dense").mixer.heads
    query, value = heads.query, heads.value
    products = (4 * query + 3 * value) if kernel == "triton" else (3 * query + 2 * value)
    assert attention.backward_flops == pytest.approx(attention.flops * products / (query + value))
    assert any(op.name == "row_statistics" for op in layer_of(model, "dense").attention_ops(w)) == fused


def test_a_model_without_query_latent_or_shared_experts_has_no_such_names(model, train, policies) -> None:
    plain = dataclasses.replace(model, q_lora_rank=None, n_shared_experts=0)
    names = set(by_name(workload(plain, train, 1), policies()))
    assert not names & {"q_latent", "q_latent_norm_output", "shared_swiglu_input", "shared_swiglu_output"}


def test_k2_policies_leave_a_tenth_or_less_on_the_device() -> None:
    config = load_config(["experiment=k2"])
    w = workload(config.model, config.train, 16)
    before = sum(tensor.device_bytes for tensor in saved_tensors(w, ActivationsConfig(), "moe"))
    after = sum(tensor.device_bytes for tensor in saved_tensors(w, config.activations, "moe"))
    assert after <= before / 10


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("layer_input", "recompute"),
        ("expert_input", "recompute"),
        ("routing", "recompute"),
        ("routing", "fp8"),
        ("routing", "fp8_offload"),
    ],
)
def test_policies_that_cannot_be_carried_out_are_refused(policies, name: str, policy: str) -> None:
    with pytest.raises(ConfigError, match=f"activations.{name}={policy}"):
        check_policies(policies(**{name: policy}))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wider_types_take_more_bytes(model, train, policies, dtype: str) -> None:
    narrow = workload(model, train, 1)
    wide = dataclasses.replace(narrow, dtype=dtype)
    factor = {"float32": 2, "float64": 4}[dtype]
    assert (
        by_name(wide, policies())["query"].full_bytes
        == factor * by_name(narrow, policies())["query"].full_bytes
    )
