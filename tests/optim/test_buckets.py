"""A bucket adds gradients and returns values entry by entry, whether a parameter lies in it in long runs or short ones."""

from __future__ import annotations

import pytest
import torch

from k2train.layout.tensors import TensorSpec
from k2train.model.pieces import Piece
from k2train.optim.buckets import SHORT_RUN_ELEMENTS, Bucket, GradBuffers
from k2train.optim.shares import plan_buckets
from k2train.parallel.communicator import World
from k2train.parallel.threads import run_threads

OWNERS = 3


def pair_of(rows: int, width: int) -> tuple[list[Piece], dict[str, TensorSpec]]:
    """Two tensors cut by rows among the owners, so that each lies in the bucket in as many runs as there are owners."""
    names = ("first", "second")
    pieces = [Piece(name, torch.nn.Parameter(torch.zeros(rows, width))) for name in names]
    return pieces, {name: TensorSpec(name, (rows, width), "embedding") for name in names}


@pytest.mark.parametrize("rows", [5, OWNERS * SHORT_RUN_ELEMENTS])
def test_every_entry_comes_back_as_the_sum_over_ranks_and_additions(rows: int) -> None:
    """Whole numbers below 2**24, so FP32 sums are exact in any order."""

    def run(world: World) -> None:
        pieces, catalogue = pair_of(rows, 2)
        (plan,) = plan_buckets([pieces], catalogue, False, 5, {"dp": OWNERS, "edp": 1})
        bucket = Bucket(plan, world.group("dp", range(OWNERS)), world.device)
        buffers = GradBuffers([bucket])
        values = {
            piece.name: torch.arange(2.0 * rows).view(rows, 2) + 7 * n for n, piece in enumerate(pieces)
        }
        for piece in pieces:
            assert len(bucket.runs[piece.parameter]) == OWNERS
            for times in (1, 2):
                buffers.add(piece.parameter, values[piece.name] * times)
            torch.testing.assert_close(buffers.gradient(piece.name), 3 * values[piece.name], rtol=0, atol=0)
        bucket.start_reduce()
        bucket.finish_reduce()
        bucket.start_gather(bucket.own_gradient.clone())
        bucket.finish_gather()
        for piece in pieces:
            torch.testing.assert_close(piece.tensor, 3 * OWNERS * values[piece.name], rtol=0, atol=0)

    run_threads(OWNERS, run)
