"""Memory over one step as a picture: the rehearsed level action by action, over the level that was
planned."""

from __future__ import annotations

from k2train.planner.memory import level_at
from k2train.rehearsal.run import Rehearsal
from k2train.schedule.actions import COMPUTE, Pair, Step
from k2train.schedule.simulate import simulate
from k2train.telemetry.plot import HELD_OUT_COLOUR, RATE_COLOUR, TRAIN_COLOUR


def render_memory(rehearsal: Rehearsal, path: str) -> None:
    """Write a PNG."""
    # Imported here: matplotlib takes most of a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    levels = rehearsal.observer.levels
    axes.step(
        range(len(levels)),
        [highest / 1e9 for _, _, highest in levels],
        where="mid",
        linewidth=0.9,
        color=TRAIN_COLOUR,
        label="rehearsed, highest within the action",
    )
    axes.step(
        range(len(levels)),
        [after / 1e9 for _, after, _ in levels],
        where="mid",
        linewidth=0.7,
        color=RATE_COLOUR,
        label="rehearsed, after the action",
    )
    numbers, planned = planned_levels(rehearsal)
    axes.step(
        numbers,
        [level / 1e9 for level in planned],
        where="mid",
        linewidth=0.9,
        color=HELD_OUT_COLOUR,
        label="planned, highest within the action",
    )
    title = f"{rehearsal.config.name}, stage {rehearsal.stage}: device memory over one step"
    axes.set(title=title, xlabel="action of the stage's list", ylabel="GB (1e9 bytes)", ylim=(0, None))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def planned_levels(rehearsal: Rehearsal) -> tuple[list[int], list[int]]:
    """The number of each compute step in the stage's list, and the most bytes that are planned
    during it."""
    program, stage = rehearsal.plan.program, rehearsal.stage
    simulation = simulate(program.schedule, program.costs, record=True)
    records = simulation.compute_records[stage]
    times, level = simulation.memory[stage]
    states = rehearsal.plan.memory[stage].states
    numbers = [n for n, step in enumerate(program.schedule.stages[stage]) if computes(step)]
    planned = []
    for record in records:
        start, end = record.start + record.layout.compute_start, record.start + record.layout.compute_end
        inside = level[(times > start) & (times <= end)]
        planned.append(states + max(level_at((times, level), start), int(inside.max(initial=0))))
    return numbers, planned


def computes(step: Step) -> bool:
    """Whether a step of the list runs on the compute stream."""
    return isinstance(step, Pair) or step.kind in COMPUTE
