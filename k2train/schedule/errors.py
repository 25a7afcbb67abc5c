"""The exception for an action list that cannot run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from k2train.config.errors import ConfigError
from k2train.config.sections import ScheduleConfig


class ScheduleError(ValueError):
    """A schedule that breaks a rule: a headline, then a line for each stage or action involved."""

    def __init__(self, headline: str, lines: Sequence[str] = ()) -> None:
        self.headline = headline
        self.lines = tuple(lines)
        super().__init__("\n  ".join((headline, *self.lines)))


@contextlib.contextmanager
def told_as_config(section: ScheduleConfig) -> Iterator[None]:
    """Within this context what is wrong with a schedule is told in the keys of the config.

    A schedule that cannot run is a mistake in `schedule`, a ConfigError. A number of microbatches,
    which a ScheduleSpec is given and no config holds, follows from the global batch.
    """
    try:
        yield
    except ConfigError as error:
        if error.field != "num_microbatches":
            raise
        counted = f"{error.value} microbatches a pipeline"
        raise ConfigError("train.global_batch_tokens", counted, error.rule, error.remedy) from error
    except ScheduleError as error:
        remedy = ""
        if section.pair_forward_backward and not section.extra_warmup_microbatches:
            remedy = "pairs need schedule.extra_warmup_microbatches=1"
        raise ConfigError("schedule.kind", section.kind, f"cannot run: {error}", remedy) from error
