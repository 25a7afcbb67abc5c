"""An all-to-all of tensors whose rows go the same ways: a token's features, and its weights beside
them.

Tensors that travel together share one message: a row of it is a row of each, one behind the other,
as bytes. For K2 that is 14,336 bytes of features and 32 of weights, where a message of its own for
the weights would cost as much latency as the features'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from k2train.model.dispatcher import Tensors
from k2train.parallel.communicator import Communicator, Work

Last = Callable[[torch.Tensor], torch.Tensor]
"""What is made of a tensor when it has arrived."""

# Rows are moved in words of this many bytes: a gather of single bytes would be eight times as many
# loads, and every type's numbers start at a multiple of their size.
WORD_BYTES = 8


def pack(tensors: Tensors) -> torch.Tensor:
    """One tensor whose rows hold the rows of all: (N, words) int64; a single tensor stays as it is.

    Each part begins at a word; what is left of its last word is not set.
    """
    if len(tensors) == 1:
        return tensors[0]
    words = [_words(t) for t in tensors]
    packed = torch.empty(tensors[0].shape[0], sum(words), dtype=torch.int64, device=tensors[0].device)
    for part, tensor in zip(unpack(packed, tensors), tensors, strict=True):
        part.copy_(tensor)
    return packed


def unpack(packed: torch.Tensor, like: Tensors) -> Tensors:
    """Views of the parts of a packed tensor, in the types and row shapes of `like`."""
    if len(like) == 1:
        return (packed,)
    views, start = [], 0
    for tensor in like:
        words = _words(tensor)
        numbers = packed[:, start : start + words].view(tensor.dtype)[:, : _width(tensor)]
        views.append(numbers.unflatten(1, tensor.shape[1:]) if tensor.dim() > 1 else numbers[:, 0])
        start += words
    return tuple(views)


def _width(tensor: torch.Tensor) -> int:
    """Numbers in a row."""
    return math.prod(tensor.shape[1:])


def _words(tensor: torch.Tensor) -> int:
    return -(-_width(tensor) * tensor.element_size() // WORD_BYTES)


@dataclasses.dataclass(frozen=True)
class Moving:
    """A message under way. like: tensors of the types and row shapes it holds.

    then: what becomes of each part at the end; empty, they stay as they arrive.
    """

    work: Work
    arrived: torch.Tensor
    like: Tensors
    then: Sequence[Last] = ()

    def message(self) -> torch.Tensor:
        """The packed message, once it has arrived."""
        self.work.wait()
        return self.arrived

    def wait(self) -> Tensors:
        """Its parts, once they have arrived."""
        parts = unpack(self.message(), self.like)
        return tuple(last(part) for part, last in zip(parts, self.then, strict=False)) if self.then else parts


def start_exchange(
    group: Communicator,
    message: torch.Tensor,
    like: Tensors,
    leaving: list[int],
    arriving: list[int],
    then: Sequence[Last] = (),
    out: torch.Tensor | None = None,
) -> Moving:
    """Start one all-to-all of a packed message: leaving[p] rows go to rank p and arriving[p] come
    from it.

    Every rank of the group calls it. like: what the message holds, as for `unpack`. out: where it
    arrives, if there is room already. then: by the parts' places; more than there are parts do no
    harm.
    """
    if out is None:
        out = message.new_empty(sum(arriving), *message.shape[1:])
    work = group.start_all_to_all(out, message.contiguous(), arriving, leaving)
    return Moving(work, out, like, then)
