"""Parameter counts against published figures and against the catalogue tensor by tensor."""

import pytest

from k2train.config.compose import load_config
from k2train.estimate.parameters import model_parameters
from k2train.layout.tensors import model_tensors


@pytest.mark.parametrize(
    ("name", "total", "activated"),
    [
        # docs/k2.md: computed from the released configs, both embeddings counted.
        ("k2", 1026.4e9, 32.9e9),
        ("deepseek_v3", 671.0e9, 37.6e9),
    ],
)
def test_counts_equal_the_published_ones(name: str, total: float, activated: float) -> None:
    parameters = model_parameters(load_config([f"model={name}"]).model)
    assert parameters.total == pytest.approx(total, abs=0.05e9)
    assert parameters.activated == pytest.approx(activated, abs=0.05e9)


def test_moonlight_is_about_16_and_3_billion() -> None:
    parameters = model_parameters(load_config(["model=moonlight_16b_a3b"]).model)
    assert round(parameters.total / 1e9) == 16
    assert round(parameters.activated / 1e9) == 3


@pytest.mark.parametrize("name", ["k2_tiny", "moonlight_16b_a3b"])
def test_total_is_the_sum_of_the_trained_tensors(name: str) -> None:
    model = load_config([f"model={name}"]).model
    assert model_parameters(model).total == sum(
        spec.num_elements for spec in model_tensors(model) if spec.trained
    )


@pytest.mark.parametrize(("pp", "ep"), [(1, 1), (2, 2), (3, 4), (4, 3)])
def test_ranks_of_a_pipeline_hold_every_parameter_once_apart_from_replicas(
    model, make_layout, pp: int, ep: int
) -> None:
    parameters = model_parameters(model)
    layout = make_layout(pp=pp, ep=ep)
    held = sum(ep * parameters.of(piece, ep) for piece in layout.virtual_stages)
    dense = parameters.total - sum(layer.per_expert * layer.num_experts for layer in parameters.layers)
    assert held == parameters.total + (ep - 1) * dense


def test_bf16_parameters_and_fp32_gradients_of_k2_are_6_16_terabytes() -> None:
    parameters = model_parameters(load_config(["model=k2"]).model)
    assert parameters.total * 6 == pytest.approx(6.16e12, abs=0.005e12)
    assert parameters.total * 6 / 256 == pytest.approx(24e9, abs=0.1e9)


def test_sparsity_changes_the_total_and_leaves_the_active_experts() -> None:
    few, many = (
        model_parameters(load_config(["model=k2", f"model.n_routed_experts={n}"]).model) for n in (64, 384)
    )
    router = (384 - 64) * 7168 * 60
    assert many.activated - few.activated == router
    assert many.total - few.total == router + (384 - 64) * 3 * 2048 * 7168 * 60
