"""Named pieces: what a part holds, parameter counts, and initial values."""

from __future__ import annotations

import itertools

import pytest
import torch

from k2train.architecture.embedding import EMBEDDING
from k2train.architecture.head import FINAL_NORM, HEAD
from k2train.config.compose import load_config
from k2train.layout.tensors import model_tensors
from k2train.model.model import build_model
from k2train.model.pieces import ModelPart, whole_model


@pytest.mark.parametrize(("name", "billions"), [("k2", 1026.41), ("deepseek_v3", 671.03)])
def test_the_published_models_have_their_parameter_counts_on_the_meta_device(
    name: str, billions: float
) -> None:
    config = load_config([f"model={name}"]).model
    model = build_model(config, whole_model(config), torch.bfloat16, "meta")
    trained = sum(piece.tensor.numel() for piece in model.pieces() if piece.trained)
    assert round(trained / 1e9, 2) == billions


def test_pieces_of_a_whole_model_are_the_catalogue_in_its_order(family) -> None:
    model = build_model(family, whole_model(family), device="meta")
    catalogue = list(model_tensors(family))
    pieces = list(model.pieces())
    assert [(p.name, tuple(p.tensor.shape), p.trained) for p in pieces] == [
        (spec.name, spec.shape, spec.trained) for spec in catalogue
    ]


def test_pieces_cover_every_element_of_every_parameter_once(family) -> None:
    model = build_model(family, whole_model(family), torch.float64)
    pieces = list(model.pieces())
    counts = {piece.parameter: torch.zeros(piece.parameter.shape) for piece in pieces}
    for piece in pieces:
        piece.view(counts[piece.parameter]).add_(1)
    assert all(bool((count == 1).all()) for count in counts.values())


def test_any_split_of_layers_and_experts_holds_exactly_its_tensors(family) -> None:
    layers, experts = range(family.num_hidden_layers), family.n_routed_experts
    cut, half = family.num_hidden_layers // 2, experts // 2
    names = []
    for (chosen, first, last), ids in itertools.product(
        [(layers[:cut], True, False), (layers[cut:], False, True)], [range(half), range(half, experts)]
    ):
        part = ModelPart(tuple(chosen), first, last, tuple(ids))
        held = {piece.name for piece in build_model(family, part, device="meta").pieces()}
        expected = set()
        for spec in model_tensors(family):
            ends = (first and spec.name == EMBEDDING) or (last and spec.name in (FINAL_NORM, HEAD))
            mine = spec.layer in chosen and (spec.expert is None or spec.expert in ids)
            if ends or (spec.layer is not None and mine):
                expected.add(spec.name)
        assert held == expected
        names.append(held)
    assert set.union(*names) == {spec.name for spec in model_tensors(family)}


def test_initial_values_depend_on_seed_and_name_alone(families) -> None:
    """A part with some layers and experts starts from the same tensors as the whole model, in every
    type."""
    config = families["odd"]
    whole = build_model(config, whole_model(config))
    whole.initialise(3)
    values = {piece.name: piece.tensor for piece in whole.pieces()}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        part = build_model(config, ModelPart((1, 2), False, True, (6, 2)), dtype)
        part.initialise(3)
        for piece in part.pieces():
            assert torch.equal(piece.tensor, values[piece.name].to(piece.tensor.dtype)), piece.name
    other = build_model(config, whole_model(config))
    other.initialise(4)
    differing = [p.name for p in other.pieces() if not torch.equal(p.tensor, values[p.name])]
    assert sorted(differing) == sorted(n for n, v in values.items() if v.dim() == 2)


def test_initial_values_have_the_asked_spread_and_no_two_tensors_are_equal(families) -> None:
    config = families["k2"]
    model = build_model(config, whole_model(config))
    model.initialise(0)
    matrices = [p.tensor for p in model.pieces() if p.tensor.dim() == 2]
    assert all(bool((p.tensor == 1).all()) for p in model.pieces() if p.trained and p.tensor.dim() == 1)
    assert all(bool((p.tensor == 0).all()) for p in model.pieces() if not p.trained)
    everything = torch.cat([m.flatten() for m in matrices])
    # 100 thousand draws: the deviation's own deviation is 0.2 percent.
    assert everything.std().item() == pytest.approx(config.initializer_range, rel=0.02)
    assert len({m.flatten()[:4].sum().item() for m in matrices}) == len(matrices)


def test_initial_values_do_not_depend_on_how_many_threads_draw_them(families) -> None:
    config, drawn, threads = families["k2"], [], torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            model = build_model(config, whole_model(config))
            model.initialise(0)
            drawn.append({piece.name: piece.tensor for piece in model.pieces()})
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
