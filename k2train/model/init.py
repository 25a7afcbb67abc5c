"""Initial weights as a function of (seed, tensor name) alone, so that every layout starts from the
same model.

A counter-based generator keyed by a 128-bit hash makes the values. torch's CPU generator would not
do: it keeps 32 bits of its seed, and among K2's 70 thousand tensors some would start equal.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from k2train.model.pieces import Piece

_BLOCK_ELEMENTS = 2**24


def initialise(pieces: Iterable[Piece], seed: int, std: float) -> None:
    """Fill the pieces: norms with 1, correction biases with 0, matrices with normal values of
    deviation `std`.

    Every tensor has a generator of its own, so as many are drawn at once as torch may use threads.
    """

    def fill(piece: Piece) -> None:
        tensor = piece.tensor
        if not piece.trained:
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            _fill_normal(tensor, piece.name, seed, std)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        collections.deque(pool.map(fill, pieces), maxlen=0)


def _fill_normal(tensor: torch.Tensor, name: str, seed: int, std: float) -> None:
    """Draw FP32 values in row order, a block of rows at a time, and cast them into the tensor."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    rows = max(_BLOCK_ELEMENTS // tensor.shape[1], 1)
    for start in range(0, tensor.shape[0], rows):
        block = tensor[start : start + rows]
        values = generator.standard_normal(tuple(block.shape), dtype=np.float32)
        block.copy_(torch.from_numpy(values).mul_(std))
