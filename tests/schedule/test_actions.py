"""Actions and schedules as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2train.schedule import (
    Action,
    Kind,
    Pair,
    Schedule,
    parse_action,
    parse_line,
    parse_schedule,
    parse_step,
)
from k2train.schedule.actions import format_line

_numbers = st.integers(0, 10**6)
_actions = st.builds(Action, st.sampled_from(Kind), _numbers, _numbers)
_pairs = st.builds(
    Pair,
    st.builds(Action, st.just(Kind.F), _numbers, _numbers),
    st.builds(Action, st.just(Kind.I), _numbers, _numbers),
)


@given(_actions)
def test_an_action_comes_back_from_its_text(action: Action) -> None:
    assert parse_action(str(action)) == action
    assert type(parse_step(str(action))) is Action


@given(st.lists(_actions | _pairs))
def test_a_line_comes_back_from_its_text(steps: list[Action | Pair]) -> None:
    line = parse_line(format_line(tuple(steps)))
    assert line == tuple(steps)
    assert [type(step) for step in line] == [type(step) for step in steps]


def test_the_text_of_an_action_is_kind_then_virtual_stage_then_microbatch() -> None:
    assert str(Action(Kind.RECV_B, 2, 5)) == "RECV_B2.5"
    assert str(Pair(Action(Kind.F, 2, 6), Action(Kind.I, 0, 1))) == "F2.6+I0.1"


@pytest.mark.parametrize(
    "text", ["", "F", "F2", "F2.", "X2.5", "SEND2.5", "SEND_W2.5", "F-1.2", "F2.5 ", "f2.5", "F2.5.1"]
)
def test_text_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an action"):
        parse_action(text)


@pytest.mark.parametrize("text", ["F2.6+B2.1", "I2.1+F2.6", "F2.6+W2.1"])
def test_a_pair_is_a_forward_and_an_input_gradient(text: str) -> None:
    with pytest.raises(ValueError, match="is not a pair"):
        parse_step(text)


_FILE = """\
# a comment
schedule two stages
microbatches 1
placement 0 1
chain 0 1

stage 0: F0.0 SEND_F0.0 RECV_B0.0 B0.0
stage 1: RECV_F1.0 F1.0 B1.0 SEND_B1.0
"""


def test_a_schedule_is_read_from_its_file_form() -> None:
    schedule = parse_schedule(_FILE)
    assert (schedule.name, schedule.num_microbatches, schedule.placement) == ("two stages", 1, (0, 1))
    assert schedule.stages[1][0] == Action(Kind.RECV_F, 1, 0)
    assert parse_schedule(schedule.to_text()) == schedule


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("microbatches 1\n", "", "no microbatches"),
        ("chain 0 1\n", "", "no chain"),
        ("stage 1:", "stage 2:", "expected 'stage 1"),
        ("F1.0 B1.0", "F1.0 Q1.0", "line 8.*is not an action"),
        ("chain", "link", "line 5: unexpected 'link'"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_schedule(_FILE.replace(old, new))


def test_two_chains_divide_the_microbatches_into_two_runs() -> None:
    schedule = Schedule("x", 6, (0, 1, 1, 0), ((0, 1), (2, 3)), ((), ()))
    assert [schedule.chain_of(m) for m in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [list(schedule.microbatches_of(c)) for c in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert schedule.next == (1, None, 3, None)
    assert schedule.previous == (None, 0, None, 2)
    assert schedule.model_part == (0, 1, 0, 1)
    assert schedule.virtual_stages_of(0) == (0, 3)
