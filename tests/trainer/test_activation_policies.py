"""Activation policies inside whole runs: pairs, split weight gradients, interleaved stages,
all-to-alls and ZeRO-1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from k2train.checkpoint import latest_checkpoint, open_checkpoint
from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.model.context import Statistics
from k2train.schedule.actions import Kind, Pair
from k2train.telemetry.metrics import read_metrics
from k2train.trainer.batch import read_batch
from k2train.trainer.build import build_program
from k2train.trainer.evaluate import evaluate
from k2train.trainer.step import StepMetrics, run_schedule, train_step
from k2train.trainer.testing import run_on_ranks

EXACT = ("loss", "grad_norm", "max_logit", "clipped_heads", "load_violation", "eval_loss")
LAYOUTS = {
    "one_rank": ["schedule=gpipe", "train.microbatch_size=1"],
    "one_rank_k2": ["schedule=k2", "layout.vpp=2", "train.microbatch_size=1"],
    "threads": ["schedule=k2", "layout.pp=2", "layout.vpp=2", "layout.ep=2", "train.microbatch_size=1"],
    "threads_1f1b": ["schedule=1f1b", "layout.pp=3", "layout.edp=2", "train.microbatch_size=1"],
    "threads_zb": ["schedule=zb_h1", "layout.pp=2", "layout.ep=2", "train.microbatch_size=1"],
}


def train(words: list[str], run_dir: Path) -> Path:
    assert main(["train", *words, f"run_dir={run_dir}"]) == 0
    return run_dir


def exact(run_dir: Path) -> list[dict[str, float]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{name: line[name] for name in EXACT if name in line} for line in lines]


def assert_bit_equal(mine: Path, other: Path) -> None:
    assert exact(mine) == exact(other)
    checkpoints = [latest_checkpoint(run / "checkpoints") for run in (mine, other)]
    one, two = (open_checkpoint(found) for found in checkpoints if found is not None)
    assert set(one.names()) == set(two.names())
    for name in one.names():
        assert torch.equal(one.load(name), two.load(name)), name


@pytest.mark.parametrize("policies", ["recompute", "offload", "recompute_offload"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_recompute_and_offload_change_no_bit_of_a_run(words, tmp_path: Path, layout, policies: str) -> None:
    words = [*words, *LAYOUTS[layout], "train.dtype=bfloat16", "train.steps=3"]
    plain = train(words, tmp_path / "plain")
    assert_bit_equal(train([*words, f"activations={policies}"], tmp_path / policies), plain)


@pytest.mark.parametrize("layout", ["threads", "threads_1f1b"])
def test_recompute_and_offload_change_no_bit_over_processes(words, layout: str) -> None:
    def trained(policies: str) -> list[tuple[list[StepMetrics], dict[str, torch.Tensor]]]:
        config = load_config([*words, *LAYOUTS[layout], f"activations={policies}"])

        def run_rank(run):
            metrics = [train_step(run, read_batch(run, index)) for index in range(3)]
            run.optimizer.finish_gather()
            return metrics, {
                p.name: p.tensor.clone() for model in run.models.values() for p in model.pieces()
            }

        return run_on_ranks(config, run_rank, "processes")

    for (metrics, weights), (expected, plain) in zip(
        trained("recompute_offload"), trained("none"), strict=True
    ):
        assert metrics == expected
        assert all(torch.equal(weights[name], plain[name]) for name in plain)


def test_the_layouts_run_pairs_and_offloads(words) -> None:
    def steps(layout: str):
        schedule = build_program(load_config([*words, *LAYOUTS[layout], "activations=offload"])).schedule
        return [step for line in schedule.stages for step in line]

    assert any(isinstance(step, Pair) for step in steps("threads"))
    for layout in set(LAYOUTS) - {"one_rank_k2"}:
        kinds = [step.kind for step in steps(layout) if not isinstance(step, Pair)]
        assert Kind.OFFLOAD in kinds, layout
        assert kinds.count(Kind.OFFLOAD) == kinds.count(Kind.RELOAD)


@pytest.mark.parametrize("layout", ["one_rank", "threads"])
def test_fp8_storage_trains_nearly_the_same_and_offloading_it_changes_nothing_more(
    words, tmp_path: Path, layout: str
) -> None:
    """The forward of the first step is untouched. Gradients see E4M3's rounding, up to 2^-4 of an
    element and far less summed over many, so six steps stay within a few per cent of the loss."""
    words = [*words, *LAYOUTS[layout]]
    plain = exact(train(words, tmp_path / "plain"))
    fp8 = train([*words, "activations=recompute_fp8"], tmp_path / "fp8")
    assert exact(fp8)[0]["loss"] == plain[0]["loss"]
    assert exact(fp8)[0]["grad_norm"] != plain[0]["grad_norm"]
    assert exact(fp8)[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.03)
    assert_bit_equal(train([*words, "activations=k2"], tmp_path / "k2"), fp8)


def test_host_buffers_are_made_in_the_first_step_and_used_again(words) -> None:
    """With one expert-parallel rank sizes do not vary, so the schedule says it all; evaluation in
    between takes none."""
    config = load_config([*words, *LAYOUTS["threads"], "layout.ep=1", "activations=k2"])

    def run_rank(run):
        arena, engine = run.activations.engine.arena, run.activations.engine
        seen = []
        for index in range(3):
            train_step(run, read_batch(run, index))
            evaluate(run, 256)
            assert arena.used_bytes == engine.in_flight_bytes == 0
            assert engine.bytes_out == engine.bytes_back
            seen.append(arena.allocated_bytes)
        return seen, arena.peak_bytes

    for seen, peak in run_on_ranks(config, run_rank):
        assert seen[0] == seen[1] == seen[2]
        assert peak > 0


def test_an_interrupted_step_leaves_nothing_on_the_host(words) -> None:
    config = load_config([*words, *LAYOUTS["one_rank"], "activations=k2"])

    def run_rank(run):
        arena = run.activations.engine.arena
        whole = [train_step(run, read_batch(run, index)).loss for index in range(2)]
        seen = iter(range(7))

        class Interrupt:
            def watch(self, steps):
                for step in steps:
                    if next(seen, None) is None:
                        raise KeyboardInterrupt
                    yield step

            def wait(self, message):
                return message.wait()

        with pytest.raises(KeyboardInterrupt):
            run_schedule(run, read_batch(run, 2), Statistics(), Interrupt())
        assert arena.peak_bytes > 0
        assert arena.used_bytes == 0
        assert run.activations.device_bytes == 0
        return whole

    run_on_ranks(config, run_rank)


def test_the_runs_metrics_and_start_tell_what_is_offloaded(
    words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train([*words, *LAYOUTS["threads"], "activations=k2"], tmp_path / "run")
    assert all(line["offloaded_bytes"] > 0 for line in read_metrics(run_dir / "metrics.jsonl"))
    assert all(line["host_bytes_peak"] > 0 for line in read_metrics(run_dir / "metrics.jsonl"))
    assert "microbatch passes, reloaded 1 ahead" in capsys.readouterr().out
    train(
        [*words, *LAYOUTS["one_rank"], "activations=k2", "train.global_batch_tokens=64"], tmp_path / "short"
    )
    assert "asked for, but every backward" in capsys.readouterr().out


def test_more_offloaded_bytes_than_the_node_has_are_refused_with_the_numbers(
    words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, *LAYOUTS["threads"], "activations=k2", "cluster.host_memory_bytes=100000"]
    assert main(["train", *words, f"run_dir={tmp_path}/run"]) == 2
    said = capsys.readouterr().err
    assert "cluster.host_memory_bytes" in said
    assert "of offloaded activations" in said
    assert not (tmp_path / "run").exists()
