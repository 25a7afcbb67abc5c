"""Learning-rate phases: exact at the joints, continuous between, held after the end."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from k2train.config.errors import ConfigError
from k2train.config.optim import LrPhase
from k2train.optim.lr_schedule import LrSchedule

PEAK = 2e-4


def test_k2s_recipe() -> None:
    """500 steps of warm-up, 10T tokens at 2e-4, cosine to 2e-5 over 5.5T, linear to 7e-6 over 0.4T;
    67M-token steps."""
    tokens = 16384 * 4096
    phases = [
        LrPhase("linear", PEAK, steps=500),
        LrPhase("constant", PEAK, tokens=10e12),
        LrPhase("cosine", 2e-5, tokens=5.5e12),
        LrPhase("linear", 7e-6, tokens=0.4e12),
    ]
    at = LrSchedule(phases, total_steps=1, tokens_per_step=tokens).at
    constant, cosine = 500 + 10e12 / tokens, 5.5e12 / tokens
    assert at(0) == pytest.approx(PEAK / 500)
    assert at(249) == pytest.approx(PEAK / 2)
    assert at(499) == at(500) == at(int(constant) - 1) == PEAK
    assert at(round(constant + cosine / 2) - 1) == pytest.approx((PEAK + 2e-5) / 2, rel=1e-4)
    assert at(round(constant + cosine) - 1) == pytest.approx(2e-5, rel=1e-4)
    assert at(10**9) == 7e-6


def test_a_constant_phase_jumps() -> None:
    at = LrSchedule([LrPhase("constant", 1.0, steps=2), LrPhase("constant", 0.5, fraction=0.2)], 10, 1).at
    assert [at(step) for step in range(6)] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


def test_a_phase_of_no_length_is_where_the_next_starts() -> None:
    at = LrSchedule([LrPhase("linear", 1.0, steps=0), LrPhase("linear", 0.0, steps=4)], 4, 1).at
    assert [at(step) for step in range(4)] == [0.75, 0.5, 0.25, 0.0]


def test_rates_that_are_all_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="every rate is 0"):
        LrSchedule([LrPhase("linear", 0.0, steps=10)], 10, 1)


lengths = st.one_of(
    st.integers(0, 30).map(lambda n: {"steps": n}),
    st.integers(0, 3000).map(lambda n: {"tokens": float(n)}),
    st.floats(0, 1).map(lambda x: {"fraction": x}),
)
phase_lists = st.lists(
    st.builds(
        lambda kind, to, length: LrPhase(kind, to, **length),
        st.sampled_from(["linear", "cosine"]),
        st.floats(1e-6, 1),
        lengths,
    ),
    min_size=1,
    max_size=5,
)


def lengths_in_steps(phases: list[LrPhase], total: int, tokens_per_step: int) -> list[float]:
    return [
        phase.steps
        if phase.steps is not None
        else phase.tokens / tokens_per_step
        if phase.tokens is not None
        else (phase.fraction or 0) * total
        for phase in phases
    ]


@settings(deadline=None)
@given(phase_lists, st.integers(1, 50), st.integers(1, 200))
def test_no_step_moves_further_than_its_phases_allow(
    phases: list[LrPhase], total: int, tokens_per_step: int
) -> None:
    """Linear and cosine phases are continuous: inside one, a step moves at most pi/2 of span /
    length."""
    schedule = LrSchedule(phases, total, tokens_per_step)
    lengths = lengths_in_steps(phases, total, tokens_per_step)
    assume(all(length >= 1 for length in lengths))
    slopes = []
    origin = 0.0
    for phase, length in zip(phases, lengths, strict=True):
        slopes.append(abs(phase.to - origin) / length * math.pi / 2)
        origin = phase.to
    rates = [0.0] + [schedule.at(step) for step in range(math.ceil(sum(lengths)) + 2)]
    for before, after in itertools.pairwise(rates):
        assert abs(after - before) <= max(slopes) * (1 + 1e-6) + 1e-12
    assert rates[-1] == phases[-1].to


@settings(deadline=None)
@given(phase_lists, st.integers(1, 50), st.integers(1, 200))
def test_rates_stay_between_zero_and_the_largest(
    phases: list[LrPhase], total: int, tokens_per_step: int
) -> None:
    schedule = LrSchedule(phases, total, tokens_per_step)
    largest = max(phase.to for phase in phases)
    for step in range(200):
        assert 0 < schedule.at(step) <= largest * (1 + 1e-12)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["linear", "cosine"]))
def test_whole_phases_end_exactly_at_their_rate(warmup: int, decay: int, kind: str) -> None:
    phases = [LrPhase("linear", 1.0, steps=warmup), LrPhase(kind, 0.125, steps=decay)]  # type: ignore[arg-type]
    schedule = LrSchedule(phases, 1, 1)
    assert schedule.at(0) == pytest.approx(1 / warmup)
    assert schedule.at(warmup - 1) == 1.0
    assert schedule.at(warmup + decay - 1) == 0.125
    rates = [schedule.at(step) for step in range(warmup, warmup + decay)]
    assert rates == sorted(rates, reverse=True)
