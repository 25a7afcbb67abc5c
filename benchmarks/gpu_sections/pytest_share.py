"""Runs every n-th test marked gpu of some files and writes a line of JSON for each as it ends.

python -m gpu_sections.pytest_share INDEX N LOG FILE ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


class Share:
    """A pytest plugin: keeps tests index, index + n, ..., and reports them."""

    def __init__(self, index: int, of: int, log: Path) -> None:
        self.index, self.of, self.log = index, of, log

    # Last, so that tests without the mark are gone before they are counted.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.index :: self.of]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A skip is told by the setup; a failure may happen in any part.
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # Every process collects every file; one of them says what could not be.
        if report.failed and self.index == 0:
            self._write(report.nodeid, "failed", report.longreprtext)

    def _write(self, test: str, outcome: str, text: str) -> None:
        # pytest marks the lines of the error itself.
        errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
        message = next(iter(errors or text.splitlines()), "")[:200]
        with self.log.open("a") as stream:
            stream.write(json.dumps({"test": test, "outcome": outcome, "message": message}) + "\n")


def main() -> int:
    index, of, log, *files = sys.argv[1:]
    words = ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", *files]
    return int(pytest.main(words, plugins=[Share(int(index), int(of), Path(log))]))


if __name__ == "__main__":
    sys.exit(main())
