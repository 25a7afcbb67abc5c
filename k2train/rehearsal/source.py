"""Lines of the package, for reports."""

from __future__ import annotations

import sys
from pathlib import Path

from k2train.device import living
from k2train.device.rehearsed import short_path

_PACKAGE = str(Path(__file__).parents[1])
_OBSERVERS = (str(Path(__file__).parent), str(Path(living.__file__)))


def package_line() -> str:
    """file:line of the innermost caller that belongs to the package and does not observe; "" where
    there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PACKAGE) and not path.startswith(_OBSERVERS):
            return f"{short_path(path)}:{frame.f_lineno}"
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    return ""
