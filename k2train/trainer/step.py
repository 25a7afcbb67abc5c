"""One optimizer step: read the global batch, execute the action list, update, report.

The loss is the mean over the global batch's tokens, whatever the number of microbatches or ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch

from k2train.model.context import MicrobatchContext, Statistics
from k2train.model.routing import load_violation
from k2train.model.saved import KeepEverything
from k2train.runtime.executor import run_actions
from k2train.runtime.recorder import Recorder
from k2train.runtime.stage import StepInputs
from k2train.schedule import Step
from k2train.trainer.build import Run


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step computed, the same on every rank."""

    step: int
    tokens: int
    loss: float
    balance_loss: float
    grad_norm: float
    lr: float
    max_logit: float
    clipped_heads: int
    load_violation: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(run: Run, index: int, recorder: Recorder | None = None) -> StepMetrics:
    """Take step `index` (counted from 0). With a non-finite loss or gradient norm nothing is updated.

    Every rank must call it: the collectives of the schedule, of the optimizer and of the statistics. The all-gather of
    updated parameters is still under way when it returns; the next pass over a virtual stage waits for its own.
    """
    statistics = Statistics()
    run_schedule(run, index, statistics, recorder)
    lr = run.learning_rate.at(index)
    loss, balance_loss = reduce_losses(run, statistics)
    clip_norm = run.config.train.grad_clip_norm
    # A loss that is not finite makes every gradient suspect, even where their norm happens to be finite.
    scale = 1.0 if math.isfinite(loss) else math.nan
    result = run.optimizer.step(lr, statistics.max_logits, clip_norm, gradient_scale=scale, finish=False)
    loads = reduce_loads(run, statistics)
    if result.finite:
        for model in run.models.values():
            model.update_correction_biases(loads, run.config.train.bias_update_rate)
    return StepMetrics(
        step=index + 1,
        tokens=(index + 1) * run.config.train.global_batch_tokens,
        loss=loss,
        balance_loss=balance_loss,
        grad_norm=result.grad_norm,
        lr=lr,
        max_logit=result.max_logit,
        clipped_heads=result.clipped_heads,
        load_violation=worst_violation(run, loads),
    )


def run_schedule(run: Run, index: int, statistics: Statistics, recorder: Recorder | None = None) -> None:
    """Execute this stage's action list on its share of step `index`'s sequences.

    Gradients end in the optimizer's buffers, and each virtual stage's reduce-scatter starts with its last one.
    """
    stage = run.training
    inputs = step_inputs(run, local_batch(run, index), statistics)
    steps: Iterable[Step] = run.schedule.stages[run.pp_rank]
    if recorder is not None:
        inputs, steps = dataclasses.replace(inputs, wait=recorder.wait), recorder.watch(steps)
    with stage.step(inputs):
        run_actions(steps, stage)


def step_inputs(run: Run, batch: torch.Tensor, statistics: Statistics) -> StepInputs:
    """What the stage works on: microbatch m is rows m * size .. (m + 1) * size of this rank's (n, S + 1) sequences."""
    train, optimizer = run.config.train, run.optimizer
    microbatches = batch.split(train.microbatch_size)

    def make_context(virtual_stage: int, microbatch: int) -> MicrobatchContext:
        return MicrobatchContext(
            num_sequences=train.microbatch_size,
            gradients=optimizer.gradients,
            weight_grads=run.training.queue,
            key=(virtual_stage, microbatch),
            statistics=statistics,
            loss_scale=1.0 / train.global_batch_tokens,
            balance_loss_scale=train.balance_loss_alpha / (run.num_microbatches * run.groups.dp.size),
            targets=microbatches[microbatch][:, 1:],
            saved=KeepEverything() if run.activations is None else run.activations.microbatch(virtual_stage),
        )

    return StepInputs(
        tokens=lambda microbatch: microbatches[microbatch][:, :-1],
        make_context=make_context,
        num_microbatches=run.num_microbatches,
        before_forward=lambda virtual_stage: optimizer.finish_gather(run.local_index[virtual_stage]),
        weight_gradients_done=lambda virtual_stage: optimizer.start_reduce(run.local_index[virtual_stage]),
    )


def local_batch(run: Run, index: int) -> torch.Tensor:
    """This data-parallel rank's sequences of step `index`, (n, S + 1) on the device."""
    train = run.config.train
    sequences = train.global_batch_tokens // train.seq_len
    share = sequences // run.groups.dp.size
    start = index * sequences + run.groups.dp.rank * share
    return run.corpus.batch("train", start, share).to(run.device)


def reduce_losses(run: Run, statistics: Statistics) -> tuple[float, float]:
    """Loss and balance loss of the global batch: one sum over the world, and the step's wait for the device."""
    zero = torch.zeros((), dtype=torch.float64, device=run.device)
    parts = [zero if part is None else part.double() for part in (statistics.loss, statistics.balance_loss)]
    total = torch.stack(parts)
    run.groups.world.all_reduce(total)
    loss, balance_loss = total.tolist()
    return loss, balance_loss


def reduce_loads(run: Run, statistics: Statistics) -> dict[int, torch.Tensor]:
    """Tokens of the global batch that chose each expert, for the MoE layers of this stage: one sum over the stage."""
    layers = sorted(statistics.expert_loads)
    if not layers:
        return {}
    loads_LE = torch.stack([statistics.expert_loads[layer] for layer in layers])
    run.groups.dp.all_reduce(loads_LE)
    return dict(zip(layers, loads_LE, strict=True))


def worst_violation(run: Run, loads: Mapping[int, torch.Tensor]) -> float:
    """The load violation of the worst layer of the whole model: one maximum over the world."""
    worst = torch.tensor([load_violation(list(loads.values()))], dtype=torch.float64, device=run.device)
    run.groups.world.all_reduce(worst, "max")
    return float(worst.item())
