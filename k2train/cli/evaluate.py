"""`k2train evaluate run_dir=DIR`: a run's newest checkpoint, or a given one, scored on held-out
text.

    k2train evaluate run_dir=DIR                                        the run's own held-out text
    k2train evaluate run_dir=DIR 'data.valid=[{prefix: data/mine}]'     text of one's own
    k2train evaluate run_dir=DIR layout=single json=score.json          another layout; a file

The config is the run's own, changed by the words. A checkpoint knows no layout, so any layout will
do.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from k2train.cli import launch
from k2train.cli.answers import answered
from k2train.cli.plan import check_writable
from k2train.cli.train import NOT_JOINED, lost
from k2train.config.compose import load_run
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.telemetry.tables import fact_table, show

if TYPE_CHECKING:
    from k2train.trainer.evaluate import Evaluation

OWN_KEYS = ("checkpoint", "json")
TITLE = "Score a checkpoint on held-out text."
NOT_READ = ("plan", "rehearse")
USAGE = """k2train evaluate run_dir=DIR [checkpoint=DIR] [json=FILE] [key=value ...]

checkpoint: directory of the checkpoint; left out, it is the run's newest. json: file for the score.
The held-out text is that of the run, or of data.valid; train.final_eval_tokens says how much of it."""


def run(args: list[str]) -> int:
    """Score a checkpoint, print a table and write the file; returns 0. Raises ConfigError."""
    words = [word for word in args if word.split("=", 1)[0] not in OWN_KEYS]
    if answered(words, TITLE, USAGE, load_run, NOT_READ):
        return 0
    check_run_dir(words)
    config = load_run(words)
    path = own_value(args, "json")
    if path is not None:
        check_writable("json", path)
    # As in training: see cli.train.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if launch.is_wanted(config, os.environ):
        return launch.launch(evaluate_here, config, args)
    return evaluate_here(config, args)


def check_run_dir(words: Sequence[str]) -> None:
    """Raise ConfigError unless the words name the directory of one run."""
    named = [word.split("=", 1)[1] for word in words if word.startswith("run_dir=")]
    if len(named) != 1:
        raise ConfigError(
            "run_dir", " ".join(named) or "(missing)", "must be given once", USAGE.splitlines()[0]
        )
    if not (Path(named[0]) / "config.yaml").is_file():
        raise ConfigError(
            "run_dir",
            named[0],
            "holds no config.yaml of a run",
            "give the directory that `k2train train` printed",
        )


def own_value(args: Sequence[str], key: str) -> str | None:
    """The value of one of the command's own keys."""
    return next((word.split("=", 1)[1] for word in args if word.startswith(f"{key}=")), None)


def evaluate_here(config: Config, args: list[str]) -> int:
    """This process's part; rank 0 prints and writes."""
    # Imported here: torch takes seconds, and --help and mistakes in the words do not need it.
    from k2train.checkpoint import newest_checkpoint
    from k2train.parallel.communicator import CommunicationError, JoinError
    from k2train.trainer.score import score

    given = own_value(args, "checkpoint")
    checkpoint = Path(given) if given else newest_checkpoint(Path(config.run_dir or ""))
    try:
        evaluation = score(config, checkpoint)
    except JoinError as error:
        return failed(f"{error}\n{NOT_JOINED}")
    except CommunicationError as error:
        return failed(lost(error, config.train.timeout_seconds))
    if evaluation is not None:
        tell(evaluation, checkpoint, config, own_value(args, "json"))
    return 0


def failed(text: str) -> int:
    """Tell a failure of the ranks; the exit status for it."""
    print(f"k2train evaluate: {text}", file=sys.stderr, flush=True)
    return 1


def tell(evaluation: Evaluation, checkpoint: Path, config: Config, json_path: str | None) -> None:
    """The score as a table, and as JSON where a file is named."""
    document = score_document(evaluation, checkpoint, config)
    rows = [
        ("checkpoint", str(checkpoint)),
        (
            "held-out text",
            f"{evaluation.num_tokens:,} tokens, {evaluation.num_bytes:,} bytes of {document['data']}",
        ),
        ("loss", f"{evaluation.loss:.4f} nats a token"),
        ("perplexity", f"{document['perplexity']:.4f}"),
        ("bits per byte", f"{evaluation.bits_per_byte:.4f}"),
    ]
    show(fact_table("Score", rows))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {json_path}")


def score_document(evaluation: Evaluation, checkpoint: Path, config: Config) -> dict[str, object]:
    """Everything the table shows, unrounded. Keys are stable: scripts read them."""
    valid = [entry.prefix for entry in config.data.valid]
    return {
        "checkpoint": str(checkpoint),
        "data": ", ".join(valid) or config.data.name,
        "loss": evaluation.loss,
        "perplexity": math.exp(evaluation.loss),
        "bits_per_byte": evaluation.bits_per_byte,
        "num_sequences": evaluation.num_sequences,
        "num_tokens": evaluation.num_tokens,
        "num_bytes": evaluation.num_bytes,
    }
