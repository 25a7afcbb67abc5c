"""The experiments that come with the package: what a run on a cluster must have, and K2's
recipe."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.config.folders import config_dir, group_files
from k2train.config.schema import Config
from k2train.optim.lr_schedule import LrSchedule

EXPERIMENTS = {
    name: load_config([f"experiment={name}"]) for name in group_files([config_dir()])["experiment"]
}
CLUSTERS = {name: config for name, config in EXPERIMENTS.items() if config.cluster.kind == "gpu"}


def rates(config: Config) -> LrSchedule:
    train = config.train
    return LrSchedule(config.optim.lr_phases, train.steps, train.global_batch_tokens)


def test_k2_s_experiments_are_meant_for_a_cluster() -> None:
    assert {"k2", "k2_long_context"} <= CLUSTERS.keys()


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_experiment_for_a_cluster_saves_by_time(name: str) -> None:
    """Within an hour, which is what a lost node may cost; steps take seconds or minutes, by the
    number of nodes."""
    assert 0 < CLUSTERS[name].train.checkpoint_every_minutes <= 60


@pytest.mark.parametrize("name", CLUSTERS)
def test_an_experiment_for_a_cluster_trains_on_no_corpus_that_nobody_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.blend=\[\]: .*\n.*data=stdlib"):
        CLUSTERS[name].data.check_corpus()
    load_config([f"experiment={name}", "data=stdlib"]).data.check_corpus()
    load_config([f"experiment={name}", "data.blend=[{prefix: some/where}]"]).data.check_corpus()


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - CLUSTERS.keys()))
def test_an_experiment_for_a_laptop_needs_no_corpus(name: str) -> None:
    EXPERIMENTS[name].data.check_corpus()


def test_k2_s_pretraining_is_as_long_as_its_phases() -> None:
    """15.5T tokens and 400B of annealing (K2 report, 2.5), rounded up to whole steps of 67.1M
    tokens."""
    k2 = EXPERIMENTS["k2"].train
    assert 0 <= k2.steps * k2.global_batch_tokens - 15.9e12 < k2.global_batch_tokens
    long = EXPERIMENTS["k2_long_context"].train
    assert 0 <= long.steps * long.global_batch_tokens - 15.96e12 < long.global_batch_tokens
    assert (k2.seq_len, long.seq_len) == (4096, 32768)


def test_k2_s_learning_rate_passes_through_the_report_s_figures() -> None:
    """The peak until 10T tokens, 2e-5 at 15.5T, 7e-6 at the end, and between the last two a
    straight line."""
    config = EXPERIMENTS["k2_long_context"]
    schedule, tokens = rates(config), config.train.global_batch_tokens
    assert schedule.at(499) == schedule.at(int(10e12 / tokens) - 1) == 2e-4
    assert schedule.at(int(10e12 / tokens) + 1) < 2e-4
    # One step of the line changes the rate by 1.9e-9.
    assert schedule.at(round(15.5e12 / tokens) - 1) == pytest.approx(2e-5, abs=2e-9)
    middle = round(15.73e12 / tokens) - 1
    assert schedule.at(middle) == pytest.approx((2e-5 + 7e-6) / 2, abs=2e-9)
    assert schedule.at(config.train.steps - 1) == 7e-6


def test_the_long_context_stage_goes_on_where_the_first_one_ends() -> None:
    first, second = EXPERIMENTS["k2"], EXPERIMENTS["k2_long_context"]
    before, after = first.optim.lr_phases, second.optim.lr_phases
    assert after[: len(before)] == before
    step = first.train.steps - 2
    assert rates(first).at(step) == rates(second).at(step)
    assert first.model == second.model


@pytest.mark.parametrize("name", ["k2", "k2_long_context"])
def test_k2_is_trained_without_yarn_and_released_with_it(name: str) -> None:
    trained, released = EXPERIMENTS[name].model, load_config(["model=k2"]).model
    assert trained.rope_scaling is None
    assert released.rope_scaling is not None
    yarn = {"rope_scaling": released.rope_scaling, "max_position_embeddings": 131072}
    assert dataclasses.replace(trained, **yarn) == released  # type: ignore[arg-type]
    assert trained.max_position_embeddings >= EXPERIMENTS[name].train.seq_len


def test_momentum_looks_ahead_where_a_recipe_was_tuned_with_it_alone() -> None:
    """Algorithm 1 of the report has plain momentum."""
    ahead = {name for name, config in EXPERIMENTS.items() if config.optim.nesterov}
    assert ahead == {"tiny", "laptop", "k2_threads"}
    assert not load_config(["optim=muonclip"]).optim.nesterov


def test_steps_follow_the_phases_and_the_batch() -> None:
    words = [
        "train.steps=phases",
        "optim.lr_phases=[{kind: constant, to: 1e-3, steps: 3}, {kind: linear, to: 1e-4, tokens: 10241}]",
    ]
    for batch, steps in ((2048, 3 + 6), (4096, 3 + 3), (20480, 3 + 1)):
        assert load_config([*words, f"train.global_batch_tokens={batch}"]).train.steps == steps


def test_phases_that_are_fractions_of_the_steps_cannot_say_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=phases: .*fraction"):
        load_config(["train.steps=phases"])


def test_no_two_experiments_are_the_same() -> None:
    for one, other in itertools.combinations(EXPERIMENTS.values(), 2):
        assert one != other
