"""What a MoE layer's exchange costs beside bytes: messages, host waits, operations; bounded, as
docs/schedule.md lists.

Letters: T tokens, K experts per token, E experts, M rows at local experts, D features.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from k2train.device.cpu import CpuDevice, CpuReading
from k2train.estimate.exchange import ROUTE_OPERATIONS
from k2train.layout.grid import RankGrid
from k2train.model.context import MicrobatchContext
from k2train.model.dispatcher import Dispatcher, LocalDispatcher
from k2train.model.layers import CombinePhase, DispatchPhase, RoutePhase
from k2train.parallel.communicator import Communicator, Work, World
from k2train.parallel.dispatcher import AllToAllDispatcher
from k2train.parallel.groups import build_groups
from k2train.parallel.relay_dispatcher import RelayDispatcher
from k2train.parallel.side_stream import SideStream
from k2train.parallel.threads import run_threads

TOKENS, FEATURES, EXPERTS, TOP_K, RANKS = 40, 6, 8, 3, 4
# Ranks of a node (None: a row for every expert) and parts, as each dispatch of the config has them.
DISPATCHES = {"per_expert": (None, 1), "per_rank": (RANKS, 1), "per_node": (2, 4)}


class Counts(collections.Counter[str]):
    """What one rank did. paused: inside a collective, where the last rank to come does the work of
    all."""

    paused = False


class Counting(Communicator):
    """A group that counts the collectives this rank starts in it."""

    def __init__(self, group: Communicator, counts: Counts) -> None:
        self._group, self._counts = group, counts
        self.name, self.rank, self.size = group.name, group.rank, group.size

    def start_all_to_all(self, *arguments: Any) -> Work:
        return self._start("all_to_all", self._group.start_all_to_all, arguments)

    def start_all_gather(self, *arguments: Any) -> Work:
        return self._start("all_gather", self._group.start_all_gather, arguments)

    def _start(self, name: str, call: Any, arguments: Any) -> Work:
        self._counts[name] += 1
        self._counts.paused = True
        work: Work = call(*arguments)
        self._counts.paused = False
        return work


class CountingDevice(CpuDevice):
    """A CPU that counts the numbers of reads begun."""

    def __init__(self, counts: Counts) -> None:
        super().__init__(torch.device("cpu"))
        self._counts = counts

    def start_read(self, tensor: torch.Tensor, what: str) -> CpuReading:
        self._counts["host reads"] += 1
        return super().start_read(tensor, what)


class Operations(TorchDispatchMode):
    """Counts operations that would be a kernel on a GPU: neither views nor plain allocations."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = func._schema.arguments
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
        if not is_view and "empty" not in func._schema.name and not self._counts.paused:
            self._counts["operations"] += 1
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number by itself"
        assert func is not torch.ops.aten.nonzero.default, "a size that only the device knows"
        return func(*args, **(kwargs or {}))


def dispatcher_of(dispatch: str, world: World | None, counts: Counts) -> Dispatcher:
    device = CountingDevice(counts)
    if dispatch == "local":
        return LocalDispatcher(device)
    assert world is not None
    relay_ranks, num_parts = DISPATCHES[dispatch]
    groups = build_groups(RankGrid(1, 1, RANKS), world, relay_ranks)
    ep = Counting(groups.ep, counts)
    if groups.relay is None:
        return AllToAllDispatcher(ep, EXPERTS, SideStream(device))
    rail = None if groups.rail is None else Counting(groups.rail, counts)
    node = Counting(groups.relay, counts)
    return RelayDispatcher(ep, node, rail, EXPERTS, SideStream(device), num_parts)


def counts_of_a_layer(dispatch: str) -> dict[str, collections.Counter[str]]:
    """What one rank does in each phase of one layer and microbatch, forward and backward."""

    def run(world: World | None) -> dict[str, collections.Counter[str]]:
        counts: Counts = Counts()
        found: dict[str, collections.Counter[str]] = {}
        dispatcher = dispatcher_of(dispatch, world, counts)
        route, moved, combine = (make(0, dispatcher) for make in (RoutePhase, DispatchPhase, CombinePhase))
        context = MicrobatchContext(num_sequences=1)
        generator = torch.Generator().manual_seed(world.rank if world else 0)
        experts_TK = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
        x_TD = torch.randn(TOKENS, FEATURES, generator=generator).bfloat16()
        weights_TK = torch.rand(TOKENS, TOP_K, generator=generator)
        counts_E = torch.bincount(experts_TK.flatten(), minlength=EXPERTS)

        def phase(name: str, call: Any, *arguments: Any) -> Any:
            counts.clear()
            with Operations(counts):
                result = call(*arguments, context)
            found[name] = collections.Counter(counts)
            return result

        inputs = (x_TD, x_TD, weights_TK, experts_TK, counts_E)
        routed, _ = phase("route", route.forward, inputs)
        (_, _, rows_MD, weights_M, _), _ = phase("dispatch", moved.forward, routed)
        phase("combine", combine.forward, (x_TD, rows_MD))
        _, drows_MD = phase("combine backward", combine.backward, None, (x_TD,))
        grads = (x_TD, x_TD, drows_MD, weights_M, None)
        dinputs = phase("dispatch backward", moved.backward, None, grads)
        phase("route backward", route.backward, None, dinputs)
        return found

    if dispatch == "local":
        return run(None)
    return run_threads(RANKS, run)[0]


@pytest.mark.parametrize(("dispatch", "messages"), [("per_expert", 1), ("per_rank", 1), ("per_node", 8)])
def test_features_and_weights_travel_in_one_all_to_all_for_every_hop_and_part(
    dispatch: str, messages: int
) -> None:
    """Two hops of four parts make 8. A message for each tensor made 48 a layer of per_node where
    now 32 do."""
    found = counts_of_a_layer(dispatch)
    moves = ["dispatch", "combine", "combine backward", "dispatch backward"]
    assert [found[move]["all_to_all"] for move in moves] == [messages] * 4
    assert found["route"]["all_to_all"] + found["route"]["all_gather"] == 1
    assert found["route backward"] == {}


@pytest.mark.parametrize("dispatch", ["local", *DISPATCHES])
def test_the_host_waits_for_the_device_once_a_layer(dispatch: str) -> None:
    """In the route; `Operations` refuses what would wait elsewhere."""
    found = counts_of_a_layer(dispatch)
    assert {name: counts["host reads"] for name, counts in found.items() if counts["host reads"]} == {
        "route": 1
    }


@pytest.mark.parametrize("dispatch", ["local", *DISPATCHES])
def test_a_layer_issues_no_more_operations_than_the_plan_says(dispatch: str) -> None:
    found = counts_of_a_layer(dispatch)
    assert found["route"]["operations"] <= ROUTE_OPERATIONS[dispatch]
    assert found["route"]["operations"] >= 0.9 * ROUTE_OPERATIONS[dispatch], "the plan says too much"
