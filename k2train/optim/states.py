"""What an owner keeps for its stretch of a bucket: FP32 masters, Muon's momentum, Adam's moments.

All are flat tensors with the order of the stretch, so that equal-shaped matrices are batches (k, n, m) and all of
AdamW is two calls. The AdamW arithmetic is torch's fused kernel (Loshchilov & Hutter, arXiv 1711.05101), which updates
masters in place.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw

from k2train.optim.buckets import Bucket
from k2train.optim.muon import MuonRule, muon_update
from k2train.optim.shares import Share

# Entries in one batched Newton-Schulz: bounds its temporaries (about 5 of them) to some hundred megabytes.
MAX_BATCH_ELEMENTS = 1 << 26


@dataclasses.dataclass(frozen=True)
class AdamRule:
    """AdamW's constants."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class OwnedTensor(NamedTuple):
    """Rows [start, start + tensor.shape[0]) of a state whose whole shape is `shape`; names as in checkpoints.

    tensor is the live state, not a copy.
    """

    name: str
    tensor: torch.Tensor
    start: int
    shape: tuple[int, ...]


class _Batch(NamedTuple):
    """Equal-shaped matrices that are neighbours in the stretch: k of (n, m) from `start`."""

    start: int
    shape: tuple[int, int, int]

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        k, n, m = self.shape
        return flat[self.start : self.start + k * n * m].view(k, n, m)


class OwnedStates:
    """Optimizer states of one rank for one bucket.

    The stretch is [matrices | decayed rows | other rows]; momentum covers the first part, the moments the rest.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        muon = [share for share in bucket.owned if share.method == "muon"]
        self._num_muon = sum(share.num_elements for share in muon)
        self._num_decayed = sum(
            share.num_elements for share in bucket.owned if share.method == "adamw" and share.spec.decayed
        )
        self.batches = _batches(muon)
        gradient = bucket.own_gradient
        self.master = torch.empty_like(gradient)
        self.momentum = torch.zeros_like(gradient[: self._num_muon])
        self.exp_avg = torch.zeros_like(gradient[self._num_muon :])
        self.exp_avg_sq = torch.zeros_like(gradient[self._num_muon :])
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
        for batch in self.batches:
            muon_update(batch.view(self.master), batch.view(self.momentum),
                        batch.view(self.bucket.own_gradient), lr, rule)  # fmt: skip
        return sum(batch.shape[0] for batch in self.batches)

    def adamw_step(self, lr: float, rule: AdamRule, num_updates: int) -> None:
        """AdamW for every owned row. num_updates: updates made before this one."""
        decayed = self._num_muon + self._num_decayed
        self._adamw(slice(self._num_muon, decayed), lr, rule, rule.weight_decay, num_updates)
        self._adamw(slice(decayed, None), lr, rule, 0.0, num_updates)

    def _adamw(self, part: slice, lr: float, rule: AdamRule, weight_decay: float, num_updates: int) -> None:
        master = self.master[part]
        if not master.numel():
            return
        moments = slice(
            part.start - self._num_muon, None if part.stop is None else part.stop - self._num_muon
        )
        step = torch.tensor(float(num_updates), device=master.device)
        adamw([master], [self.bucket.own_gradient[part]], [self.exp_avg[moments]], [self.exp_avg_sq[moments]],
              [], [step], fused=True, amsgrad=False, beta1=rule.beta1, beta2=rule.beta2, lr=lr,
              weight_decay=weight_decay, eps=rule.eps, maximize=False)  # fmt: skip

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


def _batches(shares: Sequence[Share]) -> list[_Batch]:
    """Neighbours of one shape, at most MAX_BATCH_ELEMENTS together."""
    batches = []
    for (n, m), same in itertools.groupby(shares, key=lambda share: share.shape):
        matrices = list(same)
        size = max(1, MAX_BATCH_ELEMENTS // (n * m))
        for first in range(0, len(matrices), size):
            count = min(size, len(matrices) - first)
            batches.append(_Batch(matrices[first].offset, (count, n, m)))
    return batches
