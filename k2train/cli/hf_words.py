"""The words of import-hf and export-hf: one directory, then key=value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from k2train.config.compose import parse_overrides
from k2train.config.errors import ConfigError

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=")


def split_words(args: Sequence[str], text_keys: Sequence[str], what: str) -> tuple[str, dict[str, Any]]:
    """The directory, and the values by key.

    Keys in `text_keys` take what follows the first `=` as it is, so that a path may hold spaces and
    signs that Hydra's grammar gives a meaning; the others are read as Hydra reads them. `what` says
    what DIR is, for the error where it is missing. Raises ConfigError for a missing or second
    directory and a key given twice.
    """
    places = [word for word in args if not _KEY.match(word)]
    if not places:
        raise ConfigError("DIR", "(missing)", "must be given as the first word", what)
    if len(places) > 1:
        raise ConfigError(
            "DIR",
            " ".join(places),
            "must be one directory",
            f"everything else is key=value; did you mean key={places[1]}?",
        )
    values: dict[str, Any] = {}
    for word in args:
        if not _KEY.match(word):
            continue
        key, _, text = word.partition("=")
        if key in values:
            raise ConfigError(key, text, "is given twice")
        values[key] = text if key in text_keys else parse_overrides([word])[0].value()
    return places[0], values
