"""A directory that appears whole or not at all.

Files are written into `<name>.partial` beside their destination (same file system, so the last step
is one rename). A killed writer leaves the `.partial`; it is never taken for the real thing and the
next writer, or `clean_leftovers`, removes it. Replacing goes through `<name>.replaced`: if the
process dies between the two renames, the old directory is put back. One writer group per
destination at a time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"
REPLACED = ".replaced"


def partial_path(directory: Path) -> Path:
    """Where the files of `directory` are written until they are complete; what `begin` makes, the
    same on every rank."""
    directory = Path(directory).resolve()
    return directory.with_name(directory.name + PARTIAL)


def begin(directory: Path) -> Path:
    """Make the empty temporary directory for `directory`, removing what a killed writer left; one
    rank calls it."""
    directory = Path(directory).resolve()
    restore_replaced(directory)
    temporary = partial_path(directory)
    remove(temporary)
    temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, directory: Path) -> None:
    """Flush `temporary` and rename it to `directory`, replacing a directory of that name; one rank
    calls it."""
    directory = Path(directory).resolve()
    sync_directory(temporary)
    replaced = directory.with_name(directory.name + REPLACED)
    if directory.exists():
        remove(replaced)
        os.rename(directory, replaced)
    os.rename(temporary, directory)
    sync_directory(directory.parent)
    remove(replaced)


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """`begin` for a single writer: on any exception, Ctrl-C included, the temporary directory is
    removed."""
    temporary = begin(directory)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise


def clean_leftovers(parent: Path) -> list[Path]:
    """Remove or repair what killed writers left in `parent`; returns what was removed. No writer
    may be at work."""
    parent = Path(parent)
    removed = []
    for path in sorted(parent.glob("*" + REPLACED)):
        if not restore_replaced(path.with_name(path.name.removesuffix(REPLACED))):
            removed.append(path)
    for path in sorted(parent.glob("*" + PARTIAL)):
        remove(path)
        removed.append(path)
    return removed


def restore_replaced(directory: Path) -> bool:
    """Settle a replacement that was cut off: put the old directory back if the new one never came,
    else drop it."""
    replaced = directory.with_name(directory.name + REPLACED)
    if not replaced.exists():
        return False
    if directory.exists():
        remove(replaced)
        return False
    os.rename(replaced, directory)
    return True


def write_text(path: Path, text: str) -> None:
    """Write a small file and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def remove(directory: Path) -> None:
    """Delete a directory tree if it exists."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


def sync_directory(directory: Path) -> None:
    """Make the entries of a directory (new files, renames) survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
