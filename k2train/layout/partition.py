"""Layers to virtual stages: contiguous, every layer once, the slowest stage as fast as it can be.

A step is as long as its fullest stage, so that is minimised first; then the heaviest virtual stage,
because pipelines move in lockstep; then evenness. K2 on 16 stages with 2 virtual stages each: the
head weighs about two layers, so the last virtual stage has the head alone, the last stage's other
one a single layer, and all others two.

The virtual stages of a stage are not neighbours in the model, which makes the exact problem a
packing problem. It is solved by dealing out layers as if all weighed the same, which is exact where
they do, and then moving layers away from the fullest stage and the heaviest virtual stage while
that helps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

Score = tuple[float, float, float]


@dataclass(frozen=True)
class PipelineWeights:
    """What is to be cut: weights of embedding, layers and head, in any one unit."""

    embedding: float
    layers: tuple[float, ...]
    head: float

    @property
    def num_items(self) -> int:
        """The most virtual stages that can each hold something."""
        return len(self.layers) + 2


def balance(weights: PipelineWeights, placement: Sequence[int]) -> tuple[int, ...]:
    """Layers of every virtual stage. placement: the stage of every virtual stage, in model order.

    The first virtual stage also has the embedding, the last the head; no other is left without a
    layer, so at most `weights.num_items` virtual stages can be served.
    """
    assert 1 <= len(placement) <= weights.num_items, "more virtual stages than things to put on them"
    counts = _deal_out(weights, placement)
    score = _score(weights, placement, counts)
    while True:
        better = min(_moves(weights, placement, counts), default=(score, counts))
        if better[0] >= score:
            return tuple(counts)
        score, counts = better


def piece_loads(weights: PipelineWeights, counts: Sequence[int]) -> list[float]:
    """The weight of every virtual stage for these numbers of layers."""
    sums = [0.0, *itertools.accumulate(weights.layers)]
    ends = [0, *itertools.accumulate(counts)]
    loads = [sums[end] - sums[start] for start, end in itertools.pairwise(ends)]
    loads[0] += weights.embedding
    loads[-1] += weights.head
    return loads


def stage_loads(loads: Sequence[float], placement: Sequence[int]) -> list[float]:
    """The weight of every stage from that of its virtual stages."""
    totals = [0.0] * (max(placement) + 1)
    for load, stage in zip(loads, placement, strict=True):
        totals[stage] += load
    return totals


def _fewest(num_pieces: int) -> list[int]:
    """One layer everywhere but where embedding and head are."""
    fewest = [1] * num_pieces
    fewest[0] = fewest[-1] = 0
    return fewest


def _deal_out(weights: PipelineWeights, placement: Sequence[int]) -> list[int]:
    """Layers one by one to the stage, and there to the virtual stage, that has least, as if all
    weighed the mean."""
    counts = _fewest(len(placement))
    mean = sum(weights.layers) / len(weights.layers)
    loads = [count * mean for count in counts]
    loads[0] += weights.embedding
    loads[-1] += weights.head
    totals = stage_loads(loads, placement)
    for _ in range(len(weights.layers) - sum(counts)):
        piece = min(range(len(loads)), key=lambda piece: (totals[placement[piece]], loads[piece], piece))
        counts[piece] += 1
        loads[piece] += mean
        totals[placement[piece]] += mean
    return counts


def _score(weights: PipelineWeights, placement: Sequence[int], counts: Sequence[int]) -> Score:
    loads = piece_loads(weights, counts)
    return max(stage_loads(loads, placement)), max(loads), sum(load * load for load in loads)


def _moves(
    weights: PipelineWeights, placement: Sequence[int], counts: Sequence[int]
) -> list[tuple[Score, list[int]]]:
    """Every way to take a layer from the fullest stage or the heaviest virtual stage, with what
    comes of it."""
    loads = piece_loads(weights, counts)
    totals = stage_loads(loads, placement)
    fullest, heaviest = max(totals), max(loads)
    fewest = _fewest(len(counts))
    outcomes = []
    for giver in range(len(counts)):
        crowded = totals[placement[giver]] == fullest or loads[giver] == heaviest
        if not crowded or counts[giver] <= fewest[giver]:
            continue
        for taker in range(len(counts)):
            if taker != giver:
                moved = list(counts)
                moved[giver] -= 1
                moved[taker] += 1
                outcomes.append((_score(weights, placement, moved), moved))
    return outcomes
