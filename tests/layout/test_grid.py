"""The rank grid over every size up to 4 x 3 x 4: groups partition the world, neighbours agree."""

import itertools

import pytest

from k2train.layout.grid import AXES, Axis, RankGrid

GRIDS = [RankGrid(*degrees) for degrees in itertools.product(range(1, 5), range(1, 4), range(1, 5))]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_groups_partition_the_world(grid: RankGrid) -> None:
    sizes = {"pp": grid.pp, "ep": grid.ep, "edp": grid.edp, "dp": grid.edp * grid.ep}
    for axis in AXES:
        groups = grid.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world))
        assert {len(group) for group in groups} == {sizes[axis]}
        for group in groups:
            assert all(grid.group(axis, rank) == group for rank in group)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rank_and_coordinates_are_inverse_and_follow_the_formula(grid: RankGrid) -> None:
    for rank in range(grid.world):
        pp_rank, edp_rank, ep_rank = grid.coordinates(rank)
        assert (
            rank
            == (pp_rank * grid.edp + edp_rank) * grid.ep + ep_rank
            == grid.rank_of(pp_rank, edp_rank, ep_rank)
        )
        assert grid.dp_rank(rank) == edp_rank * grid.ep + ep_rank


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_neighbours_are_consistent_and_stay_in_the_pipeline(grid: RankGrid) -> None:
    for rank in range(grid.world):
        following = grid.next_stage(rank)
        assert grid.previous_stage(following) == rank
        assert following in grid.group("pp", rank)
        here, there = grid.coordinates(rank), grid.coordinates(following)
        assert there == ((here.pp_rank + 1) % grid.pp, here.edp_rank, here.ep_rank)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_two_groups_of_crossing_axes_meet_in_one_rank(grid: RankGrid) -> None:
    for rank in range(grid.world):
        axes: tuple[Axis, ...] = ("pp", "ep", "edp")
        for one, other in itertools.combinations(axes, 2):
            assert set(grid.group(one, rank)) & set(grid.group(other, rank)) == {rank}
        assert set(grid.group("dp", rank)) == {
            peer for replica in grid.group("edp", rank) for peer in grid.group("ep", replica)
        }


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_relay_groups_cut_every_expert_group_into_neighbours_and_cross_them_once(grid: RankGrid) -> None:
    for size in (size for size in range(1, grid.ep + 1) if grid.ep % size == 0):
        for rank in range(grid.world):
            neighbours, places = grid.relay_groups(rank, size)
            assert neighbours == tuple(range(neighbours[0], neighbours[0] + size))
            assert len(places) == grid.ep // size
            assert set(neighbours) | set(places) <= set(grid.group("ep", rank))
            assert set(neighbours) & set(places) == {rank}
            assert all(grid.relay_groups(peer, size)[0] == neighbours for peer in neighbours)
            assert all(grid.relay_groups(peer, size)[1] == places for peer in places)


def test_ranks_outside_the_world_are_refused() -> None:
    grid = RankGrid(2, 1, 2)
    for rank in (-1, 4):
        with pytest.raises(IndexError):
            grid.coordinates(rank)
    with pytest.raises(IndexError):
        grid.rank_of(2, 0, 0)


def test_k2_expert_groups_fill_two_neighbouring_nodes() -> None:
    grid = RankGrid(16, 2, 16)
    assert grid.world == 512
    for group in grid.groups("ep"):
        assert group == tuple(range(group[0], group[0] + 16))
        assert group[0] % 16 == 0
