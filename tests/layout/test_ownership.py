"""Ownership covers everything exactly once, is balanced within the greedy rule's bound, and never
depends on chance."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2train.config.errors import ConfigError
from k2train.layout.ownership import assign_owners, row_ranges
from k2train.update_rules.rules.muon import newton_schulz_cost


@given(st.lists(st.integers(0, 10**12), max_size=60), st.integers(1, 40))
def test_every_matrix_has_one_owner_and_no_owner_exceeds_the_greedy_bound(
    costs: list[int], num_owners: int
) -> None:
    owners = assign_owners(costs, num_owners)
    assert len(owners) == len(costs)
    assert set(owners) <= set(range(num_owners))
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        for rank in range(num_owners)
    ]
    # Graham: the last item of the fullest owner was placed on the least loaded one, at or below the
    # mean of the others.
    assert max(loads) * num_owners <= sum(costs) + (num_owners - 1) * max(costs, default=0)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 12))
def test_greedy_is_within_four_thirds_of_the_lower_bound_of_any_assignment(
    costs: list[int], num_owners: int
) -> None:
    """LPT is at most 4/3 - 1/(3m) of the optimum, and the optimum is at least each of these three
    figures."""
    loads = [0] * num_owners
    for cost, owner in zip(costs, assign_owners(costs, num_owners), strict=True):
        loads[owner] += cost
    if len(costs) <= 6 and num_owners <= 3:
        best = min(
            max(sum(c for c, o in zip(costs, choice, strict=True) if o == rank) for rank in range(num_owners))
            for choice in itertools.product(range(num_owners), repeat=len(costs))
        )
        assert 3 * num_owners * max(loads) <= (4 * num_owners - 1) * best


@given(st.integers(1, 60), st.integers(1, 20))
def test_equal_matrices_are_dealt_out_evenly_in_number(num_matrices: int, num_owners: int) -> None:
    owners = assign_owners([7] * num_matrices, num_owners)
    counts = [owners.count(rank) for rank in range(num_owners)]
    assert max(counts) - min(counts) <= 1


def test_matrices_without_cost_are_spread_too() -> None:
    assert sorted(assign_owners([0, 0, 0, 0], 4)) == [0, 1, 2, 3]


def test_ownership_is_the_same_on_every_rank() -> None:
    costs = [3.0, 1.0, 3.0, 2.0, 2.0, 1.0]
    assert assign_owners(costs, 3) == assign_owners(tuple(costs), 3) == (0, 0, 1, 2, 2, 1)


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_row_ranges_are_contiguous_cover_all_rows_and_differ_by_at_most_one(
    num_rows: int, num_owners: int
) -> None:
    ranges = row_ranges(num_rows, num_owners)
    assert len(ranges) == num_owners
    assert [row for start, end in ranges for row in range(start, end)] == list(range(num_rows))
    sizes = [end - start for start, end in ranges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_newton_schulz_cost_counts_the_products_of_the_wide_form(shape: tuple[int, ...]) -> None:
    n, m = min(shape), max(shape)
    products = [(n, m, n), (n, n, n), (n, n, m)]
    assert newton_schulz_cost(shape, 5) == 5 * sum(2 * a * b * c for a, b, c in products)


@pytest.mark.parametrize(
    "call",
    [
        lambda: assign_owners([1], 0),
        lambda: assign_owners([-1], 2),
        lambda: row_ranges(4, 0),
        lambda: row_ranges(-1, 2),
        lambda: newton_schulz_cost((4,), 5),
    ],
)
def test_impossible_requests_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        call()
