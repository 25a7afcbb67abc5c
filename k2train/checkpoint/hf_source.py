"""A directory of Hugging Face safetensors files: which tensor is in which file, checked before any
is read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import Tensor

from k2train.checkpoint.fp8_blocks import SCALE_SUFFIX, dequantize, scale_shape
from k2train.checkpoint.safetensors_file import (
    DTYPE_NAMES,
    FormatError,
    LazyTensor,
    Slot,
    read_header,
    read_tensor,
)
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.layout.tensors import model_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# A buffer that old versions of transformers saved; it follows from the config.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
_STORED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Located:
    """A tensor's file and its place there."""

    path: Path
    slot: Slot

    def read(self) -> Tensor:
        """The tensor as it is stored. Raises ConfigError naming the file if it is short or
        unreadable."""
        try:
            return read_tensor(self.path, self.slot)[0]
        except (OSError, FormatError) as error:
            raise ConfigError("DIR", self.path, f"cannot be read: {error}") from error


def locate_tensors(directory: Path) -> dict[str, Located]:
    """Every tensor of the model's files, by name. Raises ConfigError naming the file that is
    missing or damaged."""
    if (directory / SINGLE_FILE).is_file():
        files, promised = [SINGLE_FILE], dict[str, str]()
    else:
        promised = _read_index(directory)
        files = sorted(set(promised.values()))
    found: dict[str, Located] = {}
    for file in files:
        path = directory / file
        for name, slot in _header(path).items():
            if name in found:
                raise ConfigError("DIR", path, f"holds {name}, which {found[name].path.name} holds too")
            found[name] = Located(path, slot)
    for name, file in promised.items():
        if name not in found or found[name].path.name != file:
            raise ConfigError(
                "DIR",
                directory / file,
                f"lacks {name}, which {INDEX_FILE} places there",
                "download the file again",
            )
    return found


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX_FILE
    if not path.is_file():
        raise ConfigError(
            "DIR",
            directory,
            f"holds neither {SINGLE_FILE} nor {INDEX_FILE}",
            "only safetensors files can be imported; save the model with save_pretrained",
        )
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError("DIR", path, "is not an index with a weight_map") from error


def _header(path: Path) -> dict[str, Slot]:
    try:
        return read_header(path)
    except FileNotFoundError:
        raise ConfigError("DIR", path, f"is missing, but {INDEX_FILE} names it", "download it") from None
    except (OSError, FormatError) as error:
        raise ConfigError("DIR", path, f"is damaged: {error}", "download it again") from error


@dataclasses.dataclass(frozen=True)
class CheckedTensors:
    """The model's tensors in catalogue order, ready to be read one by one, and what was left
    aside."""

    tensors: tuple[tuple[str, LazyTensor], ...]
    num_dequantized: int
    skipped_layers: tuple[str, ...]


def check_tensors(
    located: Mapping[str, Located], model: ModelConfig, block: tuple[int, int], directory: Path
) -> CheckedTensors:
    """Hold the files' tensors against the model's catalogue, reading none.

    Raises ConfigError that lists missing, extra and misshapen tensors (the first few of each, and
    how many), or names one of a type that is no weight's. Multi-token-prediction layers, beyond the
    model's last, are left aside.
    """
    skipped = {name for name, place in located.items() if _left_aside(name, place, model)}
    names = located.keys() - skipped
    expected = {spec.name: spec.shape for spec in model_tensors(model)}
    matrices = {name for name in names & expected.keys() if len(expected[name]) == 2}
    quantized = {name for name in matrices if located[name].slot.dtype == torch.float8_e4m3fn}
    shapes = expected | {name + SCALE_SUFFIX: scale_shape(expected[name], block) for name in quantized}
    problems = [
        _listed("missing", sorted(shapes.keys() - names)),
        _listed("extra", sorted(names - shapes.keys())),
        _listed("misshapen", _misshapen(located, shapes, names)),
    ]
    if any(problems):
        raise ConfigError(
            "DIR",
            directory,
            "its tensors are not those config.json describes\n" + "\n".join(filter(None, problems)),
            "check that config.json and the weights belong together; nothing was written",
        )
    lazies = tuple((name, _lazy(name, located, name in quantized, block)) for name in expected)
    layers = {
        f"model.layers.{match.group(1)}"
        for name in skipped
        if (match := _LAYER.match(name)) and _beyond(name, model.num_hidden_layers)
    }
    return CheckedTensors(lazies, len(quantized), tuple(sorted(layers)))


def _left_aside(name: str, place: Located, model: ModelConfig) -> bool:
    # transformers saves the projections of zero shared experts as tensors without elements.
    empty = 0 in place.slot.shape
    return empty or name.endswith(_IGNORED_SUFFIX) or _beyond(name, model.num_hidden_layers)


def _beyond(name: str, num_layers: int) -> bool:
    match = _LAYER.match(name)
    return match is not None and int(match.group(1)) >= num_layers


def _misshapen(
    located: Mapping[str, Located], shapes: Mapping[str, tuple[int, ...]], names: Set[str]
) -> list[str]:
    return [
        f"{name} is {list(located[name].slot.shape)}, not {list(shapes[name])}"
        for name in sorted(names & shapes.keys())
        if located[name].slot.shape != shapes[name]
    ]


def _listed(what: str, items: list[str]) -> str:
    if not items:
        return ""
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"  {what} ({len(items)}): {', '.join(items[:_SHOWN])}{rest}"


def _lazy(name: str, located: Mapping[str, Located], quantized: bool, block: tuple[int, int]) -> LazyTensor:
    place = located[name]
    if quantized:
        scale = located[name + SCALE_SUFFIX]
        if scale.slot.dtype not in _STORED_DTYPES:
            raise ConfigError(
                "DIR",
                scale.path,
                f"{name}{SCALE_SUFFIX} has type {DTYPE_NAMES[scale.slot.dtype]}",
                "scales must be FP32",
            )
        return LazyTensor(
            place.slot.shape, torch.bfloat16, lambda: dequantize(place.read(), scale.read(), block)
        )
    if place.slot.dtype not in _STORED_DTYPES:
        raise ConfigError(
            "DIR",
            place.path,
            f"{name} has type {DTYPE_NAMES[place.slot.dtype]}, which is no weight's",
            "take the BF16 or block-FP8 form of the checkpoint",
        )
    return LazyTensor(place.slot.shape, place.slot.dtype, place.read)
