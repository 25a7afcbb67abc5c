"""Ranks that compiled different programs say so before they exchange anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.parallel.communicator import World
from k2train.parallel.groups import build_groups
from k2train.parallel.testing import run_distributed_test
from k2train.program import Program, compile_program
from k2train.schedule.builders import build_schedule
from k2train.schedule.spec import ScheduleSpec
from k2train.trainer.agreement import agree_on_program
from k2train.trainer.loop import Prepared
from k2train.trainer.worlds import WorldKind

WORDS = [
    "layout.ep=1",
    "layout.edp=4",
    "train.global_batch_tokens=8192",
    "train.seq_len=64",
    "train.microbatch_size=1",
]


def program_of(*words: str) -> Program:
    return compile_program(load_config([*WORDS, *words]))


def agree(program_of_rank: Callable[[int], Program]) -> Callable[[World], ConfigError | None]:
    """What every rank of four hears: its error, or None."""

    def run_rank(world: World) -> ConfigError | None:
        program = program_of_rank(world.rank)
        try:
            build_groups(
                program.layout.grid, world, agree=lambda group: agree_on_program(program, group, world.device)
            )
        except ConfigError as error:
            return error
        return None

    return run_rank


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_ranks_with_one_program_go_on(backend: str) -> None:
    assert run_distributed_test(agree(lambda rank: program_of()), 4, backend) == [None] * 4  # type: ignore[arg-type]


def test_every_rank_names_those_that_differ_the_key_and_both_values() -> None:
    errors = run_distributed_test(
        agree(lambda rank: program_of("train.seed=9") if rank in (1, 3) else program_of()), 4, "threads"
    )
    for error in errors:
        assert error is not None
        assert error.field == "train.seed"
        assert "rank(s) 1, 3 compiled another program than rank 0" in str(error)
        assert "rank 1 was started with this value and rank 0 with 0" in str(error)
        assert error.remedy == "start every rank with the same words"


def test_ranks_whose_groups_would_differ_are_told_before_they_make_them() -> None:
    """Two grids of four ranks make different groups: without the agreement each would wait for the
    other."""
    errors = run_distributed_test(
        agree(lambda rank: program_of("layout.edp=2", "layout.pp=2") if rank == 2 else program_of()),
        4,
        "threads",
    )
    assert {error.field for error in errors if error is not None} == {"layout.edp"}
    assert None not in errors


def test_the_same_words_and_other_lists_are_another_version_of_the_program() -> None:
    base = program_of()
    lists = build_schedule(ScheduleSpec.preset("gpipe", 1, base.schedule.num_microbatches))
    other = dataclasses.replace(base, schedule=lists)
    errors = run_distributed_test(agree(lambda rank: other if rank == 3 else base), 4, "threads")
    for error in errors:
        assert error is not None
        assert "of rank 3" in str(error)
        assert error.remedy == "install one version on every machine"


@pytest.mark.parametrize(("kind", "heard"), [("processes", "train.seed"), ("threads", None)])
def test_processes_make_no_groups_before_they_agree_and_threads_have_nothing_to_agree_on(
    kind: WorldKind, heard: str | None
) -> None:
    """Training and `k2train evaluate` take their groups from what `prepare` gives."""

    def run_rank(world: World) -> str | None:
        program = program_of(f"train.seed={world.rank}")
        try:
            Prepared(program, torch.device("cpu"), kind).groups(world)
        except ConfigError as error:
            return error.field
        return None

    assert run_distributed_test(run_rank, 4, "threads") == [heard] * 4
