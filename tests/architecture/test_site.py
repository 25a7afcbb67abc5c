"""What the documentation site is built from: every page and every room is on it, and no link leaves
it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tools import rooms, site_pages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make docs` hands to MkDocs."""
    folder = tmp_path_factory.mktemp("site") / "docs"
    site_pages.write_site(folder)
    return folder


def test_every_page_is_in_the_order_once(site: Path) -> None:
    config = yaml.safe_load((site / "mkdocs.yml").read_text())
    listed = [page for group in config["nav"] for pages in group.values() for page in pages]
    there = {str(path.relative_to(site / "pages")) for path in (site / "pages").rglob("*.md")}
    assert sorted(listed) == sorted(there)


def test_every_module_has_its_docstrings_on_a_page(site: Path) -> None:
    pages = "".join(path.read_text() for path in (site / "pages" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: (\S+)$", pages, re.M))
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in site_pages.rooms()
        for path in room.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == modules


def test_no_relative_link_leaves_the_site(site: Path) -> None:
    pages = (site / "pages").resolve()
    leaving = [
        f"{page.name} -> {target}"
        for page in pages.rglob("*.md")
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
        if "reference" not in page.parts and not (page.parent / target).resolve().is_relative_to(pages)
    ]
    assert leaving == []


def test_a_link_to_a_module_becomes_a_link_to_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[optimizer](ROOT/k2train/optim/optimizer.py), [env](ROOT/launch/env.sh)".replace("ROOT", str(ROOT))
    )
    monkeypatch.setattr(site_pages, "DOCS", tmp_path)
    assert site_pages.relinked(page) == "[optimizer](reference/optim.md), env"


def test_the_picture_of_the_rooms_is_drawn_from_the_contract() -> None:
    """A room that came or went asks for `make pictures`."""
    assert (ROOT / "docs" / "pictures" / "rooms.svg").read_text() == rooms.picture()
