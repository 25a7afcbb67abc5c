"""ZeRO-1 on paper: which rank owns which part of which tensor, and its place in the flat buckets.

A share is what one owner updates of one tensor: a whole matrix where the tensor's rule needs it
whole (Muon), or a range of rows (AdamW, which is elementwise). Shares of tensors that live on the
same virtual stage, are replicated over the same group and have one compute type make a bucket:

    bucket   | owner 0                                  | owner 1                          | ...
    shares   | matrices by shape | decayed | not decayed | matrices ... | decayed | ...     |

Each owner's part is one stretch, so one reduce-scatter gives it whole matrices and one all-gather
returns them. Inside the stretch each rule has one part (two elementwise rules would follow each
other), and equal shapes are neighbours, so that a batch of them is a view (k, n, m) and nothing is
copied for a batched update. Owners are chosen over all of a rank's virtual stages together, by the
FLOPs of a matrix's update. Source: docs/design.md, "MuonClip with ZeRO-1".
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch

from k2train.architecture.tensors import TensorSpec
from k2train.layout.ownership import assign_owners, row_ranges
from k2train.model.pieces import Piece
from k2train.update_rules.rule import Rules, UpdateRule

Replication = Literal["dp", "edp"]


@dataclasses.dataclass(frozen=True)
class Share:
    """Rows [start, stop) of one tensor, updated by `owner` with `rule`.

    They are entries [offset, offset + num_elements) of its bucket.
    """

    piece: Piece
    spec: TensorSpec
    rule: UpdateRule
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
    rule: UpdateRule

    @property
    def replication(self) -> Replication:
        return "dp" if self.spec.expert is None else "edp"

    @property
    def bucket(self) -> tuple[int, Replication, str]:
        return self.virtual_stage, self.replication, str(self.piece.parameter.dtype)


def plan_buckets(
    pieces: Mapping[int, Sequence[Piece]],
    catalogue: Mapping[str, TensorSpec],
    rules: Rules,
    num_owners: Mapping[Replication, int],
) -> list[BucketPlan]:
    """The buckets of one rank, the same on every rank that holds the same pieces.

    pieces: by virtual stage, those that live on the rank. catalogue: the model's tensors by name.
    num_owners: ranks that share out the states of a tensor. Buckets come by virtual stage, dense
    before experts. Tensors that are not trained are left out.
    """
    tensors = list(_trained(pieces, catalogue, rules))
    shares: dict[tuple[int, Replication, str], list[Share]] = {tensor.bucket: [] for tensor in tensors}
    for replication, owners in num_owners.items():
        ours = [tensor for tensor in tensors if tensor.replication == replication]
        for tensor, share in _cut(ours, owners):
            shares[tensor.bucket].append(share)
    return [
        _lay_out(bucket, shares[bucket], num_owners[bucket[1]]) for bucket in sorted(shares) if shares[bucket]
    ]


def _trained(
    pieces: Mapping[int, Sequence[Piece]], catalogue: Mapping[str, TensorSpec], rules: Rules
) -> Iterator[_Tensor]:
    for virtual_stage, of_stage in pieces.items():
        for piece in of_stage:
            spec = catalogue[piece.name]
            if not spec.trained:
                continue
            shape = tuple(piece.view(piece.parameter).shape)
            assert shape == spec.shape, f"{piece.name} is {shape}, the catalogue says {spec.shape}"
            yield _Tensor(virtual_stage, piece, spec, rules.of(spec.role))


def _cut(tensors: Sequence[_Tensor], num_owners: int) -> Iterator[tuple[_Tensor, Share]]:
    """Tensors that are updated whole to owners by cost, everything else in rows."""
    whole = [tensor for tensor in tensors if tensor.rule.whole_matrices]
    costs = [tensor.rule.matmul_flops(tensor.spec.shape) for tensor in whole]
    for tensor, owner in zip(whole, assign_owners(costs, num_owners), strict=True):
        yield tensor, Share(tensor.piece, tensor.spec, tensor.rule, owner, 0, tensor.spec.shape[0])
    for tensor in tensors:
        if not tensor.rule.whole_matrices:
            for owner, (start, stop) in enumerate(row_ranges(tensor.spec.shape[0], num_owners)):
                if stop > start:
                    yield tensor, Share(tensor.piece, tensor.spec, tensor.rule, owner, start, stop)


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
    """By owner; matrices by shape, then each rule's decayed rows and its others.

    The sort is stable, so equals stay in model order.
    """
    whole = share.rule.whole_matrices
    return share.owner, not whole, share.shape if whole else (), share.rule.name, not share.spec.decayed


@dataclasses.dataclass(frozen=True)
class OwnershipRow:
    """A line of the start-up table.

    owners: ranks of the replication group, more than one where rows are cut.
    """

    name: str
    rule: UpdateRule
    shape: tuple[int, ...]
    replication: Replication
    owners: tuple[int, ...]
    num_elements: int


def ownership_table(plans: Sequence[BucketPlan]) -> list[OwnershipRow]:
    """Every trained tensor of these buckets, with its rule and who updates it, in order of name."""
    by_name: dict[str, list[tuple[Share, Replication]]] = {}
    for plan in plans:
        for share in plan.shares:
            by_name.setdefault(share.name, []).append((share, plan.replication))
    return [_row(name, found) for name, found in sorted(by_name.items())]


def _row(name: str, found: Sequence[tuple[Share, Replication]]) -> OwnershipRow:
    share, replication = found[0]
    owners = tuple(share.owner for share, _ in found)
    return OwnershipRow(name, share.rule, share.spec.shape, replication, owners, share.spec.num_elements)
