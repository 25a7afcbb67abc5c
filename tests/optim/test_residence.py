"""States in host memory: every batch through three slots, in the right order however late a copy is made.

`LateCopies` makes a copy only when somebody waits for it, which is the worst a GPU may do: whoever reads or fills memory
without waiting finds the wrong values in it.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from k2train.layout.staging import NUM_SLOTS
from k2train.optim.lanes import ImmediateCopies
from k2train.optim.residence import OnDevice, OnHost


@dataclasses.dataclass
class Promise:
    """A copy that is made when it is waited for, after what it waits for itself."""

    target: torch.Tensor
    source: torch.Tensor
    after: tuple
    done: bool = False

    def keep(self) -> None:
        if self.done:
            return
        self.done = True
        for promise in self.after:
            if promise is not None:
                promise.keep()
        self.target.copy_(self.source)


class LateLane:
    def __init__(self) -> None:
        self.last: Promise | None = None

    def copy(self, target, source, *after):
        self.last = Promise(target, source, (self.last, *after))
        return self.last

    def finish(self) -> None:
        if self.last is not None:
            self.last.keep()


class LateCopies:
    """Computation happens at once, copies as late as can be."""

    def lane(self) -> LateLane:
        return LateLane()

    def now(self) -> None:
        return None

    def compute_after(self, moment: Promise | None) -> None:
        if moment is not None:
            moment.keep()

    host_after = compute_after


COPIES = [ImmediateCopies, LateCopies]
LIKE = torch.zeros(0, dtype=torch.float32)


def some_states(residence, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    states = [(residence.new_state(size), residence.new_state(size)) for size in sizes]
    for index, (first, second) in enumerate(states):
        first.fill_(index + 1)
        second.fill_(-index - 1)
    return states


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("num_batches", range(9))
def test_every_batch_is_changed_in_the_states_and_no_other(copies, num_batches: int) -> None:
    residence = OnHost(LIKE, 20, 0, copies())
    states = some_states(residence, [10, 3, 7, 1, 10, 9, 2, 8][:num_batches])
    for _ in range(2):
        residence.drain()
        for index, (first, second) in enumerate(residence.stream(states)):
            assert (first.shape, second.shape) == (states[index][0].shape, states[index][1].shape)
            first.mul_(10)
            second.add_(first)
    residence.drain()
    for index, (first, second) in enumerate(states):
        assert (first == 100 * (index + 1)).all()
        assert (second == 109 * (index + 1)).all()


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("num_batches", [1, 2, 4])
def test_what_is_uploaded_is_what_was_just_streamed(copies, num_batches: int) -> None:
    """In pieces of a slot, nothing awaited in between; one batch comes back to the device by a slot it was not in."""
    residence = OnHost(LIKE, 6, 0, copies())
    values = torch.arange(6.0 * num_batches)
    state = residence.new_state(len(values))
    state.copy_(values)
    for (part,) in residence.stream([(part,) for part in state.split(6)]):
        part.neg_()
    uploaded = [piece.clone() for piece in residence.upload(state)]
    assert [len(piece) for piece in uploaded] == [6] * num_batches
    assert torch.equal(torch.cat(uploaded), -values)


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("num_elements", [0, 1, 5, 6, 17])
def test_gradients_come_to_the_host_whole_and_in_pieces(copies, num_elements: int) -> None:
    residence = OnHost(LIKE, 1, 5, copies())
    gradient = torch.arange(1.0, num_elements + 1)
    arrived = torch.zeros(num_elements)
    for part, piece in residence.gradients(gradient):
        assert len(piece) <= 5
        arrived[part] = piece
    assert torch.equal(arrived, gradient)


@pytest.mark.parametrize("copies", COPIES)
def test_streams_and_uploads_take_turns_with_the_same_slots(copies) -> None:
    """A step streams two buckets, then uploads both: each slot is filled again before its last store was waited for."""
    residence = OnHost(LIKE, 4, 0, copies())
    states = [residence.new_state(10), residence.new_state(7)]
    for step in range(3):
        residence.drain()
        for state in states:
            for (part,) in residence.stream([(part,) for part in state.split(4)]):
                part.add_(1)
        for state in states:
            assert all((piece == step + 1).all() for piece in residence.upload(state))


def test_a_lane_that_is_not_waited_for_is_noticed() -> None:
    """That `LateCopies` can fail at all: nobody waits, and the copy is not there."""
    copies = LateCopies()
    target = torch.zeros(3)
    copies.lane().copy(target, torch.ones(3))
    assert not target.any()


def test_a_batch_larger_than_a_slot_is_our_bug() -> None:
    residence = OnHost(LIKE, 4, 0)
    with pytest.raises(AssertionError, match="5 entries in a slot of 4"):
        list(residence.stream([(residence.new_state(5),)]))


def test_host_states_hold_their_slots_on_the_device_and_device_states_nothing_extra() -> None:
    residence = OnHost(LIKE, 100, 10)
    assert [len(memory) for memory in residence.staging] == NUM_SLOTS * [100]
    assert (residence.on_host, OnDevice(LIKE).on_host, OnDevice(LIKE).staging) == (True, False, [])


def test_states_on_the_device_are_handed_out_themselves() -> None:
    residence = OnDevice(LIKE)
    state = residence.new_state(4)
    ((same,),) = residence.stream([(state,)])
    (also,) = residence.upload(state)
    ((part, gradient),) = residence.gradients(state)
    assert same is state
    assert also is state
    assert gradient is state
    assert part == slice(0, 4)
