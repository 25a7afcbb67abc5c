"""Layout, schedule and costs fit each other for every kind of schedule and every small grid."""

import itertools

import pytest

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.planner.plan import build_plan
from k2train.program import check_program, compile_program
from k2train.schedule.validate import validate

# 1152 sequences.
SMALL = ["train.global_batch_tokens=147456", "train.seq_len=128", "train.microbatch_size=1"]


def small(*words: str) -> Config:
    return load_config([*SMALL, "model.num_hidden_layers=8", "model.n_routed_experts=24", *words])


@pytest.mark.parametrize(("pp", "edp", "ep"), list(itertools.product(range(1, 5), range(1, 4), range(1, 5))))
def test_every_small_grid_can_be_planned(pp: int, edp: int, ep: int) -> None:
    tokens = 128 * edp * ep * 12
    config = small(
        f"layout.pp={pp}",
        f"layout.edp={edp}",
        f"layout.ep={ep}",
        f"train.global_batch_tokens={tokens}",
        f"layout.vpp={min(2, 10 // pp)}",
    )
    plan = build_plan(config)
    assert plan.program.schedule.num_microbatches == 12
    assert plan.step_seconds > plan.simulation.makespan_seconds > 0
    assert len(plan.memory) == pp
    assert plan.fits


@pytest.mark.parametrize(
    "kind", ["k2", "gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "dualpipe", "dualpipe_v"]
)
def test_every_virtual_stage_has_a_piece_and_every_chain_the_whole_model(kind: str) -> None:
    vpp = 2 if kind in ("k2", "interleaved_1f1b") else 1
    program = compile_program(small(f"schedule={kind}", "layout.pp=4", f"layout.vpp={vpp}", "layout.ep=2"))
    validate(program.schedule)
    assert len(program.pieces) == len(program.costs.virtual_stages) == program.schedule.num_virtual_stages
    for chain in program.schedule.chains:
        pieces = [program.pieces[virtual_stage] for virtual_stage in chain]
        assert [layer for piece in pieces for layer in piece.layers] == list(range(8))
        assert [piece.embedding for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.head for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_dualpipe_holds_every_parameter_twice_and_others_once() -> None:
    double, single = (
        build_plan(small(f"schedule={kind}", "layout.pp=4", "layout.ep=2")) for kind in ("dualpipe", "1f1b")
    )
    assert double.program.parameter_copies == 2
    assert sum(s.parameters for s in double.memory) == 2 * sum(s.parameters for s in single.memory)
    # The states of both copies' replicas are dealt out over twice the ranks, so in all they are as
    # many.
    assert sum(s.optimizer_mean_bytes for s in double.states) == pytest.approx(
        sum(s.optimizer_mean_bytes for s in single.states)
    )


def test_offload_actions_appear_with_the_first_offloaded_name() -> None:
    for policy, expected in (("keep", 0), ("offload", 1), ("fp8_offload", 1)):
        text = compile_program(small("layout.pp=2", f"activations.swiglu_input={policy}")).schedule.to_text()
        assert ("OFFLOAD" in text) == bool(expected)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["layout.pp=11"], "layout.pp"),
        (["layout.pp=4", "layout.vpp=3"], "layout.vpp"),
        (["layout.nodes=3", "layout.pp=4", "layout.ep=4"], "layout.nodes"),
        (["layout.edp=7"], "train.global_batch_tokens"),
        (["activations.expert_input=recompute"], "activations.expert_input"),
        (["schedule=dualpipe", "layout.pp=3"], "layout.pp"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_the_long_work(words: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_program(small(*words))
    assert caught.value.field == field


def test_pairs_without_the_extra_warmup_are_refused_with_the_cycle_and_the_remedy() -> None:
    with pytest.raises(ConfigError, match="deadlock") as caught:
        build_plan(small("layout.pp=4", "schedule.extra_warmup_microbatches=0"))
    assert "extra_warmup_microbatches=1" in caught.value.remedy
