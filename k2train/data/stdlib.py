"""The default corpus: the Python standard library's own sources on this machine.

Every .py file under the interpreter's library directory except tests (which are larger than the
library itself, and which some distributions leave out) and installed packages. It is text that
every machine already has, so a first run needs no download. Files are ordered by a hash of their
relative path: the held-out documents are the last of a dataset, and in path order they would all be
    `xml`, `zipfile` and the like.

Built on first use under `data.cache_dir`, under a name that holds the Python version and a hash of
the contents, so an upgrade of Python makes a new one. Two processes may build at once: both write
the same bytes and rename, and once the index is there it never goes away, so the one that is done
may read while the other renames.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from k2train.config.errors import ConfigError
from k2train.data.sidecar import sidecar_path
from k2train.data.tokenizer import Tokenizer
from k2train.data.writer import DatasetWriter, publish, staging

_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def build_stdlib(cache_dir: Path, tokenizer: Tokenizer, root: Path | None = None) -> Path:
    """The prefix of the dataset, built if it is not there. `root` replaces the interpreter's
    library directory."""
    documents = list(read_sources(root or Path(sysconfig.get_path("stdlib"))))
    prefix = cache_dir / f"stdlib-{platform.python_version()}-{_digest(documents, tokenizer)}"
    if Path(f"{prefix}.idx").is_file() and sidecar_path(prefix).is_file():
        return prefix
    try:
        _write(prefix, documents, tokenizer)
    except OSError as error:
        raise ConfigError(
            "data.cache_dir",
            cache_dir,
            f"cannot hold the default corpus: {error.strerror}",
            "name a directory that can be written",
        ) from error
    return prefix


def read_sources(root: Path) -> Iterator[tuple[str, str]]:
    """(relative path, text) of every source file, by hash of the path. Raises ConfigError where
    there are none."""
    wanted = [path.relative_to(root).as_posix() for path in _walk(root)]
    if not wanted:
        raise ConfigError(
            "data.blend",
            "[]",
            f"takes the standard library's sources, and {root} holds none",
            "give corpora of your own (see docs/data.md)",
        )
    for name in sorted(wanted, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            yield name, (root / name).read_bytes().decode()
        except UnicodeDecodeError:
            continue  # a few tests are in other encodings; the library proper is UTF-8


def _walk(root: Path) -> Iterator[Path]:
    for parent, directories, names in os.walk(root):
        # pruned rather than filtered: installed packages can be a hundred times the library
        directories[:] = [name for name in directories if name not in _EXCLUDED]
        for name in names:
            # _sysconfigdata holds the paths and flags this interpreter was built with: another text
            # on each machine
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(parent, name)


def _digest(documents: list[tuple[str, str]], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.identity.encode())
    for name, text in documents:
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def _write(prefix: Path, documents: list[tuple[str, str]], tokenizer: Tokenizer) -> None:
    with staging(prefix) as staged:
        writer = DatasetWriter(staged, tokenizer)
        for _, text in documents:
            writer.add(tokenizer.encode(text), len(text.encode()))
        writer.finish()
        publish(staged, prefix, same=True)
