"""From config to layout, and every check that needs more than one section of the config."""

from __future__ import annotations

import math
from collections.abc import Sequence

from k2train.architecture.routing_tables import DEEPEP_NODE
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.config.schema import batch_error, check_experts_fit
from k2train.config.sections import ClusterConfig, LayoutConfig, TrainConfig
from k2train.layout.grid import RankGrid
from k2train.layout.layout import Layout, VirtualStage
from k2train.layout.partition import PipelineWeights, balance
from k2train.layout.placement import looped
from k2train.layout.weights import piece_weights

MAX_WORLD = 10**7
"""More devices than this is a typing error; it keeps tables of ranks within memory."""
MAX_LAYERS = 10**4
MAX_EXPERTS = 10**5
"""The same for layers, and for routed experts of a layer."""

# deep_ep.Buffer.get_dispatch_config (github.com/deepseek-ai/DeepEP).
DEEPEP_SIZES = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)


def build_layout(
    layout: LayoutConfig,
    cluster: ClusterConfig,
    model: ModelConfig,
    seq_len: int = 4096,
    placement: Sequence[int] | None = None,
) -> Layout:
    """Resolve degrees, cut the model, place the experts.

    seq_len: tokens in a sequence, for the weight of attention against the rest. placement: the
    stage of every virtual stage, as the schedule has it; None means round the stages (`looped`).
    Raises ConfigError for a layout that cannot be.
    """
    _check_size("model.num_hidden_layers", model.num_hidden_layers, MAX_LAYERS)
    _check_size("model.n_routed_experts", model.n_routed_experts, MAX_EXPERTS)
    check_pieces(layout, model, layout.pp * layout.vpp if placement is None else len(placement))
    stages = looped(layout.pp, layout.vpp) if placement is None else tuple(placement)
    check_experts_fit(model, layout.ep)
    _check_dispatch(layout, cluster.gpus_per_node)
    grid = RankGrid(layout.pp, resolve_edp(layout, cluster.gpus_per_node), layout.ep)
    counts = layout.layers_per_virtual_stage
    if counts is None:
        counts = balance(PipelineWeights(*piece_weights(model, seq_len)), stages)
    return Layout(
        grid,
        cluster.gpus_per_node,
        _pieces(counts),
        stages,
        model.n_routed_experts,
        layout.dispatch,
        layout.dispatch_parts,
    )


def resolve_edp(layout: LayoutConfig, gpus_per_node: int) -> int:
    """Replicas of the model-parallel group, from `layout.nodes`, `layout.edp` or neither (1)."""
    group = layout.pp * layout.ep
    if layout.nodes is None:
        edp = layout.edp or 1
    else:
        edp = _edp_from_nodes(layout, gpus_per_node)
        if layout.edp not in (None, edp):
            raise ConfigError(
                "layout.edp",
                layout.edp,
                f"layout.nodes={layout.nodes} with {gpus_per_node} GPUs each holds "
                f"{edp} model-parallel groups of {group}",
                f"leave layout.edp out, or set layout.edp={edp}",
            )
    if group * edp > MAX_WORLD:
        field, value = ("layout.nodes", layout.nodes) if layout.nodes else ("layout.edp", edp)
        raise ConfigError(field, value, f"makes a world of {group * edp} ranks, the most is {MAX_WORLD}")
    return edp


def _edp_from_nodes(layout: LayoutConfig, gpus_per_node: int) -> int:
    assert layout.nodes is not None
    group = layout.pp * layout.ep
    unit = math.lcm(group, gpus_per_node) // gpus_per_node
    if layout.nodes % unit:
        fills = f"{layout.pp} x {layout.ep} model-parallel group fills {unit} nodes of {gpus_per_node} GPUs"
        if group % gpus_per_node:
            fills = f"{layout.pp} x {layout.ep} model-parallel group fills whole nodes of {gpus_per_node} GPUs only by {unit}"
        below = layout.nodes // unit * unit
        near = f"nearest are {below} and {below + unit}" if below else f"nearest is {unit}"
        shorter = layout.pp * layout.nodes // unit
        if not below and shorter * unit == layout.pp * layout.nodes:
            near += f"; or give {layout.nodes} nodes a shorter pipeline, layout.pp={shorter}"
        rule = f"the {fills}, so nodes must be a multiple of {unit}"
        raise ConfigError("layout.nodes", layout.nodes, rule, near)
    return layout.nodes * gpus_per_node // group


def _check_dispatch(layout: LayoutConfig, gpus_per_node: int) -> None:
    """Passing tokens on inside a node needs groups that lie on whole nodes alike."""
    if layout.dispatch == "deepep" and layout.ep > 1:
        _check_deepep(layout.ep, gpus_per_node)
    if layout.dispatch == "per_node" and layout.ep % gpus_per_node and gpus_per_node % layout.ep:
        raise ConfigError(
            "layout.dispatch",
            "per_node",
            f"layout.ep={layout.ep} must divide cluster.gpus_per_node={gpus_per_node} or be a multiple of it, "
            "so that every group has as many ranks on each of its nodes",
            "use layout.dispatch=per_rank",
        )


def _check_deepep(ep: int, gpus_per_node: int) -> None:
    """DeepEP has settings for some sizes, and its nodes have 8 ranks."""
    if ep not in DEEPEP_SIZES:
        sizes = ", ".join(map(str, DEEPEP_SIZES))
        raise ConfigError(
            "layout.dispatch",
            "deepep",
            f"has no settings for layout.ep={ep}, only for {sizes}",
            "use layout.dispatch=per_node or per_rank",
        )
    if gpus_per_node % min(ep, DEEPEP_NODE) or (ep > DEEPEP_NODE and gpus_per_node != DEEPEP_NODE):
        raise ConfigError(
            "layout.dispatch",
            "deepep",
            f"takes {DEEPEP_NODE} ranks for a node, and layout.ep={ep} does not lie so on nodes of "
            f"cluster.gpus_per_node={gpus_per_node}",
            "use layout.dispatch=per_node or per_rank",
        )


def _check_size(field: str, value: int, most: int) -> None:
    if value > most:
        raise ConfigError(field, value, f"is more than the {most} that a layout is made for")


def check_pieces(layout: LayoutConfig, model: ModelConfig, num_pieces: int) -> None:
    """An explicit list must place every layer once; a balanced cut leaves no virtual stage empty.

    num_pieces: pp * vpp, or as many as the schedule makes where it fixes them itself. Raises
    ConfigError.
    """
    is_fixed = num_pieces != layout.pp * layout.vpp
    if layout.layers_per_virtual_stage is not None:
        made_by = "the schedule" if is_fixed else "pp * vpp"
        _check_explicit(layout.layers_per_virtual_stage, model.num_hidden_layers, num_pieces, made_by)
        return
    items = model.num_hidden_layers + 2
    if num_pieces <= items:
        return
    field, value = "layout.vpp", layout.vpp
    remedy = (
        f"use at most layout.vpp={items // layout.pp}, or give layout.layers_per_virtual_stage with zeros"
    )
    if is_fixed or layout.pp > items:
        field, value = "layout.pp", layout.pp
        remedy = f"use at most layout.pp={items * layout.pp // num_pieces if is_fixed else items}"
    raise ConfigError(
        field,
        value,
        f"makes {num_pieces} virtual stages, but {model.num_hidden_layers} layers, embedding and "
        f"head fill only {items}",
        remedy,
    )


def _check_explicit(counts: Sequence[int], num_layers: int, num_pieces: int, made_by: str) -> None:
    field, shown = "layout.layers_per_virtual_stage", list(counts)
    if len(counts) != num_pieces:
        raise ConfigError(
            field,
            shown,
            f"has {len(counts)} entries, but {made_by} makes {num_pieces} virtual stages",
            "give one number for each virtual stage, or null to balance them",
        )
    if min(counts) < 0:
        raise ConfigError(field, shown, "a number of layers cannot be negative")
    if sum(counts) != num_layers:
        raise ConfigError(
            field,
            shown,
            f"places {sum(counts)} layers, but model.num_hidden_layers={num_layers}",
            "every layer must be on exactly one virtual stage",
        )


def _pieces(counts: Sequence[int]) -> tuple[VirtualStage, ...]:
    pieces = []
    first = 0
    for index, count in enumerate(counts):
        pieces.append(VirtualStage(first, first + count, index == 0, index == len(counts) - 1))
        first += count
    return tuple(pieces)


def num_microbatches(train: TrainConfig, layout: Layout) -> int:
    """Microbatches each pipeline runs in a step: the global batch over data-parallel ranks and
    microbatch tokens.

    Raises ConfigError where that is not a whole number.
    """
    tokens = train.seq_len * train.microbatch_size * layout.dp
    whole, rest = divmod(train.global_batch_tokens, tokens)
    if rest or not whole:
        raise batch_error(train, layout.dp)
    return whole
