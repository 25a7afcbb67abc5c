"""One optimizer step with ZeRO-1, from summed gradients to updated parameters.

    reduce-scatter   every bucket, so that owners hold whole summed matrices
    agree            one sum over the world, of the squared norm (every share has one owner, so each
                     is counted once), and one maximum, of the logits; whatever else a step has to
                     sum or compare rides along
    update           each tensor's rule (Muon, AdamW) on the FP32 masters
    QK-Clip          on the masters of the heads whose logits grew past tau
    all-gather       updated values in the compute type, into every replica's parameters

All arithmetic on weights stands in update_rules/ and qk_clip.py; this file only gathers, applies
and scatters. Source: Kimi K2 report, section 2.1; docs/design.md, "MuonClip with ZeRO-1".

Shape suffixes: L layers of the model, H attention heads.

Letters: L layers of the model, H heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from k2train.device.protocol import Device
from k2train.optim.buckets import Bucket, GradBuffers
from k2train.optim.qk_clip_step import QkClipper, ReducedLogits
from k2train.optim.residence import Residence
from k2train.optim.shares import OwnershipRow, ownership_table
from k2train.optim.states import OwnedStates, OwnedTensor
from k2train.parallel.communicator import Communicator

# Rows [start, stop) of the stored tensor of that name.
Lookup = Callable[[str, int, int], torch.Tensor]
NUM_UPDATES = "num_updates"


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank but for num_orthogonalised.

    grad_norm: global L2 norm before clipping. clip_scale: what the gradients were multiplied by to
    clip them. clipped_heads: heads QK-Clip shrank, over all layers. max_logit: largest of the step,
    -inf where none was given. finite: False where the norm was not finite; then nothing was
    updated. num_orthogonalised: matrices this rank updated whole (Newton-Schulz). report: the
    riders' numbers.
    """

    grad_norm: float
    clip_scale: float
    clipped_heads: int
    max_logit: float
    finite: bool
    num_orthogonalised: int
    report: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Riders:
    """A rank's numbers that travel with the step's own; in place they become the world's.

    sums, maxima: FP64 vectors on the device, of the same lengths on every rank. report(sums,
    maxima): an FP64 vector on the device of what the host wants to know of the world's; it is read
    with the norm, so that the host waits once.
    """

    sums: torch.Tensor
    maxima: torch.Tensor
    report: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class _Agreed:
    """What the host has read of the whole model; QK-Clip's factors stay on the device."""

    norm: float
    finite: bool
    max_logit: float
    clipped_heads: int
    report: tuple[float, ...]
    logits: ReducedLogits


class Optimizer:
    """Owns masters and states of this rank's shares.

    `gradients` is where the backward pass puts its gradients.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        world: Communicator,
        qk_clip: QkClipper,
        residence: Residence,
        device: Device,
    ) -> None:
        self.gradients = GradBuffers(buckets)
        self.num_updates = 0
        self._buckets = tuple(buckets)
        self._residence, self._device = residence, device
        self._states = [OwnedStates(bucket, residence) for bucket in buckets]
        self._world = world
        self._qk_clip = qk_clip

    @torch.no_grad()
    def step(
        self,
        lr: float,
        max_logits: Mapping[int, torch.Tensor] | None = None,
        clip_norm: float | None = None,
        finish: bool = True,
        riders: Riders | None = None,
    ) -> StepResult:
        """Update every parameter from the gradients summed since the last step, and forget them.

        lr: learning rate. max_logits: layer -> (H,) largest pre-softmax logits of this rank's
        microbatches, for the layers of this rank. clip_norm: largest global gradient norm; None
        never clips. finish: False leaves the all-gathers running; then `finish_gather` must be
        called before the parameters are read or gradients added. riders: see there. With a
        non-finite norm, or a sum among the riders that is not finite, nothing is updated and the
        result says so. Collectives, in this order, for every rank of the world: a reduce-scatter
        for each bucket not begun yet, a maximum and a sum over the world, an all-gather for each
        bucket. The host waits once, for what it has to know of them. Raises ValueError where
        QK-Clip is on and logits of a layer of this rank are missing.
        """
        for bucket in self._buckets:
            bucket.start_reduce()
        agreed = self._agree(max_logits or {}, riders)
        if not agreed.finite:
            self.gradients.zero()
            return StepResult(agreed.norm, 1.0, 0, agreed.max_logit, False, 0, agreed.report)
        clip_scale = 1.0 if clip_norm is None else min(1.0, clip_norm / (agreed.norm + 1e-6))
        orthogonalised = self._update(lr, clip_scale)
        if agreed.clipped_heads:
            self._clip(agreed.logits)
        self._start_gather()
        if finish:
            self.finish_gather()
        return StepResult(
            agreed.norm,
            clip_scale,
            agreed.clipped_heads,
            agreed.max_logit,
            True,
            orthogonalised,
            agreed.report,
        )

    def start_reduce(self, virtual_stage: int) -> None:
        """Begin the reduce-scatters of a virtual stage whose last weight gradient is in.

        `step` begins the rest. Collective over the replication groups, so every rank of the stage
        calls it in the same order.
        """
        for bucket in self._buckets:
            if bucket.plan.virtual_stage == virtual_stage:
                bucket.start_reduce()

    @torch.no_grad()
    def finish_gather(self, virtual_stage: int | None = None) -> None:
        """Wait for updated parameters, of one virtual stage or of all.

        Does nothing where nothing runs.
        """
        for bucket in self._buckets:
            if virtual_stage in (None, bucket.plan.virtual_stage):
                bucket.finish_gather()

    def ownership(self) -> list[OwnershipRow]:
        """The start-up table: every trained tensor this rank holds, its rule and its owners."""
        return ownership_table([bucket.plan for bucket in self._buckets])

    @property
    def state_bytes(self) -> int:
        """Bytes of masters and states on this rank."""
        return sum(states.num_bytes for states in self._states)

    @property
    def states_on_host(self) -> bool:
        """Whether masters and states live in host memory."""
        return self._residence.on_host

    @property
    def staging(self) -> list[torch.Tensor]:
        """Device memory that host states pass through in a step, all that they hold there.

        There is none for states on the device.
        """
        return self._residence.staging

    @property
    def staging_bytes(self) -> int:
        """Bytes of `staging`."""
        return sum(memory.nbytes for memory in self.staging)

    def state(self) -> Iterator[OwnedTensor]:
        """The states this rank owns, and on the world's first rank the number of updates.

        They are live tensors, not copies. Over all ranks every row of every state comes exactly
        once. Waits for states on their way to the host.
        """
        self._residence.drain()
        for states in self._states:
            yield from states.tensors()
        if self._world.rank == 0:
            yield OwnedTensor(NUM_UPDATES, torch.tensor([self.num_updates]), 0, (1,))

    @torch.no_grad()
    def load(self, lookup: Lookup) -> None:
        """Take over states written under any layout, and set every replica's parameters.

        lookup(name, start, stop) gives rows [start, stop) of a state. Every rank of the world must
        call it: an all-gather for each bucket.
        """
        self._residence.drain()
        for states in self._states:
            for name, tensor, start, _ in states.tensors():
                tensor.copy_(lookup(name, start, start + tensor.shape[0]))
        self.num_updates = int(lookup(NUM_UPDATES, 0, 1).item())
        self._start_gather()
        self.finish_gather()

    @torch.no_grad()
    def read_parameters(self) -> None:
        """Set the masters from parameters that were changed from outside (an import). Local."""
        self._residence.drain()
        for states in self._states:
            states.read_parameters()

    def _agree(self, max_logits: Mapping[int, torch.Tensor], riders: Riders | None) -> _Agreed:
        """The whole model's gradient norm, whether all sums are finite, and its logits.

        A maximum and a sum over the world; waits for the reduce-scatters, and then once for the
        device.
        """
        nothing = self._buckets[0].flat.new_zeros(0, dtype=torch.float64)
        riders = riders or Riders(nothing, nothing)
        logits_LH = self._qk_clip.of_rank(max_logits)
        maxima = torch.cat([logits_LH.flatten().double(), riders.maxima])
        comparing = self._world.start_all_reduce(maxima, "max")
        for bucket in self._buckets:
            bucket.finish_reduce()
        sums = torch.cat([self._squared_norm(), riders.sums])
        self._world.all_reduce(sums)
        comparing.wait()
        riders.sums.copy_(sums[1:])
        riders.maxima.copy_(maxima[logits_LH.numel() :])
        logits = self._qk_clip.decide(maxima[: logits_LH.numel()].view_as(logits_LH))
        report = nothing if riders.report is None else riders.report(riders.sums, riders.maxima)
        own = torch.stack([sums[0].sqrt(), sums.isfinite().all()])
        norm, finite, largest, clipped, *rest = self._device.read(
            torch.cat([own, logits.numbers, report]), "step"
        )
        return _Agreed(norm, bool(finite), largest, int(clipped), tuple(rest), logits)

    def _squared_norm(self) -> torch.Tensor:
        """The square of the L2 norm of the gradients this rank owns (1,), FP64."""
        shares = [share.in_bucket(bucket.own_gradient) for bucket in self._buckets for share in bucket.owned]
        # Share by share and then in FP64: whole matrices give the same term under every layout.
        norms = [torch.linalg.vector_norm(share).double() for share in shares]
        zero = self._buckets[0].flat.new_zeros((), dtype=torch.float64)
        return torch.stack([zero, *norms]).square().sum().reshape(1)

    def _update(self, lr: float, scale: float) -> int:
        for bucket in self._buckets:
            if scale != 1.0:
                bucket.own_gradient.mul_(scale)
        # The masters that the last step sent to the replicas were read by then; this makes it
        # certain.
        self._residence.drain()
        # All matrices first: on a GPU that only queues work, which goes on while the host updates
        # rows.
        orthogonalised = sum(states.update_matrices(lr, self.num_updates) for states in self._states)
        for states in self._states:
            states.update_rows(lr, self.num_updates)
        self.num_updates += 1
        return orthogonalised

    def _clip(self, logits: ReducedLogits) -> None:
        """QK-Clip on the masters, where they live."""
        self._residence.drain()
        for states in self._states:
            self._qk_clip.apply(states.whole_masters(), logits)

    def _start_gather(self) -> None:
        """Begin to send masters to every replica; gradients are forgotten.

        An all-gather for each bucket.
        """
        for states in self._states:
            states.start_gather()
