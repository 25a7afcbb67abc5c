"""From the config and a rank's tensors to its Optimizer; refuses what was asked for and would touch nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from k2train.architecture.tensors import TensorSpec
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.config.optim import OptimConfig
from k2train.device.protocol import Device
from k2train.layout.staging import CHUNK_ELEMENTS, slot_elements
from k2train.model.pieces import Piece
from k2train.ops.dtypes import DTYPES
from k2train.optim.adam import build_adamw, check_host_adam
from k2train.optim.buckets import Bucket
from k2train.optim.muon import MuonRule
from k2train.optim.optimizer import Optimizer
from k2train.optim.qk_clip_step import QkClipper
from k2train.optim.residence import OnDevice, OnHost, Residence
from k2train.optim.shares import BucketPlan, Method, Replication, plan_buckets
from k2train.optim.states import muon_batches
from k2train.parallel.communicator import Communicator
from k2train.parallel.groups import Groups


def build_optimizer(
    config: OptimConfig,
    model: ModelConfig,
    catalogue: Mapping[str, TensorSpec],
    pieces: Sequence[Sequence[Piece]],
    groups: Groups,
    device: Device,
) -> Optimizer:
    """The optimizer of one rank, its masters read from the parameters as they are now.

    catalogue: the model's tensors by name. pieces: those of each of the rank's virtual stages (one rank: one list).
    device: of the parameters.
    Every rank that holds the same pieces computes the same ownership, without communication.
    Raises ConfigError where Muon or QK-Clip was asked for and finds nothing on this rank to act on, and for an
    optim.host_adam that cannot be.
    """
    muon = config.name == "muonclip"
    owners: dict[Replication, int] = {"dp": groups.dp.size, "edp": groups.edp.size}
    plans = plan_buckets(pieces, catalogue, muon, config.newton_schulz_steps, owners)
    if not plans:
        raise ConfigError("layout", "a rank without parameters", "every rank must hold at least one trained tensor",
                          "use fewer pipeline stages or virtual stages")  # fmt: skip
    check_host_adam(config, plans[0].dtype)
    groups_of: dict[Replication, Communicator] = {"dp": groups.dp, "edp": groups.edp}
    buckets = [Bucket(plan, groups_of[plan.replication], device.torch_device) for plan in plans]
    tensors = [catalogue[piece.name] for of_stage in pieces for piece in of_stage]
    tau = config.tau
    qk_clip = QkClipper(model, tensors, tau, like=buckets[0].flat)
    check_touches(config, model, plans, qk_clip)
    residence = build_residence(config.states, buckets, device)
    return Optimizer(
        buckets, groups.world, muon_rule(config), build_adamw(config), qk_clip, residence, device
    )


def build_residence(
    states: Literal["device", "host"], buckets: Sequence[Bucket], device: Device
) -> Residence:
    """Where the states of these buckets live. Host states get slots for the largest batch of master and momentum."""
    like = buckets[0].flat
    if states == "device":
        return OnDevice(like)
    batches = [batch.num_elements for bucket in buckets for batch in muon_batches(bucket)]
    stretch = max(bucket.own_gradient.numel() for bucket in buckets)
    rows = max(share_elements(bucket, "adamw") for bucket in buckets)
    slots = slot_elements(stretch, max(batches, default=0))
    return OnHost(device, like, slots, min(rows, CHUNK_ELEMENTS))


def share_elements(bucket: Bucket, method: Method) -> int:
    """Entries of the bucket that this rank updates by a method."""
    return sum(share.num_elements for share in bucket.owned if share.method == method)


def muon_rule(config: OptimConfig) -> MuonRule:
    """Algorithm 1's constants from the config."""
    return MuonRule(
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        update_rms=config.update_rms,
        nesterov=config.nesterov,
        newton_schulz_steps=config.newton_schulz_steps,
        newton_schulz_dtype=DTYPES[config.newton_schulz_dtype],
    )


def check_touches(
    config: OptimConfig, model: ModelConfig, plans: Sequence[BucketPlan], qk_clip: QkClipper
) -> None:
    """A feature asked for must find something: Muon a matrix, QK-Clip both projections of every attention here.

    A pipeline stage that holds transformer layers always has both; one that holds only embedding or head has neither.
    """
    if config.name != "muonclip":
        return
    layers = {share.spec.layer for plan in plans for share in plan.shares if share.spec.layer is not None}
    matrices = sum(share.method == "muon" for plan in plans for share in plan.shares)
    if layers and not matrices:
        raise ConfigError("optim.name", config.name, f"Muon finds no matrix in layers {sorted(layers)}",
                          "set optim.name=adamw")  # fmt: skip
    if config.qk_clip_tau is not None and qk_clip.num_targets != 2 * len(layers):
        raise ConfigError("optim.qk_clip_tau", config.qk_clip_tau,
                          f"QK-Clip finds {qk_clip.num_targets} query and key up-projections in {len(layers)} layers, not two "
                          "in each", "set optim.qk_clip_tau=null")  # fmt: skip
