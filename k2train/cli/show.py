"""Tables and lines on standard output, at the terminal's width, or at 100 columns where there is no terminal."""

from __future__ import annotations

import sys

from rich.console import Console

from k2train.planner.tables import WIDTH


def show(*things: object) -> None:
    """Print each."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    if console.width > WIDTH:
        console = Console(width=WIDTH, highlight=False)
    for thing in things:
        console.print(thing)
