"""Training, validation and test documents: contiguous shares of a dataset, as megatron-core cuts
them."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from k2train.config.errors import ConfigError

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)

_FORM = """write shares of training, validation and test documents, for example 'data.split="95,5,0"'"""


def parse_split(text: str) -> tuple[float, float, float]:
    """`data.split` as three shares that sum to 1. Raises ConfigError.

    Parsed here and not by megatron-core, which overlooks a minus sign and divides by a sum of zero.
    """
    words = text.split(",")
    try:
        shares = [float(word) for word in words]
    except ValueError as error:
        raise ConfigError("data.split", text, "must be numbers separated by commas", _FORM) from error
    if len(shares) > len(SPLITS):
        raise ConfigError("data.split", text, "must be at most three numbers", _FORM)
    if any(share < 0 or not math.isfinite(share) for share in shares):
        raise ConfigError("data.split", text, "must not hold negative numbers", _FORM)
    shares += [0.0] * (len(SPLITS) - len(shares))
    total = sum(shares)
    if total == 0:
        raise ConfigError("data.split", text, "sums to zero", _FORM)
    if shares[0] == 0:
        raise ConfigError("data.split", text, "leaves no training documents", _FORM)
    train, valid, test = (share / total for share in shares)
    return train, valid, test


def document_ranges(shares: tuple[float, float, float], num_documents: int) -> dict[SplitName, range]:
    """The documents of each split: contiguous, disjoint, complete.

    The cuts are those of megatron-core's BlendedMegatronDatasetBuilder: round(share so far x
    documents).
    """
    cuts = [0]
    for index in range(len(SPLITS)):
        cuts.append(round(sum(shares[: index + 1]) * num_documents))
    cuts[-1] = num_documents
    return {name: range(cuts[i], cuts[i + 1]) for i, name in enumerate(SPLITS)}


def as_indices(documents: range) -> npt.NDArray[np.int32]:
    """The form GPTDataset takes them in."""
    return np.arange(documents.start, documents.stop, dtype=np.int32)
