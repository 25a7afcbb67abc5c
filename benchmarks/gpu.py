"""What one Hopper GPU does with this program's operations, layers and training, beside what the
plan says, in 8 minutes.

Nine sections, each in a process of its own with a hard limit, so that a hang or a crash costs one
section. One line is printed for each result as it comes, with the plan's prediction where it has
one; the same goes into a JSON file.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --sections 1,4,9 --budget 240
    python benchmarks/gpu.py --wheels wheels            packages that the machine lacks
    python benchmarks/gpu.py --device cpu --tiny        every section at toy sizes, without a GPU

The limits of the sections are shares of the budget; what one leaves goes to those behind it. A
section that fails or is stopped says so in one line, keeps the results it has, and the next one
goes on. It needs torch, Triton, numpy and PyYAML; transformers, Transformer Engine and what the
tests import are used where they are there. docs/benchmarks.md has more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_sections.catalogue import Section, chosen, limit_seconds
from gpu_sections.report import read_results
from gpu_sections.wheels import unpack_wheels

HERE = Path(__file__).resolve().parent


def main() -> int:
    options = parse()
    # A polite kill ends as Ctrl-C does, with the section in hand.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sections = chosen(options.sections)
    outcomes: list[dict[str, Any]] = []
    ends_at = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory(prefix="k2train-gpu-") as folder:
        packages = []
        if options.wheels:
            packages = [f"{folder}/packages"]
            print(f"wheels: {', '.join(unpack_wheels(Path(options.wheels), Path(packages[0])))}", flush=True)
        for index, section in enumerate(sections):
            limit = limit_seconds(sections[index:], ends_at - time.monotonic())
            outcomes.append(run_section(section, limit, options, packages, Path(folder)))
            write_json(options, outcomes)
    for outcome in outcomes:
        failed = [str(result["name"]) for result in outcome["results"] if result["kind"] == "failed"]
        if failed:
            print(f"failed in section {outcome['number']}: {'; '.join(failed)}", flush=True)
    bad = [outcome["number"] for outcome in outcomes if outcome["status"] != "done"]
    print(f"sections {', '.join(map(str, bad))} did not end well" if bad else "all sections done", flush=True)
    return 1 if bad else 0


def run_section(
    section: Section, limit: float, options: argparse.Namespace, packages: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Run one section in a process, killed with all it started at its limit; what came of it, as
    JSON holds it."""
    print(f"\n== {section.number}. {section.title} (limit {limit:.0f} s)", flush=True)
    log = folder / f"section{section.number}.jsonl"
    began = time.monotonic()
    status = wait_for(start(section, limit, options, packages, log), limit)
    seconds = time.monotonic() - began
    print(f"== {section.number}. {status} after {seconds:.1f} s", flush=True)
    results = read_results(log)
    return {
        "number": section.number,
        "title": section.title,
        "status": status,
        "seconds": seconds,
        "limit_seconds": limit,
        "results": results,
    }


def start(
    section: Section, limit: float, options: argparse.Namespace, packages: Sequence[str], log: Path
) -> subprocess.Popen[bytes]:
    """Start the process of a section, the leader of a process group."""
    command = [sys.executable, "-m", "gpu_sections.child", f"--section={section.number}", f"--log={log}"]
    command += [f"--device={options.device}", f"--limit={limit}"]
    command += ["--tiny"] if options.tiny else []
    command += [f"--repeats={options.repeats}"] if options.repeats else []
    command += ["--packages", *packages] if packages else []
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def wait_for(process: subprocess.Popen[bytes], limit: float) -> str:
    """`done`, `failed`, or `stopped at its limit`.

    The process and all it started are gone afterwards.
    """
    try:
        return "done" if process.wait(max(limit, 1.0)) == 0 else f"failed (exit status {process.returncode})"
    except subprocess.TimeoutExpired:
        return "stopped at its limit"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_json(options: argparse.Namespace, outcomes: list[dict[str, Any]]) -> None:
    """All results so far, after every section, so that the file is whole whenever the run ends."""
    if options.json is None:
        return
    target = Path(options.json)
    staged = target.with_name(f"{target.name}.partial")
    staged.write_text(json.dumps({"command": sys.argv[1:], "sections": outcomes}, indent=1) + "\n")
    staged.replace(target)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sections", default="1,2,3,4,5,6,7,8,9", help="which, for example 1,4,9")
    parser.add_argument("--json", help="file for all results")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all sections together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script itself")
    parser.add_argument("--repeats", type=int, help="measurements behind a median")
    parser.add_argument("--wheels", help="folder of wheels with packages that this machine lacks")
    options = parser.parse_args()
    try:
        chosen(options.sections)
    except ValueError as error:
        parser.error(f"--sections {options.sections}: {error}")
    return options


if __name__ == "__main__":
    sys.exit(main())
