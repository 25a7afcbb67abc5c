"""Bytes accounted for are bytes alive: at every boundary between two actions of a whole step, on
every rank.

Storages made since the step began are counted by weak references. Each must stand in somebody's
books: the activation store, the queue of weight gradients, messages, host buffers, the step's batch
and statistics, and what phases without a graph keep: a copy of the token ids, and the numbers of
rows by which exchanges are undone, a few for every expert. The first step is not looked at: scratch
buffers that stay are made in it.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
from collections.abc import Iterable, Iterator

import pytest
import torch

from k2train.activations.arena import HostArena
from k2train.activations.entries import Entry, Slot
from k2train.activations.offload import OffloadEngine
from k2train.activations.store import ActivationStore, MicrobatchStore
from k2train.config.compose import load_config
from k2train.device.living import Birth, LivingStorages
from k2train.model.context import Statistics
from k2train.trainer.batch import Batch, read_batch
from k2train.trainer.build import Run
from k2train.trainer.step import run_schedule
from k2train.trainer.testing import run_on_ranks

ROOMS = ("k2train.parallel", "k2train.model", "k2train.ops")
"""Whose plain objects records are made of."""
PRESETS = ["none", "recompute", "recompute_fp8", "recompute_offload", "offload", "k2"]
SCHEDULES = {
    "pairs, weight gradients put off": ["layout.vpp=3", "schedule=k2"],
    "one virtual stage, weight gradients at once": ["schedule=1f1b"],
    "pairs between two stages and two expert ranks": [
        "layout.pp=2",
        "layout.ep=2",
        "schedule=k2",
        "model.num_hidden_layers=4",
    ],
    "zero bubble": ["layout.pp=2", "schedule=zb_h1", "model.num_hidden_layers=4"],
}


class Auditor:
    """Implements runtime.recorder.Watcher: compares books and storages after each action."""

    def __init__(self, run: Run, batch: Batch, statistics: Statistics, living: LivingStorages) -> None:
        self.run, self.batch, self.statistics, self.living = run, batch, statistics, living
        self.start = living.mark()
        self.host_before = self.arena.allocated_bytes
        self.most_alive = self.most_stored = 0
        self.offloads = 0
        self.most_numbers = 2 * 8 * run.config.model.n_routed_experts

    @property
    def store(self) -> ActivationStore:
        assert self.run.activations is not None
        return self.run.activations

    @property
    def arena(self) -> HostArena:
        return self.store.engine.arena

    def watch(self, steps: Iterable) -> Iterator:
        for step in steps:
            yield step
            self.check(str(step))

    def wait(self, message) -> torch.Tensor:
        return message.wait()

    def check(self, when: str) -> None:
        """Every storage is somebody's, the host's aside, and the store's number is that of its
        storages."""
        alive = self.living.living(self.start)
        books = self.books()
        recorded = {id(tensor.untyped_storage()) for tensor in books.pop("records")}
        known = {id(tensor.untyped_storage()) for tensors in books.values() for tensor in tensors}
        train = self.run.config.train
        tokens = (train.microbatch_size, train.seq_len)
        numbers = [birth for birth in alive if birth.key in recorded - known and birth.shape != tokens]
        assert all(birth.num_bytes <= self.most_numbers for birth in numbers), (when, list(map(str, numbers)))
        known |= recorded
        unknown = [birth for birth in alive if birth.key not in known and birth.num_bytes]
        others = [birth for birth in unknown if not is_host(birth)]
        assert not others, f"{when}: in nobody's books: {[str(birth) for birth in others]}"
        assert sum(birth.num_bytes for birth in unknown) == self.arena.allocated_bytes - self.host_before, (
            when
        )
        stored = {
            id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in books["store"]
        }
        assert sum(stored.values()) == self.store.device_bytes, when
        self.most_alive = max(self.most_alive, sum(birth.num_bytes for birth in alive))
        self.most_stored = max(self.most_stored, self.store.device_bytes)
        self.offloads += when.startswith("OFFLOAD")

    def books(self) -> dict[str, list[torch.Tensor]]:
        """The tensors that each account answers for."""
        stage, statistics = self.run.training, self.statistics
        held = stage._held()
        records = held.pop("records")
        return {
            "store": list(self.store.tensors()),
            "queue": [
                t for queued in stage.queue._entries.values() for entry in queued for t in entry.tensors
            ],
            "messages": list(tensors_in(held)),
            "sending": list(tensors_in(vars(stage.transport)) if stage.transport is not None else ()),
            "batch": list(tensors_in([self.batch.tokens, self.batch.targets])),
            "statistics": list(tensors_in(vars(statistics))),
            "records": list(tensors_in([(kept, context.routes) for kept, context in records.values()])),
        }


def tensors_in(value: object, seen: dict[int, object] | None = None) -> Iterator[torch.Tensor]:
    """The tensors in nested containers, dataclasses and objects of the rooms that make records; a
    store's are its own."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) in seen or isinstance(value, (ActivationStore, MicrobatchStore, Slot, Entry)):
        return
    elif isinstance(value, (dict, list, tuple, collections.deque)):
        seen[id(value)] = value
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item, seen)
    elif dataclasses.is_dataclass(value) or type(value).__module__.startswith(ROOMS):
        seen[id(value)] = value
        yield from tensors_in(list(getattr(value, "__dict__", {}).values()), seen)


def is_host(birth: Birth) -> bool:
    """Whether it is a buffer of the arena: only these are made as zero bytes."""
    return (birth.operation, birth.dtype) == ("zeros", torch.uint8)


def audited(run: Run) -> list[tuple[int, int, int]]:
    """Two steps, the second of them looked at after each action."""
    # Where all is kept, autograd keeps it; a store says the same with numbers.
    if run.activations is None:
        engine = OffloadEngine(run.device, HostArena(run.device))
        run = dataclasses.replace(run, activations=ActivationStore(run.config.activations, engine))
    found = []
    with LivingStorages() as living:
        run_schedule(run, read_batch(run, 0), Statistics())
        batch = read_batch(run, 1)
        auditor = Auditor(run, batch, Statistics(), living)
        run_schedule(run, batch, auditor.statistics, auditor)
        found.append((auditor.most_alive, auditor.most_stored, auditor.offloads))
    return found


@pytest.fixture(autouse=True)
def no_garbage_collection():
    """Training runs without it, too: what only the collector would free is kept."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_every_storage_alive_between_two_actions_is_in_somebodys_books(words, preset, schedule) -> None:
    config = load_config([*words, f"activations={preset}", *schedule])
    for ((most_alive, most_stored, offloads),) in run_on_ranks(config, audited):
        assert most_alive > most_stored > 0
        assert (offloads > 0) <= config.activations.offloads
