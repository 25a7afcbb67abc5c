"""benchmarks/gpu.py without a GPU: every section runs at toy sizes, says what it should, and keeps
to its limit."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from k2train.config.compose import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
KINDS = {"figure", "fact", "skipped", "failed"}
# The beginnings of names that a section must have told on a CPU, each as a figure or a fact.
TOLD = {
    1: [
        "packages",
        "copy on the device",
        "product of",
        "has grouped_mm",
        "has cuDNN attention",
        "has FlexAttention",
    ],
    2: ["outcomes", "tests that failed"],
    3: [
        "k2train, its own choice, 24 tokens: dq",
        "k2train, Triton kernels, 17 tokens: dv",
        "largest logits, 17 tokens",
    ],
    4: [
        "k2train, its own choice, 16 tokens, forward",
        "torch, math, 24 tokens, backward",
        "Triton blocks, key_gradient_blocks",
    ],
    5: [
        "forward: grouped_mm",
        "forward: a loop",
        "gradient: FP32 x FP32",
        "gradient: k2train's own product twice, error",
    ],
    6: [
        "none: forward attention",
        "recompute_fp8: backward experts",
        "k2: weight gradients",
        "k2: peak, beside the plan",
    ],
    7: [
        "pinned copy both ways",
        "copies both ways beside products",
        "a pass with activations=k2",
        "offloaded in a pass",
    ],
    8: ["head: loss and both gradients", "Newton-Schulz, 8 experts' gate", "Newton-Schulz, dense gate"],
    9: [
        "the slice: tokens a second",
        "the slice: MFU",
        "the slice: loss of the last step",
        "transformers'",
        "k2train train",
    ],
}
# What a CPU cannot show. Everything else that is skipped would be a line that was never tried.
NEEDS_A_GPU = (
    "device",
    "torch, cuDNN",
    "torch, flash",
    "FlexAttention",
    "Transformer Engine",
    "gradient: addmm, FP32 output",
    "gradient: mm with FP32 output",
    "hidden share",
    "the slice: its rehearsal",
)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=variables,
    )


@pytest.mark.parametrize("number", sorted(TOLD))
def test_every_section_runs_at_toy_sizes_and_tells_its_results(number: int, tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    done = run("--device=cpu", "--tiny", f"--sections={number}", "--json", str(target))
    assert done.returncode == 0, done.stdout + done.stderr
    (section,) = json.loads(target.read_text(), parse_constant=pytest.fail)["sections"]
    assert (section["number"], section["status"]) == (number, "done")
    results = section["results"]
    assert {result["kind"] for result in results} <= KINDS
    assert [result for result in results if result["kind"] == "failed"] == []
    skipped = [result["name"] for result in results if result["kind"] == "skipped"]
    assert [name for name in skipped if not name.startswith(NEEDS_A_GPU)] == []
    told = [result["name"] for result in results if result["kind"] in ("figure", "fact")]
    assert [start for start in TOLD[number] if not any(name.startswith(start) for name in told)] == []
    # One line a result, in the order they came.
    printed = [line for line in done.stdout.splitlines() if line.startswith(f"[{number}]")]
    assert [line[4:].startswith(result["name"]) for line, result in zip(printed, results, strict=True)] == [
        True
    ] * len(results)


def test_a_section_is_stopped_at_its_limit_and_the_next_one_goes_on(tmp_path: Path) -> None:
    # Shares are 50 of 75 and what is left, so the first stops after a fifth of a second, before
    # torch is imported.
    target = tmp_path / "gpu.json"
    done = run("--device=cpu", "--tiny", "--sections=7,1", "--budget=0.6", "--json", str(target))
    assert done.returncode == 1
    sections = json.loads(target.read_text())["sections"]
    assert [section["status"] for section in sections] == ["stopped at its limit"] * 2
    assert "sections 1, 7 did not end well" in done.stdout


def test_a_section_that_does_not_exist_is_refused() -> None:
    done = run("--sections=1,12")
    assert done.returncode == 2
    assert "there is no section 12; sections are 1 to 9" in done.stderr


def test_a_folder_of_wheels_is_found_behind_what_is_installed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "only_here-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("only_here/__init__.py", "")
        wheel.writestr("json/__init__.py", "raise ImportError('hides the standard library')")
    done = run("--device=cpu", "--tiny", "--sections=1", "--wheels", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "wheels: only_here-1-py3-none-any.whl" in done.stdout
    assert run("--wheels", str(tmp_path / "nowhere")).returncode != 0


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return lambda name: importlib.import_module(f"gpu_sections.{name}")


def test_configs_read_without_hydra_are_those_that_hydra_composes(
    sections: Callable[[str], ModuleType],
) -> None:
    compose = sections("configs").compose
    for activations in ("none", "recompute_fp8", "k2"):
        for cluster in ("cpu", "h100", "h200", "h800"):
            groups = {"model": "k2", "activations": activations, "cluster": cluster}
            ours = compose(groups, train={"seq_len": 4096, "microbatch_size": 1})
            hydra = load_config([f"{group}={name}" for group, name in groups.items()])
            for name in ("model", "layout", "schedule", "activations", "cluster", "data"):
                assert getattr(ours, name) == getattr(hydra, name)


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H800", "h800"),
        ("NVIDIA A100", None),
        (None, "cpu"),
    ],
)
def test_the_plans_device_is_the_one_of_the_name(
    name: str | None, cluster: str | None, sections: Callable[[str], ModuleType]
) -> None:
    assert sections("setting").cluster_of(name) == cluster


def test_limits_are_shares_of_what_is_left(sections: Callable[[str], ModuleType]) -> None:
    catalogue = sections("catalogue")
    assert sum(section.share for section in catalogue.SECTIONS) == 480
    everything = list(catalogue.SECTIONS)
    left, limits = 480.0, []
    while everything:
        limits.append(catalogue.limit_seconds(everything, left))
        left -= limits[-1]
        everything.pop(0)
    assert limits == pytest.approx([section.share for section in catalogue.SECTIONS])
    # What one saves goes to those behind it.
    assert catalogue.limit_seconds(catalogue.SECTIONS[1:], 480.0) > catalogue.SECTIONS[1].share


def test_a_figure_that_is_not_finite_is_a_failure_and_a_cut_line_is_left_out(
    sections: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    report = sections("report")
    log = tmp_path / "log.jsonl"
    told = report.Report(3, log, on_gpu=False)
    told.figure("good", 2.0, "ms", predicted=1.0)
    told.figure("bad", float("nan"), "ms")
    with told.attempt("needs a kernel", gpu_only=True):
        raise RuntimeError("no kernel")
    with told.attempt("broken"):
        raise RuntimeError("first\nsecond")
    with log.open("a") as stream:
        stream.write('{"section": 3, "na')
    results = report.read_results(log)
    assert [(result["name"], result["kind"]) for result in results] == [
        ("good", "figure"),
        ("bad", "failed"),
        ("needs a kernel", "skipped"),
        ("broken", "failed"),
    ]
    assert results[3]["note"] == "RuntimeError: first"


def test_the_text_corpus_gives_neighbouring_tokens_and_begins_again(
    sections: Callable[[str], ModuleType],
) -> None:
    corpus = sections("adapter").TextCorpus(16, 17 * 5 + 3)
    batch = corpus.batch("train", 0, 6)
    assert batch.shape == (6, 17)
    assert (batch[5] == batch[0]).all()
    assert int(batch.max()) < 256
