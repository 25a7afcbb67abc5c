"""The one exception for a user's mistake.

Every command turns a ConfigError into a few lines on stderr and exit status 2, never a traceback,
so raise it wherever something a user wrote (a key, a path, a flag) cannot work; raise anything else
only for our own bugs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class ConfigError(Exception):
    """A value the user gave that cannot be used.

    field: the dotted key or command-line word, as the user would write it.
    value: what was given.
    rule: what must hold, as a sentence fragment ("must be a positive number of sequences").
    remedy: what to write instead; empty where the rule already says it.
    local: whether one rank of many may see it alone, because it is about its machine (files, disks)
        and not about the words.
    """

    def __init__(self, field: str, value: object, rule: str, remedy: str = "") -> None:
        self.field = field
        self.value = value
        self.rule = rule
        self.remedy = remedy
        self.local = False
        super().__init__(self._text())

    def __reduce__(self) -> tuple[type[ConfigError], tuple[object, ...], dict[str, object]]:
        # exceptions are rebuilt from their message, which would lose the fields on the way back
        # from a worker process
        return type(self), self._arguments(), {"local": self.local}

    def placed(self, section: str) -> ConfigError:
        """The same error with full keys. section: the dotted key of the section that it arose in.

        A section that several roots hold names its fields by its own name (`tokenizer.path`), the
        holder by the key where it holds it (`data.tokenizer`, or one entry of a list,
        `data.blend[1]`).
        """
        plain = re.sub(r"\[\d+\]$", "", section)
        own = next(
            (name for name in (plain, plain.rsplit(".", 1)[-1]) if self.field.startswith(f"{name}.")), None
        )
        if own is None or own == section:
            return self
        # In a remedy only what is written like a word of the command line is a key: tokenizer.json
        # is a file.
        written = re.compile(rf"(?<![\w.]){re.escape(own)}\.(?=\w+=)")
        field, remedy = section + self.field[len(own) :], written.sub(f"{section}.", self.remedy)
        error = ConfigError(field, self.value, self.rule, remedy)
        error.local = self.local
        return error

    def _arguments(self) -> tuple[object, ...]:
        """What `__init__` was given; a subclass that takes something else says so here."""
        return self.field, self.value, self.rule, self.remedy

    def _text(self) -> str:
        lines = [f"{self.field}={_short(self.value)}: {self.rule}"]
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)


def _short(value: object, limit: int = 120) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The remedy for a misspelling: the closest known names, else the list of them (at most a
    dozen).

    prefix: shown before each name but not compared, for the sections of a dotted key.
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(prefix + name for name in close) + "?"
    shown = ", ".join(prefix + name for name in names[:12]) + (", …" if len(names) > 12 else "")
    return f"known names are {shown}"
