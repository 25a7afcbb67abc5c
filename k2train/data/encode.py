"""The worker's half of a build: text in, a file of ids out. Imports neither torch nor
megatron-core, so a worker process starts in a fraction of a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from k2train.config.data import TokenizerConfig
from k2train.data.readers import BadLine, LineCount, read_unit
from k2train.data.sources import Unit
from k2train.data.tokenizer import Tokenizer, build_tokenizer

MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are 32-bit in the indexed format


@dataclasses.dataclass(frozen=True)
class Job:
    """What every task of a build has in common."""

    text_key: str
    tokenizer: TokenizerConfig
    dtype: str
    scratch: str


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The documents of a task: ids in file `part`, the documents' lengths, and what was no
    document.

    bad: a list for each unit, lines numbered within the unit; lines: the lines of each unit.
    """

    part: str
    lengths: npt.NDArray[np.int32]
    num_bytes: int
    bad: tuple[tuple[BadLine, ...], ...]
    lines: tuple[int, ...]


class Encoder:
    """Encodes tasks with one tokenizer, which is loaded once for a process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer: Tokenizer = build_tokenizer(job.tokenizer)

    def encode(self, index: int, task: tuple[Unit, ...]) -> Encoded:
        """Write the documents of a task into a part file. Raises ConfigError for a file that cannot
        be read."""
        part = Path(self._job.scratch) / f"part-{index:08d}"
        lengths: list[int] = []
        num_bytes = 0
        bad: list[tuple[BadLine, ...]] = []
        lines: list[int] = []
        with open(part, "wb") as stream:
            for unit in task:
                count, wrong = LineCount(), []
                for item in read_unit(unit, self._job.text_key, count):
                    if isinstance(item, BadLine):
                        wrong.append(item)
                        continue
                    document = self._document(item[1])
                    if len(document) > MAX_DOCUMENT_TOKENS:
                        wrong.append(
                            BadLine(unit.path, item[0], f"{len(document)} tokens, more than 2^31 - 1")
                        )
                        continue
                    document.tofile(stream)
                    lengths.append(len(document))
                    num_bytes += len(item[1].encode())
                bad.append(tuple(wrong))
                lines.append(count.lines)
        return Encoded(str(part), np.array(lengths, dtype=np.int32), num_bytes, tuple(bad), tuple(lines))

    def _document(self, text: str) -> npt.NDArray[np.integer]:
        ids = self._tokenizer.encode(text)
        document = np.empty(len(ids) + 1, dtype=self._job.dtype)
        document[:-1] = ids
        document[-1] = self._tokenizer.eod_id
        return document
