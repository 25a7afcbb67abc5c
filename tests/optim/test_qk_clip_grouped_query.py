"""Which rows of grouped-query attention QK-Clip scales.

Letters: H query heads.
"""

from __future__ import annotations

import torch

from k2train.architecture.grouped_query import GroupedQueryMixer
from k2train.architecture.heads import Heads
from k2train.optim.qk_clip import clip_rows

HEADS, WIDTH, HIDDEN = 4, 6, 5


def clipped_rows(groups: int, name: str, gamma_H: torch.Tensor) -> torch.Tensor | None:
    """What QK-Clip multiplies each row of a projection by; None where it leaves the projection."""
    mixer = GroupedQueryMixer(HIDDEN, Heads(HEADS, WIDTH, WIDTH, WIDTH), groups)
    rows = mixer.clipped.get(name)
    if rows is None:
        return None
    weight = torch.ones(HEADS * WIDTH, HIDDEN, dtype=torch.float64)
    clip_rows(weight, gamma_H, rows)
    assert torch.equal(weight, weight[:, :1].expand_as(weight))
    return weight[:, 0]


def test_a_shared_key_stays_and_its_clipped_query_takes_the_whole_of_gamma() -> None:
    gamma_H = torch.tensor([1.0, 0.25, 1.0, 0.5], dtype=torch.float64)
    expected = gamma_H.repeat_interleave(WIDTH)
    for groups in (1, 2):
        query = clipped_rows(groups, "q_proj", gamma_H)
        assert query is not None
        assert torch.equal(query, expected)
        assert clipped_rows(groups, "k_proj", gamma_H) is None


def test_a_head_with_a_key_of_its_own_shrinks_both_by_the_root_of_gamma() -> None:
    """Powers of four, whose roots and products are exact."""
    gamma_H = torch.tensor([1.0, 0.25, 1.0, 0.0625], dtype=torch.float64)
    query, key = clipped_rows(HEADS, "q_proj", gamma_H), clipped_rows(HEADS, "k_proj", gamma_H)
    assert query is not None
    assert key is not None
    assert torch.equal(query, key)
    assert torch.equal(query * key, gamma_H.repeat_interleave(WIDTH))


def test_values_and_outputs_are_never_scaled() -> None:
    gamma_H = torch.full((HEADS,), 0.25, dtype=torch.float64)
    for groups in (1, 2, HEADS):
        assert clipped_rows(groups, "v_proj", gamma_H) is None
        assert clipped_rows(groups, "o_proj", gamma_H) is None
