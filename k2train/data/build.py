"""Text files in, one indexed dataset out.

    files -> tasks of ~8 MB -> workers: read, tokenize, write a part -> one writer: append the parts
    in task order

Tasks and their order depend on the files alone, so the bytes of the dataset do not depend on the
number of workers. At most two tasks a worker are in flight, so memory stays at some 8 MB of input a
task (a .gz file, which cannot be cut, is read as a stream), plus what megatron-core's builder
keeps: the length and place of every document, about 100 bytes each.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np

from k2train.config.data import DataBuildConfig
from k2train.config.errors import ConfigError
from k2train.data.encode import Encoded, Encoder, Job
from k2train.data.readers import BadLine
from k2train.data.sidecar import Sidecar
from k2train.data.sources import Unit, cut_tasks, find_files
from k2train.data.tokenizer import build_tokenizer
from k2train.data.writer import DatasetWriter, publish, staging

BAD_SUFFIX = ".bad.log"
SHOWN_BAD_LINES = 10
_SUFFIXES = (".idx", ".bin", ".json", BAD_SUFFIX)

Task = tuple[Unit, ...]


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What a build made: the side-car's counts, the first bad lines, and the file that lists them
    all (None: none)."""

    prefix: str
    sidecar: Sidecar
    num_files: int
    bad_lines: tuple[BadLine, ...]
    bad_file: str | None


class Progress:
    """What a build tells its caller. This one tells nobody; `k2train data build` draws a bar."""

    def begin(self, num_files: int, input_bytes: int) -> None:
        """Once, before the first task."""

    def advance(self, input_bytes: int, num_documents: int, num_tokens: int) -> None:
        """After each task: input bytes of the task, documents and tokens so far."""


def build_dataset(config: DataBuildConfig, progress: Progress | None = None) -> BuildReport:
    """Build `config.output` from `config.input`.

    Raises ConfigError for inputs that cannot be read, an output that exists, input without a
    document, and for the first bad line if `on_bad_line` is stop. Whatever is raised, nothing is
    left at the output.
    """
    target = _target(config)
    progress = progress or Progress()
    tokenizer = build_tokenizer(config.tokenizer)
    files = find_files(config.input)
    tasks = cut_tasks(files, config.text_key)
    progress.begin(len(files), sum(unit.num_bytes for task in tasks for unit in task))
    with _staging(target) as staged:
        writer = DatasetWriter(staged, tokenizer)
        job = Job(config.text_key, config.tokenizer, np.dtype(writer.dtype).name, str(staged.parent))
        try:
            bad = _encode_all(config, job, tasks, writer, progress, Path(f"{staged}{BAD_SUFFIX}"))
            if writer.num_documents == 0:
                raise ConfigError(
                    "input",
                    _words(config.input),
                    "holds no document" + bad.first_reason(),
                    "check the files, and text_key for .jsonl and .parquet",
                )
            sidecar = writer.finish(bad.count)
        finally:
            writer.close()
        publish(staged, target, (BAD_SUFFIX,))
    bad_file = f"{target}{BAD_SUFFIX}" if bad.count else None
    return BuildReport(str(target), sidecar, len(files), tuple(bad.shown), bad_file)


class BadLines:
    """Counts bad lines, keeps the first, and writes all of them to a file that exists only if there
    are some."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self.shown: list[BadLine] = []
        self._path = path
        self._file: TextIO | None = None

    def add(self, bad: BadLine) -> None:
        self.count += 1
        if len(self.shown) < SHOWN_BAD_LINES:
            self.shown.append(bad)
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8", errors="backslashreplace")
        self._file.write(describe(bad) + "\n")

    def first_reason(self) -> str:
        return f"; the first of {self.count} bad lines is {describe(self.shown[0])}" if self.shown else ""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def describe(bad: BadLine) -> str:
    """file:line: reason"""
    return f"{bad.path}:{bad.line}: {bad.reason}"


def _encode_all(
    config: DataBuildConfig,
    job: Job,
    tasks: list[Task],
    writer: DatasetWriter,
    progress: Progress,
    bad_path: Path,
) -> BadLines:
    """Append the documents of all tasks in order; returns what was bad."""
    bad = BadLines(bad_path)
    lines_before: dict[str, int] = {}
    try:
        for task, encoded in zip(tasks, _results(config.workers, job, tasks), strict=True):
            for found in _numbered(task, encoded, lines_before):
                if config.on_bad_line == "stop":
                    raise ConfigError(
                        "input",
                        f"{found.path}:{found.line}",
                        found.reason,
                        "mend the line, or set on_bad_line=skip",
                    )
                bad.add(found)
            _append(writer, encoded, job.dtype)
            progress.advance(sum(unit.num_bytes for unit in task), writer.num_documents, writer.num_tokens)
    finally:
        bad.close()
    return bad


def _numbered(task: Task, encoded: Encoded, lines_before: dict[str, int]) -> Iterator[BadLine]:
    """The bad lines of a task, lines counted from the start of the file."""
    for unit, wrong, lines in zip(task, encoded.bad, encoded.lines, strict=True):
        before = lines_before.get(unit.path, 0) if unit.start else 0
        for bad in wrong:
            yield dataclasses.replace(bad, line=bad.line + before) if unit.kind != "parquet" else bad
        if unit.kind == "jsonl":
            lines_before.clear()  # only the file at hand is read on
            lines_before[unit.path] = before + lines


def _append(writer: DatasetWriter, encoded: Encoded, dtype: str) -> None:
    if len(encoded.lengths):
        ids = np.fromfile(encoded.part, dtype=dtype)
        writer.add_many(ids, encoded.lengths.tolist(), encoded.num_bytes)
    os.unlink(encoded.part)


def _results(workers: int | None, job: Job, tasks: list[Task]) -> Iterator[Encoded]:
    """Encoded tasks in order, from this process if one worker is enough."""
    num_workers = min(workers or _num_cores(), len(tasks))
    if num_workers <= 1:
        encoder = Encoder(job)
        return (encoder.encode(index, task) for index, task in enumerate(tasks))
    return _parallel_results(num_workers, job, tasks)


def _parallel_results(num_workers: int, job: Job, tasks: Iterable[Task]) -> Iterator[Encoded]:
    # spawned, not forked: the parent has imported torch, whose threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    numbered = enumerate(tasks)
    waiting: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker) as pool:
        try:
            for index, task in itertools.islice(numbered, 2 * num_workers):
                waiting.append(pool.submit(_encode_in_worker, job, index, task))
            while waiting:
                encoded = waiting.popleft().result()
                for index, task in itertools.islice(numbered, 1):
                    waiting.append(pool.submit(_encode_in_worker, job, index, task))
                yield encoded
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died, most likely for lack of memory; try workers=1"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent alone answers it and ends the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode_in_worker(job: Job, index: int, task: Task) -> Encoded:
    return _encoder(job).encode(index, task)


@functools.lru_cache(maxsize=1)
def _encoder(job: Job) -> Encoder:
    """A worker loads its tokenizer once, not for every task."""
    return Encoder(job)


def _num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _target(config: DataBuildConfig) -> Path:
    """The output prefix, checked. Raises ConfigError."""
    target = Path(config.output).expanduser()
    if config.output.endswith(os.sep) or target.is_dir():
        raise ConfigError(
            "output",
            config.output,
            "is a directory, the output is the prefix of three files",
            f"for example output={target / 'corpus'}",
        )
    if target.suffix in _SUFFIXES:
        raise ConfigError(
            "output",
            config.output,
            "names a file, the output is the prefix of three files",
            f"output={target.with_suffix('')}",
        )
    existing = [f"{target}{suffix}" for suffix in _SUFFIXES if os.path.exists(f"{target}{suffix}")]
    if existing and not config.overwrite:
        raise ConfigError(
            "output", config.output, f"{existing[0]} exists", "set overwrite=true to replace the dataset"
        )
    return target


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    try:
        with staging(target) as staged:
            yield staged
    except OSError as error:
        raise ConfigError(
            "output",
            target,
            f"cannot be written: {error.strerror}",
            "name a place that can be written and has room",
        ) from error


def _words(inputs: Iterable[str]) -> str:
    return "[" + ",".join(inputs) + "]"
