"""The error of a checkpoint that cannot be read or written: something a user pointed at, so it is a
ConfigError."""

from __future__ import annotations

from pathlib import Path

from k2train.config.errors import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that is missing, incomplete or damaged.

    path: the checkpoint's directory, or the shard at fault.
    """

    def __init__(self, path: Path | str, rule: str, remedy: str = "") -> None:
        self.path = Path(path)
        super().__init__("checkpoint", path, rule, remedy)

    def _arguments(self) -> tuple[object, ...]:
        return self.path, self.rule, self.remedy
