"""Saved tensors: one entry for each storage, and the slots through which autograd and recipes see
it.

An entry is made when its tensor is named and stored when somebody first wants it kept. What it
stores depends on the policy: the tensor, its FP8 codes and scales, or nothing but its recipe. Slots
alone hold an entry once the forward is over, so a tensor's bytes go the moment its last user in the
backward has gone.

A tensor is never held to be recognised: its storage is remembered weakly, and where in the storage
the whole of it lies.

Letters: R rows, W numbers of a row, N tiles of a row.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence

import torch

from k2train.config.sections import FP8_POLICIES, OFFLOAD_POLICIES, Policy
from k2train.ops.fp8 import Fp8Form, dequantise, quantise


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where a tensor lies in its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: torch.Tensor) -> Geometry:
        return Geometry(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    @property
    def end(self) -> int:
        """The element of the storage behind the last that it reaches; `offset` where it has no
        elements."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def view(self, other: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """The tensor that lies here, `shift` elements further on, in the storage of another."""
        return other.as_strided(self.shape, self.stride, self.offset + shift)


class Recipe:
    """How the tensors of one name are computed again, all together and once, from entries that were
    kept."""

    def __init__(
        self, compute: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]], sources: Sequence[Slot]
    ) -> None:
        self._compute, self._sources = compute, sources
        self._made: dict[int, torch.Tensor] | None = None

    def take(self, index: int) -> torch.Tensor:
        """The index-th tensor, handed over: it can be taken once. The first call computes them and
        lets the sources go."""
        if self._made is None:
            with torch.no_grad():
                made = self._compute(*(source.get() for source in self._sources))
            self._made = dict(enumerate(made if isinstance(made, tuple) else (made,)))
            self._sources = ()
        return self._made.pop(index)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What an entry is called and what becomes of it. recipe: with the place of this tensor in what
    it makes."""

    layer: int | None
    name: str
    policy: Policy
    recipe: tuple[Recipe, int] | None = None


class Entry:
    """One named storage of one microbatch."""

    def __init__(self, origin: Origin, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous(), f"{origin.name} is named as a view with strides {tensor.stride()}"
        self.origin = origin
        self.full_bytes = tensor.numel() * tensor.element_size()
        self.payload: tuple[torch.Tensor, ...] = ()
        self.where = Geometry.of(tensor)
        self._storage = weakref.ref(tensor.untyped_storage())
        self._stored = False
        self._fp8: Fp8Form | None = None
        self._fetch: Callable[[], None] | None = None
        self._away_bytes = 0
        self._returning = False
        self._value: torch.Tensor | None = None

    def is_of(self, storage: torch.UntypedStorage) -> bool:
        """Whether this is the entry of that very storage; an address alone can be used again."""
        return self._storage() is storage

    @property
    def stored(self) -> bool:
        return self._stored

    @property
    def device_bytes(self) -> int:
        """Bytes of what is stored that are on the device now, on their way back included. A value
        rebuilt for the backward at work is not counted."""
        here = sum(part.numel() * part.element_size() for part in self.payload)
        return here + (self._away_bytes if self._returning else 0)

    @property
    def host_bytes(self) -> int:
        """Bytes of what is stored that are in host memory now."""
        return 0 if self._returning else self._away_bytes

    @property
    def offloads(self) -> bool:
        """Whether it has something to be offloaded."""
        return self.origin.policy in OFFLOAD_POLICIES and bool(self.payload)

    def store(self, part: torch.Tensor, non_finite_tiles: torch.Tensor | None) -> None:
        """Keep what the policy says. Once. part: any tensor of the storage."""
        assert not self._stored, f"{self.origin.name} stored twice"
        self._stored = True
        whole = self.where.view(part.detach())
        if self.origin.policy in FP8_POLICIES:
            stored = quantise(whole, non_finite_tiles)
            # Codes and scales are the payload alone: they leave with it.
            self._fp8, self.payload = stored.form, stored.tensors
        elif self.origin.policy != "recompute":
            self.payload = (whole,)

    def leave(self, fetch: Callable[[], None]) -> None:
        """Its payload is copied to the host and let go; `fetch` brings it back by calling
        `arrive`."""
        self._away_bytes, self.payload, self._fetch = self.device_bytes, (), fetch

    def returns(self) -> None:
        """Its payload has device memory again and is being copied into it."""
        self._returning = True

    def arrive(self, payload: tuple[torch.Tensor, ...]) -> None:
        """The payload again, from the host."""
        self._away_bytes, self.payload, self._fetch, self._returning = 0, payload, None, False

    def get(self) -> torch.Tensor:
        """The whole tensor. Rebuilt or read from FP8 once, and kept until the entry goes."""
        if self._value is None:
            if self._fetch is not None:
                self._fetch()
            self._value = self._read()
            assert Geometry.of(self._value).stride == self.where.stride, self.origin.name
        return self._value

    def _read(self) -> torch.Tensor:
        if self._fp8 is not None:
            codes_RW, scales_RN = self.payload
            return dequantise(self._fp8.over(codes_RW, scales_RN))
        if self.origin.policy == "recompute":
            assert self.origin.recipe is not None, f"{self.origin.name} has no recipe"
            recipe, index = self.origin.recipe
            return recipe.take(index).contiguous()
        (whole,) = self.payload
        return whole


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor of an entry, whole or a view, as autograd or a recipe keeps it."""

    entry: Entry
    where: Geometry

    def get(self) -> torch.Tensor:
        """The tensor, with the geometry it had when it was saved."""
        whole = self.entry.get()
        if self.where == self.entry.where:
            return whole
        return self.where.view(whole, int(whole.storage_offset()) - self.entry.where.offset)
