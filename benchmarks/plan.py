"""How long planning takes, and how it grows with microbatches and stages.

    python benchmarks/plan.py            some minutes; --quick leaves out the longest step

One core: everything is plain Python on one thread, so processor seconds are counted, and the best
of the repeats is shown. Building, proving, simulating and accounting memory have a column each;
seconds for a million actions should not rise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from k2train.config.compose import load_config
from k2train.config.schema import Config
from k2train.planner.memory import all_stage_states, stage_memories
from k2train.planner.plan import build_plan
from k2train.program import Program, compile_program
from k2train.schedule.simulate import simulate
from k2train.schedule.validate import validate

COLUMNS = (
    "plan",
    "microbatches",
    "actions",
    "build s",
    "prove s",
    "simulate s",
    "memory s",
    "whole s",
    "s/M actions",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="leave out K2's full batch on 32 nodes")
    parser.add_argument("--only", help="one row, for example 'k2, 512 nodes'")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    table = Table(*COLUMNS, title="k2train plan on one core")
    for name, overrides in cases(arguments.quick):
        if arguments.only in (None, name):
            table.add_row(name, *measure(load_config(overrides), arguments.repeats))
    Console(width=120).print(table)


def cases(quick: bool) -> list[tuple[str, list[str]]]:
    """K2 from many nodes (few microbatches) to few, then the same with fewer stages."""
    nodes = [512, 256, 128, 64] + ([] if quick else [32])
    sizes = [(f"k2, {n} nodes", ["experiment=k2", f"layout.nodes={n}"]) for n in nodes]
    batch = "train.global_batch_tokens=8388608"
    stages = [
        (f"k2, pp {pp}", ["experiment=k2", f"layout.pp={pp}", "layout.nodes=null", batch])
        for pp in (2, 4, 8, 16)
    ]
    return sizes + stages


def measure(config: Config, repeats: int) -> list[str]:
    """A row: the parts one by one, then the whole as `k2train plan` runs it."""
    build, program = best(lambda: priced(config), repeats)
    prove, _ = best(lambda: validate(program.schedule), repeats)
    run, simulation = best(lambda: simulate(program.schedule, program.costs), repeats)
    states = all_stage_states(program)
    memory, _ = best(lambda: stage_memories(program, simulation, states), repeats)
    whole, _ = best(lambda: build_plan(config), repeats)
    actions = sum(map(len, program.schedule.stages))
    numbers = [f"{value:.2f}" for value in (build, prove, run, memory, whole, whole / actions * 1e6)]
    return [str(program.schedule.num_microbatches), f"{actions:,}", *numbers]


def priced(config: Config) -> Program:
    """The program and its costs."""
    program = compile_program(config)
    _ = program.costs
    return program


def best(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """(seconds of the fastest run, its result)."""
    fastest, result = float("inf"), None
    for _ in range(repeats):
        started = time.process_time()
        result = call()
        fastest = min(fastest, time.process_time() - started)
    return fastest, result


if __name__ == "__main__":
    main()
