"""ZeRO-1 over any (edp, ep) is the one-rank optimizer: the same weights, each update made once,
states shared out.

Everything in float64, with gradient clipping and QK-Clip active. Replicas and microbatches add
their parts of one total gradient in different orders, so the sums differ in the last bit;
Newton-Schulz amplifies that at most 3.4445^5 = 485 times: 1e-13. Weights must agree within 1e-12 of
their tensor's largest.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from k2train.layout.grid import RankGrid
from k2train.optim.optimizer import Riders
from k2train.parallel.testing import run_distributed_test
from k2train.update_rules.chosen import all_rules

GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (3, 2), (1, 6)]
STEPS = 3
TAU = 100.0


def logits(rank: int, layer: int, step: int, ranks: int) -> torch.Tensor:
    """Max logits whose maximum over ranks does not depend on how many there are: one head of three
    is over tau."""
    whole = torch.tensor([20.0 + layer, 150.0 + 30 * layer + step, -3.0], dtype=torch.float64)
    return whole if (layer + step) % ranks == rank else whole - 90


def train(rank) -> tuple[list, dict]:
    results = []
    for step in range(STEPS):
        rank.feed(step)
        max_logits = {layer: logits(rank.world.rank, layer, step, rank.world.size) for layer in range(3)}
        results.append(rank.optimizer.step(0.01, max_logits, clip_norm=30.0))
    return results, rank.weights()


@pytest.fixture(scope="module")
def reference() -> dict:
    return {}


@pytest.mark.parametrize(("edp", "ep"), GRIDS)
@pytest.mark.parametrize("name", [named.name for named in all_rules()])
def test_every_weight_equals_the_one_rank_run(make_rank, optim_config, reference, name, edp, ep) -> None:
    optim = dataclasses.replace(optim_config, name=name)
    if name not in reference:
        reference[name] = run_distributed_test(
            lambda world: train(make_rank(world, RankGrid(1, 1, 1), optim)), 1, "threads"
        )[0]
    results, weights = reference[name]
    grid = RankGrid(1, edp, ep)
    ranks = run_distributed_test(lambda world: train(make_rank(world, grid, optim)), grid.world, "threads")
    seen = set()
    for got_results, got_weights in ranks:
        for got, expected in zip(got_results, results, strict=True):
            assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)
            assert got.clip_scale == pytest.approx(expected.clip_scale, rel=1e-12)
            assert expected.clip_scale < 1
            assert (got.clipped_heads, got.max_logit) == (expected.clipped_heads, expected.max_logit)
            assert got.clipped_heads == (3 if name == "muonclip" else 0)
        for tensor, got in got_weights.items():
            largest = weights[tensor].abs().max()
            assert (got - weights[tensor]).abs().max() <= 1e-12 * largest, tensor
        seen.update(got_weights)
    assert seen == set(weights)


def test_gloo_processes_agree_with_threads(make_rank, optim_config) -> None:
    grid = RankGrid(1, 2, 2)
    runs = [
        run_distributed_test(lambda world: train(make_rank(world, grid, optim_config)), 4, backend)
        for backend in ("threads", "processes")
    ]
    for (_, threads), (_, processes) in zip(*runs, strict=True):
        for tensor, expected in threads.items():
            torch.testing.assert_close(processes[tensor], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("edp", "ep"), [(1, 1), *GRIDS])
def test_newton_schulz_runs_once_for_each_matrix_of_the_world(make_rank, edp, ep) -> None:
    grid = RankGrid(1, edp, ep)

    def run(world) -> tuple[int, dict[str, int]]:
        rank = make_rank(world, grid)
        matrices = {spec.name for spec in rank.catalogue.values() if spec.role == "matrix"}
        rank.feed(0)
        result = rank.optimizer.step(0.01, {layer: torch.zeros(3) for layer in range(3)})
        momenta = [state.name for state in rank.optimizer.state() if state.name.startswith("momentum/")]
        return result.num_orthogonalised, len(matrices), momenta

    ranks = run_distributed_test(run, grid.world, "threads")
    owned = [name for _, _, momenta in ranks for name in momenta]
    assert len(owned) == len(set(owned)) == ranks[0][1] == sum(count for count, _, _ in ranks)


@pytest.mark.parametrize(("edp", "ep"), [(1, 1), *GRIDS])
def test_state_bytes_fall_with_the_replicas(make_rank, edp, ep) -> None:
    """Over the world every state is kept once; on a rank a matrix more or less is all the imbalance
    there is."""
    grid = RankGrid(1, edp, ep)

    def run(world) -> tuple[int, int]:
        rank = make_rank(world, grid)
        dense = expert = 0
        for state in rank.optimizer.state():
            if "/" in state.name:
                spec = rank.catalogue[state.name.split("/", 1)[1]]
                if spec.expert is None:
                    dense += state.tensor.nbytes
                else:
                    expert += state.tensor.nbytes
        assert dense + expert == rank.optimizer.state_bytes
        return dense, expert

    ranks = run_distributed_test(run, grid.world, "threads")
    (one_dense, one_expert) = run_distributed_test(lambda world: run_one(make_rank, world), 1, "threads")[0]
    assert sum(dense for dense, _ in ranks) == one_dense
    assert sum(expert for _, expert in ranks) == one_expert
    largest_matrix = 2 * 8 * 28 * 20
    assert max(dense for dense, _ in ranks) <= one_dense / (edp * ep) + 2 * largest_matrix
    assert max(expert for _, expert in ranks) == one_expert // (edp * ep)


def run_one(make_rank, world) -> tuple[int, int]:
    rank = make_rank(world, RankGrid(1, 1, 1))
    totals = [0, 0]
    for state in rank.optimizer.state():
        if "/" in state.name:
            totals[rank.catalogue[state.name.split("/", 1)[1]].expert is not None] += state.tensor.nbytes
    return totals[0], totals[1]


def test_states_written_under_one_layout_load_under_another(make_rank) -> None:
    """Three steps on (2, 2), then three on (3, 1), against six on one rank."""

    def first(world) -> list:
        rank = make_rank(world, RankGrid(1, 2, 2))
        for step in range(3):
            rank.feed(step)
            rank.optimizer.step(0.01, {layer: torch.full((3,), 120.0) for layer in range(3)}, clip_norm=30.0)
        return [(s.name, s.tensor.clone(), s.start, s.shape) for s in rank.optimizer.state()]

    stored: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}
    for name, tensor, start, shape in (
        s for states in run_distributed_test(first, 4, "threads") for s in states
    ):
        whole = stored.setdefault(
            name,
            torch.full(shape, torch.nan, dtype=tensor.dtype)
            if tensor.is_floating_point()
            else torch.zeros(shape, dtype=tensor.dtype),
        )
        whole[start : start + len(tensor)] = tensor
        rows[name] = rows.get(name, 0) + len(tensor)
    assert all(rows[name] == len(whole) for name, whole in stored.items()), "every row comes exactly once"

    def second(world, grid: RankGrid, steps: range, load: bool) -> dict[str, torch.Tensor]:
        rank = make_rank(world, grid)
        if load:
            rank.optimizer.load(lambda name, start, stop: stored[name][start:stop])
        for step in steps:
            rank.feed(step)
            rank.optimizer.step(0.01, {layer: torch.full((3,), 120.0) for layer in range(3)}, clip_norm=30.0)
        return rank.weights()

    resumed = run_distributed_test(lambda w: second(w, RankGrid(1, 3, 1), range(3, 6), True), 3, "threads")[2]
    straight = run_distributed_test(lambda w: second(w, RankGrid(1, 1, 1), range(6), False), 1, "threads")[0]
    for name, expected in straight.items():
        assert (resumed[name] - expected).abs().max() <= 1e-12 * expected.abs().max(), name


def test_two_runs_of_one_layout_are_bit_equal(make_rank) -> None:
    runs = [
        run_distributed_test(lambda w: train(make_rank(w, RankGrid(1, 2, 3))), 6, "threads") for _ in range(2)
    ]
    for (_, first), (_, second) in zip(*runs, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_early_reduction_and_late_gather_change_nothing(make_rank) -> None:
    def run(world, overlapped: bool) -> dict[str, torch.Tensor]:
        rank = make_rank(world, RankGrid(1, 2, 2))
        for step in range(2):
            rank.optimizer.finish_gather(0)
            rank.feed(step)
            if overlapped:
                rank.optimizer.start_reduce(0)
            rank.optimizer.step(0.01, {layer: torch.zeros(3) for layer in range(3)}, finish=not overlapped)
        rank.optimizer.finish_gather()
        return rank.weights()

    plain, overlapped = (run_distributed_test(lambda w, o=o: run(w, o), 4, "threads") for o in (False, True))
    for a, b in zip(plain, overlapped, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_riders_come_back_as_the_worlds_sums_and_maxima(make_rank, optim_config) -> None:
    def ride(world) -> tuple[list[float], list[float], bool]:
        rank = make_rank(world, RankGrid(1, 2, 2), optim_config)
        rank.feed(0)
        riders = Riders(
            sums=torch.tensor([1.0, 2.0**world.rank], dtype=torch.float64),
            maxima=torch.tensor([float(world.rank), -float(world.rank), 7.0], dtype=torch.float64),
        )
        max_logits = {layer: torch.zeros(3) for layer in range(3)}
        result = rank.optimizer.step(0.01, max_logits, riders=riders)
        return riders.sums.tolist(), riders.maxima.tolist(), result.finite

    assert run_distributed_test(ride, 4, "threads") == [([4.0, 15.0], [3.0, 0.0, 7.0], True)] * 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_ranks_sum_that_is_not_finite_stops_every_ranks_update(make_rank, optim_config, value) -> None:
    def ride(world) -> tuple[bool, bool]:
        rank = make_rank(world, RankGrid(1, 2, 1), optim_config)
        before = rank.weights()
        rank.feed(0)
        sums = torch.tensor([value if world.rank else 1.0], dtype=torch.float64)
        max_logits = {layer: torch.zeros(3) for layer in range(3)}
        result = rank.optimizer.step(0.01, max_logits, riders=Riders(sums, sums.new_zeros(0)))
        return result.finite, all(torch.equal(before[name], t) for name, t in rank.weights().items())

    assert run_distributed_test(ride, 2, "threads") == [(False, True)] * 2
