"""The dry run before the first step: it makes every host buffer, and leaves no trace in what is
trained."""

from __future__ import annotations

import pytest
import torch

from k2train.config.compose import load_config
from k2train.model.context import Statistics
from k2train.trainer.batch import read_batch
from k2train.trainer.build import Run
from k2train.trainer.dry_run import dry_run
from k2train.trainer.step import run_schedule, train_step
from k2train.trainer.testing import run_on_ranks

LAYOUTS = [["layout.vpp=3"], ["layout.pp=2", "layout.ep=2", "model.num_hidden_layers=4"]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_a_run_with_a_dry_run_before_it_has_the_same_bits_as_one_without(words, layout) -> None:
    def steps(run: Run, dry: bool) -> list[object]:
        if dry:
            dry_run(run)
        metrics = [train_step(run, read_batch(run, index)) for index in range(3)]
        run.optimizer.finish_gather()
        weights = [piece.tensor.clone() for model in run.models.values() for piece in model.pieces()]
        return [metrics, weights, 0 if run.activations is None else run.activations.engine.arena.peak_bytes]

    config = load_config([*words, "activations=k2", "schedule=k2", *layout])
    wet, dry = (run_on_ranks(config, lambda run, dry=dry: steps(run, dry)) for dry in (False, True))
    for (metrics, weights, peak), (other_metrics, other_weights, other_peak) in zip(wet, dry, strict=True):
        assert metrics == other_metrics
        assert peak == other_peak
        assert all(torch.equal(one, other) for one, other in zip(weights, other_weights, strict=True))


def test_after_it_a_step_makes_no_host_buffer_while_loads_stay_in_their_size_class(words) -> None:
    """Dense layers only: how many rows there are does not depend on a router. Without it the step
    has to make them."""
    dense = ["model.first_k_dense_replace=3", "activations=k2", "schedule=k2", "layout.vpp=3"]

    def allocations(run: Run) -> tuple[int, int]:
        assert run.activations is not None
        arena = run.activations.engine.arena
        dry_run(run)
        before = arena.num_allocations
        run_schedule(run, read_batch(run, 0), Statistics())
        return before, arena.num_allocations - before

    ((before, in_step),) = run_on_ranks(load_config([*words, *dense]), allocations)
    assert before > 0
    assert in_step == 0
