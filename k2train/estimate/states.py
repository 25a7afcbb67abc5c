"""What a rank holds from step to step, and what the update costs.

A rank holds parameters, gradient sums, masters and the update rules' states. Parameters have the
compute type. Gradient sums, masters and the update rules' states have four bytes a number, eight in
float64 runs. Masters and states live with a parameter's owner (ZeRO-1), so they shrink as replicas
grow, while parameters and gradients do not. Ownership is dealt out by the same functions that
training uses, from what each rule says of itself. Source: docs/design.md, "MuonClip with ZeRO-1";
K2 report, section 2.4.2.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from k2train.architecture.work import ELEMENT_BYTES, accumulation_bytes
from k2train.config.model import ModelConfig
from k2train.config.optim import OptimConfig
from k2train.config.sections import Dtype
from k2train.layout.layout import VirtualStage
from k2train.layout.ownership import assign_owners, row_ranges
from k2train.layout.staging import NUM_SLOTS, largest_batch, slot_elements
from k2train.layout.tensors import TensorSpec, embedding_tensors, head_tensors, layer_tensors
from k2train.update_rules.chosen import chosen_rules
from k2train.update_rules.rule import Rules, UpdateRule, numbers_kept, numbers_moved


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
    """Masters and states of the rank that owns most."""
    optimizer_mean_bytes: float
    """The same, on average over the stage's ranks."""
    staging_bytes: int
    """Device memory that states in host memory pass through, on the rank that needs most."""
    whole_elements: int
    """Parameters that are updated as whole matrices, on the rank with most of them."""
    whole_numbers: int
    """Masters and states of those, on the rank with most of them."""
    row_elements: int
    """Parameters that are updated in rows, on the rank with most of them."""
    row_numbers_moved: int
    """Numbers that the update of those reads or writes, on the rank with most of them."""
    matmul_flops: float
    """Of the update (Newton-Schulz), on the rank with most of them."""


def stage_states(
    pieces: Sequence[VirtualStage],
    model: ModelConfig,
    optim: OptimConfig,
    dtype: Dtype,
    ep: int,
    owners: tuple[int, int],
) -> StageStates:
    """States of a stage that holds these pieces.

    owners: ranks that replicate a dense parameter, and an expert. Raises ConfigError for an
    optim.name that is none.
    """
    rules = chosen_rules(optim)
    held = [(index, spec) for index, piece in enumerate(pieces) for spec in _trained(piece, model, ep)]
    dense = [(index, spec) for index, spec in held if spec.expert is None]
    groups = dense, [(index, spec) for index, spec in held if spec.expert is not None]
    loads = [_loads(group, rules, num_owners) for group, num_owners in zip(groups, owners, strict=True)]
    # Every pairing of a dense owner and an expert owner occurs at most once, so the two maxima may
    # meet on a rank.
    worst = [_worst(of_group) for of_group in loads]
    width = accumulation_bytes(dtype)
    numbers = [sum(spec.num_elements for _, spec in group) for group in groups]
    return StageStates(
        dense_elements=numbers[0],
        expert_elements=numbers[1],
        parameter_bytes=sum(numbers) * ELEMENT_BYTES[dtype],
        gradient_bytes=sum(numbers) * width,
        optimizer_bytes=width * sum(load.numbers for load in worst),
        optimizer_mean_bytes=width * sum(_mean_numbers(of_group) for of_group in loads),
        staging_bytes=NUM_SLOTS * width * max(load.slot for load in worst),
        whole_elements=sum(load.whole for load in worst),
        whole_numbers=sum(load.whole_numbers for load in worst),
        row_elements=sum(load.rows for load in worst),
        row_numbers_moved=sum(load.row_numbers_moved for load in worst),
        matmul_flops=sum(load.flops for load in worst),
    )


@dataclass(frozen=True)
class _Load:
    """What one owner has; the fields are those of StageStates. slot: entries of a staging slot."""

    whole: int
    whole_numbers: int
    rows: int
    row_numbers_moved: int
    numbers: int
    flops: float
    slot: int


@dataclass(frozen=True)
class _Owned:
    """Entries that one owner updates, by piece of the model, rule and (if updated whole) shape."""

    matrices: Counter[tuple[int, UpdateRule, tuple[int, ...]]]
    """How many matrices."""
    rows: Counter[tuple[int, UpdateRule]]
    """How many entries."""
    flops: list[float]
    """Of every matrix."""


def _loads(held: Sequence[tuple[int, TensorSpec]], rules: Rules, num_owners: int) -> list[_Load]:
    """The load of every owner: tensors that are updated whole by cost, the others in rows."""
    owned = [_Owned(Counter(), Counter(), []) for _ in range(num_owners)]
    tensors = [(piece, spec.shape, rules.of(spec.role)) for piece, spec in held]
    whole = [tensor for tensor in tensors if tensor[2].whole_matrices]
    costs = [rule.matmul_flops(shape) for _, shape, rule in whole]
    for (piece, shape, rule), cost, owner in zip(whole, costs, assign_owners(costs, num_owners), strict=True):
        owned[owner].matrices[piece, rule, shape] += 1
        owned[owner].flops.append(cost)
    for piece, shape, rule in tensors:
        if not rule.whole_matrices:
            row = math.prod(shape[1:])
            for owner, (start, stop) in enumerate(row_ranges(shape[0], num_owners)):
                owned[owner].rows[piece, rule] += (stop - start) * row
    return [_load(of_owner) for of_owner in owned]


def _load(owned: _Owned) -> _Load:
    stretches: Counter[int] = Counter()  # a piece's bucket has one stretch for an owner
    whole: Counter[UpdateRule] = Counter()
    for (piece, rule, shape), count in owned.matrices.items():
        stretches[piece] += count * math.prod(shape)
        whole[rule] += count * math.prod(shape)
    rows: Counter[UpdateRule] = Counter()
    for (piece, rule), entries in owned.rows.items():
        stretches[piece] += entries
        rows[rule] += entries
    batch = largest_batch((shape, count) for (_, _, shape), count in owned.matrices.items())
    whole_numbers = sum(numbers_kept(rule) * entries for rule, entries in whole.items())
    kept = max((numbers_kept(rule) for rule in whole), default=0)
    return _Load(
        whole=whole.total(),
        whole_numbers=whole_numbers,
        rows=rows.total(),
        row_numbers_moved=sum(numbers_moved(rule) * entries for rule, entries in rows.items()),
        numbers=whole_numbers + sum(numbers_kept(rule) * entries for rule, entries in rows.items()),
        flops=sum(owned.flops),
        slot=slot_elements(max(stretches.values(), default=0), batch, kept),
    )


_NAMES = tuple(field.name for field in dataclasses.fields(_Load))


def _worst(loads: Sequence[_Load]) -> _Load:
    return _Load(*(max(getattr(load, name) for load in loads) for name in _NAMES))


def _mean_numbers(loads: Sequence[_Load]) -> float:
    return sum(load.numbers for load in loads) / len(loads)


def _trained(piece: VirtualStage, model: ModelConfig, ep: int) -> Iterator[TensorSpec]:
    """What an optimizer updates on a rank that holds this piece.

    Every expert-parallel rank holds as many experts of the same shapes, so the first one's stand
    for all.
    """
    experts = range(model.n_routed_experts // ep)
    of_layers = (spec for layer in piece.layers for spec in layer_tensors(model, layer, experts))
    specs = itertools.chain(
        embedding_tensors(model) if piece.embedding else (),
        of_layers,
        head_tensors(model) if piece.head else (),
    )
    return (spec for spec in specs if spec.trained)
