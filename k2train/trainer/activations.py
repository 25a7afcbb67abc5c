"""The activation store of a rank, where a policy asks for one."""

from __future__ import annotations

import dataclasses

import torch

from k2train.activations.arena import HostArena
from k2train.activations.offload import OffloadEngine
from k2train.activations.store import ActivationStore
from k2train.config.sections import ActivationsConfig
from k2train.parallel.communicator import Communicator


def build_activations(policies: ActivationsConfig, device: torch.device) -> ActivationStore | None:
    """The store; None where every tensor is kept as it is, which is autograd's own way."""
    if all(policy == "keep" for policy in dataclasses.asdict(policies).values()):
        return None
    arena = HostArena(pinned=device.type == "cuda", limit_bytes=None)
    return ActivationStore(policies, OffloadEngine(device, arena))


def non_finite_tiles(
    store: ActivationStore | None, world: Communicator, device: torch.device
) -> dict[str, int]:
    """Tiles with a value that is not finite that FP8 storage has met in the run, by name, over all ranks.

    Every rank must call it: one sum over the world where there is a store. Waits for the device.
    """
    if store is None:
        return {}
    names = [field.name for field in dataclasses.fields(ActivationsConfig)]
    mine = store.non_finite_tiles()
    counts = torch.tensor([mine.get(name, 0) for name in names], dtype=torch.int64, device=device)
    world.all_reduce(counts)
    return {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}
