"""Numbers and names as reports show them. GB is 1e9 bytes, TB 1e12."""

from __future__ import annotations

from collections.abc import Sequence

from k2train.layout.layout import VirtualStage


def gigabytes(num_bytes: float) -> str:
    """One decimal; small amounts keep two digits."""
    value = num_bytes / 1e9
    if value == 0:
        return "0"
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}" if value >= 0.001 else "<0.001"


def seconds(value: float) -> str:
    """Three significant digits; 0 where nothing of a step's account would show."""
    if value < 5e-7:
        return "0"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}" if value >= 0.0995 else f"{value:.2g}"


def fixed(value: float) -> str:
    """Two decimals, for columns of seconds."""
    return "0" if value < 5e-7 else "<0.01" if value < 0.005 else f"{value:.2f}"


def count(value: float, decimals: int = 1) -> str:
    """1026.4B, 32.9B, 12.3M, 4,096."""
    for factor, letter in ((1e9, "B"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.{decimals}f}{letter}"
    return f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """A percentage."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def pieces(parts: Sequence[VirtualStage]) -> str:
    """What a stage holds by virtual stage: `E+2 | 2`, E the embedding, H the head."""
    return " | ".join(_piece(part) for part in parts)


def _piece(part: VirtualStage) -> str:
    words = ["E"] if part.embedding else []
    if part.num_layers or not (part.embedding or part.head):
        words.append(str(part.num_layers))
    return "+".join([*words, "H"] if part.head else words)


def ranges(numbers: Sequence[int]) -> str:
    """1-14 for consecutive numbers."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
