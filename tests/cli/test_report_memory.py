"""`k2train report memory`: predicted and measured bytes agree for every name, and K2's policies
leave next to nothing."""

from __future__ import annotations

import pytest

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.device.cpu import CpuDevice
from k2train.trainer.memory_report import MemoryReport, measure_memory

CPU = CpuDevice()
PRESETS = ["none", "recompute", "recompute_fp8", "recompute_offload", "offload", "k2"]
MODELS = {
    "k2": ["model=k2", "train.dtype=bfloat16"],
    "moonlight": ["model=moonlight_16b_a3b", "train.dtype=bfloat16"],
    "tiny": ["model=k2_tiny", "train.balance_loss_alpha=0"],
}


def report(model: str, preset: str) -> MemoryReport:
    return measure_memory(load_config([*MODELS[model], f"activations={preset}"]), CPU)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", sorted(MODELS))
def test_predicted_is_measured_for_every_name(model: str, preset: str) -> None:
    found = report(model, preset)
    assert set(found.layers) == {"dense layer", "MoE layer"}
    assert found.largest_difference == 0
    experts = load_config(MODELS[model]).model.n_routed_experts
    assert 0 <= found.other_bytes <= 2 * 8 * experts
    kept = sum(row.measured_device + row.measured_host for row in found.layers["MoE layer"])
    assert kept > 0


def test_each_step_of_k2s_plan_leaves_less_on_the_device_and_the_last_a_tenth_at_most() -> None:
    rows = [
        report("k2", preset).layers["MoE layer"] for preset in ("none", "recompute", "recompute_fp8", "k2")
    ]
    device = [sum(row.measured_device for row in of_preset) for of_preset in rows]
    assert device == sorted(device, reverse=True)
    assert len(set(device)) == 4
    assert device[-1] <= device[0] / 10


def test_k2_is_measured_at_a_fraction_of_its_widths_and_a_small_model_whole() -> None:
    assert report("k2", "none").divisor == 16
    assert report("tiny", "none").divisor == 1


def test_the_command_prints_both_layers_and_says_how_far_off_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["report", "memory", "activations=k2"]) == 0
    said = capsys.readouterr().out
    assert "MoE layer" in said
    assert "dense layer" in said
    assert "expert_input" in said
    assert "0.00 %" in said


def test_policies_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "memory", "activations.routing=recompute"]) == 2
    assert "activations.routing=recompute" in capsys.readouterr().err


def test_a_config_made_for_gpus_can_be_looked_at_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "memory", "experiment=k2"]) == 0
    assert "1/16 of the widths" in capsys.readouterr().out
