"""`k2train report memory`: what is predicted for every saved activation is what a forward leaves in the store."""

from __future__ import annotations

import json
import sys

import pytest

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.estimate.shrink import divide_widths, layer_bytes, sample_layers, shrink
from k2train.trainer import memory_report as measuring
from k2train.trainer.memory_report import memory_report

PRESETS = ["none", "recompute", "recompute_fp8", "recompute_offload", "offload", "k2"]
MODELS = {
    "tiny": [],
    "tiny_bfloat16": ["train.dtype=bfloat16", "train.balance_loss_alpha=0"],
    "k2": ["model=k2", "train.dtype=bfloat16"],
    "moonlight": ["model=moonlight_16b_a3b"],
}
FEW_BYTES = 2**25


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure large models narrower than the program does: the same shapes, and each in a tenth of the time."""
    monkeypatch.setattr(measuring, "PARAMETER_LIMIT_BYTES", FEW_BYTES)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("preset", PRESETS)
def test_every_name_is_measured_as_predicted(model: str, preset: str) -> None:
    """Byte for byte: both sides count the same tensors, and nothing of them depends on values but which expert a row goes to."""
    report = memory_report(load_config([*MODELS[model], f"activations={preset}"]))
    assert [layer.moe for layer in report.layers] == [True, False]
    for layer in report.layers:
        assert len(layer.rows) >= 11
        for row in layer.rows:
            assert row.device_bytes == row.predicted.device_bytes, row.predicted.name
            assert row.host_bytes == row.predicted.host_bytes, row.predicted.name
    assert report.difference == 0
    assert sum(row.device_bytes + row.host_bytes for layer in report.layers for row in layer.rows) > 0


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("model", ["tiny", "k2"])
def test_k2s_policies_leave_a_tenth_on_the_device(model: str) -> None:
    def device_bytes(preset: str) -> int:
        report = memory_report(load_config([*MODELS[model], f"activations={preset}"]))
        return sum(row.device_bytes for layer in report.layers for row in layer.rows)

    assert 10 * device_bytes("k2") <= device_bytes("none")


def test_a_prediction_that_is_wrong_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The two columns come from different places: spoil one and the last line says so."""
    real = measuring.stored_bytes

    def spoiled(store):
        found = real(store)
        found[1]["query"] = (found[1]["query"][0] * 2, 0)
        return found

    monkeypatch.setattr(measuring, "stored_bytes", spoiled)
    assert main(["report", "memory", "activations=none"]) == 0
    assert "of any name: 1e+02 %" in capsys.readouterr().out


def test_the_tables_fit_100_columns_and_name_the_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "memory", "model=k2", "activations=k2", "train.dtype=bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "MoE layer, measured at 1/16 of the widths, predicted for the same" in printed
    assert "dense layer, measured" in printed
    assert "kv_latent_norm_output" in printed
    assert "fp8_offload" in printed
    assert "of any name: 0 %" in printed
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(("dense_layers", "absent", "present"), [(0, "dense layer", "MoE layer"), (6, "MoE layer", "dense layer")])  # fmt: skip
def test_a_kind_of_layer_that_is_not_there_has_no_table(
    dense_layers: int, absent: str, present: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["model.num_hidden_layers=6", f"model.first_k_dense_replace={dense_layers}"]
    assert main(["report", "memory", *words]) == 0
    printed = capsys.readouterr().out
    assert absent not in printed
    assert present in printed


def test_figures_are_written_for_scripts(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.json"
    assert main(["report", "memory", "activations=recompute_fp8", f"json={path}"]) == 0
    figures = json.loads(path.read_text())
    row = figures["layers"]["moe"]["swiglu_input"]
    assert row["measured_device_bytes"] == row["predicted_device_bytes"] > 0
    assert 0.25 < row["measured_device_bytes"] / row["computed_bytes"] < 0.3  # one byte and 1/32 for four
    assert str(path) in capsys.readouterr().out


@pytest.mark.parametrize(("words", "expected"), [
    (["activations.routing=recompute"], "activations.routing"),
    (["activations=k3"], "there is no configs/activations/k3.yaml"),
    (["model.hidden_sizes=3"], "did you mean model.hidden_size or"),
    (["nonsense"], "is not of the form key=value"),
    (["json=/nowhere/at/all.json"], "json=/nowhere/at/all.json: cannot be written"),
    (["model.n_routed_experts=4000000"], "model.n_routed_experts=4000000"),
])  # fmt: skip
def test_mistakes_exit_with_2(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "memory", *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_config_for_gpus_is_measured_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "memory", "train.device=cuda"]) == 0
    assert "Largest difference" in capsys.readouterr().out


def test_widths_are_divided_by_the_smallest_power_of_two_that_fits() -> None:
    model = load_config(["model=k2"]).model
    layers = sample_layers(model)
    assert layers == (0, 1)
    narrow, divisor = shrink(model, layers, "bfloat16", 2**30)
    assert divisor == 8
    assert layer_bytes(narrow, layers, "bfloat16") <= 2**30 < layer_bytes(divide_widths(model, 4), layers, "bfloat16")
    assert (narrow.hidden_size, narrow.num_attention_heads, narrow.q_lora_rank) == (896, 8, 192)
    assert (narrow.qk_head_dim, narrow.n_routed_experts, narrow.num_experts_per_tok) == (192, 384, 8)
    assert shrink(model, layers, "bfloat16", sys.maxsize) == (model, 1)
