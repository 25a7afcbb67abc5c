"""What a section says: one line a result as it comes, and the same as a line of JSON.

The JSON lines go to a file that the front reads when the section has ended, in whichever way: what
was measured before a crash or the limit is kept. Imports without torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["figure", "fact", "skipped", "failed"]
_NAME_WIDTH = 58


@dataclasses.dataclass(frozen=True)
class Result:
    """One line. predicted: the plan's value in the same unit, None where it has none. n:
    measurements behind the median."""

    section: int
    kind: Kind
    name: str
    value: float | None = None
    unit: str = ""
    predicted: float | None = None
    n: int | None = None
    note: str = ""

    def line(self) -> str:
        """The result as text."""
        head = f"[{self.section}] {self.name:<{_NAME_WIDTH}s}"
        if self.kind != "figure" or self.value is None:
            text = self.note if self.kind == "fact" else f"{self.kind}: {self.note}"
            return f"{head} {text}"
        parts = [f"{head} {_number(self.value):>9s} {self.unit:<9s}", f"predicted {self._prediction():<18s}"]
        if self.n is not None:
            parts.append(f"n={self.n}")
        return " ".join([*parts, self.note]).rstrip()

    def _prediction(self) -> str:
        if self.predicted is None or self.value is None:
            return "n/a"
        ratio = f" (x {self.value / self.predicted:.2f})" if self.predicted else ""
        return f"{_number(self.predicted)}{ratio}"


class Report:
    """The results of one section. on_gpu: whether what needs a GPU has one."""

    def __init__(self, section: int, log: Path, on_gpu: bool) -> None:
        self.section, self._log, self._on_gpu = section, log, on_gpu

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        predicted: float | None = None,
        n: int | None = None,
        note: str = "",
    ) -> None:
        """A measured number. One that is not finite is a failure: JSON has no word for it, and
        nobody wants it."""
        if not math.isfinite(value):
            self._write(Result(self.section, "failed", name, note=f"measured {value} {unit}"))
            return
        self._write(Result(self.section, "figure", name, value, unit, predicted, n, note))

    def fact(self, name: str, text: str) -> None:
        self._write(Result(self.section, "fact", name, note=text))

    def skip(self, name: str, reason: str) -> None:
        self._write(Result(self.section, "skipped", name, note=reason))

    def fail(self, name: str, reason: str) -> None:
        self._write(Result(self.section, "failed", name, note=reason))

    @contextlib.contextmanager
    def attempt(self, name: str, gpu_only: bool = False, optional: bool = False) -> Iterator[None]:
        """One measurement: an error in it becomes a line, and the section goes on.

        gpu_only: an error without a GPU was to be expected. optional: an error says that the
        libraries here do not take this, which is an answer. A package that is missing is no error
        anywhere.
        """
        try:
            yield
        except ModuleNotFoundError as error:
            self.skip(name, str(error))
        except Exception as error:
            if optional or (gpu_only and not self._on_gpu):
                self.skip(name, f"{'not taken here' if optional else 'needs a GPU'}: {first_line(error)}")
            else:
                self.fail(name, first_line(error))

    def _write(self, result: Result) -> None:
        print(result.line(), flush=True)
        with self._log.open("a") as stream:
            stream.write(json.dumps(dataclasses.asdict(result)) + "\n")


def read_results(log: Path) -> list[dict[str, object]]:
    """The results a section has written; a last line that was cut off by a kill is left out."""
    if not log.exists():
        return []
    results = []
    for line in log.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            results.append(json.loads(line))
    return results


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
