"""Section 9: one dense and two MoE layers of K2, trained by the trainer's own step, beside
transformers' model.

    k2train train            the command line, on a toy, with a run directory and a checkpoint
    the slice                20 steps of MuonClip through `trainer.build` and `trainer.step`, on
                             this machine's own text
    transformers             the same shape with AdamW in BF16, forward, backward and update

The slice writes no checkpoint: its states are tens of gigabytes. Its vocabulary is cut, since the
head is measured by section 8, and its tokens are the bytes of the standard library.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from k2train.config.schema import Config

from . import adapter
from .memory import note, peak
from .predictions import rehearsed_peak, step_prediction, train_flops
from .report import Report
from .setting import Setting
from .shapes import k2_config
from .transformers_side import transformers_tokens_per_second

CLI_STEPS = 5
CLI_SECONDS = 60
REHEARSAL_SECONDS = 40
WARMUP_STEPS = 3
LEARNING_RATE = 2e-3


def run(report: Report, setting: Setting) -> None:
    config = slice_config(setting)
    with report.attempt("the slice"):
        train(report, setting, config)
    with report.attempt("transformers' DeepseekV3 with AdamW"):
        beside_transformers(report, setting, config)
    with report.attempt("k2train train"):
        command_line(report, setting)


def slice_config(setting: Setting) -> Config:
    sizes = setting.sizes
    return k2_config(
        setting,
        model={"num_hidden_layers": 3, "vocab_size": sizes.vocab_size},
        optim={"lr_phases": [{"kind": "constant", "to": LEARNING_RATE, "fraction": 1.0}]},
        train={"steps": sizes.train_steps, "global_batch_tokens": sizes.train_microbatches * sizes.seq_len},
    )


def train(report: Report, setting: Setting, config: Config) -> None:
    began = time.perf_counter()
    losses, ends = [], []

    def built(run: Any) -> None:
        parameters = sum(piece.tensor.numel() for model in run.models.values() for piece in model.pieces())
        report.figure(
            "the slice: weights made and optimizer built",
            time.perf_counter() - began,
            "s",
            note=f"{parameters / 1e9:.2f} billion parameters",
        )
        ends.append(time.perf_counter())

    def stepped(metrics: Any) -> None:
        # Its numbers were read from the device, so the step's work is over; the gather of weights
        # may be under way.
        losses.append(metrics.loss)
        ends.append(time.perf_counter())

    adapter.train_steps(config, setting.device, built, stepped)
    tell_speed(report, setting, config, [b - a for a, b in itertools.pairwise(ends)][WARMUP_STEPS:])
    tell_losses(report, config, losses)
    tell_peak(report, setting, config)


def tell_peak(report: Report, setting: Setting, config: Config) -> None:
    """Beside the rehearsal's of the same step, which is told apart where it fails: the figure
    stands without it."""
    rehearsed = None
    with report.attempt("the slice: its rehearsal", optional=True):
        rehearsed = rehearsed_peak(config, min(REHEARSAL_SECONDS, setting.seconds_left)) / 1e9
    report.figure("the slice: peak", peak(setting) / 1e9, "GB", rehearsed, note=note(setting))


def tell_speed(report: Report, setting: Setting, config: Config, seconds: list[float]) -> None:
    tokens, middle = config.train.global_batch_tokens, statistics.median(seconds)
    rate, mfu = (None, None) if setting.cluster is None else step_prediction(config)
    report.figure(
        "the slice: tokens a second",
        tokens / middle,
        "tokens/s",
        rate,
        len(seconds),
        f"{middle * 1e3:.0f} ms a step of {tokens} tokens",
    )
    if setting.cluster is not None:
        peak = setting.cluster.matmul_flops_per_second
        report.figure(
            "the slice: MFU", train_flops(config, tokens) / middle / peak, "share", mfu, len(seconds)
        )


def tell_losses(report: Report, config: Config, losses: list[float]) -> None:
    """A fresh model knows nothing: it starts at the logarithm of its vocabulary."""
    report.figure("the slice: loss of the first step", losses[0], "nats", math.log(config.model.vocab_size))
    report.figure("the slice: loss of the last step", losses[-1], "nats", n=len(losses))
    if losses[-1] < losses[0]:
        report.fact("the slice: loss", "fell")
    else:
        report.fail("the slice: loss", "did not fall: " + " ".join(f"{loss:.3f}" for loss in losses))


def beside_transformers(report: Report, setting: Setting, config: Config) -> None:
    if importlib.util.find_spec("transformers") is None:
        report.skip("transformers' DeepseekV3 with AdamW", "transformers is not installed")
        return
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
    for experts in ("grouped_mm", "eager"):
        name = f"transformers' DeepseekV3 with AdamW, experts {experts}"
        with report.attempt(name):
            timing, tokens = transformers_tokens_per_second(setting, config, experts)
            report.figure(
                name,
                tokens / timing.seconds,
                "tokens/s",
                n=timing.n,
                note=f"{timing.seconds * 1e3:.0f} ms a step; no prediction is made for it",
            )
            return


def command_line(report: Report, setting: Setting) -> None:
    """`k2train train` as a user calls it, in a run directory of its own."""
    missing = [
        name for name in ("hydra", "matplotlib", "megatron", "rich") if importlib.util.find_spec(name) is None
    ]
    if missing:
        report.skip("k2train train", f"{', '.join(missing)} not installed; see --wheels")
        return
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"run_dir={folder}/run",
            f"data.cache_dir={folder}/data",
            f"train.device={setting.device.type}",
            f"train.steps={CLI_STEPS}",
            "train.global_batch_tokens=512",
            "train.microbatch_size=2",
            "train.eval_every_steps=0",
            "train.final_eval_tokens=0",
            "train.dtype=bfloat16",
            "telemetry.tensorboard=false",
            "telemetry.progress=none",
        ]
        code = f"import sys; sys.path += {sys.path!r}; from k2train.cli.main import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, "train", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=min(CLI_SECONDS, max(1.0, setting.seconds_left)),
        )
        if done.returncode:
            report.fail("k2train train", (done.stderr.strip().splitlines() or ["no message"])[-1][:200])
            return
        lines = [
            json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        report.fact(
            "k2train train",
            f"{len(lines)} steps, loss {lines[0]['loss']:.3f} to {lines[-1]['loss']:.3f}, "
            "with a run directory and a checkpoint",
        )
