"""A folder of wheels as packages, without network, pip or write access to the interpreter.

A wheel is a zip archive whose top folders are packages, so unpacking all of them into one folder
installs them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path


def unpack_wheels(folder: Path, target: Path) -> list[str]:
    """Unpack every wheel of `folder` into `target`; their file names. Raises FileNotFoundError
    where there is none."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"--wheels: there is no wheel in {folder}")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return [wheel.name for wheel in wheels]
