"""Work beside the main stream: right results, whatever becomes of its inputs meanwhile."""

from __future__ import annotations

import pytest
import torch

from k2train.device.build import build_device
from k2train.parallel.side_stream import SideStream

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_results_are_right_though_inputs_are_freed_and_their_memory_is_used_again(kind: str) -> None:
    device = torch.device(kind)
    streams = build_device(device)
    side = SideStream(streams)
    pending = []
    for index in range(8):
        # Written by the main stream just before, freed just after, and asked for again by the next
        # round.
        x = torch.full((1024, 1024), float(index), device=device)
        factor = torch.full((1024, 1), 2.0, device=device)

        def work(t: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (t * factor, t + 1)

        pending.append(side.start(work, (x, factor)))
        del x, factor
    for index, started in enumerate(pending):
        doubled, next_one = started.on(streams.current)
        assert torch.equal(doubled, torch.full_like(doubled, 2.0 * index))
        assert torch.equal(next_one, torch.full_like(next_one, index + 1.0))
