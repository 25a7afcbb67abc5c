"""Tables for a terminal, a log file or a pipe: nothing in them is ever cut off.

Rich shortens what does not fit, and a number without its last digits is worse than none. So a table
of numbers that is too wide is set as several tables below each other, each with the first columns
of text again; and text that is too wide goes on in the next line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

WIDTH = 100
"""Columns where there is no terminal and COLUMNS is not set, and the most that are used."""
_UNBOUNDED = 100_000


class NumberTable(Table):
    """Numbers, right-aligned behind the first `text_columns` columns, in as many parts as the
    width asks for."""

    def __init__(self, title: str, columns: Sequence[str], text_columns: int = 1) -> None:
        super().__init__(
            title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False
        )
        self._headings, self._text_columns = tuple(columns), text_columns
        self._lines: list[tuple[tuple[str, ...], dict[str, Any]]] = []
        for index, column in enumerate(columns):
            if index < text_columns:
                self.add_column(column, overflow="fold")
            else:
                self.add_column(column, justify="right", no_wrap=True)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """A row of texts. options: `style` and `end_section`, as rich takes them."""
        self._lines.append((cells, options))
        super().add_row(*cells, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._width(console, options) <= options.max_width or len(self.columns) <= self._text_columns + 1:
            yield from super().__rich_console__(console, options)
            return
        for part in self._parts(console, options):
            yield from part.__rich_console__(console, options)

    def _width(self, console: Console, options: ConsoleOptions) -> int:
        """Columns that the table needs to have every cell in one line."""
        return self.__rich_measure__(console, options.update_width(_UNBOUNDED)).maximum

    def _parts(self, console: Console, options: ConsoleOptions) -> Iterable[NumberTable]:
        """Parts with as many columns of numbers each as fit, one at least."""
        chosen: list[int] = []
        for index in range(self._text_columns, len(self._headings)):
            if chosen and self._part([*chosen, index])._width(console, options) > options.max_width:
                yield self._part(chosen)
                chosen = []
            chosen.append(index)
        yield self._part(chosen)

    def _part(self, numbers: Sequence[int]) -> NumberTable:
        """The table with these columns of numbers alone; only the first part is titled."""
        kept = [*range(self._text_columns), *numbers]
        first = numbers[0] == self._text_columns
        part = NumberTable(
            str(self.title) if first else "", [self._headings[index] for index in kept], self._text_columns
        )
        part.title = self.title if first else None
        part.padding, part.show_edge = self.padding, self.show_edge
        for cells, options in self._lines:
            part.add_row(*(cells[index] for index in kept if index < len(cells)), **options)
        return part


def new_table(title: str, columns: Sequence[str], text_columns: int = 1) -> NumberTable:
    """A table of numbers, right-aligned behind its first columns of text."""
    return NumberTable(title, columns, text_columns)


def fact_table(
    title: str | None, rows: Iterable[tuple[str, ...]], headings: Sequence[str] = ("", "")
) -> Table:
    """Columns of text, for facts and what they are called; long text goes on in the next line."""
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD if any(headings) else box.SIMPLE,
        show_header=any(headings),
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def broken_heading(key: str) -> str:
    """A heading over several lines: a unit below its quantity, a long key broken behind
    underscores."""
    if key.count("_") == 1 and len(key) <= 8:
        return key.replace("_", "\n")
    lines = [""]
    for word in key.replace("_", "_ ").split():
        if lines[-1] and len(lines[-1] + word) > 10:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def output_console() -> Console:
    """Standard output at the terminal's width, at that of COLUMNS or at WIDTH elsewhere, and at
    WIDTH at most."""
    given = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if given else WIDTH, highlight=False)
    return Console(width=WIDTH, highlight=False) if console.width > WIDTH else console


def show(*things: object) -> None:
    """Print each on standard output."""
    console = output_console()
    for thing in things:
        console.print(thing)
