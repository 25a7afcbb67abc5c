"""The only door to megatron-core.

Importing any module of megatron-core runs `megatron/core/__init__.py`, which takes seconds (it
imports torch's compiler) and warns about every optional package it does not find. So nothing here
is imported at the top of another module: callers import this one inside the function that needs it,
and the import's own warnings are held back, since they are about parts of megatron-core (its model,
optimizer and inference) that this program never calls.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.helpers import build_blending_indices
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

__all__ = [
    "DType",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Split",
    "build_blending_indices",
]
