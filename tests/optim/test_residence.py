"""States in host memory: every batch through three slots, in the right order however late a copy is
made.

On the simulated device a copy is made when somebody waits for it, or for a copy behind it, and
perhaps before: whoever reads or fills memory without waiting finds the wrong values in it for some
seed.
"""

from __future__ import annotations

import pytest
import torch

from k2train.device.cpu import CpuDevice
from k2train.device.simulated import SimulatedDevice
from k2train.layout.staging import NUM_SLOTS
from k2train.optim.residence import OnDevice, OnHost

LIKE = torch.zeros(0, dtype=torch.float32)


@pytest.fixture(params=[None, *range(6)], ids=lambda seed: "at once" if seed is None else f"seed {seed}")
def device(request: pytest.FixtureRequest):
    """A CPU, and simulated devices whose computation happens at once and whose copies lag
    behind."""
    return CpuDevice() if request.param is None else SimulatedDevice(request.param, eager_compute=True)


def some_states(residence, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    states = [(residence.new_state(size), residence.new_state(size)) for size in sizes]
    for index, (first, second) in enumerate(states):
        first.fill_(index + 1)
        second.fill_(-index - 1)
    return states


@pytest.mark.parametrize("num_batches", range(9))
def test_every_batch_is_changed_in_the_states_and_no_other(device, num_batches: int) -> None:
    residence = OnHost(device, LIKE, 20, 0)
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


@pytest.mark.parametrize("num_batches", [1, 2, 4])
def test_what_is_uploaded_is_what_was_just_streamed(device, num_batches: int) -> None:
    """In pieces of a slot, nothing awaited in between; one batch comes back to the device by a slot
    it was not in."""
    residence = OnHost(device, LIKE, 6, 0)
    values = torch.arange(6.0 * num_batches)
    state = residence.new_state(len(values))
    state.copy_(values)
    for (part,) in residence.stream([(part,) for part in state.split(6)]):
        part.neg_()
    uploaded = [piece.clone() for piece in residence.upload(state)]
    assert [len(piece) for piece in uploaded] == [6] * num_batches
    assert torch.equal(torch.cat(uploaded), -values)


@pytest.mark.parametrize("num_elements", [0, 1, 5, 6, 17])
def test_gradients_come_to_the_host_whole_and_in_pieces(device, num_elements: int) -> None:
    residence = OnHost(device, LIKE, 1, 5)
    gradient = torch.arange(1.0, num_elements + 1)
    arrived = torch.zeros(num_elements)
    for part, piece in residence.gradients(gradient):
        assert len(piece) <= 5
        arrived[part] = piece
    assert torch.equal(arrived, gradient)


def test_streams_and_uploads_take_turns_with_the_same_slots(device) -> None:
    """A step streams two buckets, then uploads both: each slot is filled again before its last
    store was waited for."""
    residence = OnHost(device, LIKE, 4, 0)
    states = [residence.new_state(10), residence.new_state(7)]
    for step in range(3):
        residence.drain()
        for state in states:
            for (part,) in residence.stream([(part,) for part in state.split(4)]):
                part.add_(1)
        for state in states:
            assert all((piece == step + 1).all() for piece in residence.upload(state))


def test_a_stream_that_is_not_waited_for_is_noticed() -> None:
    """That the simulated device can fail at all: nobody waits, and the copy is not there."""
    stream = SimulatedDevice(0, eager_compute=True).stream("states in")
    target = torch.zeros(3)
    stream.copy(target, torch.ones(3))
    assert not target.any()


def test_a_batch_larger_than_a_slot_is_our_bug() -> None:
    residence = OnHost(CpuDevice(), LIKE, 4, 0)
    with pytest.raises(AssertionError, match="5 entries in a slot of 4"):
        list(residence.stream([(residence.new_state(5),)]))


def test_host_states_hold_their_slots_on_the_device_and_device_states_nothing_extra() -> None:
    residence = OnHost(CpuDevice(), LIKE, 100, 10)
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
