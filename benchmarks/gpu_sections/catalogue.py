"""Which sections there are, and which share of the budget each may take. Imports without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """module: its file in this package, which has `run(report, setting)`. share: weight of its part
    of the budget."""

    number: int
    module: str
    title: str
    share: float


# The shares are the seconds of a budget of 480.
SECTIONS = (
    Section(1, "environment", "versions, ceilings, fused paths", 25),
    Section(2, "gpu_tests", "the tests marked gpu", 60),
    Section(3, "attention_accuracy", "attention against float64", 40),
    Section(4, "attention_speed", "attention and its variants", 95),
    Section(5, "products", "grouped products and FP32 sums", 30),
    Section(6, "moe_layer", "a MoE layer of K2 by phase", 45),
    Section(7, "offload", "copies to the host and back", 50),
    Section(8, "head_and_muon", "head and Newton-Schulz", 30),
    Section(9, "slice_of_k2", "a slice of K2 in training", 105),
)


def chosen(numbers: str) -> tuple[Section, ...]:
    """The sections of a list such as `1,4,9`, in their own order. Raises ValueError for a number
    that is none."""
    wanted = {int(word) for word in numbers.split(",")}
    unknown = wanted - {section.number for section in SECTIONS}
    if unknown:
        raise ValueError(f"there is no section {min(unknown)}; sections are 1 to {len(SECTIONS)}")
    return tuple(section for section in SECTIONS if section.number in wanted)


def limit_seconds(sections: Sequence[Section], seconds_left: float) -> float:
    """The limit of the first of `sections`: its share of what is left, so that saved seconds go to
    those behind."""
    return seconds_left * sections[0].share / sum(section.share for section in sections)
