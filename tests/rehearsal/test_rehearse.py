"""One rank of K2 at its real size, with few microbatches, and small ranks of other kinds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = [
    "model=k2_tiny",
    "layout.pp=2",
    "layout.vpp=2",
    "layout.ep=2",
    "activations=k2",
    "cluster=h800",
    "optim.states=host",
    "train.dtype=bfloat16",
    "train.device=cuda",
    "train.seq_len=256",
    "train.microbatch_size=1",
    "train.global_batch_tokens=4096",
]
SCHEDULES = {
    "k2": ["schedule=k2"],
    "interleaved": ["schedule=interleaved_1f1b"],
    "zero bubble": ["layout.vpp=1", "schedule=zb_h1"],
    "all experts on a rank, FP32": ["layout.ep=1", "schedule=1f1b", "layout.vpp=1", "train.dtype=float32"],
    "gpipe, a copy for every expert": ["layout.vpp=1", "schedule=gpipe", "layout.dispatch=per_expert"],
}
MICROBATCHES, LAYERS = 2, 4


@pytest.fixture(scope="module")
def k2(rehearse: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Stage 1: four MoE layers."""
    return rehearse("experiment=k2", "rehearse.stage=1", f"rehearse.microbatches={MICROBATCHES}")


def beside(report: dict[str, Any], part: str) -> dict[str, Any]:
    return {row["name"]: row for row in report[part]}


def test_k2s_states_take_the_bytes_that_are_planned(k2: dict[str, Any]) -> None:
    states = beside(k2, "memory")["states"]
    # Beside the states that are planned live rotary tables and the like, 1 MB of 30 GB.
    assert states["rehearsed"] == pytest.approx(states["planned"], rel=1e-4)


def test_k2s_peak_is_the_planned_one(k2: dict[str, Any]) -> None:
    peak = beside(k2, "memory")["peak"]
    assert peak["rehearsed"] == pytest.approx(peak["planned"], rel=0.05)


def test_k2s_compute_takes_the_planned_time_by_the_roofline(k2: dict[str, Any]) -> None:
    seconds = beside(k2, "seconds")["all"]
    assert seconds["rehearsed"] == pytest.approx(seconds["planned"], rel=0.10)


def test_no_product_of_k2_is_fp32_by_fp32(k2: dict[str, Any]) -> None:
    assert k2["wide_products"] == []
    assert set(k2["flops_by_dtype"]) == {"bfloat16"}


def test_the_host_waits_for_each_route_for_steps_long_issued_and_otherwise_only_in_the_update(
    k2: dict[str, Any],
) -> None:
    """Of a microbatch F, I and W are compute steps on each of two virtual stages; the dry run's are
    among those waited for."""
    waits = {(wait["for"], wait["line"].split(":")[0]): wait["times"] for wait in k2["host_waits"]}
    assert waits.pop(("route", "parallel/relay_dispatcher.py")) == LAYERS * MICROBATCHES
    assert waits.pop(("event of main", "runtime/pace.py")) <= 2 * 3 * MICROBATCHES
    assert {file for _, file in waits} <= {"optim/residence.py", "optim/optimizer.py"}


def test_a_layer_exchanges_its_tokens_in_four_parts_twice_each_way(k2: dict[str, Any]) -> None:
    calls = {(row["place"], row["group"], row["operation"]): row["calls"] for row in k2["communication"]}
    for half in "FI":
        for hop in ("rail", "relay"):
            assert calls[half, hop, "all_to_all"] == LAYERS * MICROBATCHES * 2 * 4


def test_after_every_offload_k2s_storages_are_what_the_store_says_and_nobody_keeps_another(
    k2: dict[str, Any],
) -> None:
    assert k2["audits"]
    for audit in k2["audits"]:
        assert audit["stored"] == audit["alive"]
        # Route counts, statistics and the batch of token ids.
        assert audit["nobodys"] < 2e6


def test_a_step_of_k2_leaves_a_few_megabytes_of_tables_and_counts(k2: dict[str, Any]) -> None:
    assert k2["left_bytes"] < 5e6


def test_the_report_is_readable_at_a_hundred_columns(k2: dict[str, Any]) -> None:
    assert max(map(len, k2["text"].splitlines())) <= 100
    assert "Waits of the host" in k2["text"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_kind_of_rank_can_be_rehearsed(rehearse: Callable[..., dict[str, Any]], name: str) -> None:
    report = rehearse(*SMALL, *SCHEDULES[name], "rehearse.stage=1", "rehearse.skew=0.5")
    states = beside(report, "memory")["states"]
    # Small models: scratch and tables weigh more.
    assert states["rehearsed"] == pytest.approx(states["planned"], rel=0.05)
    assert report["left_bytes"] < 0.01 * states["rehearsed"]
    phases = [line.split(" s  ")[1] for line in report["told"].splitlines()]
    assert [phase.split()[0] for phase in phases] == ["plan", "build", "dry", "action", "update"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("rehearse.stage=16", "the layout has 16 of them, counted from 0"),
        ("rehearse.data_rank=16", "give 0 to 15"),
        ("rehearse.picture=memory.svg", "give a name that ends in .png"),
        ("train.device=cpu", "a rehearsal is of a GPU"),
        ("rehearse.microbatches=0", "must be at least 1"),
        ("rehearse.skew=-1", "must be at least 0"),
    ],
)
def test_a_rank_that_is_not_there_and_a_file_that_cannot_be_are_refused(
    rehearse_words: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, word: str, told: str
) -> None:
    done = rehearse_words(tmp_path, "experiment=k2", word)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
