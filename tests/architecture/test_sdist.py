"""The source archive is a tree that its own tests and `make docs` can work with."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def named_in_the_readme() -> set[str]:
    """Files and folders of the README's tree and of its links."""
    text = (ROOT / "README.md").read_text()
    tree = re.findall(r"^([\w./-]+)", text.split("```text", 1)[1].split("```", 1)[0], re.M)
    links = re.findall(r"\]\(([\w./-]+)\)", text)
    return {name.rstrip("/") for name in (*tree, *links)}


def test_the_source_archive_has_whatever_the_readme_names(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (archive,) = tmp_path.glob("k2train-*.tar.gz")
    with tarfile.open(archive) as files:
        packed = [Path(name.split("/", 1)[1]) for name in files.getnames() if "/" in name]
    there = {str(path) for file in packed for path in (file, *file.parents)}
    assert sorted(named_in_the_readme() - there) == []
