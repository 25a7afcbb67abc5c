"""A bucket adds gradients and returns values entry by entry, whether a parameter lies in it in long
runs or short ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from k2train.architecture.tensors import TensorSpec
from k2train.config.compose import load_config
from k2train.layout.tensors import model_tensors
from k2train.model.model import build_model
from k2train.model.pieces import ModelPart, Piece
from k2train.optim.buckets import SHORT_RUN_ELEMENTS, Bucket, GradBuffers
from k2train.optim.shares import plan_buckets
from k2train.parallel.communicator import World
from k2train.parallel.threads import run_threads
from k2train.update_rules.chosen import all_rules, chosen_rules

OWNERS = 3
ADAMW = chosen_rules(load_config(["optim.name=adamw"]).optim)


@dataclasses.dataclass(frozen=True)
class Peers:
    """Who a bucket would talk to, for a bucket that talks to nobody."""

    size: int
    rank: int = 0


def pair_of(rows: int, width: int) -> tuple[list[Piece], dict[str, TensorSpec]]:
    """Two tensors cut by rows among the owners, so that each lies in the bucket in as many runs as
    there are owners."""
    names = ("first", "second")
    pieces = [Piece(name, torch.nn.Parameter(torch.zeros(rows, width))) for name in names]
    return pieces, {name: TensorSpec(name, (rows, width), "embedding") for name in names}


@pytest.mark.parametrize("rows", [5, OWNERS * SHORT_RUN_ELEMENTS])
def test_every_entry_comes_back_as_the_sum_over_ranks_and_additions(rows: int, gradient_of) -> None:
    """Whole numbers below 2**24, so FP32 sums are exact in any order."""

    def run(world: World) -> None:
        pieces, catalogue = pair_of(rows, 2)
        (plan,) = plan_buckets({0: pieces}, catalogue, ADAMW, {"dp": OWNERS, "edp": 1})
        bucket = Bucket(plan, world.group("dp", range(OWNERS)), world.device)
        buffers = GradBuffers([bucket])
        values = {
            piece.name: torch.arange(2.0 * rows).view(rows, 2) + 7 * n for n, piece in enumerate(pieces)
        }
        for piece in pieces:
            assert len(bucket.runs[piece.parameter]) == OWNERS
            for times in (1, 2):
                buffers.add(piece.parameter, values[piece.name] * times)
            torch.testing.assert_close(
                gradient_of(buffers, piece.name), 3 * values[piece.name], rtol=0, atol=0
            )
        bucket.start_reduce()
        bucket.finish_reduce()
        bucket.start_gather(bucket.own_gradient.clone())
        bucket.finish_gather()
        for piece in pieces:
            torch.testing.assert_close(piece.tensor, 3 * OWNERS * values[piece.name], rtol=0, atol=0)

    run_threads(OWNERS, run)


def filled(bucket: Bucket) -> None:
    """Every entry another whole number."""
    bucket.flat.copy_(torch.arange(bucket.flat.numel()) % 1000)


@pytest.mark.parametrize("rows", [5, 7, OWNERS * SHORT_RUN_ELEMENTS])
@pytest.mark.parametrize("width", [1, 2, 9])
def test_rows_are_added_where_they_lie_whoever_owns_them(rows: int, width: int, gradient_of) -> None:
    """Whole numbers, so FP32 sums are exact in any order. A row that comes twice is added twice."""
    pieces, catalogue = pair_of(rows, width)
    (plan,) = plan_buckets({0: pieces}, catalogue, ADAMW, {"dp": OWNERS, "edp": 1})
    bucket = Bucket(plan, Peers(OWNERS), torch.device("cpu"))
    filled(bucket)
    buffers = GradBuffers([bucket])
    for piece in pieces:
        before = {other.name: gradient_of(buffers, other.name) for other in pieces}
        index, columns = torch.tensor([4, 0, 4, 3]), width // 2 + 1
        values = torch.arange(4.0 * columns).view(4, columns)
        buffers.add_rows(piece.parameter, index, values, width - columns)
        expected = before | {piece.name: before[piece.name].clone()}
        expected[piece.name][:, width - columns :].index_add_(0, index, values)
        for other in pieces:
            assert torch.equal(gradient_of(buffers, other.name), expected[other.name])


@pytest.mark.parametrize("owners", [1, 3, 16, 64])
@pytest.mark.parametrize("name", [named.name for named in all_rules()])
def test_the_runs_of_k2s_parameters_are_whole_rows_and_cover_each_once(owners: int, name: str) -> None:
    """Real shapes on tensors without memory: an embedding, the dense layer, a MoE layer of 24
    experts, the head.

    Each run is a stretch of its bucket, and all of them together are the bucket but for the norms.
    """
    model = load_config(["model=k2"]).model
    part = ModelPart((0, 1), True, True, tuple(range(24)))
    pieces = list(build_model(model, part, torch.bfloat16, torch.device("meta")).pieces())
    catalogue = {spec.name: spec for spec in model_tensors(model)}
    rules = chosen_rules(load_config(["model=k2", f"optim.name={name}"]).optim)
    plans = plan_buckets({0: pieces}, catalogue, rules, {"dp": owners, "edp": owners})
    for plan in plans:
        bucket = Bucket(plan, Peers(owners), torch.device("meta"))
        stretches = []
        for parameter in bucket.runs:
            if parameter.dim() == 1:
                stretches += [(run.offset, run.end) for run in bucket.runs[parameter]]
                continue
            *_, rows, inner = parameter.shape
            covered = torch.zeros(parameter.numel() // inner, dtype=torch.int64)
            for run in bucket.row_runs[parameter]:
                assert run.buffer.shape == (run.last - run.first, inner)
                assert run.buffer.is_contiguous()
                assert 0 <= run.first < run.last <= rows
                covered[run.matrix * rows + run.first : run.matrix * rows + run.last] += 1
                start = run.buffer.storage_offset()
                stretches.append((start, start + run.buffer.numel()))
            assert (covered == 1).all()
        ends = [0, *(end for _, end in sorted(stretches))]
        assert [start for start, _ in sorted(stretches)] == ends[:-1]
        assert ends[-1] == plan.num_elements


def test_a_run_that_cuts_a_row_is_refused() -> None:
    """No layout makes one; a piece that is part of a row would."""
    parameter = torch.nn.Parameter(torch.zeros(4, 6))
    piece = Piece("half", parameter, (0, slice(0, 3)))
    spec = TensorSpec("half", (3,), "norm")
    (plan,) = plan_buckets({0: [piece]}, {"half": spec}, ADAMW, {"dp": 1, "edp": 1})
    with pytest.raises(AssertionError, match="cuts rows of 6 entries"):
        Bucket(plan, Peers(1), torch.device("cpu"))
