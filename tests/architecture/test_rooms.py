"""The house: pure rooms import without torch, the design's table is the contract, the README's tree
is the disk's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PURE = [
    "config",
    "telemetry",
    "architecture",
    "update_rules",
    "layout",
    "schedule",
    "estimate",
    "program",
    "planner",
]


@pytest.mark.parametrize("room", PURE)
def test_a_pure_room_imports_without_torch(room: str) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "k2train" / room).rglob("*.py"))
    ]
    code = "import sys\n" + "".join(f"import {name.removesuffix('.__init__')}\n" for name in modules)
    code += "heavy = {'torch', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_no_module_keeps_state_behind_a_global_statement() -> None:
    offenders = [
        path
        for path in (ROOT / "k2train").rglob("*.py")
        if re.search(r"^\s*global \w", path.read_text(), re.M)
    ]
    assert not offenders


def test_no_file_is_a_house_of_its_own() -> None:
    sizes = {path: len(path.read_text().splitlines()) for path in (ROOT / "k2train").rglob("*.py")}
    assert {path: lines for path, lines in sizes.items() if lines > 500} == {}


def test_the_tree_in_the_readme_matches_the_disk() -> None:
    text = (ROOT / "README.md").read_text()
    block = text.split("```text", 1)[1].split("```", 1)[0]
    named = set(re.findall(r"^([\w./-]+)", block, re.M))
    rooms = {
        f"k2train/{path.name}/"
        for path in (ROOT / "k2train").iterdir()
        if path.is_dir() and path.name != "__pycache__"
    }
    assert rooms <= named
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_every_relative_link_in_the_documents_leads_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken
