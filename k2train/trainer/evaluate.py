"""Loss on held-out text, which training never sees, in an order that is always the same.

Letters: N windows, S tokens of one.
"""

from __future__ import annotations

import dataclasses

import torch

from k2train.model.context import MicrobatchContext, Statistics
from k2train.model.loss import CrossEntropy
from k2train.ops.cross_entropy import IGNORED_TARGET
from k2train.runtime.executor import run_actions
from k2train.runtime.stage import StepInputs
from k2train.trainer.build import Run
from k2train.trainer.compression import bits_per_byte
from k2train.trainer.totals import losses_of_rank


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss in nats a token over `num_tokens` targets, which stand for `num_bytes` bytes of text."""

    loss: float
    num_sequences: int
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.loss, self.num_tokens, self.num_bytes)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Held-out text cut for evaluation: inputs and targets (N, S). A target that another window
    scores is IGNORED_TARGET."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def split(self, size: int) -> list[Windows]:
        parts = zip(self.inputs.split(size), self.targets.split(size), strict=True)
        return [Windows(inputs, targets) for inputs, targets in parts]


def evaluate(run: Run, max_tokens: int) -> Evaluation | None:
    """Mean loss over the first sequences of the validation split, at most `max_tokens` and at most
    one pass over it.

    Every token of them is scored once, from train.eval_overlap of a window before it or more (but
    at the start of a text). None where there is not one whole sequence. Every rank must call it:
    the messages and all-to-alls of forward passes, and a sum over the world.
    """
    train = run.config.train
    num_sequences = min(max_tokens // train.seq_len, run.corpus.num_samples("valid"))
    if num_sequences == 0:
        return None
    streams = run.corpus.held_out_streams(num_sequences)
    num_tokens = sum(len(stream) - 1 for stream in streams)
    run.optimizer.finish_gather()
    statistics = Statistics()
    windows = cut(streams, train.seq_len, train.eval_overlap_tokens)
    forward_only(run, local_microbatches(run, windows), statistics, 1.0 / num_tokens)
    losses = losses_of_rank(statistics, run.device.torch_device)
    run.groups.world.all_reduce(losses)
    num_bytes = sum(run.corpus.num_bytes(stream[1:]) for stream in streams)
    loss, _ = run.device.read(losses, "evaluation")
    return Evaluation(loss, num_sequences, num_tokens, num_bytes)


def cut(streams: list[torch.Tensor], seq_len: int, context: int) -> Windows:
    """Windows of seq_len inputs over each stream, which has at least seq_len + 1 tokens; every
    target is scored once.

    A stream's first window scores all its targets, each later one those that lie past the one
    before it, which are its last. The last window ends with the stream.
    """
    inputs, targets = [], []
    for stream in streams:
        last, scored = len(stream) - 1 - seq_len, 0
        for start in [*range(0, last, seq_len - context), last]:
            window = stream[start + 1 : start + seq_len + 1].clone()
            window[: scored - start] = IGNORED_TARGET
            scored = start + seq_len
            inputs.append(stream[start : start + seq_len])
            targets.append(window)
    return Windows(torch.stack(inputs), torch.stack(targets))


def local_microbatches(run: Run, windows: Windows) -> list[Windows]:
    """This data-parallel rank's microbatches of the windows, on the device.

    Expert-parallel ranks exchange rows in step, so every rank needs equally many microbatches of
    equal size: missing windows are filled up, with targets that are ignored.
    """
    dp, size = run.groups.dp, eval_microbatch_size(run)
    missing = -len(windows.inputs) % (size * dp.size)
    inputs = torch.cat([windows.inputs, windows.inputs[:1].expand(missing, -1)])
    ignored = torch.full_like(windows.targets[:1], IGNORED_TARGET)
    targets = torch.cat([windows.targets, ignored.expand(missing, -1)])
    windows = Windows(run.device.upload(inputs), run.device.upload(targets))
    return windows.split(size)[dp.rank :: dp.size]


def eval_microbatch_size(run: Run) -> int:
    """Windows that pass through the pipeline together in evaluation."""
    train = run.config.train
    return train.eval_microbatch_size or train.microbatch_size


def forward_only(run: Run, microbatches: list[Windows], statistics: Statistics, loss_scale: float) -> None:
    """Forward passes without anything saved, in the order of `Program.evaluation`. Every rank must
    call it."""

    def make_context(virtual_stage: int, microbatch: int) -> MicrobatchContext:
        part = microbatches[microbatch]
        return MicrobatchContext(
            num_sequences=len(part.inputs),
            key=(virtual_stage, microbatch),
            statistics=statistics,
            loss=CrossEntropy(part.targets, loss_scale),
            device=run.device,
        )

    tokens = [part.inputs for part in microbatches]
    num_rows = eval_microbatch_size(run) * run.config.train.seq_len
    stage = run.evaluation
    with stage.step(StepInputs(tokens.__getitem__, num_rows, make_context, len(microbatches))):
        run_actions(run.program.evaluation(len(microbatches)).stages[run.pp_rank], stage)
