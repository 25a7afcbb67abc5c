"""Every layout and every schedule trains the model that one rank trains: losses, norms, logits,
loads and all weights.

In float64, where nothing is left to chance but the order of sums.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from k2train.checkpoint import latest_checkpoint, open_checkpoint
from k2train.cli.main import main
from k2train.config.compose import load_config
from k2train.device.build import build_device
from k2train.parallel.baton import DeadlockError
from k2train.parallel.channels import make_channels
from k2train.parallel.communicator import World
from k2train.parallel.groups import build_groups
from k2train.parallel.threads import run_threads
from k2train.schedule.actions import Pair
from k2train.schedule.channels import ChannelForm
from k2train.telemetry.metrics import read_metrics
from k2train.trainer.batch import Batch, needs_targets, read_batch
from k2train.trainer.build import Run, build_program, build_run, open_corpus
from k2train.trainer.evaluate import evaluate
from k2train.trainer.saving import bias_pieces
from k2train.trainer.step import StepMetrics, train_step
from k2train.trainer.testing import run_on_ranks

SEQ_LEN = 16
# Twelve sequences a step: 1, 2, 3, 4, 6 or 12 data-parallel ranks. Six layers, so that six or eight
# virtual stages are uneven; twelve experts. The clip norm and tau are so low that both clips act in
# every step.
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
WORDS = (
    *(f"model.{key}={value}" for key, value in MODEL.items()),
    "optim.lr_phases=[{kind: linear, to: 1e-2, steps: 2},{kind: constant, to: 1e-2, fraction: 1}]",
    "data.split='80,20,0'",
    "telemetry.tensorboard=false",
    "telemetry.progress=none",
    "train.dtype=float64",
    "optim.newton_schulz_dtype=float64",
    "train.steps=3",
    f"train.seq_len={SEQ_LEN}",
    "train.microbatch_size=1",
    f"train.global_batch_tokens={12 * SEQ_LEN}",
    "train.grad_clip_norm=0.5",
    "train.balance_loss_alpha=0.01",
    "train.bias_update_rate=0.01",
    "optim.qk_clip_tau=0.005",
)
# Seven sequences: no number of ranks above one divides them.
EVAL_TOKENS = 7 * SEQ_LEN


def nothing(run: Run) -> None:
    """No preparation."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What one rank has at the end. states: (name, first row, rows it owns); weights: every
    parameter it holds."""

    metrics: list[StepMetrics]
    eval_loss: float
    states: list[tuple[str, int, torch.Tensor]]
    weights: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A whole run: the metrics of each step, the evaluation, whole states by checkpoint name, and
    the ranks' parts."""

    metrics: list[StepMetrics]
    eval_loss: float
    states: dict[str, torch.Tensor]
    parts: list[Part]


def train_layout(
    words: Sequence[str],
    backend: Literal["threads", "processes"] = "threads",
    prepare: Callable[[Run], None] = nothing,
    batch_of: Callable[[Run, int], Batch] = read_batch,
) -> Trained:
    """Take train.steps steps on every rank of the layout; `prepare` is called with each rank's run
    before the first. batch_of(run, index): the rank's share of a step's batch."""
    config = load_config(list(words))

    def run_rank(run: Run) -> Part:
        prepare(run)
        metrics = [train_step(run, batch_of(run, index)) for index in range(config.train.steps)]
        evaluation = evaluate(run, EVAL_TOKENS)
        assert evaluation is not None
        states = [(state.name, state.start, state.tensor.clone()) for state in run.optimizer.state()]
        if run.groups.dp.rank == 0:
            states += [(f"model/{piece.name}", 0, piece.tensor.clone()) for piece in bias_pieces(run)]
        weights = {p.name: p.tensor.clone() for model in run.models.values() for p in model.pieces()}
        return Part(metrics, evaluation.loss, states, weights)

    parts = run_on_ranks(config, run_rank, backend)
    return Trained(parts[0].metrics, parts[0].eval_loss, joined(parts), parts)


def joined(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
    """Whole states from the rows of all owners; every row must come exactly once, which the shapes
    then show."""
    rows: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for part in parts:
        for name, start, tensor in part.states:
            rows.setdefault(name, []).append((start, tensor))
    whole = {}
    for name, found in rows.items():
        found.sort(key=lambda item: item[0])
        ends = [start + len(tensor) for start, tensor in found]
        assert [start for start, tensor in found if len(tensor)] == [
            0,
            *[end for (_, tensor), end in zip(found, ends, strict=True) if len(tensor)][:-1],
        ], name
        whole[name] = torch.cat([tensor for _, tensor in found])
    return whole


def assert_close(mine: Trained, reference: Trained, tolerance: float = 1e-9) -> None:
    """Metrics of every step on every rank, evaluation, optimizer states, and each rank's
    parameters."""
    for part in mine.parts:
        for step, expected in zip(part.metrics, reference.metrics, strict=True):
            for name, value in dataclasses.asdict(expected).items():
                found = getattr(step, name)
                assert abs(found - value) <= tolerance * abs(value), (name, step.step, found, value)
        assert abs(part.eval_loss - reference.eval_loss) <= tolerance * reference.eval_loss
        for name, weight in part.weights.items():
            key = f"master/{name}" if f"master/{name}" in reference.states else f"model/{name}"
            assert_tensor_close(weight, reference.states[key], tolerance, f"parameter {name}")
    assert mine.states.keys() == reference.states.keys()
    for name, state in mine.states.items():
        assert_tensor_close(state, reference.states[name], tolerance, name)


def assert_tensor_close(mine: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    """Largest difference against the largest entry."""
    assert mine.shape == expected.shape, name
    difference = (mine - expected).abs().max().item()
    assert difference <= tolerance * expected.abs().max().item(), (name, difference)


def layout(pp: int, vpp: int, ep: int, edp: int) -> list[str]:
    return [f"layout.pp={pp}", f"layout.vpp={vpp}", f"layout.ep={ep}", f"layout.edp={edp}"]


# kind, (pp, vpp, ep, edp), microbatches a pipeline: 12 sequences over edp * ep ranks.
GRID = [
    ("gpipe", (3, 1, 2, 1), 6),
    ("gpipe", (1, 1, 12, 1), 1),
    ("1f1b", (2, 1, 1, 3), 4),
    ("1f1b", (3, 1, 2, 2), 3),
    ("1f1b", (4, 1, 1, 6), 2),
    ("interleaved_1f1b", (2, 2, 2, 2), 3),
    ("interleaved_1f1b", (3, 2, 3, 1), 4),
    ("k2", (2, 2, 2, 1), 6),
    ("k2", (2, 3, 1, 3), 4),
    ("k2", (3, 1, 4, 1), 3),
    ("k2", (3, 2, 2, 3), 2),
    ("k2", (4, 2, 1, 1), 12),
    ("k2", (1, 2, 3, 2), 2),
    ("zb_h1", (2, 1, 3, 2), 2),
    ("zb_h1", (3, 1, 1, 3), 4),
    ("dualpipe_v", (1, 1, 2, 3), 2),
    ("dualpipe_v", (2, 1, 3, 1), 4),
    ("dualpipe_v", (3, 1, 2, 1), 6),
    ("dualpipe_v", (4, 1, 1, 1), 12),
]
PROCESSES = [
    ("k2", (2, 2, 2, 1)),
    ("1f1b", (2, 1, 1, 2)),
    ("k2", (3, 2, 1, 1)),
    ("gpipe", (1, 1, 2, 2)),
    ("zb_h1", (2, 1, 3, 1)),
    ("dualpipe_v", (2, 1, 1, 1)),
]

# kind, degrees, how tokens are sent, GPUs of a node, what else: one, two and three nodes to a
# group, parts of a sequence's 16 tokens that divide them and do not, and the store of activations.
DISPATCHES = [
    ("gpipe", (1, 1, 4, 1), "per_rank", 8, ()),
    ("k2", (2, 2, 3, 1), "per_rank", 2, ()),
    ("k2", (2, 2, 4, 1), "per_node", 8, ()),
    ("k2", (2, 2, 4, 1), "per_node", 2, ()),
    ("k2", (2, 1, 4, 1), "per_node", 2, ("layout.dispatch_parts=4",)),
    ("1f1b", (1, 1, 6, 2), "per_node", 2, ("layout.dispatch_parts=3",)),
    ("interleaved_1f1b", (3, 2, 4, 1), "per_node", 1, ("layout.dispatch_parts=20",)),
    ("k2", (3, 1, 4, 1), "per_node", 2, ("layout.dispatch_parts=2", "activations=recompute_offload")),
]


@pytest.fixture(scope="module")
def model_words(corpus_prefix: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return [*WORDS, f"data.blend=[{{prefix: {corpus_prefix}}}]", f"data.cache_dir={cache}"]


@pytest.fixture(scope="module")
def one_rank(model_words: list[str]) -> Trained:
    return train_layout([*model_words, "schedule=gpipe", *layout(1, 1, 1, 1)])


def test_both_clips_and_the_balance_loss_act_in_the_reference(one_rank: Trained) -> None:
    for step in one_rank.metrics:
        assert step.clipped_heads > 0
        assert step.grad_norm > 0.5
        assert step.balance_loss > 0
        assert step.load_violation > 0
    assert one_rank.metrics[-1].loss < one_rank.metrics[0].loss


@pytest.mark.parametrize(("kind", "degrees", "microbatches"), GRID)
def test_a_layout_of_threads_equals_one_rank(
    model_words: list[str], one_rank: Trained, kind: str, degrees: tuple[int, ...], microbatches: int
) -> None:
    words = [*model_words, f"schedule={kind}", *layout(*degrees)]
    assert build_program(load_config(words)).schedule.num_microbatches == microbatches
    assert_close(train_layout(words), one_rank)


@pytest.mark.parametrize(
    ("kind", "degrees"),
    [
        ("gpipe", (3, 1, 1, 1)),
        ("1f1b", (2, 1, 1, 1)),
        ("k2", (2, 2, 1, 1)),
        ("k2", (3, 1, 1, 1)),
        ("zb_h1", (3, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("form", [ChannelForm.UNORDERED_PAIR, ChannelForm.ONE])
def test_with_both_directions_in_one_queue_the_same_steps_stand_still_and_are_reported(
    model_words: list[str], kind: str, degrees: tuple[int, ...], form: ChannelForm
) -> None:
    """So the layouts above pass because every ordered pair of stages has a channel of its own: the
    threads world keeps NCCL's rules."""
    config = load_config([*model_words, f"schedule={kind}", *layout(*degrees)])
    program = build_program(config)
    corpus, made = open_corpus(config), program.layout

    def run_rank(world: World) -> None:
        groups = build_groups(made.grid, world)
        channels = make_channels(program.messages, range(made.pp), world)
        groups = dataclasses.replace(groups, channels=channels)
        run = build_run(program, corpus, groups, build_device(world.device))
        train_step(run, read_batch(run, 0))

    with pytest.raises(
        DeadlockError, match=r"rank \d waits in (send|recv) .* of group pipeline messages"
    ) as raised:
        run_threads(made.world, run_rank, channel_form=form)
    assert re.search(r"behind (send to|recv from) rank \d", str(raised.value))


def test_the_grid_runs_pairs(model_words: list[str]) -> None:
    schedule = build_program(load_config([*model_words, "schedule=k2", *layout(2, 2, 2, 1)])).schedule
    assert any(isinstance(step, Pair) for stage in schedule.stages for step in stage)


def dispatch_words(kind: str, degrees: tuple[int, ...], dispatch: str, gpus: int) -> list[str]:
    return [
        f"schedule={kind}",
        *layout(*degrees),
        f"layout.dispatch={dispatch}",
        f"cluster.gpus_per_node={gpus}",
    ]


@pytest.mark.parametrize(("kind", "degrees", "dispatch", "gpus", "more"), DISPATCHES)
def test_however_tokens_are_sent_a_layout_equals_one_rank(
    model_words: list[str],
    one_rank: Trained,
    kind: str,
    degrees: tuple[int, ...],
    dispatch: str,
    gpus: int,
    more: tuple[str, ...],
) -> None:
    words = [*model_words, *dispatch_words(kind, degrees, dispatch, gpus), *more]
    assert_close(train_layout(words), one_rank)


def test_tokens_passed_on_by_processes_equal_one_rank(model_words: list[str], one_rank: Trained) -> None:
    words = dispatch_words("k2", (1, 1, 4, 1), "per_node", 2)
    assert_close(train_layout([*model_words, *words, "layout.dispatch_parts=2"], "processes"), one_rank)


@pytest.mark.parametrize(("kind", "degrees"), PROCESSES)
def test_a_layout_of_processes_equals_one_rank(
    model_words: list[str], one_rank: Trained, kind: str, degrees: tuple[int, ...]
) -> None:
    words = [*model_words, f"schedule={kind}", *layout(*degrees)]
    assert_close(train_layout(words, "processes"), one_rank)


def test_two_runs_of_a_layout_are_bit_equal(model_words: list[str]) -> None:
    words = [*model_words, "schedule=k2", *layout(2, 2, 2, 1), "train.dtype=bfloat16"]
    first, second = train_layout(words), train_layout(words)
    assert first.metrics == second.metrics
    assert first.eval_loss == second.eval_loss
    assert first.states.keys() == second.states.keys()
    for name, state in first.states.items():
        assert torch.equal(state, second.states[name]), name


def prefer_last_experts(count: int) -> Callable[[Run], None]:
    """Make every token choose among the last `count` experts, wherever they live."""

    def prepare(run: Run) -> None:
        for model in run.models.values():
            for router in model.routers().values():
                router.bias[-count:] += 1000.0

    return prepare


def test_all_tokens_on_one_ranks_experts_equal_one_rank(model_words: list[str]) -> None:
    prepare = prefer_last_experts(3)
    single = train_layout([*model_words, "schedule=gpipe", *layout(1, 1, 1, 1)], prepare=prepare)
    # Three of twelve experts get everything, so the busiest has at least four times the mean.
    assert all(step.load_violation >= 3 for step in single.metrics)
    for kind, degrees in (("k2", (2, 2, 4, 1)), ("1f1b", (1, 1, 4, 3))):
        words = [*model_words, f"schedule={kind}", *layout(*degrees)]
        assert_close(train_layout(words, prepare=prepare), single)
    words = [*model_words, *dispatch_words("k2", (2, 2, 4, 1), "per_node", 2), "layout.dispatch_parts=2"]
    assert_close(train_layout(words, prepare=prepare), single)


# Weights of the global batch's twelve sequences, from a generator, and the normaliser.
WEIGHTINGS: dict[str, tuple[Callable[[torch.Generator], torch.Tensor], float | None]] = {
    # Most targets of some sequences are masked, all of one: microbatches and ranks without any
    # weight.
    "masked": (
        lambda generator: (
            (torch.rand(12, SEQ_LEN, generator=generator) < torch.rand(12, 1, generator=generator))
            * (torch.arange(12) != 5).unsqueeze(1)
        ).double(),
        None,
    ),
    "unequal": (lambda generator: 10 ** (4 * torch.rand(12, SEQ_LEN, generator=generator) - 2), None),
    "signed": (lambda generator: torch.randn(12, SEQ_LEN, generator=generator), 40.0),
}
WEIGHTED = [
    ("gpipe", (1, 1, 12, 1)),
    ("1f1b", (3, 1, 2, 2)),
    ("interleaved_1f1b", (3, 2, 3, 1)),
    ("k2", (2, 2, 2, 1)),
    ("zb_h1", (2, 1, 3, 2)),
]


def weighted(name: str) -> Callable[[Run, int], Batch]:
    """The corpus's batch with the weights of that name, on the ranks that need them."""
    draw, normaliser = WEIGHTINGS[name]

    def batch_of(run: Run, index: int) -> Batch:
        batch = dataclasses.replace(read_batch(run, index), normaliser=normaliser)
        if not needs_targets(run):
            return batch
        share = 12 // run.groups.dp.size
        weights = draw(torch.Generator().manual_seed(index)).split(share)[run.groups.dp.rank]
        return dataclasses.replace(batch, weights=weights)

    return batch_of


@pytest.fixture(scope="module", params=WEIGHTINGS)
def weighting(request: pytest.FixtureRequest, model_words: list[str]) -> tuple[str, Trained]:
    """A name of WEIGHTINGS, and one rank's run with these weights."""
    words = [*model_words, "schedule=gpipe", *layout(1, 1, 1, 1)]
    return request.param, train_layout(words, batch_of=weighted(request.param))


@pytest.mark.parametrize(("kind", "degrees"), WEIGHTED)
def test_weights_of_targets_mean_the_same_under_every_layout(
    model_words: list[str], weighting: tuple[str, Trained], kind: str, degrees: tuple[int, ...]
) -> None:
    name, single = weighting
    words = [*model_words, f"schedule={kind}", *layout(*degrees)]
    assert_close(train_layout(words, batch_of=weighted(name)), single)


def test_weights_over_processes_equal_one_rank(
    model_words: list[str], weighting: tuple[str, Trained]
) -> None:
    name, single = weighting
    words = [*model_words, "schedule=k2", *layout(2, 2, 2, 1)]
    assert_close(train_layout(words, "processes", batch_of=weighted(name)), single)


def metrics_after(run_dir: Path, step: int) -> list[dict[str, Any]]:
    keys = ("loss", "grad_norm", "max_logit", "load_violation", "clipped_heads", "eval_loss")
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{key: line[key] for key in keys if key in line} for line in lines if line["step"] > step]


@pytest.mark.parametrize("degrees", [(1, 1, 1, 1), (1, 1, 4, 1)])
def test_a_checkpoint_of_four_ranks_goes_on_under_another_layout(
    model_words: list[str], tmp_path: Path, degrees: tuple[int, ...]
) -> None:
    words = [*model_words, "schedule=k2", "train.steps=4", "train.checkpoint_every_steps=2"]
    whole, other = tmp_path / "whole", tmp_path / "other"
    assert main(["train", *words, *layout(2, 2, 2, 1), f"run_dir={whole}"]) == 0
    shutil.copytree(whole, other)
    shutil.rmtree(other / "checkpoints" / "step-000004")
    assert main(["train", *words, "schedule=gpipe", *layout(*degrees), f"run_dir={other}"]) == 0
    for mine, expected in zip(metrics_after(other, 2), metrics_after(whole, 2), strict=True):
        assert mine == pytest.approx(expected, rel=1e-9, abs=0)
    ends = [latest_checkpoint(run / "checkpoints") for run in (other, whole)]
    mine_end, expected_end = (open_checkpoint(end) for end in ends if end is not None)
    assert set(mine_end.names()) == set(expected_end.names())
    for name in expected_end.names():
        torch.testing.assert_close(mine_end.load(name), expected_end.load(name), rtol=1e-9, atol=1e-12)


def pairs_of_stages(words: Sequence[str]) -> list[int]:
    """How many pairs of a forward and an input gradient each stage's list has."""
    schedule = build_program(load_config(words)).schedule
    return [sum(isinstance(step, Pair) for step in line) for line in schedule.stages]


K2 = [
    "experiment=k2_threads",
    "train.dtype=float64",
    "optim.newton_schulz_dtype=float64",
    "train.steps=2",
    "optim.qk_clip_tau=1e-4",
    "train.grad_clip_norm=0.5",
]
# 32 microbatches, the fewest with which stage 0 sees a gradient while it still has forwards to run.
EVERY_STAGE_PAIRS = ["layout.ep=2", f"train.global_batch_tokens={2 * 32 * 8}"]


def test_k2s_pipeline_pairs_on_every_stage_from_32_microbatches() -> None:
    assert min(pairs_of_stages([*K2, *EVERY_STAGE_PAIRS])) > 0
    assert min(pairs_of_stages([*K2, "layout.ep=2", f"train.global_batch_tokens={2 * 31 * 8}"])) == 0


def test_make_k2_pairs_on_its_last_stages() -> None:
    """With M microbatches fewer than the 16 stages, the stage d before the last runs 2d + 1
    forwards ahead of its first backward (docs/schedule.md), so M - 1 - 2d of its last virtual
    stage's forwards are left to be paired."""
    config = load_config(["experiment=k2_threads"])
    microbatches = config.train.global_batch_tokens // (config.train.seq_len * config.layout.ep)
    expected = [max(microbatches - 1 - 2 * (15 - stage), 0) for stage in range(16)]
    assert pairs_of_stages(["experiment=k2_threads"]) == expected


@pytest.mark.slow
def test_k2s_pipeline_with_pairs_on_every_stage_equals_one_rank() -> None:
    """61 layers on 16 stages of two ranks each, every stage of which pairs: the part of a step that
    `make k2` is too short for."""
    words = [*K2, *EVERY_STAGE_PAIRS]
    assert_close(train_layout(words), train_layout([*words, "world=single", *layout(1, 1, 1, 1)]))


@pytest.mark.slow
def test_k2s_256_ranks_equal_one_rank() -> None:
    """`make k2` in float64: 61 layers, 384 experts and 64 heads over 16 stages of 16 ranks."""
    # Four microbatches a pipeline, for the time it takes.
    words = [*K2, "train.global_batch_tokens=512"]
    single = train_layout([*words, "world=single", *layout(1, 1, 1, 1)])
    assert all(step.clipped_heads > 0 and step.grad_norm > 0.5 for step in single.metrics)
    parallel = train_layout(words)
    assert len(parallel.parts) == 256
    assert_close(parallel, single)
