"""The activation store of a rank, where a policy asks for one."""

from __future__ import annotations

import dataclasses

import torch

from k2train.activations.arena import HostArena
from k2train.activations.offload import OffloadEngine
from k2train.activations.store import ActivationStore
from k2train.config.sections import ActivationsConfig
from k2train.device.protocol import Device, integers
from k2train.parallel.communicator import Communicator
from k2train.program import Program
from k2train.schedule.offload import peak_offloaded
from k2train.trainer.host_memory import activation_share


def build_activations(program: Program, stage: int, device: Device) -> ActivationStore | None:
    """The store of a rank of a stage; None where every tensor is kept as it is, which is autograd's
    own way.

    Host memory is limited to `activation_share`, which was checked at start-up against what the
    plan needs.
    """
    policies = program.config.activations
    if all(policy == "keep" for policy in dataclasses.asdict(policies).values()):
        return None
    limit = activation_share(program, stage, device.torch_device)
    arena = HostArena(device, limit_bytes=limit)
    return ActivationStore(
        policies, OffloadEngine(device, arena), peak_offloaded(program.schedule.stages[stage])
    )


def host_traffic(store: ActivationStore | None) -> dict[str, int]:
    """A step's metrics of this rank's offloading, counted anew from here; empty where nothing can
    be offloaded.

    offloaded_bytes: copied to the host. host_bytes_peak: the most in host buffers at once, since
    the start.
    """
    if store is None:
        return {}
    engine = store.engine
    metrics = {"offloaded_bytes": engine.bytes_out, "host_bytes_peak": engine.arena.peak_bytes}
    engine.reset_counters()
    return metrics


def non_finite_tiles(store: ActivationStore | None, world: Communicator, device: Device) -> dict[str, int]:
    """Tiles with a value that is not finite that FP8 storage has met in the run, by name, over all
    ranks.

    Every rank must call it: one sum over the world where there is a store. Waits for the device.
    """
    if store is None:
        return {}
    names = [field.name for field in dataclasses.fields(ActivationsConfig)]
    mine = store.non_finite_tiles()
    counts = torch.tensor(
        [mine.get(name, 0) for name in names], dtype=torch.int64, device=device.torch_device
    )
    world.all_reduce(counts)
    return {
        name: count
        for name, count in zip(names, integers(device.read(counts, "non-finite tiles")), strict=True)
        if count
    }
