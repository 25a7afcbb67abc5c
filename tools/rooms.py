"""The picture of the rooms: `python tools/rooms.py docs/pictures/rooms.svg`.

It is drawn from what already says it: the import contract of pyproject.toml gives the layers and
which rooms know no torch, the tree of README.md what each room is for.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH, ROW, GAP, MARGIN = 1000, 50, 10, 20
PURE, OTHER = "#D9EAF7", "#F7E6CC"
LEGEND = 40
"""Pixels, as everything here; the legend's height."""


def layers() -> list[list[str]]:
    """The rooms of the import contract, the highest layer first; siblings share a list."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^layers = \[(.*?)^\]", text, re.M | re.S)
    assert block, "pyproject.toml has an import contract with layers"
    rows = re.findall(r'"([^"]+)"', block.group(1))
    return [row.split(" | ") for row in rows if not row.startswith("__")]


def pure_rooms() -> set[str]:
    """The rooms that the contract keeps free of torch."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"without torch.*?source_modules = \[(.*?)\]", text, re.S)
    assert block, "pyproject.toml has a contract for pure rooms"
    return set(re.findall(r'"k2train\.(\w+)"', block.group(1)))


def purposes() -> dict[str, str]:
    """What each room is for, from README.md's tree."""
    tree = re.findall(r"^k2train/(\w+)/\s+(.*)$", (ROOT / "README.md").read_text(), re.M)
    return dict(tree)


def box(x: float, y: float, width: float, room: str, pure: bool, purpose: str) -> str:
    """One room as an SVG fragment: name in bold, purpose below it as far as it fits."""
    letters = int((width - 20) / 5.6)
    short = purpose if len(purpose) <= letters else purpose[: letters - 1].rstrip(" ,:;") + "\u2026"
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{ROW}" rx="6" '
        f'fill="{PURE if pure else OTHER}" stroke="#666"/>\n'
        f'<text x="{x + 10:g}" y="{y + 20:g}" font-weight="bold">{room}</text>\n'
        f'<text x="{x + 10:g}" y="{y + 38:g}" font-size="11">{escape(short)}</text>\n'
    )


def picture() -> str:
    """The whole picture as SVG."""
    rows, pure, why = layers(), pure_rooms(), purposes()
    height = 2 * MARGIN + len(rows) * (ROW + GAP) + LEGEND
    parts = []
    for index, row in enumerate(rows):
        y = MARGIN + index * (ROW + GAP)
        width = (WIDTH - 2 * MARGIN - (len(row) - 1) * GAP) / len(row)
        for place, room in enumerate(row):
            x = MARGIN + place * (width + GAP)
            parts.append(box(x, y, width, room, room in pure, why.get(room, "")))
    y = height - MARGIN - 8
    key = ((MARGIN, PURE, "imports without torch"), (220, OTHER, "needs torch"))
    for x, colour, text in key:
        parts.append(f'<rect x="{x}" y="{y - 12}" width="16" height="16" fill="{colour}" stroke="#666"/>\n')
        parts.append(f'<text x="{x + 24}" y="{y}" font-size="12">{text}</text>\n')
    rule = "a room imports from rooms below it; rooms of one row do not know each other"
    parts.append(f'<text x="370" y="{y}" font-size="12">{rule}</text>\n')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="14">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture())
