"""Tables show every number at any width: what does not fit in one part goes on in the next."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from k2train.telemetry.tables import fact_table, new_table


def printed(thing: object, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_table_of_numbers_shows_every_number_at_any_width(width: int) -> None:
    headings = [f"heading_{index}" for index in range(8)]
    table = new_table("figures", ["name", *headings])
    numbers = [[f"{row}{column}123.456" for column in range(8)] for row in range(3)]
    for row, cells in enumerate(numbers):
        table.add_row(f"row {row}", *cells)
    text = printed(table, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in [*headings, *(cell for row in numbers for cell in row)]:
        assert text.count(word) == 1, word


def test_a_table_that_fits_is_one_table() -> None:
    table = new_table("figures", ["name", "a", "b"])
    table.add_row("x", "1", "2")
    assert printed(table, 80).count("name") == 1


def test_styles_and_sections_are_kept_in_every_part() -> None:
    table = new_table("figures", ["name", *(f"heading_{index}" for index in range(8))])
    table.add_row("first", *["1"] * 8, end_section=True)
    table.add_row("second", *["2"] * 8)
    assert printed(table, 40).count("second") > 1


def test_facts_go_on_in_the_next_line() -> None:
    text = printed(fact_table("facts", [("directory", "runs/" + "long" * 50)]), 40)
    assert "…" not in text
    assert "long" * 50 in text.replace("\n", "").replace(" ", "")
