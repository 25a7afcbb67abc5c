"""Gradient buckets: FP32 sums of all microbatches, laid out by owner.

A bucket's life in one step:

    add ... add      microbatch gradients are summed into views of the flat buffer
    reduce-scatter   every owner gets the sum over replicas of its own stretch, in place
    (update)         the owner reads its stretch
    all-gather       the buffer, now free, carries the updated values in the compute type to all
    copy, zero       into the parameters; ready for the next step

FP32 because thousands of small BF16 terms would be lost in a BF16 sum; FP64 in float64 runs.
Source: docs/design.md, "MuonClip with ZeRO-1".

Shape suffixes: N rows that are added to, C columns of them.

Letters: N rows, C columns of a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch

from k2train.ops.dtypes import accumulation_dtype
from k2train.ops.weight_grad import RowRun
from k2train.optim.shares import BucketPlan, Share
from k2train.parallel.communicator import Communicator, Work

# Shorter runs than this, on average, go through one indexed operation instead of one operation
# each: a norm of 7168 entries that 256 owners share would be 256 kernels for every microbatch.
SHORT_RUN_ELEMENTS = 1024


@dataclasses.dataclass(frozen=True)
class _Run:
    """Entries [start, stop) of a flattened parameter, and where they lie in a bucket."""

    start: int
    stop: int
    offset: int

    @property
    def end(self) -> int:
        """Where it ends in the bucket."""
        return self.offset + self.stop - self.start


class Bucket:
    """One bucket on one rank."""

    def __init__(self, plan: BucketPlan, group: Communicator, device: torch.device) -> None:
        assert len(plan.splits) == group.size
        self.plan = plan
        self.group = group
        self.flat = torch.zeros(plan.num_elements, dtype=accumulation_dtype(plan.dtype), device=device)
        first = sum(plan.splits[: group.rank])
        self._own = slice(first, first + plan.splits[group.rank])
        # The owned shares with offsets from the start of the rank's own stretch.
        self.owned = [
            dataclasses.replace(share, offset=share.offset - first) for share in plan.owned(group.rank)
        ]
        self.runs = _runs_by_parameter(plan.shares)
        self.row_runs = {
            parameter: _row_runs(parameter, runs, self.flat)
            for parameter, runs in self.runs.items()
            if parameter.dim() > 1
        }
        self._start_of_row: dict[torch.Tensor, torch.Tensor] = {}
        self._scattered = {
            parameter: _index(runs).to(device) for parameter, runs in self.runs.items() if _are_short(runs)
        }
        self._reducing: Work | None = None
        self._gathering: Work | None = None

    @property
    def own_gradient(self) -> torch.Tensor:
        """The rank's own stretch, flat.

        After `finish_reduce` it is the sum over all replicas.
        """
        return self.flat[self._own]

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the flat gradient of a parameter to its entries."""
        index = self._scattered.get(parameter)
        if index is not None:
            # No entry occurs twice, so the sums do not depend on an order.
            self.flat.index_add_(0, index, gradient.to(self.flat.dtype))
            return
        for run in self.runs[parameter]:
            self.flat[run.offset : run.end].add_(gradient[run.start : run.stop])

    def add_rows(
        self, parameter: torch.Tensor, rows_N: torch.Tensor, gradient_NC: torch.Tensor, first_column: int
    ) -> None:
        """Add to columns of some rows of a matrix (`GradientSink.add_rows`)."""
        if parameter not in self._start_of_row:
            starts = _starts_of_rows(self.runs[parameter], parameter.shape[1])
            self._start_of_row[parameter] = starts.to(self.flat.device)
        start_N = self._start_of_row[parameter].index_select(0, rows_N)
        # Rows lie anywhere in the bucket. A window begins at each of its entries, so a row is the
        # window at its start.
        windows = self.flat.unfold(0, gradient_NC.shape[1], 1)
        windows.index_add_(0, start_N + first_column, gradient_NC)

    def start_reduce(self) -> None:
        """Begin the reduce-scatter, unless it has begun. Collective over the replication group."""
        if self._reducing is None:
            self._reducing = self.group.start_reduce_scatter(self.own_gradient, self.flat, self.plan.splits)

    def finish_reduce(self) -> None:
        """Wait for the reduce-scatter."""
        assert self._reducing is not None, "no reduce-scatter was started"
        self._reducing.wait()
        self._reducing = None

    def start_gather(self, own_master: Iterable[torch.Tensor]) -> None:
        """Begin the all-gather of updated values, which ends the gradients.

        own_master: the masters of the rank's stretch in consecutive flat pieces, on the bucket's
        device. Collective over the replication group.
        """
        staging = self._staging()
        filled = self._own.start
        for piece in own_master:
            staging[filled : filled + piece.numel()].copy_(piece)
            filled += piece.numel()
        assert filled == self._own.stop, f"{filled - self._own.start} masters for {self._own}"
        self._gathering = self.group.start_all_gather(staging, staging[self._own], self.plan.splits)

    def finish_gather(self) -> None:
        """Copy gathered values into the parameters and make the bucket ready for gradients.

        Does nothing where no all-gather was begun.
        """
        if self._gathering is None:
            return
        self._gathering.wait()
        self._gathering = None
        staging = self._staging()
        for parameter, runs in self.runs.items():
            flat_parameter = parameter.detach().view(-1)
            index = self._scattered.get(parameter)
            if index is not None:
                flat_parameter.copy_(staging.index_select(0, index))
                continue
            for run in runs:
                flat_parameter[run.start : run.stop].copy_(staging[run.offset : run.end])
        self.flat.zero_()

    def _staging(self) -> torch.Tensor:
        return self.flat.view(self.plan.dtype)[: self.plan.num_elements]


class GradBuffers:
    """A GradientSink over a rank's buckets."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = tuple(buckets)
        # All pieces of a parameter live on one virtual stage and in one replication group, so in
        # one bucket.
        self._holder = {parameter: bucket for bucket in buckets for parameter in bucket.runs}

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the gradient of a module parameter, of any floating type, to its sums. Local."""
        assert gradient.shape == parameter.shape, f"gradient {gradient.shape}, parameter {parameter.shape}"
        self._holder[parameter].add(parameter, gradient.detach().reshape(-1))

    def runs(self, parameter: torch.Tensor) -> tuple[RowRun, ...]:
        """Stretches of the bucket that hold rows of the parameter's matrices.

        Products are added to them in place.
        """
        return self._holder[parameter].row_runs[parameter]

    def add_rows(
        self, parameter: torch.Tensor, rows_N: torch.Tensor, gradient_NC: torch.Tensor, first_column: int = 0
    ) -> None:
        """Add to columns of some rows of a matrix, in the type of the sums. Local."""
        self._holder[parameter].add_rows(parameter, rows_N, gradient_NC, first_column)

    def zero(self) -> None:
        """Forget all sums."""
        for bucket in self.buckets:
            bucket.flat.zero_()


def _runs_by_parameter(shares: Iterable[Share]) -> dict[torch.Tensor, list[_Run]]:
    runs: dict[torch.Tensor, list[_Run]] = {}
    for share in shares:
        runs.setdefault(share.piece.parameter, []).append(_run(share))
    return {parameter: _merge(of_parameter) for parameter, of_parameter in runs.items()}


def _run(share: Share) -> _Run:
    parameter = share.piece.parameter
    view = share.view(parameter)
    whole = parameter.is_contiguous() and view.is_contiguous()
    assert whole, f"{share.name} is not one stretch of its parameter"
    start = int(view.storage_offset()) - int(parameter.storage_offset())
    return _Run(start, start + share.num_elements, share.offset)


def _merge(runs: Iterable[_Run]) -> list[_Run]:
    """Join runs that go on in both the parameter and the bucket.

    So a fused parameter takes few operations.
    """
    merged: list[_Run] = []
    for run in sorted(runs, key=lambda run: run.start):
        last = merged[-1] if merged else None
        if last and last.stop == run.start and last.end == run.offset:
            merged[-1] = _Run(last.start, run.stop, last.offset)
        else:
            merged.append(run)
    return merged


def _row_runs(parameter: torch.Tensor, runs: Sequence[_Run], flat: torch.Tensor) -> tuple[RowRun, ...]:
    """The runs of a matrix or a stack of them as rows, cut where a matrix ends.

    A share is rows of a matrix of the model, and a matrix of the model is a parameter, a matrix of
    a stack, or rows of either (`Piece.index`). So a run begins and ends where a row does.
    """
    rows, inner = parameter.shape[-2:]
    cut: list[RowRun] = []
    for run in runs:
        assert run.start % inner == 0 == run.stop % inner, f"{run} cuts rows of {inner} entries"
        first, last = run.start // inner, run.stop // inner
        buffer = flat[run.offset : run.end].view(-1, inner)
        for matrix in range(first // rows, -(-last // rows)):
            begin, end = max(first, matrix * rows), min(last, (matrix + 1) * rows)
            sums = buffer[begin - first : end - first]
            cut.append(RowRun(matrix, begin - matrix * rows, end - matrix * rows, sums))
    return tuple(cut)


def _starts_of_rows(runs: Sequence[_Run], inner: int) -> torch.Tensor:
    """Where in its bucket every row of a matrix begins, flat int64. The runs cover it, in order."""
    return torch.cat([torch.arange(run.offset, run.end, inner) for run in runs])


def _are_short(runs: Sequence[_Run]) -> bool:
    return len(runs) > 1 and sum(run.stop - run.start for run in runs) < SHORT_RUN_ELEMENTS * len(runs)


def _index(runs: Sequence[_Run]) -> torch.Tensor:
    """The entries of a bucket that hold a parameter's, in the parameter's order.

    The runs cover the parameter, in order.
    """
    return torch.cat([torch.arange(run.offset, run.end) for run in runs])
