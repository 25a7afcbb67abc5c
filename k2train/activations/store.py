"""The store of saved activations: model.saved's protocol, with a policy for every name.

Inside a phase's forward, autograd hands every tensor it saves to `pack`, which knows the named ones
by their storage. A tensor that is saved before it has a name (a sigmoid saves its result) waits
until the phase ends; one that has none by then is our own mistake. Source: K2 report, section
2.4.3; docs/memory.md.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from k2train.activations.entries import Entry, Geometry, Origin, Recipe, Slot
from k2train.activations.offload import Offloaded, OffloadEngine
from k2train.config.sections import FP8_POLICIES, OFFLOAD_POLICIES, ActivationsConfig, Policy
from k2train.device.protocol import integers
from k2train.model.saved import Made


class ActivationStore:
    """The stores of one rank's microbatches, and what they have in common."""

    def __init__(
        self,
        policies: ActivationsConfig,
        engine: OffloadEngine,
        peak_offloaded: Mapping[int, int] | None = None,
    ) -> None:
        """peak_offloaded: the microbatches of each virtual stage that the schedule has on the host
        at once."""
        self.policies, self.engine = policies, engine
        self.peak_offloaded = dict(peak_offloaded or {})
        self._non_finite: dict[str, torch.Tensor] = {}
        self._microbatches: weakref.WeakSet[MicrobatchStore] = weakref.WeakSet()

    def microbatch(self) -> MicrobatchStore:
        """The store of one microbatch on one virtual stage."""
        store = MicrobatchStore(self)
        self._microbatches.add(store)
        return store

    def policy(self, name: str) -> Policy:
        """What becomes of a name; the head's two stay where they are."""
        return "keep" if name in ("head_input", "head_gradient") else getattr(self.policies, name)

    def entries(self) -> Iterator[Entry]:
        """Everything stored now, of all microbatches."""
        for store in list(self._microbatches):
            yield from store.entries()

    def tensors(self) -> Iterator[torch.Tensor]:
        """What holds `device_bytes`, for whoever counts storages; those on their way back from the
        host included."""
        for store in list(self._microbatches):
            yield from store.tensors()

    @property
    def device_bytes(self) -> int:
        """Bytes stored on the device now."""
        return sum(entry.device_bytes for entry in self.entries())

    def non_finite_counter(self, origin: Origin, device: torch.device) -> torch.Tensor | None:
        """Where FP8 storage counts tiles with a value that is not finite, read by
        `non_finite_tiles`; None without FP8."""
        if origin.policy not in FP8_POLICIES:
            return None
        if origin.name not in self._non_finite:
            self._non_finite[origin.name] = torch.zeros((), dtype=torch.int64, device=device)
        return self._non_finite[origin.name]

    def non_finite_tiles(self) -> dict[str, int]:
        """Tiles with a value that is not finite that FP8 storage has met since the start, by name.
        Waits for the device."""
        if not self._non_finite:
            return {}
        counts = self.engine.device.read(torch.stack(list(self._non_finite.values())), "non-finite tiles")
        return {name: count for name, count in zip(self._non_finite, integers(counts), strict=True) if count}


class MicrobatchStore:
    """What one microbatch keeps on one virtual stage; implements model.saved.SavedActivations."""

    def __init__(self, parent: ActivationStore) -> None:
        self._parent = parent
        self._named: dict[int, Entry] = {}
        self._entries: list[weakref.ref[Entry]] = []
        self._layer: int | None = None
        self._offloaded: Offloaded | None = None

    # What phases say.

    def name(self, name: str, *tensors: torch.Tensor, extras: tuple[torch.Tensor, ...] = ()) -> None:
        policy = self._parent.policy(name)
        for tensor in tensors:
            self._register(Origin(self._layer, name, policy), tensor)
        for tensor in extras:
            self._register(Origin(self._layer, name, _extra_policy(policy)), tensor)

    def make(self, name: str, compute: Callable[..., Made], *sources: torch.Tensor) -> Made:
        made = compute(*sources)
        policy = self._parent.policy(name)
        recipe = None
        if policy == "recompute":
            recipe = Recipe(compute, [self._slot(source) for source in sources])
        for index, tensor in enumerate(made if isinstance(made, tuple) else (made,)):
            self._register(
                Origin(self._layer, name, policy, None if recipe is None else (recipe, index)), tensor
            )
        return made

    def hold(self, tensor: torch.Tensor) -> Slot:
        return self._slot(tensor)

    @contextlib.contextmanager
    def saving(self, layer: int | None, otherwise: str | None) -> Iterator[None]:
        self._layer = layer
        unnamed: list[_Unnamed] = []

        def pack(tensor: torch.Tensor) -> Slot | _Unnamed:
            entry = self._entry(tensor)
            if entry is not None:
                return self._keep(entry, tensor)
            unnamed.append(_Unnamed(tensor))
            return unnamed[-1]

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda slot: slot.get()):
            yield
        for late in unnamed:
            late.settle(self, otherwise)

    def forward_done(self) -> None:
        self._named.clear()

    # What the schedule says.

    def sizes_to_offload(self) -> list[int]:
        """Bytes of each host buffer that `offload` would take now."""
        parts = [part for entry in self.entries() if entry.offloads for part in entry.payload]
        return [part.numel() * part.element_size() for part in parts if part.numel()]

    def offload(self) -> None:
        """Start to copy what is to be offloaded to the host and let go of it here. Once, after the
        forward."""
        assert self._offloaded is None, "offloaded twice"
        leaving = [entry for entry in self.entries() if entry.offloads]
        if not leaving:
            return
        parts = [part for entry in leaving for part in entry.payload]
        self._offloaded = self._parent.engine.offload(parts)
        counts = [(weakref.ref(entry), len(entry.payload)) for entry in leaving]
        for entry in leaving:
            entry.leave(lambda: self._land(counts))

    def reload(self) -> None:
        """Start to copy it back; its first use waits for the copy."""
        if self._offloaded is not None:
            self._offloaded.reload()
            for entry in self.entries():
                if entry.host_bytes:
                    entry.returns()

    def drop(self) -> None:
        """Forget an interrupted microbatch; its host buffers are free again."""
        if self._offloaded is not None:
            self._offloaded.drop()
            self._offloaded = None

    # The inside.

    def entries(self) -> Iterator[Entry]:
        """What is stored now."""
        for reference in self._entries:
            entry = reference()
            if entry is not None and entry.stored:
                yield entry

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is stored on the device now."""
        for entry in self.entries():
            yield from entry.payload
        if self._offloaded is not None:
            yield from self._offloaded.returning

    def _land(self, counts: list[tuple[weakref.ref[Entry], int]]) -> None:
        """Hand the reloaded tensors to their entries, so that each goes with its own last user."""
        assert self._offloaded is not None
        arrived = iter(self._offloaded.tensors())
        self._offloaded = None
        for reference, count in counts:
            payload = tuple(next(arrived) for _ in range(count))
            entry = reference()
            if entry is not None:
                entry.arrive(payload)

    def _register(self, origin: Origin, tensor: torch.Tensor) -> None:
        if self._entry(tensor) is None:
            entry = Entry(origin, tensor)
            self._named[id(tensor.untyped_storage())] = entry
            self._entries.append(weakref.ref(entry))

    def _entry(self, tensor: torch.Tensor) -> Entry | None:
        storage = tensor.untyped_storage()
        entry = self._named.get(id(storage))
        return entry if entry is not None and entry.is_of(storage) else None

    def _slot(self, tensor: torch.Tensor) -> Slot:
        entry = self._entry(tensor)
        assert entry is not None, f"a saved tensor of shape {tuple(tensor.shape)} has no name"
        return self._keep(entry, tensor)

    def _keep(self, entry: Entry, tensor: torch.Tensor) -> Slot:
        """The tensor as its user keeps it; the entry is stored with its first."""
        if not entry.stored:
            entry.store(tensor, self._parent.non_finite_counter(entry.origin, tensor.device))
        where = Geometry.of(tensor)
        # What lies outside of the named part is neither rounded nor moved with it.
        assert entry.where.offset <= where.offset and where.end <= entry.where.end, (  # noqa: PT018
            f"a view {where} of {entry.origin.name} reaches beyond what was named, {entry.where}"
        )
        return Slot(entry, where)


class _Unnamed:
    """A tensor that autograd saved before it had a name."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._slot: Slot | None = None

    def settle(self, store: MicrobatchStore, otherwise: str | None) -> None:
        """The phase has ended: now it has a name, or gets `otherwise`."""
        assert self._tensor is not None
        if otherwise is not None:
            store.name(otherwise, extras=(self._tensor,))
        self._slot, self._tensor = store.hold(self._tensor), None

    def get(self) -> Any:
        assert self._slot is not None, "read before its phase has ended"
        return self._slot.get()


def _extra_policy(policy: Policy) -> Policy:
    """Extras are never rounded or rebuilt: they stay, or go to the host with the rest."""
    return "offload" if policy in OFFLOAD_POLICIES else "keep"
