"""What only the start of a run would find, found before it: `k2train train --check`, and before
ranks are started.

It reads and leaves no trace: a run directory is tried and removed again, a corpus that does not
exist yet is not built. It communicates with nobody.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from k2train.checkpoint import latest_checkpoint
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.data.corpus import build_corpus, check_vocabulary
from k2train.data.split import parse_split
from k2train.layout.layout import Layout
from k2train.optim.lr_schedule import LrSchedule
from k2train.telemetry.sinks import check_sinks
from k2train.trainer.run_dir import config_changes
from k2train.trainer.saving import check_model, open_named


def check_start(config: Config, layout: Layout) -> None:
    """Raise ConfigError for what the first minutes of a run would refuse, beyond
    `trainer.loop.prepare`.
    """
    check_sinks(config.telemetry)
    LrSchedule(config.optim.lr_phases, config.train.steps, config.train.global_batch_tokens)
    check_every_rank_trains(layout)
    check_data(config)
    resumed = check_run_dir(config)
    if config.train.init_from is not None and not resumed:
        check_model(config.model, open_named("train.init_from", Path(config.train.init_from)))


def check_every_rank_trains(layout: Layout) -> None:
    """A stage without a layer, the embedding or the head has nothing to train."""
    busy = {
        stage
        for stage, piece in zip(layout.placement, layout.virtual_stages, strict=True)
        if piece.num_layers or piece.embedding or piece.head
    }
    idle = sorted(set(range(layout.pp)) - busy)
    if idle:
        remedy = "use fewer stages, or layout.layers_per_virtual_stage=null"
        rule = f"leaves stage {idle[0]} without parameters, and every rank must train some"
        raise ConfigError("layout.pp", layout.pp, rule, remedy)


def check_data(config: Config) -> None:
    """Open the corpora.

    The embedded one, which the start builds where it is missing, by its settings alone.
    """
    data, train = config.data, config.train
    if data.blend or not data.stdlib:
        build_corpus(data, train.seq_len, train.seed, config.model.vocab_size)
        return
    check_vocabulary(data.tokenizer, config.model.vocab_size)
    parse_split(data.split)
    check_folder("data.cache_dir", Path(data.cache_dir))


def check_run_dir(config: Config) -> bool:
    """Whether `run_dir` holds a run that would go on.

    Raises ConfigError where it cannot, or cannot be written.
    """
    run_dir = Path(config.run_dir if config.run_dir is not None else "runs")
    check_folder("run_dir", run_dir)
    checkpoint = latest_checkpoint(run_dir / "checkpoints") if config.run_dir is not None else None
    if checkpoint is None:
        return False
    config_changes(run_dir / "config.yaml", config)
    check_model(config.model, open_named("run_dir", checkpoint))
    return True


def check_folder(field: str, folder: Path) -> None:
    """Raise ConfigError where `folder` is not there and cannot be made, or cannot be written
    into."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".k2train-", dir=existing))
    except OSError as error:
        raise ConfigError(
            field, folder, f"cannot be written: {error.strerror}", f"give another {field}"
        ) from error
