"""The training loop: steps, evaluations, checkpoints, metrics; and how it ends.

It ends in one of three ways: all steps done; asked to stop (SIGTERM, Ctrl-C), after the step in hand, with a
checkpoint; or a non-finite loss or gradient, which updates nothing, so the last checkpoint is still good.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from k2train.checkpoint import clean_leftovers
from k2train.config.convert import to_dict
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.parallel.groups import single_rank_groups
from k2train.parallel.processes import process_world
from k2train.telemetry.metrics import MetricsFile
from k2train.telemetry.progress import ProgressDisplay, open_progress
from k2train.telemetry.sinks import Sink, open_sinks
from k2train.trainer.build import Run, build_layouts, build_run, choose_device
from k2train.trainer.evaluate import evaluate
from k2train.trainer.finish import print_end
from k2train.trainer.run_dir import open_run_dir
from k2train.trainer.saving import resume, save, start_from
from k2train.trainer.signals import StopRequest
from k2train.trainer.start_up import print_start
from k2train.trainer.step import StepMetrics, train_step


class TrainingDivergedError(RuntimeError):
    """A loss or gradient norm that is not finite."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended. stopped_by names the signal, None where all steps were done."""

    run_dir: Path
    steps_done: int
    stopped_by: str | None


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where the loop reports to."""

    run_dir: Path
    metrics: MetricsFile
    sinks: Sequence[Sink]
    progress: ProgressDisplay


def train(config: Config, words: Sequence[str] = ()) -> Outcome:
    """Run `config` from its start or from its newest checkpoint. `words` are the user's, to print how to resume.

    Raises ConfigError for what cannot run, TrainingDivergedError for a non-finite loss.
    """
    layout, schedule = build_layouts(config)
    if config.world in ("threads", "processes"):
        raise ConfigError(
            "world", config.world, "training runs on one rank so far", "set world=auto or single"
        )
    device = choose_device(config)
    console = Console(soft_wrap=False)
    with process_world("single", device) as world:
        run = build_run(config, layout, schedule, single_rank_groups(world.group("world", [0])), device)
        run_dir, checkpoint, changes = open_run_dir(config)
        clean_leftovers(run_dir / "checkpoints")
        done = start(run, checkpoint)
        print_start(run, run_dir, done, changes, console)
        outcome = run_steps(run, run_dir, done)
        print_end(run, outcome.run_dir, outcome.steps_done, outcome.stopped_by, words, console)
    return outcome


def start(run: Run, checkpoint: Path | None) -> int:
    """Weights from the checkpoint to resume, from train.init_from, or from the seed; the steps already done."""
    if checkpoint is not None:
        return resume(run, checkpoint)
    if run.config.train.init_from is not None:
        start_from(run, Path(run.config.train.init_from))
    return 0


def run_steps(run: Run, run_dir: Path, done: int) -> Outcome:
    """Take the steps from `done` to train.steps, or until asked to stop."""
    config = run.config
    display = open_progress(config.telemetry.progress, "step", config.train.steps, done)
    with (
        MetricsFile(run_dir / "metrics.jsonl", keep_steps=done) as metrics,
        display as progress,
        StopRequest() as stop,
    ):
        outputs = Outputs(run_dir, metrics, open_sinks(config.telemetry, run_dir, to_dict(config)), progress)
        try:
            while done < config.train.steps and stop.name is None:
                take_step(run, done, outputs)
                done += 1
                if stop.name is not None or checkpoint_due(config, done):
                    save(run, run_dir, done)
        finally:
            for sink in outputs.sinks:
                sink.close()
    return Outcome(run_dir, done, stop.name if done < config.train.steps else None)


def take_step(run: Run, index: int, outputs: Outputs) -> None:
    """One step, its evaluation where one is due, and its line of metrics."""
    began = time.perf_counter()
    step = train_step(run, index)
    seconds = time.perf_counter() - began
    line: dict[str, Any] = {
        **dataclasses.asdict(step),
        "tokens_per_second": run.config.train.global_batch_tokens / seconds,
        "step_seconds": seconds,
        "peak_bytes": peak_bytes(run.device),
    }
    if not step.finite:
        outputs.metrics.write(line)
        raise TrainingDivergedError(diverged_message(step, outputs.run_dir))
    if evaluation_due(run.config, step.step):
        evaluation = evaluate(run, evaluation_tokens(run.config, step.step))
        if evaluation is not None:
            line |= {"eval_loss": evaluation.loss, "eval_bits_per_byte": evaluation.bits_per_byte}
            outputs.progress.say(f"step {step.step}: held-out loss {evaluation.loss:.4f}, "
                                 f"{evaluation.bits_per_byte:.3f} bits per byte")  # fmt: skip
    outputs.metrics.write(line)
    for sink in outputs.sinks:
        sink.write(line)
    outputs.progress.advance(1, f"loss {step.loss:.4f}  {line['tokens_per_second']:,.0f} tokens/s")


def checkpoint_due(config: Config, done: int) -> bool:
    every = config.train.checkpoint_every_steps
    return done == config.train.steps or (every > 0 and done % every == 0)


def evaluation_due(config: Config, done: int) -> bool:
    every = config.train.eval_every_steps
    return done == config.train.steps or (every > 0 and done % every == 0)


def evaluation_tokens(config: Config, done: int) -> int:
    return config.train.final_eval_tokens if done == config.train.steps else config.train.eval_tokens


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far: on the device for CUDA, of the process for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def diverged_message(step: StepMetrics, run_dir: Path) -> str:
    """What happened, what was kept, and what to try."""
    return (
        f"step {step.step}: loss {step.loss}, gradient norm {step.grad_norm}, lr {step.lr:.3g}, max logit {step.max_logit:.4g}: "
        f"not finite, so nothing was updated and training stops.\n"
        f"  The last checkpoint in {run_dir / 'checkpoints'} is untouched.\n"
        f"  Resume from it with a lower learning rate (optim.lr_phases), or look at the data of this step."
    )
