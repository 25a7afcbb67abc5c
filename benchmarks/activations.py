"""What each activation policy costs in time, and what it saves, beside keeping every tensor;
alternating in one run.

One rank executes K2's schedule on a small K2 whose layers are cut into four virtual stages, so that
microbatches wait for their backward and OFFLOAD and RELOAD really happen: forward, backward and
weight gradients of a batch, no optimizer. All presets of configs/activations share weights and
batch, lossless ones must give the loss of `none` to the bit, and each round times all of them in
turns, starting with another one every time. The figure to trust is the median of the rounds'
ratios.

Bytes come from a pass that is not timed. Device: the most that the store holds between two phases'
steps. Host: the most in the arena's buffers. On a GPU the share of the copies' time that compute
hides is printed too.

    python benchmarks/activations.py
    python benchmarks/activations.py --rounds 9 --override model.hidden_size=512
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping

import torch

from k2train.activations.arena import HostArena
from k2train.activations.offload import OffloadEngine
from k2train.activations.store import ActivationStore
from k2train.config.compose import load_config
from k2train.config.schema import Config
from k2train.device.build import build_device
from k2train.layout.layout import Layout
from k2train.model.context import MicrobatchContext, Statistics
from k2train.model.loss import CrossEntropy
from k2train.model.model import Model, build_model
from k2train.model.pieces import ModelPart
from k2train.model.saved import KeepEverything
from k2train.ops.dtypes import DTYPES
from k2train.ops.weight_grad import PlainGradients
from k2train.runtime.executor import run_actions
from k2train.runtime.routes import build_routes
from k2train.runtime.stage import PipelineStage, StepInputs
from k2train.schedule import Schedule, Step
from k2train.trainer.build import build_program

BASE = "none"
PRESETS = (BASE, "recompute", "recompute_fp8", "recompute_offload", "offload", "k2")
LOSSLESS = ("recompute", "recompute_offload", "offload")
SHAPE = (
    "layout.pp=1",
    "layout.ep=1",
    "layout.vpp=4",
    "schedule=k2",
    "train.seq_len=256",
    "train.microbatch_size=2",
    "model.num_hidden_layers=4",
    "model.hidden_size=256",
    "model.intermediate_size=768",
    "model.moe_intermediate_size=128",
    "model.n_routed_experts=32",
    "model.num_experts_per_tok=4",
    "model.num_attention_heads=8",
    "model.q_lora_rank=128",
    "model.kv_lora_rank=96",
)
"""k2_tiny made wide enough that its kernels, not its bookkeeping, take the time."""


class Side:
    """One preset: its schedule, its store, and a pass over the batch.

    Models and gradient buffers are everybody's.
    """

    def __init__(
        self,
        preset: str,
        config: Config,
        models: Mapping[int, Model],
        gradients: PlainGradients,
        batch: torch.Tensor,
    ) -> None:
        self.config, self.batch, self.gradients = config, batch, gradients
        self.schedule: Schedule = build_program(config).schedule
        device = build_device(batch.device, timed=True)
        self.engine = OffloadEngine(device, HostArena(device), timed=True)
        self.store = ActivationStore(config.activations, self.engine)
        # As in training: where every tensor is kept, autograd keeps it, and no store is in its way.
        self.keeps_everything = preset == BASE
        self.device = build_device(batch.device)
        self.stage = PipelineStage(models, build_routes(self.schedule, 0), None, gradients, self.device)

    def run(self, watch: Peak | None = None) -> float:
        """One pass; the loss. watch: notes what the store holds."""
        self.gradients.zero()
        found = Statistics()
        steps: Iterable[Step] = self.schedule.stages[0]
        use_store = watch is not None or not self.keeps_everything
        with self.stage.step(self._inputs(found, use_store)):
            run_actions(steps if watch is None else watch.watch(steps), self.stage)
        assert found.loss is not None
        return float(found.loss.item())

    def seconds(self) -> float:
        """Wall time of one pass, which ends with reading the loss and, on a GPU, when its queues
        are empty."""
        began = time.perf_counter()
        self.run()
        if self.batch.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _inputs(self, found: Statistics, use_store: bool) -> StepInputs:
        train = self.config.train
        microbatches = self.batch.split(train.microbatch_size)

        def make_context(virtual_stage: int, microbatch: int) -> MicrobatchContext:
            return MicrobatchContext(
                num_sequences=train.microbatch_size,
                gradients=self.gradients,
                weight_grads=self.stage.queue,
                key=(virtual_stage, microbatch),
                statistics=found,
                loss=CrossEntropy(microbatches[microbatch][:, 1:], 1 / train.global_batch_tokens),
                balance_loss_scale=train.balance_loss_alpha / len(microbatches),
                saved=self.store.microbatch() if use_store else KeepEverything(),
                device=self.device,
            )

        return StepInputs(
            lambda microbatch: microbatches[microbatch][:, :-1],
            train.microbatch_size * train.seq_len,
            make_context,
            len(microbatches),
        )


class Peak:
    """The most that a store holds on the device when a step of the schedule is about to begin."""

    def __init__(self, store: ActivationStore) -> None:
        self.store, self.device_bytes = store, 0

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        for step in steps:
            self.device_bytes = max(self.device_bytes, self.store.device_bytes)
            yield step


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table.

    ratio: the median over rounds of this preset's seconds over those of `none`.
    """

    tokens_per_second: float
    ratio: float
    device_bytes: int
    host_bytes: int
    hidden: float | None


def build_models(config: Config, layout: Layout, device: torch.device) -> dict[int, Model]:
    """All virtual stages, on one rank."""
    experts = tuple(range(config.model.n_routed_experts))
    models = {}
    for index, piece in enumerate(layout.virtual_stages):
        part = ModelPart(tuple(piece.layers), piece.embedding, piece.head, experts)
        models[index] = build_model(config.model, part, DTYPES[config.train.dtype], device)
        models[index].initialise(config.train.seed)
    return models


def build_sides(options: argparse.Namespace) -> dict[str, Side]:
    """A side for every preset."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    words = [
        *SHAPE,
        f"train.dtype={options.dtype}",
        f"train.global_batch_tokens={512 * options.microbatches}",
        *options.override,
    ]
    configs = {preset: load_config([*words, f"activations={preset}"]) for preset in PRESETS}
    base = configs[BASE]
    layout = build_program(base).layout
    models, gradients = build_models(base, layout, device), PlainGradients()
    generator = torch.Generator().manual_seed(base.train.seed)
    size = (base.train.global_batch_tokens // base.train.seq_len, base.train.seq_len + 1)
    batch = torch.randint(base.model.vocab_size, size, generator=generator).to(device)
    return {preset: Side(preset, config, models, gradients, batch) for preset, config in configs.items()}


def measure(sides: Mapping[str, Side], rounds: int) -> dict[str, Result]:
    """Bytes and losses of a first pass each, then the rounds."""
    losses, peaks = {}, {}
    for preset, side in sides.items():
        watch = Peak(side.store)
        losses[preset] = side.run(watch)
        peaks[preset] = watch.device_bytes
        assert preset not in LOSSLESS or losses[preset] == losses[BASE], (preset, losses)
        side.engine.reset_counters()
    print("losses:", ", ".join(f"{preset} {loss:.6f}" for preset, loss in losses.items()))
    gc.collect()
    gc.freeze()
    seconds: dict[str, list[float]] = {preset: [] for preset in sides}
    names = list(sides)
    for round_ in range(rounds):
        start = round_ % len(names)
        for preset in names[start:] + names[:start]:
            seconds[preset].append(sides[preset].seconds())
    return {
        preset: Result(
            side.config.train.global_batch_tokens / statistics.median(seconds[preset]),
            statistics.median(a / b for a, b in zip(seconds[preset], seconds[BASE], strict=True)),
            peaks[preset],
            side.engine.arena.peak_bytes,
            hidden_share(side),
        )
        for preset, side in sides.items()
    }


def hidden_share(side: Side) -> float | None:
    """Share of the copies' time that compute hid; None on a CPU, whose copies are the host's own
    work, or without copies."""
    if not side.batch.is_cuda:
        return None
    copies = side.engine.copy_seconds()
    total = copies.out + copies.back
    return 1 - copies.exposed / total if total else None


def print_table(results: Mapping[str, Result], rounds: int) -> None:
    print(f"medians of {rounds} rounds; time beside `{BASE}`, round by round")
    print(
        f"{'activations':18s}{'tokens/s':>10s}{'time':>8s}{'device, peak':>15s}{'host, peak':>13s}{'hidden':>9s}"
    )
    for preset, row in results.items():
        hidden = "-" if row.hidden is None else f"{row.hidden:.1%}"
        print(
            f"{preset:18s}{row.tokens_per_second:10,.0f}{row.ratio:8.3f}{row.device_bytes / 1e6:12.1f} MB"
            f"{row.host_bytes / 1e6:10.1f} MB{hidden:>9s}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timings of each preset, in turns")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches of 512 tokens in a pass")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES), help="compute type")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--override", nargs="*", default=[], help="further keys of the config")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sides = build_sides(options)
    one = sides[BASE]
    model, train = one.config.model, one.config.train
    print(
        f"hidden {model.hidden_size}, {model.num_hidden_layers} layers in {one.schedule.num_virtual_stages} virtual stages, "
        f"{model.num_experts_per_tok} of {model.n_routed_experts} experts; {options.microbatches} microbatches of "
        f"{train.microbatch_size} x {train.seq_len} tokens, {train.dtype}, {one.batch.device}, {options.threads} threads"
    )
    print_table(measure(sides, options.rounds), options.rounds)


if __name__ == "__main__":
    main()
