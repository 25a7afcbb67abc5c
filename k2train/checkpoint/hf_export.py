"""A checkpoint into a Hugging Face model directory that transformers' from_pretrained opens.

A training checkpoint gives its FP32 masters, cast to the dtype it computed in or the one asked for;
an imported one its tensors as they are. The router's correction bias always keeps its FP32: top-k
decisions are made with it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2train.architecture.layer import moe_layers
from k2train.architecture.mixture_of_experts import ExpertsChannel
from k2train.architecture.tensors import TensorSpec
from k2train.checkpoint.disk import check_free_space, check_new_directory, disk_errors
from k2train.checkpoint.errors import CheckpointError
from k2train.checkpoint.hf_config import CONFIG_FILE, to_hf_config
from k2train.checkpoint.hf_import import GENERATION_FILE
from k2train.checkpoint.hf_source import INDEX_FILE
from k2train.checkpoint.hf_tokenizer import token_fields, write_tokenizer
from k2train.checkpoint.reader import Checkpoint
from k2train.checkpoint.safetensors_file import LazyTensor, lazy, write_file
from k2train.checkpoint.staging import publish, staged, write_text
from k2train.checkpoint.writer import group_by_bytes
from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.layout.tensors import model_tensors

# What transformers itself writes by default.
DEFAULT_HF_SHARD_BYTES = 5_000_000_000
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class NamedTensor:
    """A tensor of the export, by its Hugging Face name."""

    name: str
    tensor: LazyTensor

    @property
    def num_bytes(self) -> int:
        return self.tensor.num_bytes


@dataclasses.dataclass(frozen=True)
class HfExport:
    """What will be written: the architecture, the tensors in catalogue order, special tokens,
    generation settings.

    tokenizer: what the checkpoint records of its run's (`hf_tokenizer.tokenizer_meta`); None for an
    imported one.
    """

    model: ModelConfig
    tensors: tuple[NamedTensor, ...]
    tokens: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    tokenizer: Mapping[str, Any] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.tensors)

    @property
    def dtype(self) -> str:
        """Torch's name of the type that most elements have."""
        sizes: collections.Counter[torch.dtype] = collections.Counter()
        for item in self.tensors:
            sizes[item.tensor.dtype] += item.num_bytes // item.tensor.dtype.itemsize
        return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def plan_export(
    checkpoint: Checkpoint, dtype: str | None = None, tokenizer: Mapping[str, Any] | None = None
) -> HfExport:
    """Find every tensor of the model in a checkpoint.

    dtype: None takes what the run computed in, or what is stored. tokenizer: the run's; None writes
    no tokenizer, and the special tokens of the model that the checkpoint was imported from. Raises
    CheckpointError where the checkpoint names no model, lacks a tensor, or holds one of another
    shape.
    """
    model = _model_of(checkpoint)
    specs = list(model_tensors(model))
    sources = {spec.name: _source(checkpoint, spec.name) for spec in specs}
    missing = [name for name, source in sources.items() if source is None]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
        raise CheckpointError(checkpoint.directory, f"lacks {len(missing)} tensors of its model: {shown}")
    tensors = tuple(
        NamedTensor(spec.name, _lazy(checkpoint, spec, sources[spec.name] or "", dtype)) for spec in specs
    )
    hf = checkpoint.meta.get("hf") or {}
    tokens, generation = hf.get("tokens") or {}, hf.get("generation_config")
    if tokenizer is not None:
        tokens = token_fields(tokenizer)
        generation = tokens
    return HfExport(model, (*tensors, *_empty_shared_experts(model)), tokens, generation, tokenizer)


def export_model(
    export: HfExport,
    directory: Path | str,
    *,
    max_shard_bytes: int = DEFAULT_HF_SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """Write the model directory, one tensor at a time; returns its absolute path.

    On any failure, Ctrl-C included, nothing is left. Raises ConfigError if `directory` exists and
    is not empty, or the disk is too small, CheckpointError for a damaged shard.
    """
    directory = Path(directory).resolve()
    check_new_directory("DIR", directory)
    check_free_space("DIR", directory, export.num_bytes)
    groups = list(group_by_bytes(export.tensors, max_shard_bytes))
    weight_map: dict[str, str] = {}
    with disk_errors("DIR", directory), staged(directory) as temporary:
        for number, group in enumerate(groups, start=1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors = [(item.name, item.tensor) for item in group]
            write_file(temporary / file, tensors, {"format": "pt"}, on_bytes)
            weight_map |= {item.name: file for item in group}
        _write_json(
            temporary / INDEX_FILE, {"metadata": {"total_size": export.num_bytes}, "weight_map": weight_map}
        )
        _write_json(temporary / CONFIG_FILE, to_hf_config(export.model, export.dtype, export.tokens))
        if export.generation is not None:
            _write_json(temporary / GENERATION_FILE, export.generation)
        if export.tokenizer is not None:
            write_tokenizer(export.tokenizer, temporary)
        publish(temporary, directory)
    return directory


def _model_of(checkpoint: Checkpoint) -> ModelConfig:
    if "model" not in checkpoint.meta:
        raise CheckpointError(checkpoint.directory, "does not record its model's architecture")
    try:
        return from_dict(ModelConfig, checkpoint.meta["model"], "model")
    except ConfigError as error:
        raise CheckpointError(
            checkpoint.directory, f"its recorded architecture is refused: {error}"
        ) from error


def _empty_shared_experts(model: ModelConfig) -> Iterator[NamedTensor]:
    """transformers makes projections of width 0 where a model has no shared experts, and misses
    them in the files."""
    channel = ExpertsChannel.of(model)
    if channel.shared is not None:
        return
    for layer in moe_layers(model):
        for spec in channel.shared_tensors(layer):
            yield NamedTensor(spec.name, lazy(torch.empty(spec.shape)))


def _source(checkpoint: Checkpoint, name: str) -> str | None:
    return next((full for full in (f"master/{name}", f"model/{name}") if full in checkpoint), None)


def _lazy(checkpoint: Checkpoint, spec: TensorSpec, source: str, dtype: str | None) -> LazyTensor:
    if checkpoint.shape(source) != spec.shape:
        raise CheckpointError(
            checkpoint.directory,
            f"{source} is {list(checkpoint.shape(source))}, its model's is {list(spec.shape)}",
        )
    target = _target_dtype(checkpoint, spec, source, dtype)

    def load() -> Tensor:
        return checkpoint.load(source).to(target)

    return LazyTensor(spec.shape, target, load)


def _target_dtype(checkpoint: Checkpoint, spec: TensorSpec, source: str, dtype: str | None) -> torch.dtype:
    stored = checkpoint.dtype(source)
    if spec.role == "bias":
        return stored
    if dtype is None and source.startswith("master/"):
        dtype = checkpoint.meta.get("dtype")
    if dtype is None:
        return stored
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            checkpoint.directory, f"records the compute type {dtype}, which is none of torch's"
        )
    return found


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
