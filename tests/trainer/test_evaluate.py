"""Held-out windows: every token is scored once, with the context that was asked for, and the loss
is that of plain logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.model.model import logits
from k2train.ops.cross_entropy import IGNORED_TARGET
from k2train.trainer.build import Run
from k2train.trainer.evaluate import Evaluation, cut, evaluate
from k2train.trainer.testing import run_on_ranks

LENGTHS = (1, 2, 3, 5, 8)


@pytest.mark.parametrize("seq_len", LENGTHS)
@pytest.mark.parametrize("extra", range(12))
def test_every_target_of_a_stream_is_scored_once_with_the_context_asked_for(seq_len: int, extra: int) -> None:
    for context in range(seq_len):
        # Token t of each stream is its own number, so a window shows where it was cut.
        streams = [torch.arange(seq_len + extra + 1), torch.arange(100, 100 + seq_len + 1)]
        windows = cut(streams, seq_len, context)
        assert windows.inputs.shape == windows.targets.shape == (len(windows.inputs), seq_len)
        scored = []
        for inputs, targets in zip(windows.inputs.tolist(), windows.targets.tolist(), strict=True):
            assert inputs == list(range(inputs[0], inputs[0] + seq_len))
            for place, target in enumerate(targets):
                if target != IGNORED_TARGET:
                    assert target == inputs[place] + 1
                    assert place >= context or inputs[0] in (0, 100)
                    scored.append(target)
        assert scored == [t for stream in streams for t in stream[1:].tolist()]


def test_without_overlap_windows_are_the_samples() -> None:
    windows = cut([torch.arange(13)], 4, 0)
    assert windows.inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert windows.targets.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


def words(corpus_prefix: str, cache: Path, overlap: float, *more: str) -> list[str]:
    model = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_attention_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
    }
    return [
        *(f"model.{key}={value}" for key, value in model.items()),
        f"data.blend=[{{prefix: {corpus_prefix}}}]",
        f"data.cache_dir={cache}",
        "data.split='80,20,0'",
        "train.dtype=float64",
        "train.seq_len=16",
        "train.global_batch_tokens=64",
        "train.microbatch_size=1",
        f"train.eval_overlap={overlap}",
        *more,
    ]


def evaluated(config_words: list[str], tokens: int) -> tuple[Evaluation | None, Run, torch.Tensor]:
    config = load_config(config_words)
    result, run = run_on_ranks(config, lambda run: (evaluate(run, tokens), run))[0]
    return result, run, run.corpus.batch("valid", 0, tokens // 16)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_the_loss_is_that_of_logits_with_the_context_asked_for(
    corpus_prefix: str, tmp_path: Path, overlap: float
) -> None:
    """Token by token, each from the window that should score it."""
    result, run, samples = evaluated(
        words(corpus_prefix, tmp_path, overlap, "layout=single", "schedule=gpipe"), 80
    )
    assert result is not None
    stream = torch.cat([samples[0, :1], samples[:, 1:].flatten()])
    (model,) = run.models.values()
    step, losses = 16 - int(16 * overlap), []
    for target in range(1, len(stream)):
        windows_before = max(0, -(-(target - 16) // step))
        start = min(windows_before * step, len(stream) - 1 - 16)
        row = logits(model, stream[start : start + 16].unsqueeze(0))[0, target - 1 - start]
        losses.append(F.cross_entropy(row, stream[target]).item())
    assert result.num_tokens == len(losses) == 80
    assert abs(result.loss - sum(losses) / 80) < 1e-12


@pytest.mark.parametrize("sequences", ["null", "3"])
def test_overlapping_windows_score_the_same_on_four_ranks(
    corpus_prefix: str, tmp_path: Path, sequences: str
) -> None:
    """Whatever the microbatches of the evaluation, which need not be those of training."""
    single, _, _ = evaluated(words(corpus_prefix, tmp_path, 0.4, "layout=single", "schedule=gpipe"), 112)
    several, _, _ = evaluated(
        words(
            corpus_prefix,
            tmp_path,
            0.4,
            "schedule=k2",
            "layout.pp=2",
            "layout.ep=2",
            "layout.edp=1",
            f"train.eval_microbatch_size={sequences}",
        ),
        112,
    )
    assert single is not None
    assert several is not None
    assert abs(single.loss - several.loss) < 1e-9 * single.loss
    assert (single.num_tokens, single.num_bytes) == (several.num_tokens, several.num_bytes)


def test_an_overlap_that_scores_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.eval_overlap=1\.0: a window must score some"):
        load_config(["train.eval_overlap=1"])
