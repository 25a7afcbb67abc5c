"""`k2train plan` at the command line: tables, files, sweeps, and every mistake answered with exit
status 2."""

import json
from pathlib import Path

import pytest

from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.planner.advice import ROOM, advise, room
from k2train.planner.plan import build_plan
from k2train.planner.sweep import _tokens

SMALL = ["layout=laptop", "train.global_batch_tokens=32768"]


def test_a_plan_is_printed_in_tables_of_at_most_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL]) == 0
    printed = capsys.readouterr().out
    for word in (
        "Layout: tiny on cpu",
        "Device memory",
        "Host memory",
        "expert_input",
        "MFU",
        "exposed EP",
        "Fits:",
    ):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_files_are_written_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        name: tmp_path / file
        for name, file in (("json", "p.json"), ("timeline", "t.png"), ("trace", "t.json"))
    }
    assert main(["plan", *SMALL, *(f"plan.{name}={path}" for name, path in files.items())]) == 0
    assert json.loads(files["json"].read_text())["layout"]["world"] == 4
    assert files["timeline"].read_bytes().startswith(b"\x89PNG")
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert str(files["trace"]) in capsys.readouterr().out


def test_the_heading_names_the_model_that_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=k2_thin", "train.seq_len=128"]) == 0
    assert "Layout: k2_thin on cpu" in capsys.readouterr().out


def test_a_sweep_is_one_table_with_a_row_for_each_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "model.n_routed_experts=8,16", "layout.edp=1,2", "train.global_batch_tokens=32768"]
    assert main(["plan", *words, f"plan.json={tmp_path / 'rows.json'}"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [tuple(row["labels"].values()) for row in rows] == [
        ("8", "1"),
        ("8", "2"),
        ("16", "1"),
        ("16", "2"),
    ]
    assert "Sweep" in capsys.readouterr().out


def test_a_point_that_cannot_be_planned_is_a_row_that_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "-m",
        "layout.ep=1,3,4",
        "train.global_batch_tokens=32768",
        f"plan.json={tmp_path / 'rows.json'}",
    ]
    assert main(["plan", *words]) == 0
    first, second, third = json.loads((tmp_path / "rows.json").read_text())
    assert (first["world"], third["world"]) == (1, 4)
    assert second["labels"] == {"ep": "3"}
    assert "must divide model.n_routed_experts" in second["refused"]
    assert "Cannot be planned: ep=3: layout.ep=3" in capsys.readouterr().out


def test_a_column_of_tokens_has_one_unit() -> None:
    assert _tokens([62_437.0, 140_000.0]) == ["62,437", "140,000"]
    assert _tokens([1_240_000.0, 140_000.0]) == ["1.24M", "0.14M"]


@pytest.mark.parametrize("sweep", [[], ["-m", "layout.edp=1,2"], ["plan.compare=[1f1b,gpipe]"]])
def test_the_status_says_where_nothing_fits(sweep: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL[1:], "cluster.device_memory_bytes=1e6", *sweep]) == 1
    capsys.readouterr()


def device_bytes(*words: str) -> float:
    return build_plan(load_config([*SMALL, *words])).fullest.device


def test_advice_prefers_a_switch_that_leaves_room_to_one_that_fits_to_the_last_byte() -> None:
    """Recomputation alone would fit with a hundredth free, and FP8 storage with more than a
    twentieth."""
    capacity = device_bytes("activations=recompute") / 0.99
    assert device_bytes("activations=recompute_fp8") < (1 - ROOM) * capacity < device_bytes()
    advice = advise(build_plan(load_config([*SMALL, f"cluster.device_memory_bytes={capacity}"])))
    assert advice is not None
    assert advice.overrides == ("activations=recompute_fp8",)


def test_advice_takes_what_leaves_most_where_nothing_leaves_room() -> None:
    smallest = ("activations=k2", "train.microbatch_size=1")
    capacity = device_bytes(*smallest) / 0.99
    plan = build_plan(load_config([*SMALL, f"cluster.device_memory_bytes={capacity}"]))
    advice = advise(plan)
    assert advice is not None
    assert advice.overrides == smallest
    assert (
        0
        < room(build_plan(load_config([*SMALL, f"cluster.device_memory_bytes={capacity}", *smallest])))
        < ROOM
    )


def test_schedules_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = "k2,interleaved_1f1b,1f1b,gpipe,zb_h1,dualpipe,dualpipe_v"
    assert main(["plan", *SMALL, f"plan.compare=[{kinds}]"]) == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in kinds.split(","))


def test_help_explains_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert "layout.nodes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["layout.pp=-1"], "layout.pp=-1: must be at least 1"),
        (["layout.ep=0"], "layout.ep=0: must be at least 1"),
        (["layout.pp=100"], "use at most layout.pp=6"),
        (["layout.pp=1e18"], "layout.pp"),
        (["layout.edp=1e18"], "layout.edp"),
        (["layout.ep=3"], "layout.ep=3: must divide"),
        (
            ["layout.edp=3", "train.global_batch_tokens=8192"],
            "train.global_batch_tokens=8192: must be a multiple of",
        ),
        (["experiment=k2", "layout.nodes=40"], "nearest are 32 and 64"),
        (["experiment=k2", "layout.nodes=0"], "layout.nodes=0"),
        (["-m", "experiment=k2", "layout.nodes=40,41"], "nearest are 32 and 64"),
        (["layout.pp=2", "layout.layers_per_virtual_stage=[4]"], "layout.layers_per_virtual_stage"),
        (["plan.compare=[k3]"], "plan.compare"),
        (["schedule.extra_warmup_microbatches=0", *SMALL], "extra_warmup_microbatches=1"),
        (["plan.json=/nowhere/at/all/plan.json"], "plan.json=/nowhere/at/all/plan.json: cannot be written"),
        (["plan.timeline=."], "plan.timeline=.: cannot be written"),
        (["plan.timeline=picture.jpeg"], "plan.timeline=picture.jpeg"),
        (["plan.trace=/proc/trace.json"], "plan.trace=/proc/trace.json: cannot be written"),
        (["-m", "layout.edp=1,2", "plan.timeline=t.png"], "shows one plan"),
        (["plan.compare=[k2]", "plan.trace=t.json"], "shows one plan"),
        (["train.global_batch_tokens=8192000000000"], "smaller global batch"),
        (
            ["schedule=dualpipe", "layout.pp=2", "layout.vpp=1", "train.global_batch_tokens=6144"],
            "train.global_batch_tokens=3 microbatches a pipeline: DualPipe halves them",
        ),
        (["model.num_hidden_layers=1000000000"], "model.num_hidden_layers"),
        (["model.n_routed_experts=1600000000"], "model.n_routed_experts"),
        (["train.global_batch_tokens=-8192"], "train.global_batch_tokens"),
        (
            ["layout.ep=2", "layout.dispatch=deepep"],
            "layout.dispatch=deepep: its kernels run on GPUs, and cluster=cpu has none",
        ),
        (["experiment=k2", "layout.nodes=16"], "layout.pp=8"),
    ],
)
def test_mistakes_exit_with_2_and_name_the_field(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert part in printed.err
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


def test_an_unwritable_file_is_refused_before_the_long_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("k2train.cli.plan.build_plan", lambda *_, **__: pytest.fail("planned first"))
    assert main(["plan", "plan.json=/nowhere/plan.json"]) == 2
    assert main(["plan", "plan.trace=/nowhere/trace.json"]) == 2


def test_a_file_that_exists_survives_a_refused_plan(tmp_path: Path) -> None:
    kept = tmp_path / "plan.json"
    kept.write_text("old")
    assert main(["plan", f"plan.json={kept}", "plan.trace=/nowhere/trace.json"]) == 2
    assert kept.read_text() == "old"
