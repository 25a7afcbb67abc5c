"""What a rank holds from step to step: parameters, gradient sums, masters and moments; and what the update costs.

Parameters have the compute type; gradient sums, masters, momentum (Muon) and both moments (AdamW) have four bytes a
number, eight in float64 runs. The last three live with a parameter's owner (ZeRO-1), so they shrink as replicas grow,
while parameters and gradients do not. Ownership is dealt out by the same functions that training uses.
Source: docs/design.md, "MuonClip with ZeRO-1"; K2 report, section 2.4.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from k2train.architecture.work import ELEMENT_BYTES, accumulation_bytes
from k2train.config.model import ModelConfig
from k2train.config.optim import OptimConfig
from k2train.config.sections import Dtype
from k2train.layout.layout import VirtualStage
from k2train.layout.ownership import assign_owners, newton_schulz_cost, row_ranges
from k2train.layout.staging import NUM_SLOTS, largest_batch, slot_elements
from k2train.layout.tensors import layer_tensors


@dataclass(frozen=True)
class Matrix:
    """A parameter of a stage, once for every copy of a model piece on it. piece: which of the stage's pieces has it."""

    piece: int
    shape: tuple[int, ...]
    muon: bool

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class StageStates:
    """One stage's states, bytes on its fullest rank."""

    dense_elements: int
    """Parameters of a rank that are replicated over the whole stage."""
    expert_elements: int
    """Parameters of a rank's routed experts."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """Masters, momentum and moments of the rank that owns most."""
    optimizer_mean_bytes: float
    """The same, on average over the stage's ranks."""
    staging_bytes: int
    """Device memory that the states pass through where they live on the host, on the rank that needs most."""
    muon_elements: int
    """Parameters that Muon updates, on the rank with most of them."""
    adamw_elements: int
    """Parameters that AdamW updates, on the rank with most of them."""
    newton_schulz_flops: float
    """Of the rank with most to orthogonalise."""


def stage_states(
    pieces: Sequence[VirtualStage],
    model: ModelConfig,
    optim: OptimConfig,
    dtype: Dtype,
    ep: int,
    owners: tuple[int, int],
) -> StageStates:
    """States of a stage that holds these pieces. owners: ranks that replicate a dense parameter, and an expert."""
    muon = optim.name == "muonclip"
    dense = list(_dense(pieces, model, muon))
    experts = list(_local_experts(pieces, model, muon, ep))
    dense_loads = _loads(dense, owners[0], optim.newton_schulz_steps)
    expert_loads = _loads(experts, owners[1], optim.newton_schulz_steps)
    # Every pairing of a dense owner and an expert owner occurs at most once, so the two maxima may meet on a rank.
    worst = [_worst(loads) for loads in (dense_loads, expert_loads)]
    width = accumulation_bytes(dtype)
    numbers = [sum(m.num_elements for m in group) for group in (dense, experts)]
    return StageStates(
        dense_elements=numbers[0],
        expert_elements=numbers[1],
        parameter_bytes=sum(numbers) * ELEMENT_BYTES[dtype],
        gradient_bytes=sum(numbers) * width,
        optimizer_bytes=round(sum(load.states for load in worst)) * width,
        optimizer_mean_bytes=width * sum(_mean_states(loads) for loads in (dense_loads, expert_loads)),
        staging_bytes=NUM_SLOTS * width * max(load.slot for load in worst),
        muon_elements=sum(load.muon for load in worst),
        adamw_elements=sum(load.adamw for load in worst),
        newton_schulz_flops=sum(load.flops for load in worst),
    )


@dataclass(frozen=True)
class _Load:
    """What one owner has. slot: entries of one of its staging slots."""

    muon: int
    adamw: int
    states: int
    flops: float
    slot: int


def _loads(matrices: Sequence[Matrix], num_owners: int, steps: int) -> list[_Load]:
    """The load of every owner: Muon's matrices whole, by Newton-Schulz cost; the rest in rows."""
    whole = [matrix for matrix in matrices if matrix.muon]
    costs = [newton_schulz_cost(matrix.shape, steps) for matrix in whole]
    owned: list[Counter[tuple[int, tuple[int, ...]]]] = [Counter() for _ in range(num_owners)]
    rows: list[Counter[int]] = [Counter() for _ in range(num_owners)]
    flops = [0.0] * num_owners
    for matrix, cost, owner in zip(whole, costs, assign_owners(costs, num_owners), strict=True):
        owned[owner][matrix.piece, matrix.shape] += 1
        flops[owner] += cost
    for matrix in matrices:
        if not matrix.muon:
            row = math.prod(matrix.shape[1:])
            for owner, (start, stop) in enumerate(row_ranges(matrix.shape[0], num_owners)):
                rows[owner][matrix.piece] += (stop - start) * row
    return [_load(*load) for load in zip(owned, rows, flops, strict=True)]


def _load(owned: Counter[tuple[int, tuple[int, ...]]], rows: Counter[int], flops: float) -> _Load:
    """owned: how many matrices of each piece and shape. rows: entries of each piece that AdamW updates."""
    stretches = Counter(rows)  # a piece's bucket has one stretch for an owner
    for (piece, shape), count in owned.items():
        stretches[piece] += count * math.prod(shape)
    adamw = rows.total()
    muon = stretches.total() - adamw
    batch = largest_batch((shape, count) for (_, shape), count in owned.items())
    states = 2 * muon + 3 * adamw  # master and momentum; master and two moments
    slot = slot_elements(max(stretches.values(), default=0), batch)
    return _Load(muon, adamw, states, flops, slot)


_NAMES = tuple(field.name for field in dataclasses.fields(_Load))


def _worst(loads: Sequence[_Load]) -> _Load:
    return _Load(*(max(getattr(load, name) for load in loads) for name in _NAMES))


def _mean_states(loads: Sequence[_Load]) -> float:
    return sum(load.states for load in loads) / len(loads)


def _dense(pieces: Iterable[VirtualStage], model: ModelConfig, muon: bool) -> Iterable[Matrix]:
    for index, piece in enumerate(pieces):
        if piece.embedding:
            yield Matrix(index, (model.vocab_size, model.hidden_size), False)
        for layer in piece.layers:
            for spec in layer_tensors(model, layer):
                if spec.trained and spec.expert is None:
                    yield Matrix(index, spec.shape, muon and spec.role == "matrix")
        if piece.head:
            yield Matrix(index, (model.hidden_size,), False)
            yield Matrix(index, (model.vocab_size, model.hidden_size), False)


def _local_experts(
    pieces: Iterable[VirtualStage], model: ModelConfig, muon: bool, ep: int
) -> Iterable[Matrix]:
    """Every ep rank holds as many experts of the same shapes, so the first one's stand for all."""
    for index, piece in enumerate(pieces):
        for layer in piece.layers:
            for spec in layer_tensors(model, layer, range(model.n_routed_experts // ep)):
                if spec.expert is not None:
                    yield Matrix(index, spec.shape, muon)
