"""The rehearsal: build one rank as the trainer does, take one step as the trainer does, and keep
what was seen.

Everything that decides something is the program's own: layout, schedule, model, dispatcher, store,
queue, optimizer. Put in its place are the device, the communicators, the corpus and the numbers the
host would read. Weights are not initialised, because there is nothing to write them into.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from k2train.config.schema import Config
from k2train.data.corpus import Corpus
from k2train.device.rehearsed import RehearsedDevice
from k2train.parallel.groups import build_groups
from k2train.planner.plan import Plan, plan_program
from k2train.rehearsal.accounts import Auditor
from k2train.rehearsal.numbers import Numbers
from k2train.rehearsal.observer import Living, Observer, Peak
from k2train.rehearsal.phases import WatchedModel
from k2train.rehearsal.world import Counts, RehearsedWorld
from k2train.runtime.recorder import Message
from k2train.runtime.stage import PipelineStage
from k2train.schedule.actions import Pair, Step
from k2train.trainer.batch import read_batch
from k2train.trainer.build import Run, build_program, build_run
from k2train.trainer.dry_run import dry_run
from k2train.trainer.garbage import GarbageControl
from k2train.trainer.step import train_step

AUDIT_INTERVAL = 8
"""An audit looks at every storage, which takes as long as an action."""
DEVICE = torch.device("cuda", 0)
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What one rank's step was seen to do. Seconds are those of rehearsing."""

    config: Config
    plan: Plan
    stage: int
    rank: int
    observer: Observer
    counts: Counts
    auditor: Auditor
    states_bytes: int
    pipeline_peak: Peak
    update_peak: Peak
    left: tuple[Living, ...]
    """Alive at the end of the step though they were made in it."""
    build_seconds: float
    step_seconds: float
    update_seconds: float


class Recording:
    """Implements runtime.recorder.Watcher: tells the observer of every step, and keeps the peak of
    the action list."""

    def __init__(self, observer: Observer, auditor: Auditor, say: Say) -> None:
        self._observer, self._auditor, self._say = observer, auditor, say
        self.pipeline_peak = Peak()
        self.pipeline_ended = 0.0

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        self._observer.forget_peak()
        last = None
        for step in self._observer.watch(steps, kind_of_step):
            if last is not None:
                self._auditor.after(str(last))
            yield step
            last = step
        self.pipeline_peak, self.pipeline_ended = self._observer.peak, time.perf_counter()
        self._observer.forget_peak()
        self._say("update")

    def wait(self, message: Message) -> torch.Tensor:
        return message.wait()


def kind_of_step(step: Step) -> str:
    """F, I, W, SEND_F ...; a pair's own phases say which half they belong to."""
    return "pair" if isinstance(step, Pair) else step.kind.value


def kind_of_place(place: str) -> str:
    """F of F/attention."""
    return place.partition("/")[0]


class NoCorpus:
    """Sequences of token 0."""

    def __init__(self, seq_len: int) -> None:
        self._width = seq_len + 1

    def batch(self, split: str, start: int, count: int) -> torch.Tensor:
        return torch.zeros(count, self._width, dtype=torch.int64)


def rehearse(config: Config, say: Say = lambda phase: None) -> Rehearsal:
    """Take one step of one rank. config.rehearse says which. Raises ConfigError for what the
    trainer would refuse.

    say: is told what begins.
    """
    section = config.rehearse
    say("plan")
    program = build_program(config)
    layout, plan = program.layout, plan_program(program, check=False)
    rank = section.stage * layout.dp + section.data_rank
    numbers = Numbers(config, layout, rank % layout.ep, section.skew)
    device = RehearsedDevice(DEVICE, numbers.answer)
    observer = Observer(device)
    counts = Counts(lambda: kind_of_place(observer.place))
    started = time.perf_counter()
    say(f"build rank {rank} of {layout.world}")
    with (
        # On a thread of its own, autograd lets go of the last gradients whenever it gets the GIL. A
        # process that ends before that is aborted.
        torch.autograd.set_multithreading_enabled(False),
        FakeTensorMode(allow_non_fake_inputs=True),
        observer,
        observer.at("states"),
        GarbageControl(),
    ):
        world = RehearsedWorld(rank, layout.world, DEVICE, counts)
        groups = build_groups(layout.grid, world, layout.relay_ranks, program.messages)
        corpus = cast(Corpus, NoCorpus(config.train.seq_len))
        run = build_run(program, corpus, groups, device, initialise=False)
        run = watched_run(run, observer)
        say("dry run")
        with observer.at("dry run"):
            dry_run(run)
        states, built = observer.bytes_alive, time.perf_counter()
        start = observer.mark()
        observer.forget_work()
        counts.clear()
        auditor = Auditor(run, observer, AUDIT_INTERVAL)
        recording = Recording(observer, auditor, say)
        say(f"action list of {len(program.schedule.stages[section.stage]):,} actions")
        with observer.at("update"):
            train_step(run, read_batch(run, 0), recording)
            run.optimizer.finish_gather()
        left = tuple(living for living in observer.alive if living.birth.serial >= start)
    return Rehearsal(
        config,
        plan,
        section.stage,
        rank,
        observer,
        counts,
        auditor,
        states,
        recording.pipeline_peak,
        observer.peak,
        left,
        build_seconds=built - started,
        step_seconds=recording.pipeline_ended - built,
        update_seconds=time.perf_counter() - recording.pipeline_ended,
    )


def watched_run(run: Run, observer: Observer) -> Run:
    """The run with a training stage whose phases say where they are."""
    stage = run.training
    models = {index: WatchedModel(model.phases, observer) for index, model in run.models.items()}
    training = PipelineStage(models, stage.routes, stage.transport, stage.gradients, run.device)
    return dataclasses.replace(run, training=training)
