"""The batch of a step: tokens, targets and their weights, cut into the microbatches of one rank.

The first stage needs tokens, the last needs targets and weights, and a stage between them needs
neither: it knows from the config how many microbatches come and how large they are.

The loss is the weighted sum of token losses over the *global* batch, divided by its normaliser.
That is the sum of the weights unless the batch says another, so neither the layout nor the
microbatches enter it. Pre-training has weights of one, whose sum is known: nothing is added up or
sent for it.

Letters: N sequences of this rank, B of a microbatch, S tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from k2train.data.read_ahead import ReadAhead
from k2train.model.loss import CrossEntropy, Loss
from k2train.ops.dtypes import DTYPES, accumulation_dtype
from k2train.trainer.build import Run

AHEAD = 2
"""Batches that are read before their step: one may be on its way from the disk while one waits."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """This rank's share of the global batch of step `index` (counted from 0), on the host.

    Ranks of one data-parallel place, which differ in their stage alone, have the same share.

    tokens: ids (N, S), int64; needed where the embedding is.
    targets: ids (N, S), int64; needed where the head is. What is not to be counted has weight 0.
    weights: (N, S), floating, of any sign and size, 0 for a target that does not count. None is 1
        for every target. Either all ranks of the last stage have weights or none has.
    normaliser: what the weighted sum of losses is divided by, the same on every rank, above 0. None
        takes the sum of the weights over the global batch. Where that sum is not above 0 there is
        no
        mean: the loss is NaN and the step updates nothing. Signed weights, whose sum says nothing,
        need a normaliser of their own.

    Raises ValueError for a normaliser that is not above 0.
    """

    index: int
    tokens: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    normaliser: float | None = None

    def __post_init__(self) -> None:
        if self.normaliser is not None and not self.normaliser > 0:
            raise ValueError(f"a batch's normaliser must be above 0, not {self.normaliser}")


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """A rank's microbatches on its device, by number: tokens (B, S), losses. Empty where not
    needed."""

    tokens: Sequence[torch.Tensor]
    losses: Sequence[Loss]


def needs_tokens(run: Run) -> bool:
    """Whether a virtual stage of this rank begins with the embedding."""
    return any(model.part.embedding for model in run.models.values())


def needs_targets(run: Run) -> bool:
    """Whether a virtual stage of this rank ends with the head."""
    return any(model.part.head for model in run.models.values())


def read_batch(run: Run, index: int) -> Batch:
    """This rank's share of step `index` from the run's corpus; a stage that needs nothing reads
    nothing.

    Raises ConfigError for what is wrong with the corpus. It communicates with nobody.
    """
    if not (needs_tokens(run) or needs_targets(run)):
        return Batch(index)
    train = run.config.train
    sequences = train.global_batch_tokens // train.seq_len
    share = sequences // run.groups.dp.size
    rows = run.corpus.batch("train", index * sequences + run.groups.dp.rank * share, share)
    return Batch(
        index,
        tokens=rows[:, :-1] if needs_tokens(run) else None,
        targets=rows[:, 1:] if needs_targets(run) else None,
    )


def open_batches(run: Run, done: int, ahead: int) -> ReadAhead[Batch]:
    """The corpus's batches of the steps from `done` on. ahead: 0 reads each within its step.

    A rank that needs no data has no thread. Ranks that are threads should read within the step: one
    of them runs at a time, so a reader would hide nothing and take the core from the others.
    """
    ahead = ahead if needs_tokens(run) or needs_targets(run) else 0
    return ReadAhead(lambda index: read_batch(run, index), range(done, run.config.train.steps), ahead)


def place_batch(run: Run, batch: Batch) -> Microbatches:
    """Copy to the device what this rank needs of the batch, and cut it into microbatches.

    Where the batch has weights and no normaliser, every rank of the last stage must call it: they
    add up the weights. Raises ValueError for a part that is missing or has another shape than the
    run's.
    """
    size = run.config.train.microbatch_size
    tokens: Sequence[torch.Tensor] = ()
    if needs_tokens(run):
        tokens = _upload(run, batch.tokens, "tokens").split(size)
    return Microbatches(tokens, _losses(run, batch) if needs_targets(run) else ())


def _losses(run: Run, batch: Batch) -> Sequence[Loss]:
    """The loss of every microbatch, divided by the normaliser."""
    train = run.config.train
    targets = _upload(run, batch.targets, "targets").split(train.microbatch_size)
    if batch.weights is None:
        scale = 1.0 / (batch.normaliser or train.global_batch_tokens)
        return [CrossEntropy(part, scale) for part in targets]
    weights = _normalised(run, _upload(run, batch.weights, "weights"), batch.normaliser)
    parts = zip(targets, weights.split(train.microbatch_size), strict=True)
    return [CrossEntropy(part, weights=part_weights) for part, part_weights in parts]


def _normalised(run: Run, weights_NS: torch.Tensor, normaliser: float | None) -> torch.Tensor:
    """weights_NS / normaliser in the type of sums, without a host wait. None: every rank of the
    last stage calls it, for the sum over them."""
    weights_NS = weights_NS.double()
    wide = accumulation_dtype(DTYPES[run.config.train.dtype])
    if normaliser is not None:
        return (weights_NS / normaliser).to(wide)
    total = weights_NS.sum()
    run.groups.dp.all_reduce(total)
    return (weights_NS / torch.where(total > 0, total, torch.nan)).to(wide)


def _upload(run: Run, part: torch.Tensor | None, name: str) -> torch.Tensor:
    train = run.config.train
    shape = (run.num_microbatches * train.microbatch_size, train.seq_len)
    if part is None or tuple(part.shape) != shape:
        found = "missing" if part is None else f"{tuple(part.shape)}"
        raise ValueError(f"the batch's {name} on rank {run.groups.world.rank}: {found}, expected {shape}")
    return run.device.upload(part)
