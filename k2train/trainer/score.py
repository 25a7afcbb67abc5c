"""A checkpoint's loss on held-out text, outside of a training run: what `k2train evaluate`
computes.

The same layout, schedule and forward passes as the evaluations within a run, so the last line of a
run's metrics and its score on the same text are equal.
"""

from __future__ import annotations

from pathlib import Path

from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.device.build import build_device
from k2train.parallel.communicator import World
from k2train.trainer.build import build_run, open_corpus
from k2train.trainer.dry_run import dry_run
from k2train.trainer.evaluate import Evaluation, evaluate
from k2train.trainer.loop import prepare
from k2train.trainer.saving import resume
from k2train.trainer.worlds import run_world


def score(config: Config, checkpoint: Path) -> Evaluation | None:
    """Evaluate a run's checkpoint on train.final_eval_tokens of held-out text; None on ranks other
    than 0.

    Under a launcher every process calls it. Raises ConfigError for what cannot run, a checkpoint of
    another model, and held-out text of less than one sequence.
    """
    ready = prepare(config)
    program = ready.program
    config, corpus = program.config, open_corpus(program.config)
    max_tokens, seq_len = config.train.final_eval_tokens, config.train.seq_len
    if min(max_tokens // seq_len, corpus.num_samples("valid")) == 0:
        raise ConfigError(
            "train.final_eval_tokens",
            max_tokens,
            f"there are {corpus.num_tokens('valid')} held-out tokens, and a sequence has {seq_len}",
            "raise it, or name more held-out text in data.valid",
        )

    def run_rank(world: World) -> Evaluation | None:
        run = build_run(program, corpus, ready.groups(world), build_device(world.device))
        resume(run, checkpoint)
        dry_run(run)
        evaluation = evaluate(run, max_tokens)
        return evaluation if run.is_main else None

    return run_world(ready.kind, program.layout.world, ready.device, config.train, run_rank)
