"""Whether the sources are easy to read: line widths, legends of shape letters, and references that
lead somewhere.

    python tools/reading.py                 a table: how many findings each room has
    python tools/reading.py --list layout   every finding in files whose path has a word

Five rules, each a function from a file to its findings:

    width       a docstring or comment is at most 100 columns wide, unless a URL makes it wider
    skip        no line is kept from the formatter
    legend      the head of a file explains the letters of its shapes: "Letters: T tokens."
    path        a file that a docstring, a comment or a page names exists
    name        a dotted name in backticks, `layout.tensors.model_tensors`, exists

Only the syntax is read; nothing is imported. tests/architecture/test_reading.py holds the tree to
the rules.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100
PLACES = ("", "k2train", "docs", "tests", "benchmarks", "configs", "launch", "tools", "examples")
"""Folders from which a path in prose may be meant."""
HUGGING_FACE = ("model.layers.", "model.safetensors.")
"""Beginnings of Hugging Face's names, which look like those of our modules."""

_SUFFIX = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*_([A-Z]+)")
_LEGEND = re.compile(r"\b(?:Letters|[Ss]uffixes):(.*)", re.DOTALL)
_PATH = re.compile(r"(?<![\w/.:~{<*-])((?:[\w-]+/)*[\w-]+\.(?:py|md|yaml|sh|toml|cpp|sbatch))\b(?![\w/*{<(])")
_DECISION = re.compile(r"\b(?:[Dd]ecisions?[ /]|decisions/)(\d{4})\b")
_DOTTED = re.compile(r"`(?:k2train\.)?([a-z_]\w*(?:\.\w+)+)(?:\(\))?`")


def python_files(*folders: str) -> list[Path]:
    """The Python files below folders of the tree, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Every line of docstrings, comments and pages: (line number, text)."""
    text = path.read_text()
    if path.suffix != ".py":
        yield from enumerate(text.splitlines(), 1)
        return
    lines = text.splitlines()
    for node in ast.walk(parsed(path)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield from (
                (number, lines[number - 1]) for number in range(node.lineno, (node.end_lineno or 0) + 1)
            )
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        # What follows code and speaks to a tool cannot stand anywhere else.
        if token.type == tokenize.COMMENT and not token.string.startswith(("# type:", "# noqa:")):
            yield token.start[0], " " * token.start[1] + token.string


def wide_lines(path: Path) -> list[str]:
    """Docstrings and comments that are too wide, as `line: width`; words to tools are no prose."""
    wide = {
        number: len(line)
        for number, line in prose(path)
        if len(line) > WIDTH and "://" not in line and not re.search(r"# (type: ignore|noqa)", line)
    }
    return [f"{number}: {width} columns" for number, width in sorted(wide.items())]


def skips(path: Path) -> list[str]:
    """Lines that the formatter is told to leave."""
    marks = ("fmt: skip", "fmt: off")
    return [
        f"{number}: {line.strip()}" for number, line in prose(path) if any(mark in line for mark in marks)
    ]


def suffix_letters(path: Path) -> set[str]:
    """The letters of every shape suffix in a file: x_TD has T and D."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        names |= {
            getattr(node, key, "") or ""
            for key in ("id", "attr", "arg", "name")
            if isinstance(getattr(node, key, ""), str)
        }
    matches = (_SUFFIX.fullmatch(name) for name in names)
    return {letter for match in matches if match for letter in match.group(1)}


def missing_letters(path: Path) -> list[str]:
    """Letters of shape suffixes that the file's head does not explain."""
    legend = _LEGEND.search(ast.get_docstring(parsed(path)) or "")
    explained = set(re.findall(r"\b([A-Z])\b", legend.group(1))) if legend else set()
    return sorted(suffix_letters(path) - explained)


def lost_paths(path: Path) -> list[str]:
    """Files and decisions that prose names and the tree does not have."""
    found = []
    for number, line in prose(path):
        found += [f"{number}: {name}" for name in _PATH.findall(line) if not _exists(name, path.parent)]
        for decision in _DECISION.findall(line):
            if not list((ROOT / "docs" / "decisions").glob(f"{decision}-*.md")):
                found.append(f"{number}: decision {decision}")
    return found


def lost_names(path: Path) -> list[str]:
    """Dotted names of the package that prose quotes and nobody defines.

    Two parts alone, as in `layout.pp`, may be a key of the config, so three are asked for. Keys of
    three parts, as in `data.tokenizer.path`, and Hugging Face's names are let through.
    """
    found = []
    for number, line in prose(path):
        for name in _DOTTED.findall(line):
            room, module, *rest = name.split(".")
            other = not rest or rest[0] in config_keys() or name.startswith(HUGGING_FACE)
            if room in rooms() and not other and not _defined(room, module, rest[0]):
                found.append(f"{number}: {name}")
    return found


@functools.cache
def config_keys() -> frozenset[str]:
    """The names of all keys of the config."""
    classes = (
        node
        for path in python_files("k2train/config")
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
    )
    fields = (item.target for node in classes for item in node.body if isinstance(item, ast.AnnAssign))
    return frozenset(target.id for target in fields if isinstance(target, ast.Name))


@functools.cache
def rooms() -> frozenset[str]:
    """The names of the package's rooms."""
    return frozenset(folder.name for folder in (ROOT / "k2train").iterdir() if folder.is_dir())


@functools.cache
def file_names() -> frozenset[str]:
    """The name of every file in the tree's own folders, without its folder."""
    return frozenset(path.name for place in PLACES if place for path in (ROOT / place).rglob("*"))


def _exists(name: str, folder: Path) -> bool:
    """Whether `name` is a file here, or stands for many (`configs/GROUP/NAME.yaml`), or lies below
    a folder that is not ours (`megatron/core/x.py`)."""
    yaml_of_a_user = name.endswith(".yaml") and not name.startswith("configs/")
    if yaml_of_a_user:
        return True
    if "/" not in name:
        return name in file_names() or (ROOT / name).exists()
    if Path(name).stem.isupper():
        return True
    if any((base / name).exists() for base in (folder, *(ROOT / place for place in PLACES))):
        return True
    first = name.split("/")[0]
    return first not in rooms() and not (ROOT / first).exists()


def _defined(room: str, module: str, name: str) -> bool:
    """Whether a module of a room defines a name at its top, or in a class whose name the room
    exports."""
    path = ROOT / "k2train" / room / f"{module}.py"
    return name in top_names(path) if path.exists() else module in top_names(path.with_name("__init__.py"))


@functools.cache
def top_names(path: Path) -> set[str]:
    """What a module defines or imports at its top."""
    if not path.exists():
        return set()
    names: set[str] = set()
    for node in parsed(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


Rule = Callable[[Path], list[str]]
PYTHON_RULES: dict[str, Rule] = {"width": wide_lines, "skip": skips, "legend": missing_letters}
RULES: dict[str, Rule] = {**PYTHON_RULES, "path": lost_paths, "name": lost_names}


def files_for(rule: str) -> list[Path]:
    """The files that a rule is about: those of Python alone, or pages too."""
    return [path for path in all_files() if path.suffix == ".py" or rule not in PYTHON_RULES]


def room_of(path: Path) -> str:
    """The folder that a file is counted under: `k2train/ops`, `tests`, `docs`."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts[:2]) if parts[0] == "k2train" and len(parts) > 2 else parts[0]


def all_files() -> list[Path]:
    """Every Python file and every page of the tree."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    return [*python_files("k2train", "tests", "benchmarks", "tools", "examples"), *sorted(pages)]


def findings() -> list[tuple[Path, str, str]]:
    """Everything that the rules find: file, rule and what was found."""
    return [
        (path, rule, found)
        for rule, check in RULES.items()
        for path in files_for(rule)
        for found in check(path)
    ]


def table(found: list[tuple[Path, str, str]]) -> str:
    """How many findings each room has under each rule."""
    counts = Counter((room_of(path), rule) for path, rule, _ in found)
    lines = [f"{'':24}" + "".join(f"{rule:>8}" for rule in RULES)]
    for room in sorted({room_of(path) for path in all_files()}):
        lines.append(f"{room:24}" + "".join(f"{counts[room, rule] or '':>8}" for rule in RULES))
    return "\n".join(lines)


def main() -> None:
    """Print the table, or the findings that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--list", metavar="WORD", help="print what is found in files whose path has a word")
    wanted = parser.parse_args().list
    found = findings()
    if wanted is None:
        print(table(found))
    for path, rule, what in found:
        if wanted is not None and wanted in str(path.relative_to(ROOT)):
            print(f"{path.relative_to(ROOT)}: {rule}: {what}")


if __name__ == "__main__":
    main()
