"""Which storages are really alive: the number that every account of bytes is checked against.

A dispatch mode sees every operation below autograd with the tensors it returns, and a weak
reference tells when a storage goes. No book is kept by hand, so nothing can be forgotten in it.

    with LivingStorages() as living:
        mark = living.mark()
        ...
        living.num_bytes(since=mark)
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclasses.dataclass(frozen=True)
class Birth:
    """A storage that is alive. key: the id of its object; serial: its number among all; operation,
    shape and dtype: of the tensor it was made as; place: what `LivingStorages.at` said at that
    moment."""

    key: int
    serial: int
    num_bytes: int
    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: str

    def __str__(self) -> str:
        return f"{self.operation} {self.shape} {str(self.dtype)[6:]}" + (
            f" in {self.place}" * bool(self.place)
        )


class LivingStorages(TorchDispatchMode):
    """The storages made by operations while it is entered, in this thread.

    What was made before is not counted: an operation that returns a storage it was given has made
    none.
    """

    def __init__(self, counts: Callable[[torch.Tensor], bool] = lambda tensor: True) -> None:
        """counts: whether a storage is followed, by its first tensor; by default all are, the
        host's included."""
        super().__init__()
        self._counts = counts
        self._living: dict[int, Birth] = {}
        self._place = ""
        self._serial = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _is_plain(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_plain(leaf) and id(leaf.untyped_storage()) not in known and self._counts(leaf):
                self._note(leaf, func.overloadpacket.__name__)
        return result

    @property
    def place(self) -> str:
        """What `at` says now."""
        return self._place

    @contextlib.contextmanager
    def at(self, place: str) -> Iterator[None]:
        """What is made inside is said to be made at `place`."""
        before, self._place = self._place, place
        try:
            yield
        finally:
            self._place = before

    def mark(self) -> int:
        """This moment, for `since`."""
        return self._serial

    def living(self, since: int = 0, without: Collection[str] = ()) -> list[Birth]:
        """What is alive of that made since a mark, oldest first. without: places that are left
        out."""
        return [
            birth
            for birth in sorted(self._living.values(), key=lambda birth: birth.serial)
            if birth.serial >= since and birth.place not in without
        ]

    def num_bytes(self, since: int = 0, without: Collection[str] = ()) -> int:
        """Bytes of `living`."""
        return sum(birth.num_bytes for birth in self.living(since, without))

    def describe(self, since: int = 0, without: Collection[str] = ()) -> str:
        """`living` in lines, equal ones together, the largest first; for messages."""
        sums: Counter[str] = Counter()
        for birth in self.living(since, without):
            sums[str(birth)] += birth.num_bytes
        return "\n".join(f"{num_bytes:12,} {what}" for what, num_bytes in sums.most_common())

    def _note(self, tensor: torch.Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        # The object of a storage is one and the same while the storage lives, and nobody else has
        # its id then.
        if id(storage) in self._living:
            return
        shape = tuple(tensor.shape)
        birth = Birth(
            id(storage), self._serial, storage.nbytes(), operation, shape, tensor.dtype, self._place
        )
        self._living[id(storage)], self._serial = birth, self._serial + 1
        weakref.finalize(storage, self._forget, id(storage)).atexit = False
        self.made(birth)

    def _forget(self, key: int) -> None:
        birth = self._living.pop(key, None)
        if birth is not None:
            self.gone(birth)

    def made(self, birth: Birth) -> None:
        """A storage has been made; for whoever follows them one by one."""

    def gone(self, birth: Birth) -> None:
        """Its last reference has gone."""

    def birth_of(self, tensor: torch.Tensor) -> Birth | None:
        """Of a tensor's storage, where it is followed."""
        return self._living.get(id(tensor.untyped_storage()))


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
