"""From the config and a rank's tensors to its Optimizer.

What was asked for and would touch nothing is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

from k2train.architecture.tensors import TensorSpec
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.config.optim import OptimConfig
from k2train.device.protocol import Device
from k2train.layout.staging import CHUNK_ELEMENTS, slot_elements
from k2train.model.pieces import Piece
from k2train.optim.adam import build_rules, check_host_adam
from k2train.optim.buckets import Bucket
from k2train.optim.optimizer import Optimizer
from k2train.optim.qk_clip_step import QkClipper
from k2train.optim.residence import OnDevice, OnHost, Residence
from k2train.optim.shares import BucketPlan, Replication, plan_buckets
from k2train.optim.states import by_rule, matrix_batches
from k2train.parallel.communicator import Communicator
from k2train.parallel.groups import Groups
from k2train.update_rules.rule import Rules, numbers_kept


def build_optimizer(
    config: OptimConfig,
    model: ModelConfig,
    catalogue: Mapping[str, TensorSpec],
    pieces: Mapping[int, Sequence[Piece]],
    groups: Groups,
    device: Device,
) -> Optimizer:
    """The optimizer of one rank, its masters read from the parameters as they are now.

    catalogue: the model's tensors by name. pieces: by virtual stage, those that live on this rank,
    in the order of the model. device: of the parameters. Every rank that holds the same pieces
    computes the same ownership, without communication.
    Raises ConfigError where a rule for matrices or QK-Clip was asked for and finds nothing on this
    rank to act on, for an optim.name that is none, and for an optim.host_adam that cannot be.
    """
    check_host_adam(config, dtype_of(pieces.values()))
    rules = build_rules(config)
    owners: dict[Replication, int] = {"dp": groups.dp.size, "edp": groups.edp.size}
    plans = plan_buckets(pieces, catalogue, rules, owners)
    groups_of: dict[Replication, Communicator] = {"dp": groups.dp, "edp": groups.edp}
    buckets = [Bucket(plan, groups_of[plan.replication], device.torch_device) for plan in plans]
    tensors = [catalogue[piece.name] for of_stage in pieces.values() for piece in of_stage]
    qk_clip = QkClipper(model, tensors, config.tau, like=buckets[0].flat)
    check_touches(config, rules, plans, qk_clip)
    residence = build_residence(config.states, buckets, device)
    return Optimizer(buckets, groups.world, qk_clip, residence, device)


def dtype_of(pieces: Iterable[Iterable[Piece]]) -> torch.dtype:
    """The compute type of a rank's parameters. Raises ConfigError where none is trained."""
    for piece in itertools.chain.from_iterable(pieces):
        if piece.trained:
            return piece.parameter.dtype
    raise ConfigError(
        "layout",
        "a rank without parameters",
        "every rank must hold at least one trained tensor",
        "use fewer pipeline stages or virtual stages",
    )


def build_residence(
    states: Literal["device", "host"], buckets: Sequence[Bucket], device: Device
) -> Residence:
    """Where the states of these buckets live.

    Host states get slots for the largest batch of matrices with their states.
    """
    like = buckets[0].flat
    if states == "device":
        return OnDevice(like)
    parts = [part for bucket in buckets for part in by_rule(bucket.owned)]
    whole = [(rule, shares) for rule, shares in parts if rule.whole_matrices]
    kept = max((numbers_kept(rule) for rule, _ in whole), default=0)
    batches = [batch.num_elements for _, shares in whole for batch in matrix_batches(shares)]
    stretch = max(bucket.own_gradient.numel() for bucket in buckets)
    slots = slot_elements(stretch, max(batches, default=0), kept)
    rows = [sum(share.num_elements for share in shares) for rule, shares in parts if not rule.whole_matrices]
    return OnHost(device, like, slots, min(max(rows, default=0), CHUNK_ELEMENTS))


def check_touches(config: OptimConfig, rules: Rules, plans: Sequence[BucketPlan], qk_clip: QkClipper) -> None:
    """A feature asked for must find something to act on.

    A rule that needs whole matrices needs a matrix, QK-Clip all projections of every attention here
    that the mixer names. A pipeline stage that holds transformer layers always has both; one that
    holds only embedding or head has neither. Raises ConfigError.
    """
    layers = {share.spec.layer for plan in plans for share in plan.shares if share.spec.layer is not None}
    matrices = sum(share.rule.whole_matrices for plan in plans for share in plan.shares)
    if rules.matrices.whole_matrices and layers and not matrices:
        raise ConfigError(
            "optim.name",
            config.name,
            f"{rules.matrices.label} finds no matrix in layers {sorted(layers)}",
            "set optim.name=adamw",
        )
    if config.tau is not None and qk_clip.num_targets != qk_clip.targets_per_layer * len(layers):
        raise ConfigError(
            "optim.qk_clip_tau",
            config.qk_clip_tau,
            f"QK-Clip finds {qk_clip.num_targets} query and key projections in {len(layers)} layers, "
            f"not {qk_clip.targets_per_layer} in each",
            "set optim.qk_clip_tau=null",
        )
