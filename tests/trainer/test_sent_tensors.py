"""What a pipeline step has sent is released on the way: storages alive do not grow with the
microbatches."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from k2train.config.compose import load_config
from k2train.parallel.pipeline import PipelineTransport, Receiving
from k2train.trainer.batch import read_batch
from k2train.trainer.build import Run
from k2train.trainer.step import train_step
from k2train.trainer.testing import run_on_ranks

SEQ_LEN = 8
PRESETS = ("none", "recompute_offload", "k2")


class Watched(PipelineTransport):
    """A transport that counts, at each of its calls, the storages alive of what it was given and
    what it gave."""

    def __init__(self, transport: PipelineTransport) -> None:
        super().__init__(transport.channels, transport.hidden_size, transport.dtype, transport.device)
        self.sent: dict[int, list[StorageWeakRef]] = collections.defaultdict(list)
        self.most_sent: dict[int, int] = {}

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        super().send(tensor, stage)
        self.sent[stage].append(StorageWeakRef(tensor.untyped_storage()))
        del tensor
        self.count()

    def receive(self, num_rows: int, stage: int) -> Receiving:
        self.count()
        return super().receive(num_rows, stage)

    def count(self) -> None:
        for stage, refs in self.sent.items():
            alive = sum(not ref.expired() for ref in refs)
            # The stage that calls `send` still holds its own reference while the call lasts.
            self.most_sent[stage] = max(self.most_sent.get(stage, 0), alive)


def most_sent(words: Sequence[str], backend: Literal["threads", "processes"]) -> list[dict[int, int]]:
    """For each rank, by the other stage, the most sent storages alive; and none is at the end of
    the step."""

    def run_rank(run: Run) -> dict[int, int]:
        assert isinstance(run.training.transport, PipelineTransport)
        run.training.transport = watched = Watched(run.training.transport)
        train_step(run, read_batch(run, 0))
        for refs in watched.sent.values():
            assert all(ref.expired() for ref in refs)
        for stage, most in watched.most_sent.items():
            assert most <= watched.channels.max_sends + 1, (run.pp_rank, stage, most)
        return watched.most_sent

    return run_on_ranks(load_config(list(words)), run_rank, backend)


@pytest.mark.parametrize("backend", ["threads", "processes"])
@pytest.mark.parametrize("preset", PRESETS)
def test_sent_storages_alive_do_not_grow_with_the_microbatches(
    corpus_prefix: str, tmp_path: Path, preset: str, backend: Literal["threads", "processes"]
) -> None:
    """Twice and eight times as many microbatches as stages: the same number, and at most
    `max_sends` and the one at hand."""
    words = (
        "experiment=tiny",
        "schedule=k2",
        "layout.pp=2",
        "layout.vpp=2",
        "layout.ep=1",
        "layout.edp=1",
        f"activations={preset}",
        f"train.seq_len={SEQ_LEN}",
        "train.microbatch_size=1",
        "train.steps=2",
        f"data.blend=[{{prefix: {corpus_prefix}}}]",
        f"data.cache_dir={tmp_path}",
    )
    few, many = (most_sent([*words, f"train.global_batch_tokens={n * SEQ_LEN}"], backend) for n in (4, 16))
    assert few == many
