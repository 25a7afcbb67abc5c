"""`k2train bench NAME`: the scripts of benchmarks/, which stand in a clone and are not part of
the installed package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from k2train.config.errors import ConfigError, nearest
from k2train.config.folders import config_dir

USAGE = """usage: k2train bench NAME [OPTION ...]

Runs benchmarks/NAME.py, which prints its command, both sides and the median of paired runs; `k2train bench NAME --help`
explains its options."""


def run(args: list[str]) -> int:
    """Run one benchmark in a process of its own; its exit status."""
    scripts = benchmark_scripts()
    if not args or args[0] in ("-h", "--help"):
        print(
            f"{USAGE}\n\nNAME is one of: {', '.join(sorted(scripts)) or 'none here: benchmarks/ is in a clone only'}"
        )
        return 0
    if args[0] not in scripts:
        rule = (
            "is not a benchmark"
            if scripts
            else "cannot run here: benchmarks/ stands in a clone, not in the package"
        )
        raise ConfigError(
            "bench", args[0], rule, nearest(args[0], scripts) if scripts else "run it from a clone"
        )
    return subprocess.run([sys.executable, str(scripts[args[0]]), *args[1:]], check=False).returncode


def benchmark_scripts() -> dict[str, Path]:
    """The scripts beside configs/ in a clone, by name; none for an installed wheel."""
    directory = config_dir().parent / "benchmarks"
    return {path.stem: path for path in sorted(directory.glob("*.py"))}
