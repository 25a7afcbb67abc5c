"""An all-to-all of tensors whose rows go the same ways: a token's features, and its weights beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from k2train.model.dispatcher import Tensors
from k2train.parallel.communicator import Communicator, Work

Last = Callable[[torch.Tensor], torch.Tensor]
"""What is made of a tensor when it has arrived."""


@dataclasses.dataclass(frozen=True)
class Moving:
    """Tensors under way. then: what becomes of each of them at the end; empty, they stay as they arrive."""

    works: Sequence[Work]
    arrived: Tensors
    then: Sequence[Last] = ()

    def wait(self) -> Tensors:
        for work in self.works:
            work.wait()
        if not self.then:
            return self.arrived
        return tuple(last(tensor) for tensor, last in zip(self.arrived, self.then, strict=False))


def start_exchange(
    group: Communicator,
    tensors: Tensors,
    leaving: list[int],
    arriving: list[int],
    then: Sequence[Last] = (),
    outs: Tensors | None = None,
) -> Moving:
    """Start one all-to-all for each tensor; leaving[p] rows go to rank p and arriving[p] come from it, into outs where those
    are given. Every rank of the group calls it. then: by the tensors' places; more than there are tensors do no harm."""
    if outs is None:
        outs = like(tensors, sum(arriving))
    works = [
        group.start_all_to_all(out, tensor.contiguous(), arriving, leaving)
        for out, tensor in zip(outs, tensors, strict=True)
    ]
    return Moving(works, outs, then)


def like(tensors: Tensors, num_rows: int) -> Tensors:
    """Room for so many rows of each."""
    return tuple(t.new_empty(num_rows, *t.shape[1:]) for t in tensors)
