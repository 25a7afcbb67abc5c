"""Pure passes: a schedule in, a schedule out.

The order in which `build_schedule` applies them:

    base order -> extra_warmup -> split_weight_grad -> pair_steady -> drop_microbatches ->
    insert_p2p (p2p.py)
                                                                                 -> insert_offload
                                                                                 (offload.py)

A pass leaves a valid schedule valid, with one exception that is the point of the validator:
`pair_steady` needs a warm-up long enough, which is what `extra_warmup` is for (docs/schedule.md has
the proof).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from k2train.schedule.actions import BACKWARDS, Action, Kind, Pair, Step
from k2train.schedule.program import Schedule


def _each_stage(schedule: Schedule, change: Callable[[tuple[Step, ...]], Iterable[Step]]) -> Schedule:
    return replace(schedule, stages=tuple(tuple(change(line)) for line in schedule.stages))


def extra_warmup(schedule: Schedule, num: int = 1) -> Schedule:
    """Every backward of F and B lists waits for `num` more forwards; the orders of both stay as
    they are.

    In interleaved 1F1B this is one more warm-up microbatch for num = 1: in each steady slot the
    backward's own forward has already run in an earlier slot, on every stage.
    """
    return _each_stage(schedule, lambda line: _delay_backwards(line, num))


def _delay_backwards(line: tuple[Step, ...], num: int) -> list[Step]:
    forwards = [step for step in line if isinstance(step, Action) and step.kind is Kind.F]
    delayed: list[Step] = []
    done = seen = 0
    for step in line:
        if isinstance(step, Action) and step.kind is Kind.F:
            seen += 1
            continue
        assert has_backward(step), "extra_warmup runs before the other passes"
        delayed += forwards[done : seen + num]
        done = max(done, min(seen + num, len(forwards)))
        delayed.append(step)
    return delayed + list(forwards[done:])


def split_weight_grad(schedule: Schedule) -> Schedule:
    """Every full backward becomes its input gradient and, right behind it, its weight gradient.

    `insert_p2p` later puts the sends of what the input gradient (or its pair) has produced, and the
    receives for the next slot, between the two; so the weight gradient is the compute that pipeline
    traffic hides under.
    """
    return _each_stage(schedule, _split_line)


def _split_line(line: tuple[Step, ...]) -> Iterable[Step]:
    for step in line:
        if isinstance(step, Action) and step.kind is Kind.B:
            yield Action(Kind.I, step.virtual_stage, step.microbatch)
            yield Action(Kind.W, step.virtual_stage, step.microbatch)
        else:
            yield step


def pair_steady(schedule: Schedule) -> Schedule:
    """A forward directly followed by an input gradient becomes one pair: the slots of the steady
    phase.

    Without extra warm-up the last stage pairs a forward with its own backward, which deadlocks. A
    stage that runs all its forwards before its first backward has no steady phase and pairs
    nothing.
    """
    return _each_stage(schedule, _pair_line)


def _pair_line(line: tuple[Step, ...]) -> Iterable[Step]:
    if not _has_steady_phase(line):
        yield from line
        return
    index = 0
    while index < len(line):
        step = line[index]
        following = line[index + 1] if index + 1 < len(line) else None
        if (
            isinstance(step, Action)
            and isinstance(following, Action)
            and step.kind is Kind.F
            and following.kind is Kind.I
        ):
            yield Pair(step, following)
            index += 2
        else:
            yield step
            index += 1


def _has_steady_phase(line: tuple[Step, ...]) -> bool:
    """Whether a forward stands behind a backward. Where none does, the last forward may not wait
    for a backward: the stages would each wait for the other's half of the pair."""
    seen_backward = False
    for step in line:
        if has_backward(step):
            seen_backward = True
        elif seen_backward and isinstance(step, Action) and step.kind is Kind.F:
            return True
    return False


def drop_microbatches(schedule: Schedule, num_microbatches: int) -> Schedule:
    """Keep the first `num_microbatches` microbatches only. A pair that loses one half becomes the
    other.

    Nothing depends on another microbatch's results, so what remains of a valid schedule is valid.
    For schedules with one chain, before communication is inserted.
    """
    assert len(schedule.chains) == 1, "the microbatches of two chains are numbered by their total"
    kept = _each_stage(schedule, lambda line: _dropped(line, num_microbatches))
    return replace(kept, num_microbatches=num_microbatches)


def _dropped(line: tuple[Step, ...], num_microbatches: int) -> Iterable[Step]:
    for step in line:
        if isinstance(step, Action):
            if step.microbatch < num_microbatches:
                yield step
            continue
        forward, backward = step
        if max(forward.microbatch, backward.microbatch) < num_microbatches:
            yield step
        elif forward.microbatch < num_microbatches:
            yield forward
        elif backward.microbatch < num_microbatches:
            yield backward


def has_backward(step: Step) -> bool:
    """Whether a step runs a B or an I, alone or in a pair."""
    return isinstance(step, Pair) or step.kind in BACKWARDS
