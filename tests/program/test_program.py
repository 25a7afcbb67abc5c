"""A config is compiled once: its parts fit each other, are made when they are needed, and are all
proved."""

from __future__ import annotations

import dataclasses

import pytest

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.program import Program, check_program, compile_program
from k2train.program.program import MICROBATCHES_PER_STAGE
from k2train.schedule.actions import Kind
from k2train.schedule.builders import build_schedule
from k2train.schedule.deadlock import check_progress
from k2train.schedule.errors import ScheduleError
from k2train.schedule.forward import forward_only
from k2train.schedule.simulate import simulate
from k2train.schedule.spec import KINDS, ScheduleSpec, placement, preset_switches
from k2train.schedule.validate import validate

SMALL = [
    "train.global_batch_tokens=8192",
    "train.seq_len=128",
    "train.microbatch_size=1",
    "model.num_hidden_layers=8",
    "model.n_routed_experts=24",
]
TRAINED = [kind for kind in KINDS if kind != "dualpipe"]


def compiled(*words: str) -> Program:
    return compile_program(load_config([*SMALL, *words]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pp", [2, 4])
def test_the_model_is_cut_for_the_placement_that_the_schedule_is_built_over(kind: str, pp: int) -> None:
    """Two rooms read one rule; here the rule is held against what the builders have made."""
    program = compiled(f"schedule={kind}", f"layout.pp={pp}")
    first_chain = program.schedule.chains[0]
    made = tuple(program.schedule.placement[virtual_stage] for virtual_stage in first_chain)
    assert placement(kind, pp, 1) == made == program.layout.placement


@pytest.mark.parametrize("kind", TRAINED)
def test_evaluations_lists_are_proved_for_any_number_of_microbatches(kind: str) -> None:
    """Every forward once, in order, without a deadlock, and over the channels that training's lists
    have made."""
    for pp in (1, 2, 4):
        program = compiled(f"schedule={kind}", f"layout.pp={pp}")
        for count in (1, 2, pp, pp + 1, 3 * pp, 4 * pp + 1):
            lists = program.evaluation(count)
            assert lists is program.evaluation(count), "threads of one process share the lists"
            assert lists.kinds <= {Kind.F, Kind.SEND_F, Kind.RECV_F}
            for most in program.messages.max_sends:
                check_progress(lists, max_sends=most)


def test_a_forward_list_that_misses_or_adds_an_action_is_refused() -> None:
    good = forward_only(build_schedule(ScheduleSpec.preset("k2", 2, 4, 2)), 4)
    validate(good, backward=False)
    first, *others = good.stages
    with pytest.raises(ScheduleError, match="missing"):
        validate(dataclasses.replace(good, stages=(first[:-1], *others)), backward=False)
    with pytest.raises(ScheduleError, match="not needed"):
        validate(build_schedule(ScheduleSpec.preset("1f1b", 2, 4)), backward=False)
    with pytest.raises(ScheduleError, match="missing"):
        validate(good)


def test_costs_wait_until_somebody_needs_them_and_are_made_once() -> None:
    program = compiled("layout.pp=2")
    assert not {"report", "messages", "costs", "estimator"} & set(vars(program))
    assert program.costs is program.costs
    assert "report" not in vars(program)


def test_a_short_step_has_the_costs_and_the_peaks_of_the_whole_one() -> None:
    program = compiled("layout.pp=2", "layout.vpp=2", "schedule=k2", "activations=k2")
    assert program.schedule.num_microbatches > program.short_schedule.num_microbatches
    assert program.short_schedule.num_microbatches == 2 * MICROBATCHES_PER_STAGE
    whole, short = (simulate(lists, program.costs) for lists in (program.schedule, program.short_schedule))
    assert whole.peak_bytes == short.peak_bytes
    assert whole.peak_host_bytes == short.peak_host_bytes
    few = compiled("layout.pp=2", "train.global_batch_tokens=1024")
    assert few.short_schedule is few.schedule


def test_a_schedule_that_cannot_run_is_refused_in_the_words_of_the_config() -> None:
    program = compiled("layout.pp=4", "schedule=k2", "schedule.extra_warmup_microbatches=0")
    with pytest.raises(ConfigError, match="deadlock") as caught:
        _ = program.report
    assert caught.value.field == "schedule.kind"
    assert "extra_warmup_microbatches=1" in caught.value.remedy


def test_a_list_of_layers_that_does_not_fit_a_folded_pipeline_is_refused_and_one_that_fits_is_kept() -> None:
    words = ["schedule=dualpipe_v", "layout.pp=2"]
    with pytest.raises(ConfigError, match="2 entries, but the schedule makes 4 virtual stages"):
        check_program(load_config([*SMALL, *words, "layout.layers_per_virtual_stage=[4,4]"]))
    program = compiled(*words, "layout.layers_per_virtual_stage=[1,2,2,3]")
    assert [piece.num_layers for piece in program.layout.virtual_stages] == [1, 2, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_preset_of_a_kind_is_its_file_in_configs(kind: str) -> None:
    section = load_config([f"schedule={kind}"]).schedule
    spec = ScheduleSpec.preset(kind, 2, 8)
    for name, value in preset_switches(kind).items():
        assert getattr(section, name) == getattr(spec, name) == value


def test_a_fingerprint_follows_what_a_step_does_and_nothing_else() -> None:
    base = compiled("layout.pp=2").fingerprint
    assert compiled("layout.pp=2", "run_dir=elsewhere", "telemetry.progress=none").fingerprint == base
    for word in ("layout.vpp=2", "train.seed=7", "schedule=1f1b", "optim=adamw", "activations=k2"):
        assert compiled("layout.pp=2", word).fingerprint != base, word


def test_a_fingerprint_covers_the_lists_themselves() -> None:
    program = compiled("layout.pp=2")
    lists = build_schedule(ScheduleSpec.preset("1f1b", 2, program.schedule.num_microbatches))
    other = dataclasses.replace(program, schedule=lists)
    assert other.words == program.words
    assert other.fingerprint != program.fingerprint
