"""The batch of a step: what its weights and its normaliser mean, who needs what of it, and what is
refused."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.data.corpus import Corpus
from k2train.data.split import SplitName
from k2train.model.model import logits
from k2train.telemetry.metrics import read_metrics
from k2train.trainer.batch import Batch, needs_targets, needs_tokens, open_batches, read_batch
from k2train.trainer.build import Run
from k2train.trainer.step import StepMetrics, train_step
from k2train.trainer.testing import run_on_ranks

SHAPE = (8, 32)  # 256 tokens a step
FOUR_STAGES = ["schedule=1f1b", "layout.pp=4", "layout.ep=1", "layout.edp=1", "model.num_hidden_layers=4"]


def on_one_rank(words: list[str], act: Callable[[Run], object], *more: str) -> object:
    config = load_config([*words, "layout=single", "schedule=gpipe", "train.dtype=float64", *more])
    return run_on_ranks(config, act)[0]


def signed_weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normaliser", [None, 3.5])
def test_the_loss_is_torchs_weighted_cross_entropy_over_the_normaliser(
    words: list[str], normaliser: float | None
) -> None:
    """Token losses of plain logits, weighted, added up in float64: only the order of sums
    differs."""
    weights = signed_weights().abs() if normaliser is None else signed_weights()

    def act(run: Run) -> tuple[float, float]:
        batch = dataclasses.replace(read_batch(run, 0), weights=weights, normaliser=normaliser)
        assert batch.tokens is not None
        assert batch.targets is not None
        (model,) = run.models.values()
        losses = F.cross_entropy(
            logits(model, batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="none"
        )
        expected = (losses * weights.flatten()).sum() / (normaliser or weights.double().sum())
        return train_step(run, batch).loss, expected.item()

    loss, expected = on_one_rank(words, act)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_weights_of_one_give_the_bits_of_a_batch_without(words: list[str]) -> None:
    """256 tokens: dividing by a power of two is exact wherever it is done."""

    def act(weights: torch.Tensor | None) -> Callable[[Run], list[StepMetrics]]:
        return lambda run: [
            train_step(run, dataclasses.replace(read_batch(run, index), weights=weights))
            for index in range(3)
        ]

    bits = "train.dtype=float32"
    assert on_one_rank(words, act(torch.ones(SHAPE)), bits) == on_one_rank(words, act(None), bits)


@pytest.mark.parametrize("weights", [torch.zeros(SHAPE), -torch.ones(SHAPE)])
def test_without_a_positive_sum_the_loss_is_nan_and_nothing_is_updated(
    words: list[str], weights: torch.Tensor
) -> None:
    def act(run: Run) -> StepMetrics:
        before = [state.tensor.clone() for state in run.optimizer.state()]
        metrics = train_step(run, dataclasses.replace(read_batch(run, 0), weights=weights))
        for state, old in zip(run.optimizer.state(), before, strict=True):
            assert torch.equal(state.tensor, old), state.name
        return metrics

    metrics = on_one_rank(words, act)
    assert isinstance(metrics, StepMetrics)
    assert math.isnan(metrics.loss)
    assert not metrics.finite


def test_a_masked_target_counts_nothing_whatever_it_is(words: list[str]) -> None:
    def loss_with(target: int) -> object:
        def act(run: Run) -> StepMetrics:
            batch = read_batch(run, 0)
            assert batch.targets is not None
            targets, weights = batch.targets.clone(), torch.ones(SHAPE)
            targets[2, 7], weights[2, 7] = target, 0.0
            return train_step(run, dataclasses.replace(batch, targets=targets, weights=weights))

        return on_one_rank(words, act)

    assert loss_with(5) == loss_with(200)


def test_only_the_first_stage_needs_tokens_and_only_the_last_needs_targets(words: list[str]) -> None:
    def act(run: Run) -> tuple[bool, bool, bool, bool]:
        batch = read_batch(run, 0)
        train_step(run, batch)
        return needs_tokens(run), batch.tokens is not None, needs_targets(run), batch.targets is not None

    found = run_on_ranks(load_config([*words, *FOUR_STAGES]), act)
    nothing = (False, False, False, False)
    assert found == [(True, True, False, False), nothing, nothing, (False, False, True, True)]


class NoCorpus:
    """A corpus whose every read fails."""

    def batch(self, split: str, start: int, count: int) -> torch.Tensor:
        raise ConfigError("data.blend", "x", f"sample {start} cannot be read", "mend it")


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_stage_between_first_and_last_reads_nothing_and_the_others_raise_what_the_corpus_raises(
    words: list[str], ahead: int
) -> None:
    def act(run: Run) -> str:
        broken = dataclasses.replace(run, corpus=NoCorpus())
        with open_batches(broken, 0, ahead) as batches:
            try:
                return f"batch {batches.take().index}"
            except ConfigError as error:
                return error.rule

    failed = "sample 0 cannot be read"
    found = run_on_ranks(load_config([*words, *FOUR_STAGES]), act)
    assert found == [failed, "batch 0", "batch 0", failed]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_go_on_where_a_run_is_resumed(words: list[str], ahead: int) -> None:
    def act(run: Run) -> None:
        with open_batches(run, 4, ahead) as batches:
            for index in (4, 5):
                batch, expected = batches.take(), read_batch(run, index)
                assert batch.index == index
                assert batch.tokens is not None
                assert expected.tokens is not None
                assert torch.equal(batch.tokens, expected.tokens)

    on_one_rank(words, act)


@pytest.mark.parametrize(
    ("layout", "reads_ahead"),
    [(["layout=single", "schedule=gpipe"], True), (["layout.ep=2", "world=threads"], False)],
)
def test_a_process_reads_training_data_in_a_thread_of_its_own_and_a_rank_that_is_a_thread_in_its_step(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: list[str],
    reads_ahead: bool,
) -> None:
    readers = []
    batch = Corpus.batch

    def seen(self: Corpus, split: SplitName, start: int, count: int) -> torch.Tensor:
        readers.append(threading.current_thread())
        return batch(self, split, start, count)

    monkeypatch.setattr(Corpus, "batch", seen)
    assert main(["train", *words, *layout, "train.steps=3", "train.final_eval_tokens=32"]) == 0
    assert {thread.name.startswith("read-ahead") for thread in readers} == {reads_ahead}
    assert not any(thread.is_alive() for thread in readers)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(0 <= line["data_wait_seconds"] <= line["step_seconds"] for line in lines)


@pytest.mark.parametrize("part", ["tokens", "targets", "weights"])
def test_a_part_of_another_shape_is_refused(words: list[str], part: str) -> None:
    def act(run: Run) -> None:
        batch = dataclasses.replace(read_batch(run, 0), **{part: torch.ones(4, 32, dtype=torch.int64)})
        with pytest.raises(ValueError, match=rf"{part} on rank 0: \(4, 32\), expected \(8, 32\)"):
            train_step(run, batch)

    on_one_rank(words, act)


@pytest.mark.parametrize("normaliser", [0.0, -1.0, math.nan])
def test_a_normaliser_that_is_not_above_0_is_refused(normaliser: float) -> None:
    with pytest.raises(ValueError, match="normaliser must be above 0"):
        Batch(0, normaliser=normaliser)
