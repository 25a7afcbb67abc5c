"""Device memory that optimizer states in host memory pass through, as a function of shapes.

Matrices that a rule needs whole come to the device with their states in batches of equal shapes,
through three slots that each hold the largest batch. The optimizer makes its slots and the plan
predicts them with what stands here. Numbers are entries, not bytes. The pictures are in
k2train/optim/residence.py and docs/optimizer.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

# One slot being filled, one being updated, one being emptied.
NUM_SLOTS = 3
# Entries of an elementwise state that travel at once: 64 MB in FP32. A multiple of every vector
# width, so that cutting an update here leaves each entry in the vectorised part (or the tail) it
# would be in uncut: bit for bit the same.
CHUNK_ELEMENTS = 1 << 24
# Entries of the matrices in one batched update: bounds its temporaries (about 5 in Newton-Schulz)
# to some hundred megabytes.
MAX_BATCH_ELEMENTS = 1 << 26


def matrices_at_once(shape: Sequence[int]) -> int:
    """How many matrices of a shape make a batch, at most; one at least, as it is needed whole."""
    return max(1, MAX_BATCH_ELEMENTS // math.prod(shape))


def slot_elements(largest_stretch: int, largest_batch: int, numbers_kept: int) -> int:
    """Entries of a slot: the largest batch with its states, or a piece of the masters.

    largest_stretch: entries of the largest bucket's part that this rank owns. largest_batch:
    entries of its matrices, 0 where no rule needs any whole. numbers_kept: master and states of an
    entry.
    """
    return max(min(largest_stretch, CHUNK_ELEMENTS), numbers_kept * largest_batch)


def largest_batch(groups: Iterable[tuple[Sequence[int], int]]) -> int:
    """Entries of the largest batch among groups of equal matrices; 0 for no groups.

    groups: a shape and how many matrices have it.
    """
    sizes = (min(count, matrices_at_once(shape)) * math.prod(shape) for shape, count in groups)
    return max(sizes, default=0)
