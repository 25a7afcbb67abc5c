"""One optimizer step on a batch: execute the action list, update, report.

The loss is the weighted mean over the global batch's tokens, whatever the number of microbatches or
ranks (trainer.batch).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

from k2train.model.context import MicrobatchContext, Statistics
from k2train.model.saved import KeepEverything
from k2train.runtime.executor import run_actions
from k2train.runtime.recorder import Watcher
from k2train.runtime.stage import StepInputs
from k2train.schedule import Step
from k2train.trainer.batch import Batch, Microbatches, place_batch
from k2train.trainer.build import Run
from k2train.trainer.totals import Reported, StepTotals


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step computed, the same on every rank. grad_norm: before clipping.

    stop_signal: one by which a rank was asked to stop, 0 for none.
    """

    step: int
    tokens: int
    loss: float
    balance_loss: float
    grad_norm: float
    lr: float
    max_logit: float
    clipped_heads: int
    load_violation: float
    stop_signal: int

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.balance_loss, self.grad_norm)))

    def reported(self) -> dict[str, float]:
        """Its part of a line of metrics.jsonl."""
        values = dataclasses.asdict(self)
        del values["stop_signal"]
        return values


def train_step(
    run: Run, batch: Batch, recorder: Watcher | None = None, stop_signal: Callable[[], int] = lambda: 0
) -> StepMetrics:
    """Take step `batch.index` on this rank's share of its global batch. With a non-finite loss or
    gradient norm nothing is updated.

    stop_signal: asked once, late in the step, for the number of a signal this rank has received, 0
    for none.

    Every rank must call it: the collectives of the schedule and of the optimizer, on whose sum and
    maximum the statistics ride. The all-gather of updated parameters is still under way when it
    returns; the next pass over a virtual stage waits for its own. Raises ValueError where the batch
    does not fit the run.
    """
    statistics = Statistics()
    run_schedule(run, batch, statistics, recorder)
    lr = run.learning_rate.at(batch.index)
    totals = StepTotals(run.config.model, statistics, stop_signal(), run.device.torch_device)
    # The losses are among the riders: one that is not finite makes every gradient suspect.
    result = run.optimizer.step(
        lr, statistics.max_logits, run.config.train.grad_clip_norm, finish=False, riders=totals.riders
    )
    loads = totals.loads()
    if result.finite:
        for model in run.models.values():
            model.update_correction_biases(loads, run.config.train.bias_update_rate)
    reported = Reported(*result.report)
    return StepMetrics(
        step=batch.index + 1,
        tokens=(batch.index + 1) * run.config.train.global_batch_tokens,
        loss=reported.loss,
        balance_loss=reported.balance_loss,
        grad_norm=result.grad_norm,
        lr=lr,
        max_logit=result.max_logit,
        clipped_heads=result.clipped_heads,
        load_violation=reported.load_violation,
        stop_signal=int(reported.stop_signal),
    )


def run_schedule(run: Run, batch: Batch, statistics: Statistics, recorder: Watcher | None = None) -> None:
    """Execute this stage's action list on its share of the batch. Every rank must call it.

    Gradients end in the optimizer's buffers, and each virtual stage's reduce-scatter starts with
    its last one.
    """
    stage = run.training
    inputs = step_inputs(run, place_batch(run, batch), statistics)
    steps: Iterable[Step] = run.schedule.stages[run.pp_rank]
    if recorder is not None:
        inputs, steps = dataclasses.replace(inputs, wait=recorder.wait), recorder.watch(steps)
    with stage.step(inputs):
        run_actions(steps, stage)


def step_inputs(run: Run, microbatches: Microbatches, statistics: Statistics) -> StepInputs:
    """What the stage works on, from the microbatches that `place_batch` has cut."""
    train, optimizer = run.config.train, run.optimizer

    def make_context(virtual_stage: int, microbatch: int) -> MicrobatchContext:
        return MicrobatchContext(
            num_sequences=train.microbatch_size,
            gradients=optimizer.gradients,
            weight_grads=run.training.queue if run.config.schedule.split_weight_grad else None,
            key=(virtual_stage, microbatch),
            statistics=statistics,
            loss=microbatches.losses[microbatch] if microbatches.losses else None,
            balance_loss_scale=train.balance_loss_alpha / (run.num_microbatches * run.groups.dp.size),
            saved=KeepEverything() if run.activations is None else run.activations.microbatch(),
            device=run.device,
        )

    return StepInputs(
        tokens=microbatches.tokens.__getitem__,
        num_rows=train.microbatch_size * train.seq_len,
        make_context=make_context,
        num_microbatches=run.num_microbatches,
        before_forward=optimizer.finish_gather,
        weight_gradients_done=optimizer.start_reduce,
    )
