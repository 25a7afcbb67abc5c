"""Which bytes a group of tensors needs of which storages, and how to build equal tensors over a packed copy of those bytes.

Tensors that share a storage are copied once and share one afterwards. Of a storage only the stretches that some
tensor reaches are copied, packed one behind the other:

    storage   ....[ a ]......[  b [c]  ]....        a, and b with c inside it, are views; dots are reached by none
    packed    [ a ][  b [c]  ]

Offsets are bytes. Stretches begin at multiples of `ALIGNMENT` in both, so a tensor is as aligned as it was.
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
    """What is copied of a storage. `source` is the index of one of the tensors that are views of it."""

    source: int
    stretches: tuple[Stretch, ...]

    @property
    def num_bytes(self) -> int:
        """Of the packed form, gaps for alignment included."""
        last = self.stretches[-1]
        return last.position + last.num_bytes


@dataclasses.dataclass(frozen=True)
class Form:
    """A tensor without its values: `offset` bytes into packed storage number `storage`, None for one without elements."""

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
    members: dict[tuple[int, int], list[int]] = {}
    for index, tensor in enumerate(tensors):
        plain = tensor.layout == torch.strided and not tensor.is_conj() and not tensor.is_neg()
        assert plain, "only strided tensors without a pending conjugation or negation can be offloaded"
        if tensor.numel() > 0:
            storage = tensor.untyped_storage()
            members.setdefault((storage.data_ptr(), storage.nbytes()), []).append(index)
    storages = tuple(_pack([(i, *_reach(tensors[i])) for i in group]) for group in members.values())
    place = {index: number for number, group in enumerate(members.values()) for index in group}
    forms = [_form(t, place.get(i), storages) for i, t in enumerate(tensors)]
    return Packing(storages, tuple(forms))


def stretch_bytes(tensor: torch.Tensor, stretch: Stretch) -> torch.Tensor:
    """A stretch of the tensor's storage, as bytes."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(tensor.untyped_storage(), stretch.start, (stretch.num_bytes,), (1,))


def rebuild(form: Form, packed: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The tensor of a form, as a view of the bytes of its packed storage; without gradient."""
    if form.storage is None:
        return torch.empty_strided(form.size, form.stride, dtype=form.dtype, device=device)
    storage = packed[form.storage].untyped_storage()
    raw = torch.empty(0, dtype=form.dtype, device=device)
    return raw.set_(storage, form.offset // form.dtype.itemsize, form.size, form.stride)


def _reach(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of its storage that a tensor with elements reaches, and the one behind the last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    return start, start + int(steps + 1) * tensor.itemsize


def _pack(reaches: list[tuple[int, int, int]]) -> PackedStorage:
    """reaches: (index of the tensor, start, stop). Stretches that meet or overlap become one."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((start - start % ALIGNMENT, stop) for _, start, stop in reaches):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    stretches: list[Stretch] = []
    position = 0
    for start, stop in merged:
        stretches.append(Stretch(start, stop, position))
        position += -(-(stop - start) // ALIGNMENT) * ALIGNMENT
    return PackedStorage(reaches[0][0], tuple(stretches))


def _form(tensor: torch.Tensor, number: int | None, storages: tuple[PackedStorage, ...]) -> Form:
    offset = 0
    if number is not None:
        start, _ = _reach(tensor)
        stretch = next(s for s in storages[number].stretches if s.start <= start < s.stop)
        offset = start - stretch.start + stretch.position
    return Form(tensor.dtype, tuple(tensor.shape), tensor.stride(), number, offset)
