"""Timelines as text, for terminals, documents and golden files."""

from __future__ import annotations

from k2train.schedule.actions import Kind
from k2train.schedule.simulation import Simulation

_LETTERS = {Kind.F: "F", Kind.B: "B", Kind.I: "I", Kind.W: "W"}


def render_text(simulation: Simulation, width: int = 100) -> str:
    """A line for each stage, `width` characters for the step: F, B, I or W where that takes most of
    the character's time, P where a pair does, a dot where the compute stream mostly stands still.
    Recorded simulations only."""
    shares: list[list[dict[str, float]]] = [
        [{} for _ in range(width)] for _ in range(simulation.schedule.num_stages)
    ]
    cell = simulation.makespan_seconds / width
    for stage, step, start, end in simulation.steps():
        letter = _LETTERS.get(step[0], "P") if isinstance(step[0], Kind) else "P"
        for column in range(min(int(start / cell), width - 1), min(int(end / cell) + 1, width)):
            inside = min(end, (column + 1) * cell) - max(start, column * cell)
            if inside > 0:
                taken = shares[stage][column]
                taken[letter] = taken.get(letter, 0.0) + inside
    lines = ["".join(_letter(taken, cell) for taken in line) for line in shares]
    return _numbered(lines) + f"{'':>8}0{simulation.makespan_seconds:>{width - 1}.4g}\n"


def _letter(taken: dict[str, float], cell: float) -> str:
    idle = cell - sum(taken.values())
    return max([*taken.items(), (".", idle)], key=lambda item: item[1])[0]


def render_cells(simulation: Simulation, unit: float = 1.0) -> str:
    """A line for each stage and a cell for each unit of time, with what starts there and its
    microbatch: F3, I0, W0, and both halves of a pair one after the other. For costs that are
    multiples of the unit; a dash goes on with what was there."""
    places = len(str(simulation.schedule.num_microbatches - 1)) + 2
    cells = [
        ["." + " " * (places - 1)] * round(simulation.makespan_seconds / unit)
        for _ in range(simulation.schedule.num_stages)
    ]
    for event in simulation.events():
        if event.stream == "compute":
            letter = "W" if event.name == "weight grad" else event.action.kind.value
            first, last = round(event.start / unit), round(event.end / unit)
            for column in range(first, last):
                text = f"{letter}{event.action.microbatch}" if column == first else "-"
                cells[event.stage][column] = text.ljust(places)
    return _numbered(["".join(line).rstrip() for line in cells])


def _numbered(lines: list[str]) -> str:
    return "".join(f"{stage:>6}  {line}\n" for stage, line in enumerate(lines))
