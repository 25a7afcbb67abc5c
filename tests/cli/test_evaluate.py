"""`k2train evaluate`: the run's own score again, text of one's own, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from k2train.cli.main import main
from k2train.telemetry.metrics import read_metrics

TINY = {
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


def built(directory: Path, name: str, text: str) -> Path:
    """A corpus of one's own: forty documents of the text."""
    source = directory / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": f"{text} {number}"}) + "\n" for number in range(40)))
    assert main(["data", "build", f"input=[{source}]", f"output={directory / name}", "workers=1"]) == 0
    return directory / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with held-out text of its own; its directory is run/ of what is
    returned."""
    root = tmp_path_factory.mktemp("evaluate")
    corpus, held_out = built(root, "corpus", "some text to train on"), built(root, "held_out", "other text")
    words = [
        *(f"model.{key}={value}" for key, value in TINY.items()),
        f"data.blend=[{{prefix: {corpus}}}]",
        f"data.valid=[{{prefix: {held_out}}}]",
        "data.split='1,0,0'",
        f"data.cache_dir={root / 'cache'}",
        "train.dtype=float64",
        "train.seq_len=16",
        "train.global_batch_tokens=64",
        "train.microbatch_size=1",
        "train.steps=3",
        "train.final_eval_tokens=256",
        "telemetry.tensorboard=false",
        f"run_dir={root / 'run'}",
    ]
    assert main(["train", *words]) == 0
    return root


def test_a_checkpoint_scores_as_the_run_said(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"run_dir={trained / 'run'}", f"json={tmp_path / 'score.json'}"]) == 0
    last = read_metrics(trained / "run" / "metrics.jsonl")[-1]
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["loss"] == last["eval_loss"]
    assert score["bits_per_byte"] == last["eval_bits_per_byte"]
    assert score["perplexity"] == math.exp(score["loss"])
    assert score["data"] == str(trained / "held_out")
    printed = capsys.readouterr().out
    for number in (f"{score['loss']:.4f}", f"{score['perplexity']:.4f}", f"{score['bits_per_byte']:.4f}"):
        assert number in printed


def test_another_layout_and_another_text_may_be_given(trained: Path, tmp_path: Path) -> None:
    """The layout changes the order of sums alone, so FP64 losses agree to 1e-12."""
    scores = {}
    for name, words in {
        "one": [],
        "two": ["layout.ep=2"],
        "other": [f"data.valid=[{{prefix: {trained / 'corpus'}}}]"],
    }.items():
        assert main(["evaluate", f"run_dir={trained / 'run'}", f"json={tmp_path / name}", *words]) == 0
        scores[name] = json.loads((tmp_path / name).read_text())["loss"]
    assert scores["two"] == pytest.approx(scores["one"], rel=1e-12)
    assert scores["other"] != scores["one"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "run_dir"),
        (["run_dir=nowhere"], "holds no config.yaml of a run"),
        (["run_dir={run}", "train.final_eval_tokens=3"], "train.final_eval_tokens=3: there are"),
        (["run_dir={run}", "checkpoint=nowhere"], "nowhere"),
        (["run_dir={run}", "data.valid=[{{prefix: nowhere}}]"], "data.valid[0].prefix"),
        (["run_dir={run}", "model.hidden_size=32"], "model.hidden_size"),
    ],
)
def test_a_mistake_is_named(
    trained: Path, words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *(word.format(run=trained / "run") for word in words)]) == 2
    assert part in capsys.readouterr().err
