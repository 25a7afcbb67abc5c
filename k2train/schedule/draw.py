"""The panels of a timeline picture: boxes by stage, shares by column, streams of a window,
memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from k2train.schedule.actions import parts
from k2train.schedule.colours import (
    BACKWARD,
    COLOURS,
    DARK,
    FORWARD,
    IDLE,
    LANE_NAMES,
    LANES,
    WEIGHT,
    category,
    compute_category,
)
from k2train.schedule.costs import Stream
from k2train.schedule.simulation import Event, Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Window = tuple[float, float]

_COLUMNS = 700
"""Columns of the shares and memory panels, about half the dots across the page."""
_ROW = 0.86
"""Height of a stage's row; the rest of 1 is the gap below it."""
_CROWDED = 60
"""Boxes of one colour in a lane from which on they are drawn without visible edges."""
_CHARACTER = 0.0042
"""Width of a character of a label, as a share of the panel."""


def draw_boxes(axes: Axes, simulation: Simulation, window: Window, title: str) -> None:
    """One row a stage; compute boxes with their microbatch, all-to-alls as a thin line below
    them."""
    stages = simulation.schedule.num_stages
    boxes = defaultdict(list)
    for event in simulation.events(*window):
        if event.stream == "compute":
            boxes[event.stage, 0.30, 0.58].append(event)
        elif event.stream == "ep":
            boxes[event.stage, 0.08, 0.18].append(event)
    shades = _shades(simulation)
    for (stage, bottom, height), events in boxes.items():
        _bars(axes, events, stage + bottom, height, shade=shades)
        if height > 0.5:
            _labels(axes, _whole_actions(events), stage + bottom + height / 2, window, shade=shades)
    _frame(axes, window, title)
    axes.set_ylim(stages, 0)
    axes.set_yticks(
        [stage + 0.5 for stage in range(stages)], [f"stage {stage}" for stage in range(stages)], fontsize=7
    )


def draw_streams(
    axes: Axes, simulation: Simulation, window: Window, stages: tuple[int, ...], title: str
) -> None:
    """Five lanes a stage: compute, all-to-all, sends, and copies out and in, phases named."""
    rows = {stage: row for row, stage in enumerate(stages)}
    lanes: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in simulation.events(*window):
        if event.stage in rows:
            lanes[event.stage, event.stream].append(event)
    used = [lane for lane in LANES if any(stream == lane for _, stream in lanes)]
    step = 1.0 / (len(used) + 0.6)
    ticks = {}
    for stage, row in rows.items():
        for number, lane in enumerate(used):
            bottom = row + (number + 0.3) * step
            ticks[bottom + step / 2] = (
                f"stage {stage}  {LANE_NAMES[lane]}" if number == 0 else LANE_NAMES[lane]
            )
            _bars(axes, lanes[stage, lane], bottom, 0.92 * step, shade={})
            _labels(axes, lanes[stage, lane], bottom + 0.46 * step, window, named=True)
    _frame(axes, window, title)
    axes.set_ylim(len(stages), 0)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=6)


def draw_shares(axes: Axes, simulation: Simulation, title: str) -> None:
    """One row a stage; in each column the share of its time that every category takes, one on top
    of the other."""
    end = simulation.makespan_seconds
    stages = simulation.schedule.num_stages
    edges = np.linspace(0.0, end, _COLUMNS + 1)
    for stage in range(stages):
        floor = np.full(_COLUMNS, stage + _ROW)
        for name, share in _shares(simulation, stage, edges).items():
            top = floor - share * _ROW
            axes.fill_between(edges[:-1], floor, top, step="post", color=COLOURS[name], linewidth=0)
            floor = top
    for bound in simulation.steady_window:
        axes.axvline(bound, color="black", linewidth=0.8, linestyle=":")
    _frame(axes, (0.0, end), title)
    _stage_rows(axes, stages)


def _shares(simulation: Simulation, stage: int, edges: np.ndarray) -> dict[str, np.ndarray]:
    """For each compute category, the share of every column that it takes: differences of its
    running total."""
    knots: dict[str, tuple[list[float], list[float]]] = {
        n: ([0.0], [0.0]) for n in (FORWARD, BACKWARD, WEIGHT)
    }
    for record in simulation.compute_records[stage]:
        actions = parts(record.step)
        for chain, phase, opens, closes in record.layout.spans:
            if phase.stream is Stream.COMPUTE and closes > opens:
                times, totals = knots[compute_category(actions[chain], phase.name)]
                times += (record.start + opens, record.start + closes)
                totals += (totals[-1], totals[-1] + closes - opens)
    width = edges[1] - edges[0]
    return {name: np.diff(np.interp(edges, *line)) / width for name, line in knots.items()}


def _stage_rows(axes: Axes, stages: int) -> None:
    axes.set_ylim(stages, 0)
    axes.set_yticks(
        [stage + 0.5 for stage in range(stages)], [f"stage {stage}" for stage in range(stages)], fontsize=7
    )


def draw_memory(axes: Axes, simulation: Simulation, stages: tuple[int, ...]) -> None:
    """Bytes of activations, transient buffers and weight-gradient queue on the device, at the peak
    of each column."""
    end = simulation.makespan_seconds
    edges = np.linspace(0.0, end, _COLUMNS + 1)
    # Orange stands for backwards elsewhere; lines here differ in dash as well as in colour.
    styles = [("#000000", "-"), ("#0072B2", "--"), ("#D55E00", "-."), ("#009E73", ":")]
    for stage, (colour, dash) in zip(stages, styles, strict=False):
        times, level = simulation.memory[stage]
        before = (
            level[np.searchsorted(times, edges[:-1], side="right") - 1] if len(level) else np.zeros(_COLUMNS)
        )
        peaks = np.where(times.size and np.searchsorted(times, edges[:-1], side="right") > 0, before, 0)
        np.maximum.at(peaks, np.clip(np.searchsorted(edges, times, side="right") - 1, 0, _COLUMNS - 1), level)
        axes.step(edges[:-1], peaks / 1e9, where="post", color=colour, linestyle=dash, label=f"stage {stage}")
    _frame(axes, (0.0, end), "activations, transient buffers and weight-gradient queue on the device (GB)")
    axes.legend(fontsize=7, loc="upper right", ncols=len(stages))
    axes.set_ylim(bottom=0)


def draw_legend(figure: Figure, names: Iterable[str] = tuple(COLOURS)) -> None:
    """Categories and their colours, below the page."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=COLOURS[name], edgecolor="#555555", linewidth=0.4, label=name) for name in names
    ]
    handles.append(Patch(facecolor=IDLE, edgecolor="#555555", linewidth=0.4, label="idle"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def _frame(axes: Axes, window: Window, title: str) -> None:
    axes.set_xlim(*window)
    axes.set_facecolor(IDLE)
    axes.set_title(title, fontsize=9, loc="left", pad=3)
    axes.set_xlabel("seconds", fontsize=7, labelpad=1)
    axes.tick_params(labelsize=7, length=2)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _shades(simulation: Simulation) -> dict[int, float]:
    """How much white goes into the colour of each virtual stage: none for the first on its stage,
    more for later ones."""
    shades = {}
    for stage in range(simulation.schedule.num_stages):
        for place, virtual_stage in enumerate(simulation.schedule.virtual_stages_of(stage)):
            shades[virtual_stage] = min(0.6, 0.45 * place)
    return shades


def _bars(axes: Axes, events: Iterable[Event], bottom: float, height: float, shade: dict[int, float]) -> None:
    by_colour: dict[tuple[float, ...], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        colour = _tint(COLOURS[category(event)], shade.get(event.action.virtual_stage, 0.0))
        by_colour[colour].append((event.start, event.end - event.start))
    for colour, spans in by_colour.items():
        edge = 0.3 if len(spans) < _CROWDED else 0.1  # white edges would eat narrow boxes
        bars = axes.broken_barh(
            spans, (bottom, height), facecolors=[colour], edgecolor="white", linewidth=edge
        )
        bars.set_in_layout(False)


def _tint(colour: str, white: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(channel + (1.0 - channel) * white for channel in to_rgb(colour))


def _whole_actions(events: list[Event]) -> list[Event]:
    """Neighbouring phases of one action as one box, for its label."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if (
            last
            and last.action == event.action
            and category(last) == category(event)
            and last.end == event.start
        ):
            merged[-1] = last._replace(end=event.end)
        else:
            merged.append(event)
    return merged


def _labels(
    axes: Axes,
    events: Iterable[Event],
    middle: float,
    window: Window,
    named: bool = False,
    shade: dict[int, float] | None = None,
) -> None:
    """Microbatch numbers, or phase and microbatch, in boxes wide enough for them; the longest form
    that fits."""
    span = window[1] - window[0]
    for event in events:
        left, right = max(event.start, window[0]), min(event.end, window[1])
        number = str(event.action.microbatch)
        letter = "W" if category(event) == WEIGHT else event.action.kind.value
        forms = [f"{letter}{number} {event.name}", f"{letter}{number}", number] if named else [number]
        if event.stream not in ("compute", "ep"):
            forms = [f"{number}"]
        text = next((form for form in forms if (right - left) / span > _CHARACTER * (len(form) + 0.5)), None)
        if text is not None:
            pale = (shade or {}).get(event.action.virtual_stage, 0.0) > 0.2
            colour = "white" if category(event) in DARK and not pale else "black"
            label = axes.text(
                (left + right) / 2, middle, text, ha="center", va="center", fontsize=5.5, color=colour
            )
            label.set_in_layout(False)
