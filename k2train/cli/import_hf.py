"""`k2train import-hf DIR out=CHECKPOINT`: a Hugging Face model directory into a checkpoint that
a run can start from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from k2train.checkpoint.disk import check_new_directory, gigabytes
from k2train.checkpoint.hf_import import HfModel, import_model, open_hf_model
from k2train.cli.hf_words import split_words
from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError
from k2train.config.fields import check_ranges, key
from k2train.config.help import render_help
from k2train.telemetry.progress import open_progress

USAGE = "k2train import-hf DIR out=CHECKPOINT [verify=true] [max_shard_bytes=4e9]"
DIR = "DIR is a directory with config.json and model.safetensors, or shards with model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """The keys of import-hf."""

    out: str = key("checkpoint directory to write; it must be new or empty")
    verify: bool = key(
        "read every shard again and compare checksums before the checkpoint appears", default=False
    )
    max_shard_bytes: int = key(
        "largest file of the checkpoint", default=4_000_000_000, unit="bytes", minimum=1
    )

    def __post_init__(self) -> None:
        check_ranges("", self)
        if not self.out:
            raise ConfigError(
                "out", self.out, "must name a directory", "for example out=checkpoints/moonlight"
            )


def run(args: list[str]) -> int:
    """The command; returns the exit status. Raises ConfigError for every mistake of the user's."""
    if any(word in ("-h", "--help") for word in args):
        print(
            render_help(
                ImportConfig, "Turn a Hugging Face model directory into a checkpoint.", f"{USAGE}\n\n{DIR}"
            )
        )
        return 0
    directory, values = split_words(args, ("out",), DIR)
    config = from_dict(ImportConfig, values)
    check_new_directory("out", Path(config.out))
    source = open_hf_model(Path(directory))
    describe(source)
    with open_progress("auto", "import", len(source.checked.tensors)) as display:
        done = 0

        def on_bytes(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            display.advance(1, f"tensors  {gigabytes(done)} of {gigabytes(source.num_bytes)}")

        out = import_model(
            source,
            config.out,
            verify=config.verify,
            max_shard_bytes=config.max_shard_bytes,
            on_bytes=on_bytes,
        )
    print(f"checkpoint: {out}")
    print(f"train from it with `k2train train train.init_from={out}` and the same model")
    return 0


def describe(source: HfModel) -> None:
    """Print what is about to be imported, and what is not."""
    checked, model = source.checked, source.model
    print(
        f"{source.directory}: {len(checked.tensors)} tensors, {gigabytes(source.num_bytes)}; "
        f"{model.num_hidden_layers} layers, {model.n_routed_experts} experts"
    )
    if checked.num_dequantized:
        print(f"note: {checked.num_dequantized} block-FP8 weights become BF16")
    if checked.skipped_layers:
        print(
            f"note: {', '.join(checked.skipped_layers)} left out: multi-token-prediction layers, which are not part "
            f"of the {model.num_hidden_layers} layers and which transformers does not load either"
        )
