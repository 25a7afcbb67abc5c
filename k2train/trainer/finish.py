"""What a run says when it ends: the held-out loss beside gzip, where the results are, a picture
of the loss."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from k2train.checkpoint import latest_checkpoint
from k2train.config.folders import FLAG
from k2train.config.folders import VARIABLE as FOLDER_VARIABLE
from k2train.telemetry.metrics import read_metrics
from k2train.telemetry.plot import draw_loss_curve
from k2train.trainer.build import Run
from k2train.trainer.compression import gzip_bits_per_byte
from k2train.trainer.worlds import LOCAL_RUN


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. stopped_by names the signal, None where all steps were done."""

    run_dir: Path
    steps_done: int
    stopped_by: str | None


def print_end(run: Run, outcome: Outcome, words: Sequence[str], console: Console) -> None:
    """Print the end of a run and draw its loss curve."""
    run_dir = outcome.run_dir
    metrics = read_metrics(run_dir / "metrics.jsonl")
    lines = []
    if outcome.stopped_by is not None:
        lines.append(
            f"stopped by {outcome.stopped_by} after step {outcome.steps_done} of {run.config.train.steps}"
        )
        lines.append(f"resume with: {resume_command(run_dir, words, os.environ)}")
    elif metrics and metrics[-1].get("eval_bits_per_byte") is not None:
        lines.append(comparison(run, metrics[-1]["eval_bits_per_byte"]))
    lines.append(f"metrics:    {run_dir / 'metrics.jsonl'}")
    lines.append(f"checkpoint: {latest_checkpoint(run_dir / 'checkpoints')}")
    if metrics:
        picture = run_dir / "loss.png"
        draw_loss_curve(metrics, picture, run_dir.name)
        lines.append(f"loss curve: {picture}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def comparison(run: Run, bits_per_byte: float) -> str:
    """The model beside gzip -9 on the same held-out text."""
    train = run.config.train
    text = run.corpus.held_out_text(train.final_eval_tokens // train.seq_len)
    gzip = gzip_bits_per_byte(text)
    overlap = train.eval_overlap_tokens
    seen = f" with {overlap} to {train.seq_len - 1} tokens before each" if overlap else ""
    return f"held-out text ({len(text):,} bytes): {bits_per_byte:.3f} bits per byte{seen}; gzip -9 needs {gzip:.3f}"


def resume_command(run_dir: Path, words: Sequence[str], environment: Mapping[str, str]) -> str:
    """The command line that goes on from the newest checkpoint: launcher, its settings, the user's
    folder and words.

    The launch scripts say themselves how they were started (launch/started_by.sh), as text for a
    shell.
    """
    folder = environment.get(FOLDER_VARIABLE)
    kept = [f"{FLAG}={folder}"] if folder else []
    kept += [word for word in words if not word.startswith("run_dir=")]
    started = environment.get("K2TRAIN_STARTED_BY") or shlex.join(_program(environment))
    return f"{started} {shlex.join([*kept, f'run_dir={run_dir}'])}"


def _program(environment: Mapping[str, str]) -> list[str]:
    """The command that started this process, as far as a launcher's variables tell."""
    program = ["k2train", "train"]
    job = environment.get("SLURM_JOB_ID")
    if job is not None and environment.get("TORCHELASTIC_RUN_ID") == job:
        # launch/slurm.sbatch names torchrun's run by the job.
        return ["sbatch", f"--nodes={environment['SLURM_NNODES']}", "launch/slurm.sbatch"]
    if "WORLD_SIZE" not in environment or environment.get("TORCHELASTIC_RUN_ID") == LOCAL_RUN:
        return program
    nodes = int(environment["WORLD_SIZE"]) // int(environment["LOCAL_WORLD_SIZE"])
    several = [f"--nnodes={nodes}", f"--rdzv-endpoint={environment.get('MASTER_ADDR', 'NODE_0')}:29400"]
    ranks = f"--nproc-per-node={environment['LOCAL_WORLD_SIZE']}"
    return ["torchrun", ranks, *(several if nodes > 1 else []), "-m", *program]
