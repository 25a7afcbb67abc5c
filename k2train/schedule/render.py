"""Timeline pictures in the manner of the K2 report's Figure 7.

`render_timeline` draws one page: the whole step, then the fill and the drain of the pipeline, then
a few slots of the steady phase with every stream of some stages, then memory over time. A step of
few actions is drawn box by box. K2's has a hundred thousand, far more than the page has dots; there
each column of a stage's row is divided by the share of its time that goes to forwards, input
gradients, weight gradients and nothing.

matplotlib is imported when a picture is drawn, and only its object interface is used, so drawing
touches no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from k2train.schedule.actions import Pair
from k2train.schedule.colours import BOX_CATEGORIES, category
from k2train.schedule.draw import draw_boxes, draw_legend, draw_memory, draw_shares, draw_streams
from k2train.schedule.simulation import Simulation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH_INCHES = 15.0
_BOXES_PER_STAGE = 150
"""Steps of a stage that can still be told apart across the page."""


def render_timeline(
    simulation: Simulation, path: str | PathLike[str], title: str = "", dpi: int = 110
) -> None:
    """Draw a recorded simulation into a file; the suffix chooses the format (png, svg, pdf).

    Raises ValueError where the simulation was not recorded, OSError where the file cannot be
    written.
    """
    _check_recorded(simulation)
    _page(simulation, title).savefig(path, dpi=dpi)


def render_comparison(
    simulations: Sequence[tuple[str, Simulation]], path: str | PathLike[str], title: str = "", dpi: int = 110
) -> None:
    """Draw recorded simulations below one another on one time axis, each with its title."""
    from matplotlib.figure import Figure

    heights = [0.5 + 0.2 * simulation.schedule.num_stages for _, simulation in simulations]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 1.0), layout="constrained")
    figure.suptitle(title, fontsize=12)
    end = max(simulation.makespan_seconds for _, simulation in simulations)
    for axes, (name, simulation) in zip(_column(figure, heights), simulations, strict=True):
        _check_recorded(simulation)
        draw_boxes(axes, simulation, (0.0, end), name)
    shown = {category(event) for _, simulation in simulations for event in simulation.events()}
    draw_legend(figure, [name for name in BOX_CATEGORIES if name in shown])
    figure.savefig(path, dpi=dpi)


def render_window(
    simulation: Simulation,
    path: str | PathLike[str],
    start: float,
    end: float,
    stages: tuple[int, ...] | None = None,
    title: str = "",
    dpi: int = 110,
) -> None:
    """Draw every stream of some stages (default: all) between two times."""
    from matplotlib.figure import Figure

    _check_recorded(simulation)
    shown = tuple(range(simulation.schedule.num_stages)) if stages is None else stages
    figure = Figure(figsize=(_WIDTH_INCHES, 1.6 + 1.0 * len(shown)), layout="constrained")
    draw_streams(figure.subplots(), simulation, (start, end), shown, title)
    draw_legend(figure)
    figure.savefig(path, dpi=dpi)


def steady_slots(simulation: Simulation, slots: int = 3) -> tuple[float, float]:
    """A window of a few slots in the middle of the steady phase (of the step, where it has
    none)."""
    start, end = simulation.steady_window
    middle = (start + end) / 2 if end > start else simulation.makespan_seconds / 2
    records = simulation.compute_records[0]
    first = next((i for i, r in enumerate(records) if r.start >= middle), len(records) - 1)
    wanted = [r.start for r in records[first:] if isinstance(r.step, Pair)] or [
        r.start for r in records[first:]
    ]
    last = wanted[min(slots, len(wanted) - 1)] if wanted else middle
    if last <= wanted[0]:
        return max(0.0, middle - simulation.makespan_seconds / 20), middle + simulation.makespan_seconds / 20
    return wanted[0], last


def _check_recorded(simulation: Simulation) -> None:
    if not any(simulation.compute_records):
        raise ValueError("nothing to draw: simulate with record=True")


def _page(simulation: Simulation, title: str) -> Figure:
    from matplotlib.figure import Figure

    stages = simulation.schedule.num_stages
    crowded = max(map(len, simulation.compute_records)) > _BOXES_PER_STAGE
    shown = _some_stages(stages)
    has_memory = any(simulation.peak_bytes)
    whole = 0.7 + 0.2 * stages
    rows = [("whole", whole)]
    if crowded:
        rows += [("fill", whole), ("drain", whole)]
    rows += [("steady", 0.7 + 0.85 * len(shown))]
    rows += [("memory", 1.9)] if has_memory else []
    heights = [height for _, height in rows]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + 1.0), layout="constrained")
    axes = dict(zip((name for name, _ in rows), _column(figure, heights), strict=True))
    figure.suptitle(title or _headline(simulation), fontsize=12)
    everything = (0.0, simulation.makespan_seconds)
    start, end = simulation.steady_window
    if crowded:
        draw_shares(
            axes["whole"],
            simulation,
            "whole step: each row divided by the share of time that each kind takes; steady phase between the dotted lines",
        )
        draw_boxes(axes["fill"], simulation, (0.0, start), "warm-up: until the first microbatch is back")
        draw_boxes(
            axes["drain"], simulation, (end, everything[1]), "cool-down: from the last microbatch's entry"
        )
    else:
        draw_boxes(axes["whole"], simulation, everything, "whole step")
    draw_streams(axes["steady"], simulation, steady_slots(simulation), shown, "steady phase, every stream")
    if has_memory:
        draw_memory(axes["memory"], simulation, shown)
    draw_legend(figure)
    return figure


def _column(figure: Figure, heights: list[float]) -> list:
    axes = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights})
    return list(axes) if len(heights) > 1 else [axes]


def _some_stages(stages: int) -> tuple[int, ...]:
    """First, second, last but one and last: where slots differ most."""
    return tuple(range(stages)) if stages <= 4 else (0, 1, stages - 2, stages - 1)


def _headline(simulation: Simulation) -> str:
    schedule = simulation.schedule
    per_stage = schedule.num_virtual_stages // schedule.num_stages
    bubble = max(simulation.bubble_share)
    return (
        f"{schedule.name}: {schedule.num_stages} stages x {per_stage}, {schedule.num_microbatches} microbatches, "
        f"makespan {simulation.makespan_seconds:.4g} s, bubble up to {100 * bubble:.1f} % of it"
    )
