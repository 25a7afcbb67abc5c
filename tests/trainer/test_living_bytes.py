"""Bytes accounted for are bytes alive: at every boundary between two actions of a whole step, on every rank.

Storages made since the step began are counted by weak references. Each must be one that somebody has in their books: the
activation store, the queue of weight gradients, messages, the step's statistics, the copy of the token ids that the
embedding's backward needs, host buffers. The first step is not counted: in it scratch buffers are made that stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from k2train.device.living import LivingStorages
from k2train.model.context import Statistics
from k2train.trainer.build import Run

PRESETS = ["none", "recompute", "recompute_fp8", "recompute_offload", "offload", "k2"]


class Auditor:
    """Implements runtime.recorder.Watcher: compares books and storages before each action."""

    def __init__(self, run: Run, statistics: Statistics, living: LivingStorages) -> None:
        self.run, self.statistics, self.living = run, statistics, living
        self.start = living.mark()
        self.host_before = self.host_bytes
        self.faults: list[str] = []
        self.seen = 0
        self.largest = 0

    @property
    def host_bytes(self) -> int:
        store = self.run.activations
        return 0 if store is None else store.engine.arena.allocated_bytes

    def watch(self, steps: Iterable) -> Iterator:
        for step in steps:
            yield step
            self.check(str(step))

    def wait(self, message) -> torch.Tensor:
        return message.wait()

    def check(self, when: str) -> None:
        """Note every storage that nobody answers for, and every account that differs from its storages."""
        self.seen += 1
        alive = {birth.key: birth for birth in self.living.living(self.start)}
        known = {id(t.untyped_storage()) for tensors in self.accounts().values() for t in tensors}
        host = self.host_bytes - self.host_before
        unknown = [birth for key, birth in alive.items() if key not in known]
        num_bytes = sum(birth.num_bytes for birth in unknown)
        self.largest = max(self.largest, sum(birth.num_bytes for birth in alive.values()))
        if num_bytes != host:
            self.faults.append(
                f"{when}: {num_bytes} bytes unknown, {host} of them host: {[str(b) for b in unknown]}"
            )
        store = self.run.activations
        if store is not None:
            parts = {
                id(p.untyped_storage()): p.untyped_storage().nbytes()
                for e in store.entries()
                for p in e.payload
            }
            here = sum(parts.values()) + sum(e.device_bytes for e in store.entries() if not e.payload)
            if here != store.device_bytes:
                self.faults.append(f"{when}: the store says {store.device_bytes}, its storages have {here}")

    def accounts(self) -> dict[str, list[torch.Tensor]]:
        stage, found = self.run.training, {}
        held = stage._held()
        store = self.run.activations
        if store is not None:
            found["store"] = [part for entry in store.entries() for part in entry.payload]
        found["queue"] = [
            t for entries in stage.queue._entries.values() for entry in entries for t in entry.tensors
        ]
        found["batch"] = [stage._inputs_of_step().tokens(0)]
        found["messages"] = [
            *(
                getattr(a, "tensor", None)
                for name in ("inputs", "received gradients")
                for a in held[name].values()
            ),
            *held["outputs"].values(),
            *held["gradients"].values(),
        ]
        if stage.transport is not None:
            found["sending"] = [t for _, t in stage.transport._sending]
        s = self.statistics
        found["statistics"] = [
            t
            for t in (s.loss, s.balance_loss, *s.expert_loads.values(), *s.max_logits.values())
            if t is not None
        ]
        return found
