"""Which bytes a group of tensors needs of which storages, and how to build equal tensors over a
packed copy of those bytes.

Tensors that share a storage are copied once and share one afterwards. Of a storage only the
stretches that some tensor reaches are copied, packed one behind the other:

    storage   ....[ a ]......[  b [c]  ]....        a, and b with c inside it, are views; dots are
              reached by none
    packed    [ a ][  b [c]  ]

Offsets are bytes. Stretches begin at multiples of `ALIGNMENT` in both, so a tensor is as aligned as
it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

ALIGNMENT = 256


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Bytes `start` to `stop` of a storage, which stand at `position` in its packed form."""

    start: int
    stop: int
    position: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class PackedStorage:
    """What is copied of a storage. `source` is the index of the tensor through which it is read, a
    view of it.

    That is one with the smallest elements, so that every stretch is a whole number of them.
    """

    source: int
    stretches: tuple[Stretch, ...]

    @property
    def num_bytes(self) -> int:
        """Of the packed form, gaps for alignment included."""
        last = self.stretches[-1]
        return last.position + last.num_bytes


@dataclasses.dataclass(frozen=True)
class Form:
    """A tensor without its values: `offset` bytes into packed storage number `storage`, None for
    one without elements."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int | None
    offset: int


@dataclasses.dataclass(frozen=True)
class Packing:
    """A group of tensors without their values; holds no reference to them."""

    storages: tuple[PackedStorage, ...]
    forms: tuple[Form, ...]


def plan_packing(tensors: Sequence[torch.Tensor]) -> Packing:
    """The packing of a group of strided tensors, in their order."""
    members: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        plain = tensor.layout == torch.strided and not tensor.is_conj() and not tensor.is_neg()
        assert plain, "only strided tensors without a pending conjugation or negation can be offloaded"
        if tensor.numel() > 0:
            # The object of a storage is one and the same while the storage lives; its address says
            # nothing where tensors have no memory.
            members.setdefault(id(tensor.untyped_storage()), []).append(index)
    storages = tuple(_pack(tensors, group) for group in members.values())
    place = {index: number for number, group in enumerate(members.values()) for index in group}
    forms = [_form(t, place.get(i), storages) for i, t in enumerate(tensors)]
    return Packing(storages, tuple(forms))


def stretch_bytes(tensor: torch.Tensor, stretch: Stretch) -> torch.Tensor:
    """A stretch of the tensor's storage, as bytes. The tensor is the `source` of its packing."""
    start, size = stretch.start // tensor.itemsize, stretch.num_bytes // tensor.itemsize
    return tensor.detach().as_strided((size,), (1,), start).view(torch.uint8)


def rebuild(form: Form, packed: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The tensor of a form, as a view of the bytes of its packed storage; without gradient."""
    if form.storage is None:
        return torch.empty_strided(form.size, form.stride, dtype=form.dtype, device=device)
    storage, size = packed[form.storage], form.dtype.itemsize
    elements = storage[: storage.numel() // size * size].view(form.dtype)
    return elements.as_strided(form.size, form.stride, form.offset // size)


def _reach(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of its storage that a tensor with elements reaches, and the one behind the
    last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + int(steps + 1) * tensor.itemsize


def _pack(tensors: Sequence[torch.Tensor], members: Sequence[int]) -> PackedStorage:
    """The members share a storage. Stretches that meet or overlap become one."""
    merged: list[tuple[int, int]] = []
    reaches = [_reach(tensors[index]) for index in members]
    for start, stop in sorted((start - start % ALIGNMENT, stop) for start, stop in reaches):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    stretches: list[Stretch] = []
    position = 0
    for start, stop in merged:
        stretches.append(Stretch(start, stop, position))
        position += -(-(stop - start) // ALIGNMENT) * ALIGNMENT
    return PackedStorage(min(members, key=lambda index: tensors[index].itemsize), tuple(stretches))


def _form(tensor: torch.Tensor, number: int | None, storages: tuple[PackedStorage, ...]) -> Form:
    offset = 0
    if number is not None:
        start, _ = _reach(tensor)
        stretch = next(s for s in storages[number].stretches if s.start <= start < s.stop)
        offset = start - stretch.start + stretch.position
    return Form(tensor.dtype, tuple(tensor.shape), tensor.stride(), number, offset)
