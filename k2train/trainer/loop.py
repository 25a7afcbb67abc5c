"""The training loop: steps, evaluations, checkpoints, metrics; and how it ends.

It ends in one of three ways: all steps done; asked to stop (SIGTERM, Ctrl-C), after the step in
hand, with a checkpoint; or a non-finite loss or gradient, which updates nothing, so the last
checkpoint is still good.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from k2train.config.convert import to_dict
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.data.read_ahead import ReadAhead
from k2train.device.build import build_device
from k2train.estimate.step import model_flops_utilisation, step_flops
from k2train.ops.backend import choose_backend
from k2train.ops.dtypes import DTYPES
from k2train.optim.adam import check_host_adam
from k2train.parallel.communicator import Communicator, World
from k2train.parallel.groups import Groups, build_groups
from k2train.parallel.objects import broadcast_object
from k2train.program import Program
from k2train.telemetry.metrics import MetricsFile
from k2train.telemetry.progress import ProgressDisplay, Rhythm, open_progress
from k2train.telemetry.sinks import Sink, open_sinks
from k2train.telemetry.tables import output_console
from k2train.trainer.activations import host_traffic, non_finite_tiles
from k2train.trainer.agreement import agree_on_program
from k2train.trainer.batch import AHEAD, Batch, open_batches
from k2train.trainer.build import Run, build_program, build_run, choose_device, open_corpus
from k2train.trainer.checkpoint_clock import SAVE_NUMBER, CheckpointClock
from k2train.trainer.dry_run import dry_run
from k2train.trainer.evaluate import evaluate
from k2train.trainer.finish import Outcome, print_end
from k2train.trainer.garbage import GarbageControl
from k2train.trainer.host_memory import check_host_memory
from k2train.trainer.run_dir import open_run_dir
from k2train.trainer.saving import resume, save, start_from
from k2train.trainer.signals import StopRequest
from k2train.trainer.start_up import print_start
from k2train.trainer.step import StepMetrics, train_step
from k2train.trainer.trace import start_recorder, write_recording
from k2train.trainer.worlds import WorldKind, choose_world, fit_to_launcher, run_world

LOGGED_SHARES = 40
"""Lines of progress over a run whose steps are quick, beside those of its first steps."""


class TrainingDivergedError(RuntimeError):
    """A loss or gradient norm that is not finite."""


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the loop reports to; a rank other than 0 has no metrics file and reports nothing.

    ideal_seconds: of a step whose useful FLOPs run at the cluster's peak rate, which is what MFU is
    measured against; None on a CPU, for which no cluster file promises a rate.
    """

    run_dir: Path
    metrics: MetricsFile | None
    sinks: Sequence[Sink]
    progress: ProgressDisplay
    ideal_seconds: float | None = None

    def write(self, line: dict[str, Any]) -> None:
        """A step's numbers to metrics.jsonl and the sinks."""
        if self.metrics is not None:
            self.metrics.write(line)
        for sink in self.sinks:
            sink.write(line)

    def say(self, text: str) -> None:
        if self.metrics is not None:
            self.progress.say(text)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The program of a config that fits its launcher, and what follows from the two before any rank
    starts."""

    program: Program
    device: torch.device
    kind: WorldKind

    def groups(self, world: World) -> Groups:
        """One rank's groups. Every rank must call it; ranks that are processes first make sure that
        they compiled the same program.

        Raises ConfigError where they did not, and where the world's channels do not suffice.
        """
        layout = self.program.layout

        def agree(everybody: Communicator) -> None:
            # Threads share this very program, so there is nothing to agree on.
            if self.kind == "processes":
                agree_on_program(self.program, everybody, world.device)

        return build_groups(layout.grid, world, layout.relay_ranks, self.program.messages, agree)


def prepare(config: Config) -> Prepared:
    """Decide program, device and world; reads no data, makes no tensor.

    Raises ConfigError for what cannot run.
    """
    config = fit_to_launcher(config, os.environ)
    program = build_program(config)
    device = choose_device(config)
    kind = choose_world(config, program.layout, device, os.environ)
    choose_backend(config.ops, config.model, config.train.dtype, config.optim.tau, device)
    check_host_adam(config.optim, DTYPES[config.train.dtype])
    check_host_memory(program, kind, device, os.environ)
    return Prepared(program, device, kind)


def train(config: Config, words: Sequence[str] = ()) -> Outcome:
    """Run `config` from its start or from its newest checkpoint.

    words: the user's, to print how to resume. Under a launcher every process calls it. Raises
    ConfigError for what cannot run, TrainingDivergedError for a non-finite loss.
    """
    ready = prepare(config)
    program, config = ready.program, ready.program.config
    corpus = open_corpus(config)
    with StopRequest() as stop, GarbageControl() as garbage:
        # One thread runs at a time, so a reader of its own would only take turns with the ranks.
        ahead = 0 if ready.kind == "threads" else AHEAD

        def run_rank(world: World) -> Outcome:
            run = build_run(program, corpus, ready.groups(world), build_device(world.device))
            return train_rank(run, stop, garbage, words, ahead)

        return run_world(ready.kind, program.layout.world, ready.device, config.train, run_rank)


def train_rank(
    run: Run, stop: StopRequest, garbage: GarbageControl, words: Sequence[str], ahead: int
) -> Outcome:
    """One rank's part of `train`; rank 0 alone prints and draws. ahead: batches read before their
    step."""
    run_dir, checkpoint, changes = agree_on_run_dir(run)
    done = start(run, checkpoint)
    dry_run(run)
    if run.is_main:
        print_start(run, run_dir, done, changes, output_console())
    outcome = run_steps(run, run_dir, done, stop, garbage, ahead)
    if run.is_main:
        print_end(run, outcome, words, output_console())
    return outcome


def agree_on_run_dir(run: Run) -> tuple[Path, Path | None, list[str]]:
    """Rank 0 opens the run directory and tells the others: directory, checkpoint to resume, changed
    keys.

    Every rank must call it, and on every rank a ConfigError of rank 0's is raised.
    """
    answer: dict[str, Any] = {}
    if run.is_main:
        try:
            run_dir, checkpoint, changes = open_run_dir(run.config)
            answer = {
                "run_dir": str(run_dir),
                "checkpoint": checkpoint and str(checkpoint),
                "changes": changes,
            }
        except ConfigError as error:
            answer = {"error": [error.field, str(error.value), error.rule, error.remedy]}
    answer = broadcast_object(run.groups.world, answer, 0, run.device.torch_device)
    if "error" in answer:
        raise ConfigError(*answer["error"])
    found = answer["checkpoint"]
    return Path(answer["run_dir"]), Path(found) if found else None, answer["changes"]


def start(run: Run, checkpoint: Path | None) -> int:
    """Weights from the checkpoint to resume, from train.init_from, or from the seed; the steps
    already done."""
    if checkpoint is not None:
        return resume(run, checkpoint)
    if run.config.train.init_from is not None:
        start_from(run, Path(run.config.train.init_from))
    return 0


def run_steps(
    run: Run, run_dir: Path, done: int, stop: StopRequest, garbage: GarbageControl, ahead: int
) -> Outcome:
    """Take the steps from `done` to train.steps, or until any rank is asked to stop.

    Every rank must call it.
    """
    config = run.config
    stopped_by: str | None = None
    clock = CheckpointClock(config.train.checkpoint_every_minutes, run.is_main)
    with open_outputs(run, run_dir, done) as outputs, open_batches(run, done, ahead) as batches:
        while done < config.train.steps and stopped_by is None:
            number = take_step(run, batches, outputs, lambda: clock.number(stop.number))
            done += 1
            garbage.after_step(done)
            stopped_by = signal.Signals(number).name if number > SAVE_NUMBER else None
            if number or checkpoint_due(config, done):
                save(run, run_dir, done)
                clock.saved()
        run.optimizer.finish_gather()
    return Outcome(run_dir, done, stopped_by if done < config.train.steps else None)


@contextlib.contextmanager
def open_outputs(run: Run, run_dir: Path, done: int) -> Iterator[Outputs]:
    """Rank 0's metrics file, sinks and progress display; the other ranks report nothing."""
    telemetry = run.config.telemetry
    if not run.is_main:
        yield Outputs(run_dir, None, [], open_progress("none", "step", 0))
        return
    ideal = ideal_seconds(run.config, run.layout.world, run.device.torch_device)
    display = open_progress(telemetry.progress, "step", run.config.train.steps, done, rhythm_of(run.config))
    with MetricsFile(run_dir / "metrics.jsonl", keep_steps=done) as metrics, display as progress:
        sinks = open_sinks(telemetry, run_dir, to_dict(run.config))
        try:
            yield Outputs(run_dir, metrics, sinks, progress, ideal)
        finally:
            for sink in sinks:
                sink.close()


def rhythm_of(config: Config) -> Rhythm:
    """When a line of progress is due in a log file."""
    telemetry, steps = config.telemetry, config.train.steps
    every = telemetry.log_every_steps or max(1, steps // LOGGED_SHARES)
    return Rhythm(telemetry.log_first_steps, telemetry.log_every_seconds, every)


def ideal_seconds(config: Config, world: int, device: torch.device) -> float | None:
    """Seconds of a step with an MFU of 1, by the plan's FLOPs and the cluster's rate; None on a
    CPU.

    world: ranks.
    """
    if device.type == "cpu":
        return None
    train, peak = config.train, config.cluster.matmul_flops_per_second
    flops = step_flops(config.model, train.seq_len, train.global_batch_tokens)
    return model_flops_utilisation(flops, 1.0, world, peak)


def take_step(run: Run, batches: ReadAhead[Batch], outputs: Outputs, asked: Callable[[], int]) -> int:
    """One step on the next batch, its evaluation where one is due, and its line of metrics.

    asked: the number of a signal by which this rank was asked to stop, or SAVE_NUMBER, or 0.
    Returns the largest that some rank was asked before the step's end, the same on every rank.
    Every rank must call it: see `train_step` and `evaluate`.
    """
    began = time.perf_counter()
    batch = batches.take()
    recorder = start_recorder(run, batch.index)
    step = train_step(run, batch, recorder, asked)
    seconds = time.perf_counter() - began
    if recorder is not None:
        write_recording(run, recorder, outputs.run_dir)
    line: dict[str, Any] = {
        **step.reported(),
        "tokens_per_second": run.config.train.global_batch_tokens / seconds,
        "step_seconds": seconds,
        "data_wait_seconds": batches.wait_seconds,
        **({"mfu": outputs.ideal_seconds / seconds} if outputs.ideal_seconds is not None else {}),
        "peak_bytes": run.device.peak_bytes(),
        **host_traffic(run.activations),
    }
    if not step.finite:
        outputs.write(line)
        tiles = non_finite_tiles(run.activations, run.groups.world, run.device)
        raise TrainingDivergedError(diverged_message(step, outputs.run_dir, tiles))
    # Before the evaluation: the step is done, and a display that says otherwise seems to hang.
    outputs.progress.advance(1, step_note(line))
    if evaluation_due(run.config, step.step):
        line |= evaluated(run, step.step, outputs)
    outputs.write(line)
    return step.stop_signal


def step_note(line: Mapping[str, Any]) -> str:
    """What is worth knowing of a step while a run goes on."""
    mfu = f"  MFU {100 * line['mfu']:.1f} %" if "mfu" in line else ""
    return f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s{mfu}"


def evaluated(run: Run, steps_done: int, outputs: Outputs) -> dict[str, float]:
    """The evaluation after `steps_done` steps, for the step's line.

    Every rank must call it: see `evaluate`.
    """
    outputs.progress.note("evaluating on held-out text")
    evaluation = evaluate(run, evaluation_tokens(run.config, steps_done))
    if evaluation is None:
        return {}
    outputs.say(
        f"step {steps_done}: held-out loss {evaluation.loss:.4f}, {evaluation.bits_per_byte:.3f} bits per byte"
    )
    return {"eval_loss": evaluation.loss, "eval_bits_per_byte": evaluation.bits_per_byte}


def checkpoint_due(config: Config, done: int) -> bool:
    every = config.train.checkpoint_every_steps
    return done == config.train.steps or (every > 0 and done % every == 0)


def evaluation_due(config: Config, done: int) -> bool:
    every = config.train.eval_every_steps
    return done == config.train.steps or (every > 0 and done % every == 0)


def evaluation_tokens(config: Config, done: int) -> int:
    return config.train.final_eval_tokens if done == config.train.steps else config.train.eval_tokens


def diverged_message(step: StepMetrics, run_dir: Path, fp8_tiles: Mapping[str, int]) -> str:
    """What happened, what was kept, and what to try.

    fp8_tiles: where FP8 storage met values that are not finite.
    """
    names = ", ".join(f"activations.{name} ({count} tiles)" for name, count in fp8_tiles.items())
    seen = f"  FP8 storage met values that are not finite in {names}.\n" if names else ""
    return (
        f"step {step.step}: loss {step.loss}, gradient norm {step.grad_norm}, lr {step.lr:.3g}, max logit {step.max_logit:.4g}: "
        f"not finite, so nothing was updated and training stops.\n{seen}"
        f"  The last checkpoint in {run_dir / 'checkpoints'} is untouched.\n"
        f"  Resume from it with a lower learning rate (optim.lr_phases), or look at the data of this step."
    )
