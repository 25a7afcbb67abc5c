"""What the documentation site is built from: `make docs` runs this, then MkDocs.

    python tools/site_pages.py build/docs

Writes into the folder:

    pages/      docs/ as it is, with a page of docstrings for each room in pages/reference
    mkdocs.yml  the tree's mkdocs.yml, with the order of the pages

The pages of docstrings hold directives that mkdocstrings fills by reading the sources; nothing of
the package is imported. Links from docs/ to sources become links to the page of their room. Links
to other files of the tree, which the site does not have, become plain names.
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "k2train"
PAGES = {
    "Start": ["README.md", "design.md", "glossary.md", "extending.md"],
    "Using it": ["launch.md", "data.md", "huggingface.md"],
    "How it works": [
        "schedule.md",
        "plan.md",
        "rehearsal.md",
        "memory.md",
        "optimizer.md",
        "interfaces.md",
        "k2.md",
    ],
    "Measured": ["benchmarks.md", "structure.md"],
}
"""The order of the pages. A page that is not named here is listed under "Further pages"."""

_LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def rooms() -> list[Path]:
    """The folders of the package, in alphabetical order."""
    return sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


def room_page(room: Path) -> str:
    """The page of a room: its own docstring, then that of every module."""
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    modules = sorted(path for path in room.rglob("*.py") if path.name != "__init__.py")
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules)
    return "\n\n".join([f"# {room.name}", doc, *(f"::: {name}" for name in names)]) + "\n"


def relinked(page: Path) -> str:
    """The text of a page of docs/, with links that leave docs/ replaced."""

    def replaced(match: re.Match[str]) -> str:
        text, target = match.group(1), (page.parent / match.group(2)).resolve()
        if target.is_relative_to(DOCS) or not target.exists():
            return match.group(0)
        parts = target.relative_to(ROOT).parts
        if parts[0] == PACKAGE.name and len(parts) > 1:
            up = "../" * (len(page.relative_to(DOCS).parts) - 1)
            return f"[{text}]({up}reference/{parts[1]}.md)"
        return text

    return _LINK.sub(replaced, page.read_text())


def order() -> list[dict[str, list[str]]]:
    """The site's pages in order: those above, further ones, decisions, rooms."""
    groups = {name: [page for page in pages if (DOCS / page).exists()] for name, pages in PAGES.items()}
    placed = {page for pages in groups.values() for page in pages}
    groups["Further pages"] = sorted(path.name for path in DOCS.glob("*.md") if path.name not in placed)
    groups["Decisions"] = sorted(f"decisions/{path.name}" for path in (DOCS / "decisions").glob("*.md"))
    groups["Reference"] = [f"reference/{room.name}.md" for room in rooms()]
    return [{name: pages} for name, pages in groups.items() if pages]


def write_site(folder: Path) -> None:
    """Write pages and configuration; what stood there before is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder / "pages")
    for page in DOCS.rglob("*.md"):
        (folder / "pages" / page.relative_to(DOCS)).write_text(relinked(page))
    (folder / "pages" / "reference").mkdir()
    for room in rooms():
        (folder / "pages" / "reference" / f"{room.name}.md").write_text(room_page(room))
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT)]
    (folder / "mkdocs.yml").write_text(yaml.safe_dump({**config, "nav": order()}, sort_keys=False))


if __name__ == "__main__":
    write_site(Path(sys.argv[1]))
