"""Checks before a large directory is written, and the disk's own errors as a user's."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from k2train.config.errors import ConfigError

# Headers, manifest and file system blocks, on top of the tensors' bytes.
_OVERHEAD = 1.01
_OVERHEAD_BYTES = 1 << 20


def check_new_directory(field: str, directory: Path) -> None:
    """Raise ConfigError unless `directory` is absent or an empty directory; `field` is the key the
    user gave it by."""
    if directory.is_mount():
        raise ConfigError(
            field,
            directory,
            "is a mount point, so it cannot be put in place by one rename",
            f"give a directory inside it, for example {directory / 'model'}",
        )
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise ConfigError(
            field, directory, "exists and is not empty", "give a new directory, or remove this one"
        )


def check_free_space(field: str, directory: Path, num_bytes: int) -> None:
    """Raise ConfigError, with both figures, if the disk of `directory` has no room for
    `num_bytes`."""
    place = next(path for path in (directory, *directory.parents) if path.exists())
    needed, free = int(num_bytes * _OVERHEAD) + _OVERHEAD_BYTES, shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            field,
            directory,
            f"needs {gigabytes(needed)} but its disk has {gigabytes(free)} free",
            "make room, or give a directory on another disk",
        )


@contextlib.contextmanager
def disk_errors(field: str, directory: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like, met while writing, into a
    ConfigError."""
    try:
        yield
    except BrokenPipeError:
        # The reader of our progress lines went away; no file is to blame.
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        rule = "its disk is full; nothing was left of it" if full else f"cannot be written: {error}"
        raise ConfigError(
            field, directory, rule, "make room, or give a directory on another disk" if full else ""
        ) from error


def gigabytes(num_bytes: int) -> str:
    """Bytes for people: "1.50 GB" (10^9 bytes)."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10_000_000 else f"{num_bytes / 1e6:.2f} MB"
