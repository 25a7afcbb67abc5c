"""Loss on held-out text, which training never sees, in an order that is always the same."""

from __future__ import annotations

import dataclasses

from k2train.model.context import MicrobatchContext, Statistics
from k2train.runtime.executor import run_actions
from k2train.schedule import Action, Kind
from k2train.trainer.build import Run
from k2train.trainer.compression import bits_per_byte


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """loss in nats a token over `num_tokens` targets, which stand for `num_bytes` bytes of text."""

    loss: float
    num_sequences: int
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.loss, self.num_tokens, self.num_bytes)


def evaluate(run: Run, max_tokens: int) -> Evaluation | None:
    """Mean loss over the first sequences of the validation split, at most `max_tokens` and at most one pass over it.

    None where that is not one whole sequence. Every rank must call it: a sum over the world.
    """
    seq_len, size = run.config.train.seq_len, run.config.train.microbatch_size
    num_sequences = min(max_tokens // seq_len, run.corpus.num_samples("valid"))
    if num_sequences == 0:
        return None
    batch = run.corpus.batch("valid", 0, num_sequences)
    parts = list(batch.to(run.device).split(size))
    statistics = Statistics()

    def make_context(virtual_stage: int, microbatch: int) -> MicrobatchContext:
        part = parts[microbatch]
        return MicrobatchContext(num_sequences=len(part), key=(virtual_stage, microbatch), statistics=statistics,
                                 loss_scale=1.0 / (num_sequences * seq_len), targets=part[:, 1:])  # fmt: skip

    run.evaluation.begin_step(lambda microbatch: parts[microbatch][:, :-1], make_context)
    run_actions(forward_actions(run, len(parts)), run.evaluation)
    run.evaluation.finish_step()
    assert statistics.loss is not None
    num_bytes = run.corpus.num_bytes(batch[:, 1:])
    return Evaluation(float(statistics.loss), num_sequences, num_sequences * seq_len, num_bytes)


def forward_actions(run: Run, num_microbatches: int) -> list[Action]:
    """Every microbatch forward through this rank's virtual stages, in the order of the model."""
    return [
        Action(Kind.F, stage, microbatch)
        for microbatch in range(num_microbatches)
        for stage in sorted(run.models)
    ]
