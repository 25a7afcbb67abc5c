"""Our executor beside torch.distributed.pipelining: the same layers, microbatches and processes,
alternating in one run.

Four gloo processes with two virtual stages each run a small language model of residual MLP blocks
under

    ours     interleaved_1f1b; the same with weight gradients split off; K2's schedule (pairs,
             split,
             extra warm-up)
    theirs   ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

Both sides use the very same parameters, must give the same loss and gradients before anything is
timed, zero their gradients as part of the step, and get one round in turns, so that a noisy machine
disturbs all alike. A round's time is from a barrier to a barrier; the figure to trust is the median
of the rounds' ratios.

Two shares say what our own code costs beside the tensors' work, both in processor seconds of one
stage, so that waiting counts on neither side. "Runtime": the same action list over phases and
messages that do nothing, which leaves the executor, its handlers and their bookkeeping. "Runtime,
phases and dispatch": the same with the real phases on tensors of one row and eight columns, which
adds everything that torch does for an operation besides its arithmetic.

    python benchmarks/pipeline.py --rounds 15 --hidden 256 --microbatches 8

Letters: T tokens, D hidden, F width of the feed-forward, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import pipelining

from k2train.device.cpu import CpuDevice
from k2train.model.context import MicrobatchContext, Statistics
from k2train.model.loss import CrossEntropy
from k2train.model.phase import ComputePhase, ComputeRecord, Grads, Phase, Tensors
from k2train.model.pieces import Piece
from k2train.ops.embedding import EmbeddingWeightGrad
from k2train.ops.linear import linear
from k2train.ops.weight_grad import PlainGradients, WeightGradSlot
from k2train.parallel.channels import build_channels
from k2train.parallel.communicator import World
from k2train.parallel.pipeline import PipelineTransport
from k2train.parallel.testing import run_distributed_test
from k2train.runtime.executor import run_actions
from k2train.runtime.routes import build_routes
from k2train.runtime.stage import PipelineStage, StepInputs, Transport
from k2train.schedule import Schedule, ScheduleSpec, build_schedule, validate
from k2train.schedule.messages import plan_messages

PP, VPP = 4, 2
TINY_HIDDEN = 8
OURS: dict[str, dict[str, Any]] = {
    "interleaved_1f1b": {},
    "interleaved_1f1b, W split off": {"split_weight_grad": True},
    "k2": {
        "kind": "k2",
        "split_weight_grad": True,
        "pair_forward_backward": True,
        "extra_warmup_microbatches": 1,
    },
}
THEIRS = {
    "Interleaved1F1B": pipelining.ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": pipelining.ScheduleInterleavedZeroBubble,
}
Step = Callable[[], float]


class Block(nn.Module):
    """x + down(silu(up(x)))."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD + self.down(F.silu(self.up(x_TD)))


class BlockPhase(ComputePhase):
    """The same block as one of our phases."""

    def __init__(self, block: Block) -> None:
        super().__init__("mlp")
        self.block = block

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        (x_TD,) = inputs
        hidden_TF = F.silu(linear(x_TD, self.block.up.weight, slot))
        return (x_TD + linear(hidden_TF, self.block.down.weight, slot),)

    def pieces(self) -> list[Piece]:
        return [Piece("up", self.block.up.weight), Piece("down", self.block.down.weight)]


class EmbeddingPhase:
    """A look-up, whose backward is all weight gradient, as in our model."""

    name = "embedding"
    stream: Literal["compute"] = "compute"

    def __init__(self, embedding: nn.Embedding) -> None:
        self.weight = embedding.weight

    def forward(self, inputs: Tensors, context: MicrobatchContext) -> tuple[Tensors, torch.Tensor]:
        with torch.no_grad():
            return (F.embedding(inputs[0], self.weight),), inputs[0]

    def backward(self, record: torch.Tensor, grad_outputs: Grads, context: MicrobatchContext) -> Grads:
        (dx_TD,) = grad_outputs
        assert dx_TD is not None
        context.slot().put(EmbeddingWeightGrad(self.weight, record, dx_TD))
        return (None,)


class HeadPhase(ComputePhase):
    """The last projection and the loss, whose gradient is one."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__("head")
        self.head = head

    def compute(self, inputs: Tensors, context: MicrobatchContext, slot: WeightGradSlot | None) -> Tensors:
        assert isinstance(context.loss, CrossEntropy)
        logits_TV = linear(inputs[0], self.head.weight, slot)
        loss = scaled_loss(logits_TV, context.loss.targets, context.loss.scale)
        context.statistics.add_loss(loss.detach())
        return (loss,)

    def backward(self, record: ComputeRecord, grad_outputs: Grads, context: MicrobatchContext) -> Grads:
        return super().backward(record, (torch.ones(()),), context)

    def pieces(self) -> list[Piece]:
        return [Piece("head", self.head.weight)]


class IdlePhase:
    """A phase that does nothing."""

    name = "idle"
    stream: Literal["compute"] = "compute"

    def __init__(self, is_head: bool) -> None:
        self.is_head = is_head

    def forward(self, inputs: Tensors, context: MicrobatchContext) -> tuple[Tensors, None]:
        return inputs, None

    def backward(self, record: None, grad_outputs: Grads, context: MicrobatchContext) -> Grads:
        return NOTHING if self.is_head else grad_outputs


NOTHING = (torch.zeros(1),)


@dataclasses.dataclass(frozen=True)
class Here:
    """A message that is there."""

    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.tensor


@dataclasses.dataclass
class NoTransport:
    """Messages that are there at once."""

    hidden: int

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        pass

    def receive(self, num_rows: int, stage: int) -> Here:
        return Here(torch.zeros(num_rows, self.hidden))

    def finish(self) -> None:
        pass

    def tensors(self) -> Iterator[torch.Tensor]:
        return iter(())

    def abandon(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Part:
    """The phases of one virtual stage: what PipelineStage asks of a model."""

    phases: Sequence[Phase]


def scaled_loss(logits_TV: torch.Tensor, targets_T: torch.Tensor, scale: float) -> torch.Tensor:
    return F.cross_entropy(logits_TV, targets_T, reduction="sum") * scale


def build_modules(options: argparse.Namespace, hidden: int, rank: int) -> dict[int, nn.Sequential]:
    """This rank's virtual stages as plain modules; weights depend on the virtual stage alone."""
    modules = {}
    for virtual_stage in range(rank, PP * VPP, PP):
        torch.manual_seed(virtual_stage)
        layers: list[nn.Module] = [Block(hidden) for _ in range(options.layers)]
        if virtual_stage == 0:
            layers.insert(0, nn.Embedding(options.vocab, hidden))
        if virtual_stage == PP * VPP - 1:
            layers.append(nn.Linear(hidden, options.vocab, bias=False))
        modules[virtual_stage] = nn.Sequential(*layers)
    return modules


def build_phases(module: nn.Sequential) -> Part:
    phases: list[Phase] = []
    for layer in module:
        if isinstance(layer, Block):
            phases.append(BlockPhase(layer))
        elif isinstance(layer, nn.Embedding):
            phases.append(EmbeddingPhase(layer))
        else:
            assert isinstance(layer, nn.Linear)
            phases.append(HeadPhase(layer))
    return Part(phases)


def idle_phases(module: nn.Sequential) -> Part:
    return Part([IdlePhase(isinstance(layer, nn.Linear)) for layer in module])


def make_schedule(options: argparse.Namespace, switches: dict[str, Any]) -> Schedule:
    schedule = build_schedule(ScheduleSpec(pp=PP, vpp=VPP, num_microbatches=options.microbatches, **switches))
    validate(schedule)
    return schedule


@dataclasses.dataclass(frozen=True)
class OurSide:
    """One of our schedules on one rank. batch: (microbatches, 2, T), ids and targets."""

    schedule: Schedule
    rank: int
    stage: PipelineStage
    gradients: PlainGradients
    batch: torch.Tensor

    def step(self) -> float:
        """Forward, backward and gradients of the whole batch; the loss where the last virtual
        stage is."""
        self.gradients.zero()
        statistics_of_step = Statistics()
        scale = 1.0 / self.batch[:, 0].numel()

        def make_context(virtual_stage: int, microbatch: int) -> MicrobatchContext:
            return MicrobatchContext(
                num_sequences=1,
                gradients=self.gradients,
                weight_grads=self.stage.queue,
                key=(virtual_stage, microbatch),
                statistics=statistics_of_step,
                loss=CrossEntropy(self.batch[microbatch, 1], scale),
            )

        num_rows = self.batch.shape[2]
        inputs = StepInputs(
            lambda microbatch: self.batch[microbatch, 0], num_rows, make_context, len(self.batch)
        )
        with self.stage.step(inputs):
            run_actions(self.schedule.stages[self.rank], self.stage)
        return 0.0 if statistics_of_step.loss is None else float(statistics_of_step.loss)


def our_side(
    schedule: Schedule, rank: int, parts: dict[int, Part], transport: Transport, batch: torch.Tensor
) -> OurSide:
    gradients = PlainGradients()
    stage = PipelineStage(parts, build_routes(schedule, rank), transport, gradients, CpuDevice(batch.device))
    return OurSide(schedule, rank, stage, gradients, batch)


def their_step(
    cls: Any, modules: dict[int, nn.Sequential], hidden: int, vocab: int, batch: torch.Tensor
) -> Step:
    """One step of torch's runtime under schedule class `cls`.

    Shapes are given, so that it need not infer them.
    """
    ids = batch[0, 0]
    stages = []
    for index, module in modules.items():
        is_first, is_last = index == 0, index == PP * VPP - 1
        example = ids if is_first else torch.empty(len(ids), hidden, requires_grad=True)
        output = torch.empty(len(ids), vocab if is_last else hidden, requires_grad=True)
        stages.append(
            pipelining.PipelineStage(
                module, index, PP * VPP, torch.device("cpu"), input_args=(example,), output_args=(output,)
            )
        )
    scale = 1.0 / batch[:, 0].numel()
    schedule = cls(
        stages, len(batch), loss_fn=lambda out, target: scaled_loss(out, target, scale), scale_grads=False
    )
    inputs = (batch[:, 0].flatten(),) if 0 in modules else ()
    targets = batch[:, 1].flatten() if PP * VPP - 1 in modules else None

    def step() -> float:
        for module in modules.values():
            module.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        schedule.step(*inputs, target=targets, losses=losses, return_outputs=False)
        return float(sum(loss.detach() for loss in losses))

    return step


def check_equal(ours: OurSide, theirs: Step, modules: dict[int, nn.Sequential]) -> float:
    """The same loss and the same gradients; the loss."""
    mine, other = ours.step(), theirs()
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    for module in modules.values():
        for parameter in module.parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(
                ours.gradients.buffers[parameter], parameter.grad, rtol=1e-4, atol=1e-6
            )
    return mine


def timed(step: Step) -> tuple[float, float]:
    """Wall seconds from barrier to barrier, and this process's processor seconds in the step
    itself."""
    dist.barrier()
    start, start_cpu = time.perf_counter(), time.process_time()
    step()
    cpu = time.process_time() - start_cpu
    dist.barrier()
    return time.perf_counter() - start, cpu


def processor_seconds(side: OurSide, repeats: int) -> float:
    """Median processor seconds of a step that waits for nobody."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        side.step()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def make_batch(options: argparse.Namespace, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randint(options.vocab, (options.microbatches, 2, num_tokens), generator=generator)


def run_rank(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """One process: check, time every side in turns, then measure what our own code costs."""
    modules = build_modules(options, options.hidden, world.rank)
    batch = make_batch(options, options.tokens)
    schedules = {name: make_schedule(options, switches) for name, switches in OURS.items()}
    parts = {index: build_phases(module) for index, module in modules.items()}
    sides = {
        name: our_side(
            schedule,
            world.rank,
            parts,
            PipelineTransport(
                build_channels(plan_messages(schedule), range(PP), world),
                options.hidden,
                torch.float32,
                world.device,
            ),
            batch,
        )
        for name, schedule in schedules.items()
    }
    theirs = {
        name: their_step(cls, modules, options.hidden, options.vocab, batch) for name, cls in THEIRS.items()
    }
    losses = [
        check_equal(side, other, modules)
        for side, other in itertools.product(sides.values(), theirs.values())
    ]
    steps = {
        **{f"ours    {name}": side.step for name, side in sides.items()},
        **{f"theirs  {name}": step for name, step in theirs.items()},
    }
    gc.collect()
    gc.freeze()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for round_ in range(options.rounds):
        # Each round starts with another side, so that none always follows the same one.
        names = list(steps)
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            times[name].append(timed(steps[name]))
    return {"loss": losses[0], "times": times, "own": own_seconds(options, world.rank, schedules, modules)}


def own_seconds(
    options: argparse.Namespace, rank: int, schedules: dict[str, Schedule], modules: dict[int, nn.Sequential]
) -> dict[str, tuple[float, float]]:
    """Processor seconds of a step of each schedule: over idle phases, and over the real ones on
    tiny tensors."""
    tiny = {
        index: build_phases(module) for index, module in build_modules(options, TINY_HIDDEN, rank).items()
    }
    idle = {index: idle_phases(module) for index, module in modules.items()}
    batch, found = make_batch(options, 1), {}
    for name, schedule in schedules.items():
        sides = [our_side(schedule, rank, parts, NoTransport(TINY_HIDDEN), batch) for parts in (idle, tiny)]
        runtime, dispatch = (processor_seconds(side, options.rounds + 1) for side in sides)
        found[name] = (runtime, dispatch)
    return found


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The tables: wall seconds of a round are the slowest rank's, processor seconds the mean of
    the ranks."""
    print(f"loss {results[-1]['loss']:.4f}; loss and all gradients equal on both sides")
    names = list(results[0]["times"])
    rounds = range(options.rounds)
    wall = {name: [max(r["times"][name][i][0] for r in results) for i in rounds] for name in names}
    cpu = {name: [statistics.mean(r["times"][name][i][1] for r in results) for i in rounds] for name in names}
    best = min(
        (name for name in names if name.startswith("theirs")), key=lambda name: statistics.median(wall[name])
    )
    print(f"medians of {options.rounds} rounds; ratios to {best}, round by round, below 1 is better")
    print(f"  {'':40s}{'step':>12s}{'ratio':>8s}{'processor':>14s}{'ratio':>8s}")
    for name in names:
        print(
            f"  {name:40s}{statistics.median(wall[name]) * 1e3:9.1f} ms{median_ratio(wall, name, best):8.3f}"
            f"{statistics.median(cpu[name]) * 1e3:11.1f} ms{median_ratio(cpu, name, best):8.3f}"
        )
    print("our own code in a stage's step, processor time and its share of the above")
    for name in (name for name in names if name.startswith("ours")):
        own = [r["own"][name.removeprefix("ours    ")] for r in results]
        runtime, dispatch = (statistics.mean(column) for column in zip(*own, strict=True))
        total = statistics.median(cpu[name])
        print(
            f"  {name:40s}runtime {runtime * 1e3:.2f} ms, {runtime / total:.2%}; "
            f"runtime, phases and dispatch {dispatch * 1e3:.1f} ms, {dispatch / total:.1%}"
        )


def median_ratio(times: dict[str, list[float]], name: str, base: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timings of each side, in turns")
    parser.add_argument("--microbatches", type=int, default=8, help="microbatches of a step")
    parser.add_argument("--tokens", type=int, default=128, help="rows of a microbatch")
    parser.add_argument(
        "--hidden", type=int, default=256, help="width; the blocks' inner width is four times it"
    )
    parser.add_argument("--layers", type=int, default=2, help="blocks of a virtual stage")
    parser.add_argument("--vocab", type=int, default=256, help="of embedding and head")
    parser.add_argument("--seed", type=int, default=0, help="of the batch")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for everything")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # The ranks are forked: importing torch four times would take longer than the measurement.
    results = run_distributed_test(
        lambda world: run_rank(world, options), PP, "processes", timeout_seconds=options.timeout
    )
    print(
        f"{PP} processes x {VPP} virtual stages, {options.microbatches} microbatches of {options.tokens} x "
        f"{options.hidden}, {options.layers} blocks each, one thread a process"
    )
    report(results, options)


if __name__ == "__main__":
    main()
