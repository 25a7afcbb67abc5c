"""ZeRO-1 on paper: which rank owns which part of which tensor, and where that part lies in the flat buckets.

A share is what one owner updates of one tensor: a whole matrix under Muon, which needs matrices whole, or a range of
rows under AdamW, which is elementwise. Shares of tensors that live on the same virtual stage, are replicated over the same group and
have one compute type make a bucket:

    bucket   | owner 0                                  | owner 1                          | ...
    shares   | matrices by shape | decayed | not decayed | matrices ... | decayed | ...     |

Each owner's part is one stretch, so one reduce-scatter gives it whole matrices and one all-gather returns them. Inside
the stretch equal shapes are neighbours, so that a batch of them is a view (k, n, m) and nothing is copied for a batched
Newton-Schulz. Owners are chosen over all of a rank's virtual stages together, by Newton-Schulz cost. Source:
docs/design.md, "MuonClip with ZeRO-1".
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch

from k2train.architecture.tensors import TensorSpec
from k2train.layout.ownership import assign_owners, newton_schulz_cost, row_ranges
from k2train.model.pieces import Piece

Method = Literal["muon", "adamw"]
Replication = Literal["dp", "edp"]


@dataclasses.dataclass(frozen=True)
class Share:
    """Rows [start, stop) of one tensor, updated by `owner`; entries [offset, offset + num_elements) of its bucket."""

    piece: Piece
    spec: TensorSpec
    method: Method
    owner: int
    start: int
    stop: int
    offset: int = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.spec.shape[1:])

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def view(self, t: torch.Tensor) -> torch.Tensor:
        """This share of a tensor shaped like the parameter it is part of."""
        return self.piece.view(t)[self.start : self.stop]

    def in_bucket(self, flat: torch.Tensor) -> torch.Tensor:
        """This share of a flat bucket."""
        return flat[self.offset : self.offset + self.num_elements].view(self.shape)


@dataclasses.dataclass(frozen=True)
class BucketPlan:
    """A bucket: its shares in order of offset, and how many entries each owner has."""

    virtual_stage: int
    replication: Replication
    dtype: torch.dtype
    shares: tuple[Share, ...]
    splits: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return sum(self.splits)

    def owned(self, owner: int) -> list[Share]:
        return [share for share in self.shares if share.owner == owner]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A piece with what decides its bucket."""

    virtual_stage: int
    piece: Piece
    spec: TensorSpec
    method: Method

    @property
    def replication(self) -> Replication:
        return "dp" if self.spec.expert is None else "edp"

    @property
    def bucket(self) -> tuple[int, Replication, str]:
        return self.virtual_stage, self.replication, str(self.piece.parameter.dtype)


def plan_buckets(
    pieces: Sequence[Sequence[Piece]],
    catalogue: Mapping[str, TensorSpec],
    muon: bool,
    newton_schulz_steps: int,
    num_owners: Mapping[Replication, int],
) -> list[BucketPlan]:
    """The buckets of one rank, the same on every rank that holds the same pieces.

    pieces: those of each of the rank's virtual stages. muon: whether matrices get Muon (else AdamW gets all).
    Buckets come by virtual stage, dense before experts. Tensors that are not trained are left out.
    """
    tensors = list(_trained(pieces, catalogue, muon))
    shares: dict[tuple[int, Replication, str], list[Share]] = {tensor.bucket: [] for tensor in tensors}
    for replication, owners in num_owners.items():
        ours = [tensor for tensor in tensors if tensor.replication == replication]
        for tensor, share in _cut(ours, owners, newton_schulz_steps):
            shares[tensor.bucket].append(share)
    return [
        _lay_out(bucket, shares[bucket], num_owners[bucket[1]]) for bucket in sorted(shares) if shares[bucket]
    ]


def _trained(
    pieces: Sequence[Sequence[Piece]], catalogue: Mapping[str, TensorSpec], muon: bool
) -> Iterator[_Tensor]:
    for virtual_stage, of_stage in enumerate(pieces):
        for piece in of_stage:
            spec = catalogue[piece.name]
            if not spec.trained:
                continue
            shape = tuple(piece.view(piece.parameter).shape)
            assert shape == spec.shape, f"{piece.name} is {shape}, the catalogue says {spec.shape}"
            method: Method = "muon" if muon and spec.role == "matrix" else "adamw"
            yield _Tensor(virtual_stage, piece, spec, method)


def _cut(
    tensors: Sequence[_Tensor], num_owners: int, newton_schulz_steps: int
) -> Iterator[tuple[_Tensor, Share]]:
    """Whole matrices to owners by cost, everything else in rows."""
    matrices = [tensor for tensor in tensors if tensor.method == "muon"]
    costs = [newton_schulz_cost(tensor.spec.shape, newton_schulz_steps) for tensor in matrices]
    for tensor, owner in zip(matrices, assign_owners(costs, num_owners), strict=True):
        yield tensor, Share(tensor.piece, tensor.spec, "muon", owner, 0, tensor.spec.shape[0])
    for tensor in tensors:
        if tensor.method == "adamw":
            for owner, (start, stop) in enumerate(row_ranges(tensor.spec.shape[0], num_owners)):
                if stop > start:
                    yield tensor, Share(tensor.piece, tensor.spec, "adamw", owner, start, stop)


def _lay_out(bucket: tuple[int, Replication, str], shares: Sequence[Share], num_owners: int) -> BucketPlan:
    """Order the shares and give them offsets."""
    ordered = sorted(shares, key=_place)
    offsets = itertools.accumulate((share.num_elements for share in ordered), initial=0)
    placed = tuple(
        dataclasses.replace(share, offset=offset) for share, offset in zip(ordered, offsets, strict=False)
    )
    splits = [0] * num_owners
    for share in placed:
        splits[share.owner] += share.num_elements
    return BucketPlan(bucket[0], bucket[1], placed[0].piece.parameter.dtype, placed, tuple(splits))


def _place(share: Share) -> tuple[object, ...]:
    """By owner; matrices by shape, then decayed rows, then the others; the sort is stable, so then in model order."""
    muon = share.method == "muon"
    return share.owner, not muon, share.shape if muon else (), not share.spec.decayed


@dataclasses.dataclass(frozen=True)
class OwnershipRow:
    """A line of the start-up table. owners: ranks of the replication group, more than one where rows are cut."""

    name: str
    method: Method
    shape: tuple[int, ...]
    replication: Replication
    owners: tuple[int, ...]
    num_elements: int


def ownership_table(plans: Sequence[BucketPlan]) -> list[OwnershipRow]:
    """Every trained tensor of these buckets, with its optimizer and who updates it, in order of name."""
    by_name: dict[str, list[tuple[Share, Replication]]] = {}
    for plan in plans:
        for share in plan.shares:
            by_name.setdefault(share.name, []).append((share, plan.replication))
    return [
        OwnershipRow(name, found[0][0].method, found[0][0].spec.shape, found[0][1],
                     tuple(share.owner for share, _ in found), found[0][0].spec.num_elements)
        for name, found in sorted(by_name.items())
    ]  # fmt: skip
