"""What a release says of itself is the same everywhere: package, citation, changelog, command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from k2train import __version__
from k2train.cli.main import main, usage

ROOT = Path(__file__).resolve().parents[2]


def test_the_citation_has_what_its_format_asks_for_and_the_package_s_version() -> None:
    """`cff-version`, `message`, `title` and `authors` are the required keys of the schema 1.2.0."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["message"]
    assert citation["title"].startswith("k2train")
    assert all(author["name"] for author in citation["authors"])
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"


def test_the_changelog_has_the_version_and_only_the_kinds_of_changes_that_its_form_knows() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([^\]]+)\]", text, re.M)
    assert versions[0] == "Unreleased"
    assert __version__ in versions
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_command_tells_its_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out == f"k2train {__version__}\n"


def test_the_help_names_the_word_for_the_version() -> None:
    assert "k2train --version" in usage()
