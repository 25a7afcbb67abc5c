"""Host memory that is too small is refused before a tensor is made, with the numbers and what to do
about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.layout.build import build_layout
from k2train.planner.plan import build_plan
from k2train.trainer import host_memory
from k2train.trainer.build import build_program
from k2train.trainer.host_memory import (
    HostNeed,
    HostRoom,
    activation_share,
    available_bytes,
    check_host_memory,
    host_need,
    offload_peaks,
    ranks_here,
    refuse_too_little,
    states_bytes,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NEED = HostNeed(activations=3_000_000_000, optimizer=5_000_000_000, num_ranks=4)


@pytest.mark.parametrize("room", [HostRoom(8_000_000_000, 8_000_000_000), HostRoom(10**12, 10**12)])
def test_what_just_fits_is_accepted(room: HostRoom) -> None:
    refuse_too_little(NEED, room, movable=True)


@pytest.mark.parametrize(
    ("room", "field"),
    [
        (HostRoom(7_999_999_999, 10**12), "cluster.host_memory_bytes"),
        (HostRoom(10**12, 7_999_999_999), "host memory"),
        (HostRoom(0, 0), "cluster.host_memory_bytes"),
    ],
)
def test_one_byte_too_little_is_refused_and_the_limit_named(room: HostRoom, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_too_little(NEED, room, movable=True)
    assert refused.value.field == field


def test_the_refusal_has_every_number_and_every_remedy() -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_too_little(NEED, HostRoom(2_000_000_000_000, 6_500_000_000), movable=True)
    text = str(refused.value)
    for part in (
        "4 rank(s)",
        "8.000 GB",
        "3.000 GB of offloaded activations",
        "5.000 GB of optimizer states",
        "2000.000 GB",
        "6.500 GB are available",
        "optim.states=device",
        "activations=",
        "more nodes",
    ):
        assert part in text, part


def test_only_remedies_that_help_are_given() -> None:
    """States on a CPU cannot move to a device, and where nothing is offloaded other policies free
    nothing."""
    with pytest.raises(ConfigError) as refused:
        refuse_too_little(HostNeed(0, 10, 1), HostRoom(5, 5), movable=False)
    assert "optim.states" not in refused.value.remedy
    assert "activations" not in refused.value.remedy


def test_nothing_kept_needs_no_room() -> None:
    refuse_too_little(HostNeed(0, 0, 8), HostRoom(1, 0), movable=False)


def test_states_count_as_the_plan_counts_them() -> None:
    """One rank of each stage: the plan's fullest rank, in host mode on a GPU and in either mode on
    a CPU."""
    words = ["experiment=laptop", "optim.states=host"]
    config = load_config(words)
    program = build_program(config)
    layout, planned = program.layout, [stage.optimizer_on_host for stage in build_plan(config).memory]
    for device, states, counted in ((CUDA, "host", True), (CPU, "device", True), (CUDA, "device", False)):
        moved = build_program(load_config(["experiment=laptop", f"optim.states={states}"]))
        for stage in range(layout.pp):
            first = stage * layout.dp
            need = host_need(moved, range(first, first + 1), device)
            assert need == HostNeed(0, planned[stage] if counted else 0, 1)


def test_all_ranks_of_a_stage_own_what_the_stage_has_and_not_the_fullest_rank_times_their_number() -> None:
    config = load_config(["experiment=laptop", "train.dtype=float32"])
    program = build_program(config)
    whole = host_need(program, range(program.layout.world), CPU)
    one_rank = load_config(["experiment=laptop", "layout=single", "train.dtype=float32"])
    alone = host_need(build_program(one_rank), range(1), CPU)
    assert whole.optimizer == alone.optimizer
    assert (whole.num_ranks, alone.num_ranks) == (4, 1)


def test_offloaded_activations_count_as_the_plan_counts_them() -> None:
    """A short step reaches the peak of the whole one."""
    words = ["experiment=laptop", "activations=k2", "train.global_batch_tokens=131072"]
    config = load_config(words)
    plan = build_plan(config)
    program = build_program(config)
    layout = program.layout
    peaks = [stage.activations_on_host for stage in plan.memory]
    assert min(peaks) > 0
    need = host_need(program, range(layout.world), CUDA)
    assert need.activations == layout.dp * sum(peaks)


def test_without_offload_nothing_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("simulated")

    monkeypatch.setattr(host_memory, "simulate", never)
    config = load_config(["experiment=k2_threads"])
    program = build_program(config)
    assert host_need(program, range(program.layout.world), CPU).optimizer > 0
    assert "costs" not in vars(program), "costs were made though nobody needed them"


def test_the_ranks_of_a_machine_are_those_its_launcher_started() -> None:
    config = load_config(["experiment=k2"])
    layout = build_layout(config.layout, config.cluster, config.model, config.train.seq_len)
    environment = {"RANK": "21", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}
    assert ranks_here(layout, "processes", environment) == range(16, 24)
    assert ranks_here(layout, "processes", {"RANK": "3"}) == range(3, 4)
    assert ranks_here(layout, "threads", environment) == range(256)


def test_available_memory_is_what_the_system_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemFree: 5 kB\nMemAvailable:      42 kB\n")
    assert available_bytes(meminfo) == 42 * 1024
    assert available_bytes(tmp_path / "missing") > available_bytes(meminfo)
    assert available_bytes() > 0


def test_a_run_that_does_not_fit_its_node_is_refused_before_it_starts(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train", *words, "cluster.host_memory_bytes=1000"]) == 2
    error = capsys.readouterr().err
    assert "cluster.host_memory_bytes" in error
    assert "of optimizer states" in error
    assert not (tmp_path / "run").exists()


def test_a_ranks_share_of_a_node_is_what_its_optimizer_states_leave() -> None:
    """Four ranks; on a GPU with states on the device the whole share is the activations'."""
    config = load_config(["experiment=laptop", "activations=k2", "train.global_batch_tokens=131072"])
    program = build_program(config)
    layout = program.layout
    share = round(config.cluster.host_memory_bytes / layout.world)
    for stage in range(layout.pp):
        states = states_bytes(program, stage, 1)
        assert activation_share(program, stage, CPU) == share - states < share
        assert activation_share(program, stage, CUDA) == share


def test_activations_that_overflow_a_ranks_share_are_refused_at_start_up_and_not_in_mid_step() -> None:
    """Stage 0 has more in flight than stage 1: one node holds both on average and stage 0's share
    does not hold its own.

    With so much for a node that the sum just fits, the store's limit on stage 0 is below what the
    step offloads there.
    """
    words = ["experiment=laptop", "activations=k2", "train.global_batch_tokens=131072", "optim.states=device"]
    config = load_config(words)
    program = build_program(config)
    layout, peaks = program.layout, offload_peaks(program)
    assert peaks[0] > peaks[1]
    node = layout.dp * sum(peaks)
    tight = build_program(load_config([*words, f"cluster.host_memory_bytes={node}"]))
    with pytest.raises(ConfigError, match="a rank of stage 0 offloads") as refused:
        check_host_memory(tight, "threads", CUDA, {})
    assert refused.value.field == "cluster.host_memory_bytes"
    assert activation_share(tight, 0, CUDA) < peaks[0]
    enough = build_program(load_config([*words, f"cluster.host_memory_bytes={layout.world * peaks[0]}"]))
    check_host_memory(enough, "threads", CUDA, {})


def test_a_machine_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1000)
    config = load_config(["experiment=laptop", "optim.states=host"])
    program = build_program(config)
    with pytest.raises(ConfigError, match=r"host memory=0\.000 GB: 4 rank"):
        check_host_memory(program, "threads", CPU, {})
