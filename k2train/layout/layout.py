"""`Layout`: the answer to who is where. Derived once from the config and passed to whoever needs
it.

Any world that is a multiple of pp * ep is legal; growing or shrinking the cluster changes edp and
nothing else, so a checkpoint, the order of the data and the model-parallel group stay as they are.
Source: docs/design.md, "Layout"; K2 report, section 2.4.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from k2train.config.sections import DispatchKind
from k2train.layout.grid import RankGrid


@dataclass(frozen=True)
class VirtualStage:
    """A contiguous piece of the model: layers `first .. end`, perhaps the embedding before, perhaps
    the head after."""

    first: int
    end: int
    embedding: bool = False
    head: bool = False

    @property
    def layers(self) -> range:
        """The transformer layers on it, counted from 0; may be empty."""
        return range(self.first, self.end)

    @property
    def num_layers(self) -> int:
        return self.end - self.first


@dataclass(frozen=True)
class Layout:
    """Degrees, rank grid, and what every virtual stage and every expert-parallel rank holds."""

    grid: RankGrid
    gpus_per_node: int
    virtual_stages: tuple[VirtualStage, ...]
    """The pieces of the model, in its order."""
    placement: tuple[int, ...]
    """The stage (pp_rank) of every virtual stage, from `layout.placement`; the schedule has the
    same."""
    n_routed_experts: int
    dispatch: DispatchKind = "per_expert"
    dispatch_parts: int = 1

    @property
    def pp(self) -> int:
        return self.grid.pp

    @property
    def ep(self) -> int:
        return self.grid.ep

    @property
    def edp(self) -> int:
        return self.grid.edp

    @property
    def dp(self) -> int:
        """Data-parallel degree, edp * ep."""
        return self.grid.dp

    @property
    def world(self) -> int:
        return self.grid.world

    @property
    def vpp(self) -> int:
        """Virtual stages on each stage."""
        return len(self.virtual_stages) // self.pp

    @property
    def num_nodes(self) -> int:
        """Machines, the last perhaps not full."""
        return -(-self.world // self.gpus_per_node)

    def node_of(self, rank: int) -> int:
        """The machine of a rank: ranks fill nodes in order."""
        return rank // self.gpus_per_node

    def ranks_of_node(self, node: int) -> range:
        """The ranks on a machine."""
        first = node * self.gpus_per_node
        return range(first, min(first + self.gpus_per_node, self.world))

    @property
    def relay_ranks(self) -> int | None:
        """How many neighbouring ranks of an expert-parallel group pass a token on among themselves,
        once it has reached one of them: those of a node, or the whole group where each rank is sent
        its own copy. None: every expert is, or DeepEP sees to it."""
        if self.dispatch in ("per_expert", "deepep") or self.ep == 1:
            return None
        return min(self.ep, self.gpus_per_node) if self.dispatch == "per_node" else self.ep

    @property
    def relay_parts(self) -> int:
        """The parts that a microbatch's tokens are sent in: more than one only where there are two
        hops to overlap."""
        return self.dispatch_parts if self.relay_ranks not in (None, self.ep) else 1

    @property
    def dispatch_words(self) -> str:
        """How tokens reach their experts, for people."""
        if self.dispatch == "deepep":
            return "a token is sent once per node it goes to, by DeepEP"
        parts = f", in {self.relay_parts} parts" if self.relay_parts > 1 else ""
        return f"a token is sent once {self.dispatch.replace('_', ' ')} it goes to{parts}"

    def stage_of(self, virtual_stage: int) -> int:
        """The stage a virtual stage lives on."""
        return self.placement[virtual_stage]

    def virtual_stages_of(self, stage: int) -> tuple[int, ...]:
        """The virtual stages on a stage, ascending."""
        return tuple(index for index, where in enumerate(self.placement) if where == stage)

    @cached_property
    def virtual_stage_of_layer(self) -> tuple[int, ...]:
        """The virtual stage that holds each transformer layer."""
        return tuple(index for index, piece in enumerate(self.virtual_stages) for _ in piece.layers)

    @property
    def num_local_experts(self) -> int:
        """Routed experts of a layer on each ep rank."""
        return self.n_routed_experts // self.ep

    def local_experts(self, ep_rank: int) -> range:
        """The routed experts of every MoE layer that live on an ep rank: contiguous, in order."""
        if not 0 <= ep_rank < self.ep:
            raise IndexError(f"{ep_rank} is outside 0 .. {self.ep - 1}")
        first = ep_rank * self.num_local_experts
        return range(first, first + self.num_local_experts)

    def ep_rank_of_expert(self, expert: int) -> int:
        """The inverse of `local_experts`."""
        return expert // self.num_local_experts

    def replicas(self, expert: bool) -> int:
        """Ranks that hold the same copy of a parameter: edp for a routed expert's, the whole stage
        for others."""
        return self.edp if expert else self.dp
