"""`k2train rehearse`: one rank's step at real size, on tensors without memory, beside what the plan
says of it.

    k2train rehearse experiment=k2 rehearse.stage=1 rehearse.microbatches=64
    k2train rehearse experiment=k2 rehearse.json=stage0.json rehearse.picture=stage0.png

The same keys as `k2train train` and `plan`. Needs no GPU; a torch without CUDA needs a C++
compiler, once.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from k2train.cli.answers import answered
from k2train.cli.plan import check_writable
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.program import program_layout
from k2train.rehearsal.stub import load_stub
from k2train.telemetry.tables import show

NOT_READ = ("world", "run_dir", "data", "telemetry", "plan")
USAGE = "k2train rehearse [key=value ...]"


def run(args: list[str]) -> int:
    """Rehearse what the overrides say and print it; returns 0. Raises ConfigError."""
    if answered(args, "Run one rank's step without a device.", USAGE, load_config, NOT_READ):
        return 0
    config = as_rehearsed(load_config(args))
    check_section(config)
    load_stub()
    # Only now, behind the stub, may torch be imported.
    from k2train.rehearsal.document import rehearsal_document
    from k2train.rehearsal.picture import render_memory
    from k2train.rehearsal.run import rehearse
    from k2train.rehearsal.tables import rehearsal_tables

    rehearsal = rehearse(config, progress(time.perf_counter()))
    show(*rehearsal_tables(rehearsal))
    section = config.rehearse
    if section.json is not None:
        text = json.dumps(rehearsal_document(rehearsal), indent=1)
        Path(section.json).write_text(text + "\n", encoding="utf-8")
        print(f"wrote {section.json}")
    if section.picture is not None:
        render_memory(rehearsal, section.picture)
        print(f"wrote {section.picture}")
    return 0


def progress(started: float) -> Callable[[str], None]:
    """Says each phase as it begins, on standard error, so that tables in a pipe stay tables."""

    def say(phase: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s  {phase}", file=sys.stderr, flush=True)

    return say


def as_rehearsed(config: Config) -> Config:
    """The config on a GPU, with a batch of `rehearse.microbatches` for every data-parallel rank."""
    if config.train.device == "cpu":
        raise ConfigError(
            "train.device", "cpu", "a rehearsal is of a GPU", "leave it out, or set train.device=cuda"
        )
    train = dataclasses.replace(config.train, device="cuda")
    config = dataclasses.replace(config, train=train)
    count = config.rehearse.microbatches
    if count is None:
        return config
    tokens = count * program_layout(config).dp * train.microbatch_size * train.seq_len
    return dataclasses.replace(config, train=dataclasses.replace(train, global_batch_tokens=tokens))


def check_section(config: Config) -> None:
    """Raise ConfigError for a rank that the layout does not have, or a file that cannot be
    written."""
    section = config.rehearse
    layout = program_layout(config)
    for name, value, limit in (
        ("stage", section.stage, layout.pp),
        ("data_rank", section.data_rank, layout.dp),
    ):
        if value >= limit:
            raise ConfigError(
                f"rehearse.{name}",
                value,
                f"the layout has {limit} of them, counted from 0",
                f"give 0 to {limit - 1}",
            )
    for name in ("json", "picture"):
        value = getattr(section, name)
        if value is not None:
            check_writable(f"rehearse.{name}", value)
    if section.picture is not None and not section.picture.endswith(".png"):
        raise ConfigError(
            "rehearse.picture", section.picture, "is drawn as PNG", "give a name that ends in .png"
        )
