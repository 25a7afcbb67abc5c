"""The order of samples, as a function of seed and position alone.

megatron-core draws one permutation over all the epochs a run will need, so asking for more samples
reorders the earlier ones, and a run resumed with more steps would see other data. Here each epoch
has its own seed and the blend is a fixed pattern, so sample n is the same whatever was asked
before, by whom, and however long the run is.

Letters: B samples of a block, C corpora.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from k2train.config.errors import ConfigError

BLOCK = 1 << 20
"""Samples after which the blend's pattern repeats. It bounds memory (10 bytes a sample of a block)
for runs of any length; over whole blocks the shares are exact to one sample in a block."""


def epoch_seed(seed: int, split_index: int, epoch: int) -> int:
    """The 32-bit seed of one pass over one split. numpy's SeedSequence spreads neighbouring inputs
    apart."""
    return int(np.random.SeedSequence([seed, split_index, epoch]).generate_state(1)[0])


class Blend:
    """Which corpus sample n comes from, and which sample of that corpus it is.

    The pattern is megatron-core's blending rule: sample after sample, the corpus that is furthest
    behind its share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.num_corpora = len(weights)
        total = float(sum(weights))
        for index, weight in enumerate(weights):
            if len(weights) > 1 and weight / total < 1 / BLOCK:
                raise ConfigError(
                    f"data.blend[{index}].weight",
                    weight,
                    f"is a share of {weight / total:.1e}, the smallest is {1 / BLOCK:.1e}",
                    "raise it, or leave this corpus out",
                )
        self._corpus_B, self._rank_B = _pattern([weight / total for weight in weights])
        self._count_C = np.bincount(self._corpus_B, minlength=self.num_corpora)

    def locate(self, start: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(corpus, sample within that corpus) of samples start .. start + count, two arrays of
        length count."""
        positions = np.arange(start, start + count, dtype=np.int64)
        blocks, offsets = np.divmod(positions, len(self._corpus_B))
        corpora = self._corpus_B[offsets].astype(np.int64)
        return corpora, blocks * self._count_C[corpora] + self._rank_B[offsets]

    def first_beyond(self, num_samples_C: Sequence[int]) -> int:
        """The first sample that lies beyond the end of its corpus, if corpus c holds
        num_samples_C[c]: the length of the stretch in which no corpus repeats."""
        firsts = []
        for corpus, num_samples in enumerate(num_samples_C):
            blocks, rank = divmod(num_samples, int(self._count_C[corpus]))
            place = int(np.flatnonzero(self._corpus_B == corpus)[rank])
            firsts.append(blocks * len(self._corpus_B) + place)
        return min(firsts)


def _pattern(shares: Sequence[float]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """One block: the corpus of each sample, and how many of that corpus came before it."""
    if len(shares) == 1:
        return np.zeros(1, dtype=np.int16), np.zeros(1, dtype=np.int64)
    from k2train.data.megatron import build_blending_indices

    corpus_B = np.zeros(BLOCK, dtype=np.int16)
    rank_B = np.zeros(BLOCK, dtype=np.int64)
    build_blending_indices(corpus_B, rank_B, list(shares), len(shares), BLOCK, False)
    return corpus_B, rank_B
