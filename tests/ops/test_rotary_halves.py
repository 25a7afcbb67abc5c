"""Rotation of halves and copies of heads, against transformers' own functions.

Letters: B sequences, S positions, G heads before they are copied, F features.
"""

from __future__ import annotations

import pytest
import torch

from k2train.config.compose import load_config
from k2train.ops.rotary import RotaryTables, rotary_tables
from k2train.ops.rotary_halves import copied_heads, rotary_halves


@pytest.fixture
def tables() -> RotaryTables:
    """Of 7 positions, for 16 of 32 features."""
    model = load_config(["model=glm_tiny"]).model
    return rotary_tables(model, 7, torch.float64, torch.device("cpu"))


def heads(num: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num)
    shape = (2, 7, num, 32)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("groups", "copies"), [(4, 1), (2, 3), (1, 4)])
def test_values_and_gradients_are_those_of_transformers(
    tables: RotaryTables, groups: int, copies: int, inside: bool
) -> None:
    """The same products and sums of two in float64, so 1e-14 of numbers near 1; sums of up to four
    copies' gradients in another order."""
    from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb, repeat_kv

    x_BSGF, v_BSGF = heads(groups), heads(groups)
    got = rotary_halves(x_BSGF, tables, copies, inside), copied_heads(v_BSGF, copies, inside)
    assert all(t.is_contiguous() for t in got)
    cos, sin = (torch.cat([t, t], -1).unsqueeze(0) for t in (tables.cos, tables.sin))
    turned, _ = apply_rotary_pos_emb(x_BSGF.transpose(1, 2), x_BSGF.transpose(1, 2), cos, sin)
    want = repeat_kv(turned, copies), repeat_kv(v_BSGF.transpose(1, 2), copies)
    for mine, theirs, leaf in zip(got, want, (x_BSGF, v_BSGF), strict=True):
        mine = mine.transpose(1, 2) if inside else mine
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)
        weights = torch.randn(mine.shape, dtype=mine.dtype, generator=torch.Generator().manual_seed(9))
        (dmine,) = torch.autograd.grad((mine * weights).sum(), leaf, retain_graph=True)
        (dtheirs,) = torch.autograd.grad((theirs * weights).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(dmine, dtheirs, rtol=0, atol=1e-13)
