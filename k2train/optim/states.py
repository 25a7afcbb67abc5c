"""What an owner keeps for its stretch of a bucket: masters, and the states that each rule names.

All are flat tensors with the order of the stretch, so that equal-shaped matrices are batches
(k, n, m) and an elementwise rule updates all its rows in two calls. Where they live is their
residence's business. The arithmetic, and the batches it is done in, are the same for every
residence, so the results are the same bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from k2train.layout.staging import matrices_at_once
from k2train.optim.buckets import Bucket
from k2train.optim.residence import Residence
from k2train.optim.shares import Share
from k2train.update_rules.rule import MASTER, UpdateRule


class OwnedTensor(NamedTuple):
    """Rows [start, start + tensor.shape[0]) of a state whose whole shape is `shape`.

    name: as in checkpoints. tensor: the live state, not a copy.
    """

    name: str
    tensor: torch.Tensor
    start: int
    shape: tuple[int, ...]


class MatrixBatch(NamedTuple):
    """Equal-shaped matrices that are neighbours in a flat tensor: k of (n, m) from `start`."""

    start: int
    shape: tuple[int, int, int]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The batch (k, n, m) in a flat tensor."""
        return flat[self.start : self.start + self.num_elements].view(self.shape)


@dataclasses.dataclass(frozen=True)
class RulePart:
    """The part of an owner's stretch that one rule updates. All tensors are flat and equally long.

    shares: with offsets from the beginning of the part.
    """

    rule: UpdateRule
    shares: tuple[Share, ...]
    master: torch.Tensor
    states: tuple[torch.Tensor, ...]
    gradient: torch.Tensor

    def update_matrices(self, residence: Residence, lr: float, num_updates: int) -> int:
        """Update every matrix, batch by batch on the device; returns how many there are."""
        batches = matrix_batches(self.shares)
        kept = (self.master, *self.states)
        homes = [tuple(batch.view(flat) for flat in kept) for batch in batches]
        for (master, *states), batch in zip(residence.stream(homes), batches, strict=True):
            self.rule.update(master, states, batch.view(self.gradient), lr, True, num_updates)
        return sum(batch.shape[0] for batch in batches)

    def update_rows(self, residence: Residence, lr: float, num_updates: int) -> None:
        """Update every row where the states are: first the decayed ones, then the others."""
        num_decayed = sum(share.num_elements for share in self.shares if share.spec.decayed)
        for decayed, rows in ((True, slice(num_decayed)), (False, slice(num_decayed, None))):
            master, *states = (flat[rows] for flat in (self.master, *self.states))
            for entries, piece in residence.gradients(self.gradient[rows]):
                if piece.numel():
                    kept = [state[entries] for state in states]
                    self.rule.update(master[entries], kept, piece, lr, decayed, num_updates)


class OwnedStates:
    """Optimizer states of one rank for one bucket."""

    def __init__(self, bucket: Bucket, residence: Residence) -> None:
        self.bucket = bucket
        self._residence = residence
        self.master = residence.new_state(bucket.own_gradient.numel())
        self._parts = [self._part(rule, shares) for rule, shares in by_rule(bucket.owned)]
        self.read_parameters()

    @property
    def num_bytes(self) -> int:
        """Bytes of masters and states on this rank."""
        states = (state for part in self._parts for state in part.states)
        return self.master.nbytes + sum(state.nbytes for state in states)

    def read_parameters(self) -> None:
        """Set the masters to the parameters' values."""
        for share in self.bucket.owned:
            share.in_bucket(self.master).copy_(share.view(share.piece.parameter.detach()))

    def update_matrices(self, lr: float, num_updates: int) -> int:
        """Every update that needs a whole matrix; returns how many there are.

        The bucket's own gradient must be reduced and scaled. num_updates: made before this one.
        """
        return sum(
            part.update_matrices(self._residence, lr, num_updates)
            for part in self._parts
            if part.rule.whole_matrices
        )

    def update_rows(self, lr: float, num_updates: int) -> None:
        """Every elementwise update; the arguments are those of `update_matrices`."""
        for part in self._parts:
            if not part.rule.whole_matrices:
                part.update_rows(self._residence, lr, num_updates)

    def start_gather(self) -> None:
        """Send the masters on their way to every replica; see `Bucket.start_gather`."""
        self.bucket.start_gather(self._residence.upload(self.master))

    def tensors(self) -> Iterator[OwnedTensor]:
        """Every owned state under its checkpoint name, `<state>/<tensor>`."""
        for part in self._parts:
            kept = dict(zip((MASTER, *part.rule.states), (part.master, *part.states), strict=True))
            for share in part.shares:
                for kind, flat in kept.items():
                    name = f"{kind}/{share.name}"
                    yield OwnedTensor(name, share.in_bucket(flat), share.start, share.spec.shape)

    def whole_masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and master of every owned matrix that is updated whole."""
        for share in self.bucket.owned:
            if share.rule.whole_matrices:
                yield share.name, share.in_bucket(self.master)

    def _part(self, rule: UpdateRule, shares: Sequence[Share]) -> RulePart:
        first = shares[0].offset
        entries = slice(first, first + sum(share.num_elements for share in shares))
        return RulePart(
            rule,
            tuple(dataclasses.replace(share, offset=share.offset - first) for share in shares),
            self.master[entries],
            tuple(self._residence.new_state(entries.stop - first) for _ in rule.states),
            self.bucket.own_gradient[entries],
        )


def by_rule(shares: Sequence[Share]) -> list[tuple[UpdateRule, list[Share]]]:
    """An owner's shares of a bucket, in order of offset, by the rule that updates them."""
    groups = itertools.groupby(shares, key=lambda share: share.rule.name)
    parts = [list(of_rule) for _, of_rule in groups]
    return [(part[0].rule, part) for part in parts]


def matrix_batches(shares: Sequence[Share]) -> list[MatrixBatch]:
    """Shares that are whole matrices as batches: neighbours of one shape, as many as go together.

    shares: of one rule, in order of offset.
    """
    batches = []
    for (n, m), same in itertools.groupby(shares, key=lambda share: share.shape):
        matrices = list(same)
        size = matrices_at_once((n, m))
        for first in range(0, len(matrices), size):
            count = min(size, len(matrices) - first)
            batches.append(MatrixBatch(matrices[first].offset, (count, n, m)))
    return batches
