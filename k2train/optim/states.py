"""What an owner keeps for its stretch of a bucket: FP32 masters, Muon's momentum, Adam's moments.

All are flat tensors with the order of the stretch, so that equal-shaped matrices are batches (k, n, m) and all of
AdamW is two calls. Where they live is their residence's business; the arithmetic, and the batches it is done in, are the
same for every residence, so the results are the same bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from k2train.layout.staging import matrices_at_once
from k2train.optim.adam import AdamStates, AdamW
from k2train.optim.buckets import Bucket
from k2train.optim.muon import MuonRule, muon_update
from k2train.optim.residence import Residence
from k2train.optim.shares import Share


class OwnedTensor(NamedTuple):
    """Rows [start, start + tensor.shape[0]) of a state whose whole shape is `shape`; names as in checkpoints.

    tensor is the live state, not a copy.
    """

    name: str
    tensor: torch.Tensor
    start: int
    shape: tuple[int, ...]


class MuonBatch(NamedTuple):
    """Equal-shaped matrices that are neighbours in the stretch: k of (n, m) from `start`."""

    start: int
    shape: tuple[int, int, int]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start : self.start + self.num_elements].view(self.shape)


class OwnedStates:
    """Optimizer states of one rank for one bucket.

    The stretch is [matrices | decayed rows | other rows]; momentum covers the first part, the moments the rest.
    """

    def __init__(self, bucket: Bucket, residence: Residence) -> None:
        self.bucket = bucket
        self._residence = residence
        self.batches = muon_batches(bucket)
        self._num_muon = sum(batch.num_elements for batch in self.batches)
        self._num_decayed = sum(
            share.num_elements for share in bucket.owned if share.method == "adamw" and share.spec.decayed
        )
        num_elements = bucket.own_gradient.numel()
        self.master = residence.new_state(num_elements)
        self.momentum = residence.new_state(self._num_muon)
        self.exp_avg = residence.new_state(num_elements - self._num_muon)
        self.exp_avg_sq = residence.new_state(num_elements - self._num_muon)
        self.read_parameters()

    @property
    def num_bytes(self) -> int:
        """Bytes of masters, momentum and moments on this rank."""
        states = (self.master, self.momentum, self.exp_avg, self.exp_avg_sq)
        return sum(t.numel() * t.element_size() for t in states)

    def read_parameters(self) -> None:
        """Set the masters to the parameters' values."""
        for share in self.bucket.owned:
            share.in_bucket(self.master).copy_(share.view(share.piece.parameter.detach()))

    def muon_step(self, lr: float, rule: MuonRule) -> int:
        """Muon for every owned matrix; returns how many. The bucket's own gradient must be reduced and scaled."""
        homes = [(batch.view(self.master), batch.view(self.momentum)) for batch in self.batches]
        for (master, momentum), batch in zip(self._residence.stream(homes), self.batches, strict=True):
            muon_update(master, momentum, batch.view(self.bucket.own_gradient), lr, rule)
        return sum(batch.shape[0] for batch in self.batches)

    def adamw_step(self, lr: float, adamw: AdamW, num_updates: int) -> None:
        """AdamW for every owned row. num_updates: updates made before this one."""
        rows = AdamStates(self.master[self._num_muon :], self.exp_avg, self.exp_avg_sq)
        gradient = self.bucket.own_gradient[self._num_muon :]
        for decayed, part in ((True, slice(self._num_decayed)), (False, slice(self._num_decayed, None))):
            states = rows.part(part)
            for entries, piece in self._residence.gradients(gradient[part]):
                if piece.numel():
                    adamw.update(states.part(entries), piece, lr, decayed, num_updates)

    def start_gather(self) -> None:
        """Send the masters on their way to every replica; see `Bucket.start_gather`."""
        self.bucket.start_gather(self._residence.upload(self.master))

    def tensors(self) -> Iterator[OwnedTensor]:
        """Every owned state under its checkpoint name."""
        for share in self.bucket.owned:
            for kind, tensor in self._of_share(share):
                yield OwnedTensor(f"{kind}/{share.name}", tensor, share.start, share.spec.shape)

    def masters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and master of every owned matrix that Muon updates."""
        for share in self.bucket.owned:
            if share.method == "muon":
                yield share.name, share.in_bucket(self.master)

    def _of_share(self, share: Share) -> Iterator[tuple[str, torch.Tensor]]:
        yield "master", share.in_bucket(self.master)
        if share.method == "muon":
            yield "momentum", share.in_bucket(self.momentum)
            return
        moments = dataclasses.replace(share, offset=share.offset - self._num_muon)
        yield "exp_avg", moments.in_bucket(self.exp_avg)
        yield "exp_avg_sq", moments.in_bucket(self.exp_avg_sq)


def muon_batches(bucket: Bucket) -> list[MuonBatch]:
    """The matrices that this rank owns in a bucket: neighbours of one shape, as many as go together."""
    shares = [share for share in bucket.owned if share.method == "muon"]
    batches = []
    for (n, m), same in itertools.groupby(shares, key=lambda share: share.shape):
        matrices = list(same)
        size = matrices_at_once((n, m))
        for first in range(0, len(matrices), size):
            count = min(size, len(matrices) - first)
            batches.append(MuonBatch(matrices[first].offset, (count, n, m)))
    return batches
