"""Runs one section in this process: `python -m gpu_sections.child --section 4 --log FILE ...`, as
benchmarks/gpu.py does."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
import warnings
from pathlib import Path

from .catalogue import chosen
from .report import Report, first_line


def main() -> int:
    options = parse()
    # Behind the interpreter's own packages, so that nothing that is installed is replaced.
    sys.path += options.packages
    (section,) = chosen(str(options.section))
    report = Report(section.number, Path(options.log), options.device == "cuda")
    # Libraries warn of what they will not run; the line that follows says it.
    warnings.simplefilter("ignore", UserWarning)
    if options.device == "cpu":
        # Read when a kernel is defined: Triton then runs it as Python.
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        # Imported here: what is missing for one section must not stop another.
        from .setting import build_setting

        importlib.import_module(f"{__package__}.{section.module}").run(report, build_setting(options))
    except Exception as error:
        report.fail(section.title, first_line(error))
        traceback.print_exc()
        return 1
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--section", type=int, required=True)
    parser.add_argument("--log", required=True, help="file that takes the results as lines of JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=float, required=True, help="seconds until this process is killed")
    parser.add_argument("--repeats", type=int, help="measurements behind a median")
    parser.add_argument("--packages", nargs="*", default=[], help="folders to find further packages in")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
