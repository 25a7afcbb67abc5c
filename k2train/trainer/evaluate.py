"""Loss on held-out text, which training never sees, in an order that is always the same."""

from __future__ import annotations

import dataclasses

import torch

from k2train.model.context import MicrobatchContext, Statistics
from k2train.runtime.executor import run_actions
from k2train.runtime.stage import StepInputs
from k2train.schedule import Action, Kind, Schedule
from k2train.schedule.p2p import receive_of, sends_of
from k2train.trainer.build import Run
from k2train.trainer.compression import bits_per_byte
from k2train.trainer.totals import losses_of_rank

# The target that the loss leaves out (torch's default ignore_index).
IGNORED = -100


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


def evaluate(run: Run, max_tokens: int) -> Evaluation | None:
    """Mean loss over the first sequences of the validation split, at most `max_tokens` and at most one pass over it.

    None where that is not one whole sequence. Every rank must call it: the messages and all-to-alls of forward passes,
    and a sum over the world.
    """
    seq_len = run.config.train.seq_len
    num_sequences = min(max_tokens // seq_len, run.corpus.num_samples("valid"))
    if num_sequences == 0:
        return None
    batch = run.corpus.batch("valid", 0, num_sequences)
    run.optimizer.finish_gather()
    statistics = Statistics()
    forward_only(run, local_microbatches(run, batch), statistics, 1.0 / (num_sequences * seq_len))
    losses = losses_of_rank(statistics, run.device)
    run.groups.world.all_reduce(losses)
    return Evaluation(
        losses[0].item(), num_sequences, num_sequences * seq_len, run.corpus.num_bytes(batch[:, 1:])
    )


def local_microbatches(run: Run, batch: torch.Tensor) -> list[torch.Tensor]:
    """This data-parallel rank's microbatches of `batch` (n, S + 1), on the device.

    Expert-parallel ranks exchange rows in step, so every rank needs equally many microbatches of equal size: missing
    sequences are filled up, with targets that are ignored.
    """
    size, dp = run.config.train.microbatch_size, run.groups.dp
    missing = -len(batch) % (size * dp.size)
    filler = batch[:1].expand(missing, -1).clone()
    filler[:, 1:] = IGNORED
    padded = torch.cat([batch, filler]).to(run.device)
    return list(padded.split(size))[dp.rank :: dp.size]


def forward_only(
    run: Run, microbatches: list[torch.Tensor], statistics: Statistics, loss_scale: float
) -> None:
    """Forward passes without anything saved, in the order of `forward_actions`."""

    def make_context(virtual_stage: int, microbatch: int) -> MicrobatchContext:
        part = microbatches[microbatch]
        return MicrobatchContext(num_sequences=len(part), key=(virtual_stage, microbatch), statistics=statistics,
                                 loss_scale=loss_scale, targets=part[:, 1:])  # fmt: skip

    tokens = [part[:, :-1].clamp_min(0) for part in microbatches]
    stage = run.evaluation
    with stage.step(StepInputs(tokens.__getitem__, make_context, len(microbatches))):
        run_actions(forward_actions(run.schedule, run.pp_rank, len(microbatches)), stage)


def forward_actions(schedule: Schedule, stage: int, num_microbatches: int) -> list[Action]:
    """The forwards of one stage, with their messages.

    pp microbatches at a time go through the first virtual stage of every stage, then through the second, and so on: with
    that many under way no stage waits for the one behind it, and two stages exchange messages in one order.
    """
    pp = schedule.num_stages
    mine = sorted(schedule.virtual_stages_of(stage))
    actions: list[Action] = []
    for first in range(0, num_microbatches, pp):
        for virtual_stage in mine:
            for microbatch in range(first, min(first + pp, num_microbatches)):
                forward = Action(Kind.F, virtual_stage, microbatch)
                with_messages = (receive_of(schedule, forward), forward, sends_of(schedule, forward))
                actions += [action for action in with_messages if action is not None]
    return actions
