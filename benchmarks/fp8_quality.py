"""Does storing activations as FP8 cost quality? Pairs of runs on real text: every tensor kept, and
FP8 storage.

Both are `experiment=tiny` on one rank and differ in `activations` alone: `none` against
`recompute_fp8`, whose backward sees the inputs of experts and SwiGLUs through E4M3. The forward is
the same, so the first loss is equal to the bit; from then on the runs drift apart as any two do
whose gradients differ in their last digits, by about half a percent in so short a run. So there is
a pair for each seed, and it is the mean over the seeds whose last losses must agree within 0.5 %
(exit status 1 otherwise).

    python benchmarks/fp8_quality.py                              # three minutes a run on one core
    python benchmarks/fp8_quality.py --steps 10 --every 5 --seeds 3 --picture /tmp/try.png
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from k2train.telemetry.metrics import read_metrics
from k2train.telemetry.plot import HELD_OUT_COLOUR, TRAIN_COLOUR

BASE, FP8 = "none", "recompute_fp8"
LIMIT = 0.005
"""Of the last held-out loss."""
Losses = dict[int, float]
"""Held-out loss, in nats a token, by step."""


def train(preset: str, seed: int, run_dir: Path, options: argparse.Namespace) -> Losses:
    """One run in a process of its own. Raises CalledProcessError where it fails."""
    words = [
        "experiment=tiny",
        "layout=single",
        "world=single",
        f"activations={preset}",
        f"run_dir={run_dir}",
        f"train.steps={options.steps}",
        f"train.seed={seed}",
        f"train.eval_every_steps={options.every}",
        f"train.eval_tokens={options.tokens}",
        f"train.final_eval_tokens={options.final_tokens}",
        "train.checkpoint_every_steps=0",
        "telemetry.tensorboard=false",
        "telemetry.progress=none",
        *options.override,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, "-m", "k2train", "train", *words]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}


def relative(base: Losses, other: Losses) -> dict[int, float]:
    """(other - base) / base, by step."""
    return {step: (other[step] - loss) / loss for step, loss in base.items()}


def mean(losses: Sequence[Losses]) -> Losses:
    """The mean over the seeds, by step."""
    return {step: sum(one[step] for one in losses) / len(losses) for step in losses[0]}


def print_table(base: Losses, other: Losses) -> None:
    print(f"{'step':>6s}{BASE:>16s}{FP8:>16s}{'difference':>13s}   held-out loss, nats a token")
    for step, difference in relative(base, other).items():
        print(f"{step:6d}{base[step]:16.5f}{other[step]:16.5f}{difference:+13.3%}")


def draw(base: Losses, other: Losses, path: Path) -> None:
    """Write a PNG: both curves, and their relative difference below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps: Sequence[int] = list(base)
    losses.plot(
        steps, list(base.values()), color=TRAIN_COLOUR, linewidth=2.5, alpha=0.6, label=f"activations={BASE}"
    )
    losses.plot(
        steps,
        list(other.values()),
        color=HELD_OUT_COLOUR,
        marker="o",
        markersize=3,
        linewidth=1,
        label=f"activations={FP8}",
    )
    losses.set(ylabel="held-out loss (nats a token)", title="FP8 storage of activations, mean over the seeds")
    losses.legend(frameon=False)
    losses.grid(alpha=0.3)
    percent = [100 * value for value in relative(base, other).values()]
    differences.plot(steps, percent, color=HELD_OUT_COLOUR, marker="o", markersize=3, linewidth=1)
    differences.axhspan(-100 * LIMIT, 100 * LIMIT, color="#999999", alpha=0.15)
    differences.set(xlabel="step", ylabel="difference (%)")
    differences.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens of an evaluation")
    parser.add_argument("--final-tokens", type=int, default=262144, help="held-out tokens of the last one")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="of weights and data order, a pair of runs each"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/fp8_quality.png"))
    parser.add_argument("--runs", type=Path, help="a new directory that keeps both runs; by default they go")
    parser.add_argument("--override", nargs="*", default=[], help="further keys of both configs")
    options = parser.parse_args()
    if options.runs is not None and options.runs.exists():
        parser.error(f"--runs {options.runs} is there already, and a run directory would be resumed")
    found: dict[str, list[Losses]] = {BASE: [], FP8: []}
    with tempfile.TemporaryDirectory() as temporary:
        directory = options.runs or Path(temporary)
        for seed in options.seeds:
            for preset, losses in found.items():
                began = time.perf_counter()
                losses.append(train(preset, seed, directory / f"{preset}-{seed}", options))
                seconds = time.perf_counter() - began
                print(
                    f"seed {seed}, activations={preset}: {options.steps} steps in {seconds:.0f} s", flush=True
                )
            print_table(found[BASE][-1], found[FP8][-1])
    base, fp8 = mean(found[BASE]), mean(found[FP8])
    print(f"mean of {len(options.seeds)} seeds")
    print_table(base, fp8)
    draw(base, fp8, options.picture)
    print(f"picture: {options.picture}")
    last = list(relative(base, fp8).values())[-1]
    agrees = abs(last) <= LIMIT
    print(
        f"last held-out loss: {last:+.3%} with FP8 storage, {'within' if agrees else 'NOT within'} {LIMIT:.1%}"
    )
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
