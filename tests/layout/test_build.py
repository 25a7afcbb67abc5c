"""Layouts from configs: everything is placed exactly once, and what cannot be is refused with a way
out."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from k2train.architecture.head import head_flops
from k2train.architecture.layer import mixer_of
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.config.sections import LayoutConfig, TrainConfig
from k2train.layout.build import build_layout, num_microbatches
from k2train.layout.layout import Layout
from k2train.layout.ownership import assign_owners
from k2train.layout.tensors import model_tensors
from k2train.layout.weights import layer_flops
from k2train.update_rules.rules.muon import newton_schulz_cost

GRIDS = list(itertools.product(range(1, 5), range(1, 4), range(1, 5)))


@pytest.mark.parametrize(("pp", "edp", "ep"), GRIDS)
def test_every_layer_and_every_expert_is_placed_once(
    make_layout: Callable[..., Layout], pp: int, edp: int, ep: int
) -> None:
    for vpp in (1, 2, 3):
        layout = make_layout(pp=pp, edp=edp, ep=ep, vpp=vpp)
        assert (layout.pp, layout.edp, layout.ep, layout.vpp, layout.world) == (
            pp,
            edp,
            ep,
            vpp,
            pp * edp * ep,
        )
        assert [layer for piece in layout.virtual_stages for layer in piece.layers] == list(range(12))
        assert [piece.embedding for piece in layout.virtual_stages] == [True] + [False] * (pp * vpp - 1)
        assert [piece.head for piece in layout.virtual_stages] == [False] * (pp * vpp - 1) + [True]
        assert sorted(v for stage in range(pp) for v in layout.virtual_stages_of(stage)) == list(
            range(pp * vpp)
        )
        for layer, virtual_stage in enumerate(layout.virtual_stage_of_layer):
            assert layer in layout.virtual_stages[virtual_stage].layers
        experts = [expert for ep_rank in range(ep) for expert in layout.local_experts(ep_rank)]
        assert experts == list(range(24))
        assert all(expert in layout.local_experts(layout.ep_rank_of_expert(expert)) for expert in experts)


@pytest.mark.parametrize(("pp", "edp", "ep"), GRIDS)
def test_ownership_covers_each_matrix_of_a_stage_once_and_is_balanced(
    make_layout: Callable[..., Layout], model: ModelConfig, pp: int, edp: int, ep: int
) -> None:
    layout = make_layout(pp=pp, edp=edp, ep=ep)
    for stage in range(pp):
        layers = {layer for v in layout.virtual_stages_of(stage) for layer in layout.virtual_stages[v].layers}
        mine = [spec for spec in model_tensors(model) if spec.layer in layers and spec.role == "matrix"]
        for expert in (None, *layout.local_experts(0)):
            costs = [newton_schulz_cost(spec.shape, 5) for spec in mine if spec.expert == expert]
            num_owners = layout.replicas(expert is not None)
            owners = assign_owners(costs, num_owners)
            loads = [0] * num_owners
            for cost, owner in zip(costs, owners, strict=True):
                loads[owner] += cost
            assert sum(loads) == sum(costs)
            assert max(loads) * num_owners <= sum(costs) + (num_owners - 1) * max(costs, default=0)


@pytest.mark.parametrize(("pp", "edp", "ep"), GRIDS)
def test_nodes_partition_the_world(make_layout: Callable[..., Layout], pp: int, edp: int, ep: int) -> None:
    layout = make_layout(pp=pp, edp=edp, ep=ep)
    ranks = [rank for node in range(layout.num_nodes) for rank in layout.ranks_of_node(node)]
    assert ranks == list(range(layout.world))
    assert all(rank in layout.ranks_of_node(layout.node_of(rank)) for rank in ranks)


@pytest.mark.parametrize(("nodes", "edp"), [(32, 1), (64, 2), (512, 16)])
def test_k2_grows_with_nodes_in_edp_alone(nodes: int, edp: int) -> None:
    config = load_config(["model=k2", "layout=k2", f"layout.nodes={nodes}"])
    layout = build_layout(config.layout, config.cluster, config.model)
    assert (layout.pp, layout.ep, layout.edp, layout.world, layout.num_nodes) == (
        16,
        16,
        edp,
        nodes * 8,
        nodes,
    )
    assert layout.num_local_experts == 24


def test_k2_stages_weigh_the_same_but_for_the_lighter_last(model: ModelConfig) -> None:
    config = load_config(["model=k2", "layout=k2"])
    layout = build_layout(config.layout, config.cluster, config.model)
    sizes = [
        sum(layout.virtual_stages[v].num_layers for v in layout.virtual_stages_of(stage))
        for stage in range(16)
    ]
    assert sizes == [4] * 15 + [1]
    # Parameters alone give 2.35 (K2 report); with causal attention's quadratic term a layer weighs
    # 8 % more.
    ratio = head_flops(config.model) / layer_flops(config.model, "moe", 4096)
    assert ratio == pytest.approx(2.0 * 163840 * 7168 / (2 * 500.2e6 + 4097 * 64 * 320), rel=1e-3)


def test_nodes_that_do_not_hold_whole_model_parallel_groups_name_the_nearest() -> None:
    config = load_config(["model=k2", "layout=k2", "layout.nodes=40"])
    with pytest.raises(ConfigError) as caught:
        build_layout(config.layout, config.cluster, config.model)
    assert str(caught.value).splitlines() == [
        "layout.nodes=40: the 16 x 16 model-parallel group fills 32 nodes of 8 GPUs, so nodes must be a multiple of 32",
        "  remedy: nearest are 32 and 64",
    ]


@pytest.mark.parametrize(
    ("fields", "field", "part"),
    [
        ({"pp": 2, "ep": 4, "nodes": 2, "edp": 3}, "layout.edp", "layout.edp=2"),
        ({"pp": 3, "ep": 1, "nodes": 1}, "layout.nodes", "nearest is 3"),
        ({"pp": 15}, "layout.pp", "layout.pp=14"),
        ({"pp": 4, "vpp": 4}, "layout.vpp", "layout.vpp=3"),
        ({"pp": 10**18}, "layout.pp", "use at most"),
        ({"vpp": 10**18}, "layout.vpp", "use at most"),
        ({"edp": 10**18}, "layout.edp", "the most is"),
        ({"nodes": 10**18}, "layout.nodes", "the most is"),
        ({"ep": 5}, "layout.ep", "must divide"),
        ({"pp": 2, "layers_per_virtual_stage": (12,)}, "layout.layers_per_virtual_stage", "1 entries"),
        ({"pp": 2, "layers_per_virtual_stage": (13, -1)}, "layout.layers_per_virtual_stage", "negative"),
        (
            {"pp": 2, "layers_per_virtual_stage": (5, 6)},
            "layout.layers_per_virtual_stage",
            "places 11 layers",
        ),
        ({"ep": 12, "dispatch": "per_node"}, "layout.dispatch", "use layout.dispatch=per_rank"),
        (
            {"ep": 3, "dispatch": "per_node"},
            "layout.dispatch",
            "layout.ep=3 must divide cluster.gpus_per_node=8",
        ),
    ],
)
def test_impossible_layouts_are_refused_with_field_and_remedy(
    make_layout: Callable[..., Layout], fields: dict[str, Any], field: str, part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_layout(**fields)
    assert caught.value.field == field
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("ep", "dispatch", "relay_ranks", "relay_parts"),
    [
        (1, "per_node", None, 1),
        (12, "per_expert", None, 1),
        (12, "per_rank", 12, 1),
        (8, "per_node", 8, 1),
        (24, "per_node", 8, 4),
        (4, "per_node", 4, 1),
    ],
)
def test_tokens_are_passed_on_inside_nodes_and_in_parts_where_there_are_several(
    make_layout: Callable[..., Layout], ep: int, dispatch: str, relay_ranks: int | None, relay_parts: int
) -> None:
    layout = make_layout(ep=ep, dispatch=dispatch, dispatch_parts=4)
    assert (layout.relay_ranks, layout.relay_parts) == (relay_ranks, relay_parts)


@pytest.mark.parametrize("fields", [{"pp": 0}, {"ep": -1}, {"vpp": 0}, {"edp": 0}, {"nodes": -32}])
def test_zero_and_negative_degrees_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LayoutConfig(**fields)


def test_an_explicit_list_is_taken_as_it_is_zeros_included(make_layout: Callable[..., Layout]) -> None:
    layout = make_layout(pp=2, vpp=2, layers_per_virtual_stage=(3, 4, 5, 0))
    assert [piece.num_layers for piece in layout.virtual_stages] == [3, 4, 5, 0]
    assert layout.stage_of(2) == 0


@pytest.mark.parametrize(("pp", "edp", "ep"), [(1, 1, 1), (4, 2, 2), (2, 3, 1)])
def test_the_global_batch_is_fixed_in_tokens(
    make_layout: Callable[..., Layout], pp: int, edp: int, ep: int
) -> None:
    layout = make_layout(pp=pp, edp=edp, ep=ep)
    train = TrainConfig(seq_len=16, microbatch_size=2, global_batch_tokens=16 * 2 * 12)
    assert num_microbatches(train, layout) * 16 * 2 * layout.dp == train.global_batch_tokens


@pytest.mark.parametrize(("tokens", "near"), [(32 * 7, "192 and 256"), (32, "nearest is 64")])
def test_a_batch_that_does_not_divide_names_the_nearest(
    make_layout: Callable[..., Layout], tokens: int, near: str
) -> None:
    layout = make_layout(edp=2)
    with pytest.raises(ConfigError, match="must be a multiple of") as caught:
        num_microbatches(TrainConfig(seq_len=16, microbatch_size=2, global_batch_tokens=tokens), layout)
    assert near in str(caught.value)


def test_weights_of_a_layer_count_each_active_matrix_once(model: ModelConfig) -> None:
    flops = layer_flops(model, "moe", seq_len=1)
    active = dataclasses.replace(model, n_routed_experts=model.num_experts_per_tok)
    expected = sum(
        2 * spec.num_elements for spec in model_tensors(active) if spec.layer == 1 and spec.role == "matrix"
    )
    router = 2 * model.hidden_size * (model.n_routed_experts - model.num_experts_per_tok)
    heads = mixer_of(model).heads
    one_position = 2 * model.num_attention_heads * (heads.query + heads.value)
    assert flops == pytest.approx(expected + router + one_position)


@pytest.mark.parametrize(
    "name", ["single", "laptop", "one_node", "two_nodes", "four_nodes", "sixteen_nodes", "k2"]
)
def test_presets_fit_the_models_they_are_meant_for(name: str) -> None:
    for model in ("k2", "moonlight_16b_a3b"):
        config = load_config([f"model={model}", f"layout={name}"])
        if model == "moonlight_16b_a3b" and config.layout.pp * config.layout.vpp > 29:
            continue
        assert (
            build_layout(config.layout, config.cluster, config.model).world
            == config.layout.pp * config.layout.ep
        )
