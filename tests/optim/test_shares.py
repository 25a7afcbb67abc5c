"""Ownership on paper: everything owned once, matrices whole, every owner one stretch; up to K2's
own size."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from k2train.config.compose import load_config
from k2train.config.model import ModelConfig
from k2train.config.optim import OptimConfig
from k2train.layout.tensors import model_tensors
from k2train.model.model import build_model
from k2train.model.pieces import ModelPart, Piece
from k2train.optim.shares import BucketPlan, ownership_table, plan_buckets
from k2train.update_rules.chosen import all_rules, chosen_rules
from k2train.update_rules.rules.muon import newton_schulz_cost


def plan(
    model: ModelConfig, optim: OptimConfig, parts: list[ModelPart], dp: int, edp: int
) -> tuple[list[BucketPlan], list[Piece]]:
    """The buckets of a rank with these virtual stages; meta tensors have shapes and no memory."""
    pieces = [list(build_model(model, part, torch.bfloat16, "meta").pieces()) for part in parts]
    catalogue = {spec.name: spec for spec in model_tensors(model)}
    plans = plan_buckets(dict(enumerate(pieces)), catalogue, chosen_rules(optim), {"dp": dp, "edp": edp})
    return plans, [piece for of_stage in pieces for piece in of_stage]


def two_stages(model: ModelConfig) -> list[ModelPart]:
    experts = tuple(range(model.n_routed_experts))
    return [ModelPart((0,), True, False, experts), ModelPart((1, 2), False, True, experts)]


@pytest.mark.parametrize("name", [named.name for named in all_rules()])
@pytest.mark.parametrize(("dp", "edp"), [(1, 1), (2, 1), (2, 2), (6, 3), (7, 7), (40, 10)])
def test_every_row_has_one_owner_and_every_owner_one_stretch(
    model_config, optim_config, dp: int, edp: int, name
) -> None:
    optim = dataclasses.replace(optim_config, name=name)
    plans, pieces = plan(model_config, optim, two_stages(model_config), dp, edp)
    rows: dict[str, list[tuple[int, int]]] = {}
    for bucket in plans:
        end = 0
        for share in bucket.shares:
            assert share.offset == end
            end += share.num_elements
            rows.setdefault(share.name, []).append((share.start, share.stop))
            assert (share.start, share.stop) == (0, share.spec.shape[0]) or not share.rule.whole_matrices
        assert end == bucket.num_elements
        owners = [share.owner for share in bucket.shares]
        assert owners == sorted(owners)
        assert bucket.splits == tuple(
            sum(share.num_elements for share in bucket.owned(owner)) for owner in range(len(bucket.splits))
        )
        assert len(bucket.splits) == (dp if bucket.replication == "dp" else edp)
    trained = {piece.name: len(piece.tensor) for piece in pieces if piece.trained}
    assert {name: max(stop for _, stop in ranges) for name, ranges in rows.items()} == trained
    for name, ranges in rows.items():
        covered = [row for start, stop in sorted(ranges) for row in range(start, stop)]
        assert covered == list(range(trained[name]))


@pytest.mark.parametrize(("dp", "edp"), [(1, 1), (2, 2), (6, 3)])
def test_equal_shapes_of_an_owner_are_neighbours(model_config, optim_config, dp: int, edp: int) -> None:
    plans, _ = plan(model_config, optim_config, two_stages(model_config), dp, edp)
    for bucket in plans:
        for owner in range(len(bucket.splits)):
            shapes = [share.shape for share in bucket.owned(owner) if share.rule.name == "muon"]
            changes = sum(a != b for a, b in itertools.pairwise(shapes))
            assert changes == max(len(set(shapes)) - 1, 0)


@pytest.mark.parametrize("owners", [2, 3, 5])
def test_newton_schulz_is_balanced_over_all_virtual_stages_together(
    model_config, optim_config, owners: int
) -> None:
    plans, _ = plan(model_config, optim_config, two_stages(model_config), owners, owners)
    for replication in ("dp", "edp"):
        costs = [0] * owners
        largest = 0
        for bucket in plans:
            for share in bucket.shares:
                if bucket.replication == replication and share.rule.name == "muon":
                    cost = newton_schulz_cost(share.shape, 5)
                    costs[share.owner] += cost
                    largest = max(largest, cost)
        assert max(costs) - min(costs) <= largest


def test_the_table_has_a_row_for_each_tensor_with_all_its_owners(model_config, optim_config) -> None:
    plans, pieces = plan(model_config, optim_config, two_stages(model_config), 6, 3)
    rows = {row.name: row for row in ownership_table(plans)}
    assert set(rows) == {piece.name for piece in pieces if piece.trained}
    assert rows["lm_head.weight"].owners == (0, 1, 2, 3, 4, 5)
    assert all(len(row.owners) == 1 for row in rows.values() if row.rule.name == "muon")


@pytest.mark.parametrize("nodes", [32, 64, 256])
def test_k2s_states_shrink_with_the_cluster(nodes: int) -> None:
    """A stage of four MoE layers on 16 x 16: masters and momentum of 4 x 24 local experts over edp
    = nodes / 32 owners, of the dense matrices over 16 edp. At 32 nodes that is 33.8 GB of expert
    states a rank, at 256 it is an eighth.
    """
    config = load_config(["model=k2"])
    model = config.model
    edp = nodes // 32
    part = ModelPart((9, 10, 11, 12), False, False, tuple(range(24)))
    plans, _ = plan(model, config.optim, [part], 16 * edp, edp)
    experts = next(bucket for bucket in plans if bucket.replication == "edp")
    dense = next(bucket for bucket in plans if bucket.replication == "dp")
    assert set(experts.splits) == {4 * 24 * 3 * 7168 * 2048 // edp}
    largest = max(share.num_elements for share in dense.shares)
    assert max(dense.splits) <= max(dense.num_elements / (16 * edp) + largest, largest)
