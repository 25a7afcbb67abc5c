"""The shape of the package in numbers, of this tree or of another commit's.

    python tools/structure.py                   a table of this tree
    python tools/structure.py OLD NEW           trees side by side, each an unpacked commit
    python tools/structure.py --json FILE       the same with every name, in a file
    python tools/structure.py --no-trace        without the runs, which need what the package needs

What is counted:

- **lines** of files, and of functions from `def` to their last line, docstrings included. Nested
  functions count too.
- **import cycles**: groups of modules that import one another: by imports at the top of files, and
  by those in functions too.
- **names**: places in the code, not in prose, that say `is_moe`, one of MLA's widths, the string
  "muon", or the name of a schedule kind. "k2" is left out of the kinds, because it also names a
  model, a layout and a preset.
- **hops** of the config: functions outside `k2train/config` that are given a config or one of its
  sections as an argument, between the words and the first action that the executor runs. They are
  counted on a run, not read off the source: `k2train train` of one small step under
  `sys.setprofile`, and `k2train plan` of the same config to its end. A function that is called
  often counts once.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

WIDTHS = frozenset({"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"})
KINDS = frozenset({"gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "dualpipe", "dualpipe_v"})
WORDS = ["experiment=tiny", "train.steps=1", "train.device=cpu"]
"""The run that is traced."""

TRACE = """
import json, sys, threading
words, command, out = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
from k2train.cli.main import main
import k2train.runtime.executor
seen, done = {}, False
def profile(frame, event, argument):
    global done
    name = frame.f_globals.get("__name__", "")
    if done or event != "call" or frame.f_code.co_filename == "<string>" or not name.startswith("k2train.") or name.startswith("k2train.config"):
        return
    code = frame.f_code
    if name == "k2train.runtime.executor" and code.co_name == "run_actions":
        done = True
        return
    taken = [frame.f_locals.get(key) for key in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
    if any(type(value).__module__.startswith("k2train.config") for value in taken):
        seen.setdefault(f"{name}.{code.co_qualname}" if hasattr(code, "co_qualname") else f"{name}.{code.co_name}", len(seen))
threading.setprofile(profile)
sys.setprofile(profile)
status = main([command, *words])
sys.setprofile(None)
json.dump([status, sorted(seen, key=seen.get)], open(out, "w"))
"""
"""Runs a command of the package in a fresh interpreter and writes its status and the functions in
order of their first call."""


def modules(root: Path) -> dict[str, ast.Module]:
    """The syntax tree of every module of a tree, by its dotted name."""
    paths = sorted((root / "k2train").rglob("*.py"))
    names = (
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths
    )
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


def spread(values: Iterable[int]) -> dict[str, float]:
    """Count, sum, median, ninth decile and largest of some sizes."""
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "sum": sum(ordered),
        "median": statistics.median_high(ordered),
        "p90": ordered[int(0.9 * (len(ordered) - 1))],
        "max": ordered[-1],
    }


def function_lines(trees: Iterable[ast.Module]) -> Iterator[int]:
    """The lines of every function."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1


def imports(tree: ast.Module, known: Iterable[str], deferred: bool) -> set[str]:
    """The modules of the package that a module imports, those for type checkers alone left out.

    deferred: count imports inside functions, too.
    """
    names = set(known)
    found: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        if isinstance(node, ast.FunctionDef) and not deferred:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & names) or ({node.module} & names)
        stack += ast.iter_child_nodes(node)
    return found


def cycles(trees: dict[str, ast.Module], deferred: bool) -> list[list[str]]:
    """Groups of modules that reach one another by imports."""
    edges = {name: imports(tree, trees, deferred) - {name} for name, tree in trees.items()}
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        stack = [start]
        while stack:
            new = edges[stack.pop()] - seen
            seen |= new
            stack += new
        reach[start] = seen
    groups = {
        frozenset(other for other in reach[name] if name in reach[other])
        for name in reach
        if name in reach[name]
    }
    return sorted(sorted(group) for group in groups)


def mentions(trees: dict[str, ast.Module], names: frozenset[str], strings: bool) -> dict[str, int]:
    """Places in code that use one of some names (or string constants), and how many modules have
    one."""
    places: dict[str, int] = defaultdict(int)
    for module, tree in trees.items():
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if strings:
                places[module] += (
                    isinstance(node, ast.Constant) and node.value in names and id(node) not in prose
                )
            else:
                places[module] += any(
                    getattr(node, key, None) in names for key in ("id", "attr", "arg", "name")
                )
    return {"places": sum(places.values()), "files": sum(map(bool, places.values()))}


def traced(root: Path, command: str, folder: Path) -> list[str]:
    """Functions that a command of the tree hands its config to, in order of their first call.

    Raises RuntimeError where the command fails.
    """
    out = folder / f"{command}.json"
    words = [*WORDS, f"run_dir={folder / 'run'}"] if command == "train" else WORDS
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TRACE, json.dumps(words), command, str(out)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    if done.returncode or not out.exists():
        raise RuntimeError(f"k2train {command} of {root} failed:\n{done.stderr[-2000:]}")
    status, functions = json.loads(out.read_text())
    if status:
        raise RuntimeError(f"k2train {command} of {root} ended with status {status}:\n{done.stderr[-2000:]}")
    return list(functions)


def hops(root: Path) -> dict[str, object]:
    """The config's way through train and plan, and which functions both share."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        train, plan = (traced(root, command, Path(folder)) for command in ("train", "plan"))
    return {
        "train": len(train),
        "train rooms": len({name.split(".")[1] for name in train}),
        "plan": len(plan),
        "shared": len(set(train) & set(plan)),
        "names": {"train": train, "plan": plan},
    }


def measure(root: Path, trace: bool = True) -> dict[str, dict[str, object]]:
    """Everything about one tree."""
    trees = modules(root)
    lines = [len(path.read_text().splitlines()) for path in (root / "k2train").rglob("*.py")]
    result: dict[str, dict[str, object]] = {
        "files": {**spread(lines)},
        "functions": {**spread(function_lines(trees.values()))},
        "import cycles": {
            "at the top of modules": len(top := cycles(trees, deferred=False)),
            "inside functions too": len(deep := cycles(trees, deferred=True)),
            "names": [*top, *deep],
        },
        "is_moe": {**mentions(trees, frozenset({"is_moe"}), strings=False)},
        "MLA's widths": {**mentions(trees, WIDTHS, strings=False)},
        '"muon"': {**mentions(trees, frozenset({"muon"}), strings=True)},
        "schedule kinds": {**mentions(trees, KINDS, strings=True)},
    }
    return {**result, "config hops": hops(root)} if trace else result


def main() -> None:
    """Measure the trees that are named and print them side by side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "roots", nargs="*", type=Path, default=[Path(__file__).resolve().parents[1]], help="checkouts"
    )
    parser.add_argument("--json", type=Path, help="write everything, names included, to a file")
    parser.add_argument("--no-trace", action="store_true", help="leave out the traced runs")
    options = parser.parse_args()
    results = [measure(root.resolve(), trace=not options.no_trace) for root in options.roots]
    if options.json:
        options.json.write_text(
            json.dumps({str(r): m for r, m in zip(options.roots, results, strict=True)}, indent=1)
        )
    print("| measure | " + " | ".join(str(root) for root in options.roots) + " |")
    print("|---|" + "---:|" * len(results))
    for measure_name, values in results[0].items():
        for key in values:
            if key != "names":
                print(
                    f"| {measure_name}: {key} | "
                    + " | ".join(f"{r[measure_name][key]:,}" for r in results)
                    + " |"
                )


if __name__ == "__main__":
    main()
