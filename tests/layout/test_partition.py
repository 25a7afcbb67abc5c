"""Layers to virtual stages: every layer once, in order, and no cut is better where all cuts can be
tried."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2train.layout.partition import PipelineWeights, balance, piece_loads, stage_loads


def all_cuts(num_layers: int, num_pieces: int) -> Iterator[tuple[int, ...]]:
    """Every split of num_layers into num_pieces counts that leaves only the first and the last
    piece free to be empty."""
    for counts in itertools.product(range(num_layers + 1), repeat=num_pieces):
        if sum(counts) == num_layers and all(counts[1:-1]):
            yield counts


def slowest(weights: PipelineWeights, counts: Sequence[int], placement: Sequence[int]) -> float:
    return max(stage_loads(piece_loads(weights, counts), placement))


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("head", [0.0, 0.5, 1.0, 2.2, 5.0])
def test_equal_layers_are_cut_as_well_as_any_cut_can(pp: int, vpp: int, head: float) -> None:
    placement = tuple(range(pp)) * vpp
    for num_layers in range(max(1, pp * vpp - 2), 8):
        weights = PipelineWeights(0.1, (1.0,) * num_layers, head)
        best = min(slowest(weights, counts, placement) for counts in all_cuts(num_layers, pp * vpp))
        assert slowest(weights, balance(weights, placement), placement) == pytest.approx(best)


@given(
    st.lists(st.floats(0.5, 2.0), min_size=4, max_size=7),
    st.floats(0, 3),
    st.sampled_from([(2, 1), (3, 1), (2, 2)]),
)
@settings(max_examples=60, deadline=None)
def test_unequal_layers_end_within_the_dearest_layer_of_the_best_cut(
    layers: list[float], head: float, degrees: tuple[int, int]
) -> None:
    pp, vpp = degrees
    placement = tuple(range(pp)) * vpp
    weights = PipelineWeights(0.0, tuple(layers), head)
    best = min(slowest(weights, counts, placement) for counts in all_cuts(len(layers), pp * vpp))
    assert slowest(weights, balance(weights, placement), placement) <= best + max(layers)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 4), st.floats(0, 4))
@settings(deadline=None)
def test_every_layer_is_placed_once_and_only_ends_may_be_empty(
    num_layers: int, pp: int, vpp: int, head: float
) -> None:
    if pp * vpp > num_layers + 2:
        return
    weights = PipelineWeights(0.0, (1.0,) * num_layers, head)
    counts = balance(weights, tuple(range(pp)) * vpp)
    assert len(counts) == pp * vpp
    assert sum(counts) == num_layers
    assert min(counts) >= 0
    assert all(counts[1:-1])


def test_v_shaped_placement_balances_stages_not_positions() -> None:
    # Stage 0 has the first and the last virtual stage, so the head's weight takes layers from both.
    counts = balance(PipelineWeights(0.0, (1.0,) * 8, 2.0), (0, 1, 1, 0))
    loads = piece_loads(PipelineWeights(0.0, (1.0,) * 8, 2.0), counts)
    assert stage_loads(loads, (0, 1, 1, 0)) == [5.0, 5.0]
