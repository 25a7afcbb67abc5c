"""How rows reach their experts. The model defines the protocol; the parallel room brings the all-to-all.

Letters: N rows here, M rows at the experts this rank holds, E experts, L local experts, D features.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]


class Pending(Protocol):
    """Rows under way."""

    def wait(self) -> Tensors:
        """The rows, once they are there."""
        ...


class Route(Protocol):
    """One layer's exchange of one microbatch: who sends how many rows to whom. Forward and backward share it."""

    @property
    def offsets(self) -> torch.Tensor:
        """(L,) int32, on the rows' device: the row after the last of each local expert, in rows sorted by expert."""
        ...

    def settle(self) -> None:
        """The forward has used it: let go what the backward can work out again."""
        ...


class Dispatcher(Protocol):
    """Brings rows to their experts and back. Both moves are linear and each is the other's transpose, so the backward
    of one is the other. Every rank of an expert-parallel group calls them in the same order. Zero rows are legal."""

    def route(self, counts_E: torch.Tensor) -> Route:
        """Exchange counts: counts_E (E,) int64 are this rank's rows for each expert of the layer."""
        ...

    def dispatch(self, tensors: Tensors, route: Route) -> Pending:
        """Start moving tensors of N rows, sorted by expert, to their experts: M rows, sorted by local expert."""
        ...

    def combine(self, tensors: Tensors, route: Route) -> Pending:
        """Start moving tensors of M rows back where they came from: N rows in their first order."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalRoute:
    """The route where all experts are here."""

    counts_E: torch.Tensor

    @property
    def offsets(self) -> torch.Tensor:
        return self.counts_E.cumsum(0).to(torch.int32)

    def settle(self) -> None:
        """Nothing to let go."""


@dataclasses.dataclass(frozen=True)
class Arrived:
    """Rows that need no waiting for."""

    tensors: Tensors

    def wait(self) -> Tensors:
        return self.tensors


class LocalDispatcher:
    """Every expert is local: nothing moves."""

    def route(self, counts_E: torch.Tensor) -> LocalRoute:
        return LocalRoute(counts_E)

    def dispatch(self, tensors: Tensors, route: Route) -> Arrived:
        return Arrived(tensors)

    def combine(self, tensors: Tensors, route: Route) -> Arrived:
        return Arrived(tensors)
