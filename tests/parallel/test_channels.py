"""Channels between stages: made without a deadlock, separate for each direction, and sent tensors
released in time."""

from __future__ import annotations

import itertools
from typing import Literal

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from k2train.config.errors import ConfigError
from k2train.layout.grid import RankGrid
from k2train.parallel.baton import DeadlockError
from k2train.parallel.channels import Channels, build_channels, make_channels, rounds_of_pairs
from k2train.parallel.communicator import CommunicationError, World
from k2train.parallel.groups import build_groups
from k2train.parallel.pipeline import PipelineTransport
from k2train.parallel.processes import ProcessCommunicator
from k2train.parallel.testing import run_distributed_test
from k2train.parallel.threads import run_threads
from k2train.schedule import ScheduleSpec, build_schedule
from k2train.schedule.channels import ChannelForm
from k2train.schedule.messages import Messages, plan_messages

Backend = Literal["threads", "processes"]
BACKENDS: list[Backend] = ["threads", "processes"]
CPU = torch.device("cpu")


def k2_messages(pp: int, num_microbatches: int = 4) -> Messages:
    return plan_messages(build_schedule(ScheduleSpec.preset("k2", pp, num_microbatches, 2)))


@pytest.mark.parametrize("pp", range(2, 20))
def test_every_pair_of_neighbours_has_its_round_and_no_round_names_a_stage_twice(pp: int) -> None:
    ring = [(stage, (stage + 1) % pp) for stage in range(pp)]
    rounds = rounds_of_pairs(ring)
    assert sorted(itertools.chain(*rounds)) == sorted({(min(pair), max(pair)) for pair in ring})
    for together in rounds:
        named = list(itertools.chain(*together))
        assert len(named) == len(set(named))
    # An odd ring cannot do with two.
    assert len(rounds) == (1 if pp == 2 else 2 + pp % 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "pp"), [("k2", 2), ("k2", 3), ("1f1b", 4), ("k2", 5)])
def test_each_rank_makes_channels_to_its_neighbours_only_and_they_carry_messages(
    backend: Backend, kind: str, pp: int
) -> None:
    """Stages of a line without a way round have one neighbour at its ends, and still make as many
    groups."""
    messages = plan_messages(build_schedule(ScheduleSpec.preset(kind, pp, 4)))

    def fn(world: World) -> list[int]:
        channels = build_channels(messages, range(pp), world)
        assert sorted(channels.outgoing) == sorted(
            target for source, target in messages.pairs if source == world.rank
        )
        assert channels.outgoing.keys() == channels.incoming.keys()
        received = {stage: torch.zeros(3) for stage in channels.incoming}
        works = [channels.incoming[stage].start_recv(t) for stage, t in received.items()]
        # What goes to a stage waits in no queue behind what comes from it: all receives are posted
        # first.
        works += [
            channels.outgoing[stage].start_send(torch.full((3,), 10.0 * world.rank + stage))
            for stage in channels.outgoing
        ]
        for work in works:
            work.wait()
        for stage, t in received.items():
            assert t.tolist() == [10.0 * stage + world.rank] * 3
        return sorted(channels.outgoing)

    neighbours = run_distributed_test(fn, pp, backend)
    assert max(map(len, neighbours)) <= 2


def test_both_directions_in_one_queue_are_reported_as_a_deadlock_that_names_rank_and_call() -> None:
    """The same calls as above over the form that torch gives a group of all stages over NCCL."""
    messages = k2_messages(2)

    def fn(world: World) -> None:
        channels = make_channels(messages, range(2), world)
        other = 1 - world.rank
        receiving = channels.incoming[other].start_recv(torch.zeros(3))
        channels.outgoing[other].start_send(torch.zeros(3))
        receiving.wait()

    for form in (ChannelForm.UNORDERED_PAIR, ChannelForm.ONE):
        with pytest.raises(
            DeadlockError,
            match=r"rank 0 waits in recv from rank 1 of group pipeline messages .*test_channels",
        ):
            run_threads(2, fn, channel_form=form)
    run_threads(2, fn)


def test_what_is_ahead_in_a_queue_is_named() -> None:
    def fn(world: World) -> None:
        group = world.group("both ways", [0, 1])
        other = 1 - world.rank
        group.start_recv(torch.zeros(1), other)
        group.start_send(torch.zeros(1), other).wait()

    with pytest.raises(
        DeadlockError, match=r"rank 0 waits in send to rank 1 .*; behind recv from rank 1, .*test_channels"
    ):
        run_threads(2, fn)


def test_a_third_rank_in_the_queue_holds_up_a_message_where_there_is_one_queue_only() -> None:
    def fn(world: World) -> None:
        group = world.group("three", range(3))
        if world.rank == 0:
            late = group.start_recv(torch.zeros(1), 2)
            group.send(torch.zeros(1), 1)
            late.wait()
        elif world.rank == 1:
            group.recv(torch.zeros(1), 0)
            group.send(torch.zeros(1), 2)
        else:
            group.recv(torch.zeros(1), 1)
            group.send(torch.zeros(1), 0)

    run_threads(3, fn, channel_form=ChannelForm.UNORDERED_PAIR)
    with pytest.raises(DeadlockError):
        run_threads(3, fn, channel_form=ChannelForm.ONE)


def test_a_schedule_that_needs_more_than_the_world_provides_is_refused_before_anything_is_made() -> None:
    messages = k2_messages(2)

    def fn(world: World) -> None:
        build_groups(RankGrid(2, 1, 1), world, messages=messages)

    with pytest.raises(
        ConfigError, match=r"(?s)schedule\.kind=k2: cannot run with .*RECV_F2\.0 of stage 0 waits for"
    ):
        run_threads(2, fn, channel_form=ChannelForm.UNORDERED_PAIR)


def test_members_that_have_made_different_numbers_of_groups_are_told_so() -> None:
    """Over torch.distributed they would wait for each other until the timeout."""

    def fn(world: World) -> None:
        if world.rank == 1:
            world.group("alone", [1])
        world.group("both", [0, 1])

    with pytest.raises(
        CommunicationError, match=r"rank 1 makes group both .* number 2, another rank as its number 1"
    ):
        run_threads(2, fn)


def test_a_process_groups_description_names_it_and_its_ranks() -> None:
    """It is what torch's watchdog prints when an operation over NCCL fails."""

    def fn(world: World) -> str:
        group = build_channels(k2_messages(2), [0, 1], world).outgoing[1 - world.rank].group
        assert isinstance(group, ProcessCommunicator)
        return str(group.description)

    assert run_distributed_test(fn, 2, "processes") == [
        "stage 0 to 1 (ranks [0, 1])",
        "stage 1 to 0 (ranks [0, 1])",
    ]


def transport_of(channels: Channels) -> PipelineTransport:
    return PipelineTransport(channels, 4, torch.float32, CPU)


def alive(refs: list[StorageWeakRef]) -> int:
    return sum(not ref.expired() for ref in refs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_messages", [8, 64])
def test_no_more_than_max_sends_sent_tensors_are_alive_however_many_are_sent(
    backend: Backend, num_messages: int
) -> None:
    """The receiver posts every receive late, so that nothing leaves by itself; gloo never says that
    a send is done."""
    messages = k2_messages(2)

    def fn(world: World) -> int:
        transport = transport_of(build_channels(messages, [0, 1], world))
        most, refs = 0, []
        for number in range(num_messages):
            if world.rank == 0:
                tensor = torch.full((3, 4), float(number))
                refs.append(StorageWeakRef(tensor.untyped_storage()))
                transport.send(tensor, 1)
                del tensor
            else:
                received = transport.receive(3, 0).wait()
                assert received.tolist() == [[float(number)] * 4] * 3
            most = max(most, alive(refs))
        transport.finish()
        assert alive(refs) == 0
        return most

    assert run_distributed_test(fn, 2, backend) == [messages.max_sends[0], 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_posted_receive_holds_one_buffer_and_hands_it_on(backend: Backend) -> None:
    def fn(world: World) -> None:
        transport = transport_of(build_channels(k2_messages(2), [0, 1], world))
        if world.rank == 0:
            transport.send(torch.ones(3, 4), 1)
            transport.finish()
            return
        receiving = transport.receive(3, 0)
        ref = StorageWeakRef(receiving.tensor.untyped_storage())
        tensor = receiving.wait()
        del receiving
        assert not ref.expired()
        del tensor
        assert ref.expired()

    run_distributed_test(fn, 2, backend)


def test_a_message_that_has_left_is_released_at_the_next_call_though_few_are_under_way() -> None:
    def fn(world: World) -> None:
        transport = transport_of(build_channels(k2_messages(2), [0, 1], world))
        everyone = world.group("all", [0, 1])
        if world.rank == 1:
            transport.receive(3, 0)
            everyone.barrier()
            return
        tensor = torch.ones(3, 4)
        ref = StorageWeakRef(tensor.untyped_storage())
        transport.send(tensor, 1)
        del tensor
        everyone.barrier()
        assert not ref.expired()
        posted = transport.receive(3, 1)
        assert ref.expired()
        del posted

    with pytest.raises(
        CommunicationError, match="never completed:\n  recv from rank 1 in group stage 1 to 0"
    ):
        run_threads(2, fn)


def test_an_interrupted_step_lets_go_of_what_it_has_sent() -> None:
    def fn(world: World) -> None:
        transport = transport_of(build_channels(k2_messages(2), [0, 1], world))
        if world.rank == 1:
            return
        tensor = torch.ones(3, 4)
        transport.send(tensor, 1)
        assert transport._under_way[1]
        transport.abandon()
        assert not transport._under_way[1]

    with pytest.raises(CommunicationError, match="never completed:\n  send to rank 1 in group stage 0 to 1"):
        run_threads(2, fn)
