"""The default corpus: the interpreter's own library, built once, the same on every call."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from k2train.config.data import DataConfig
from k2train.config.errors import ConfigError
from k2train.data import stdlib, writer
from k2train.data.corpus import build_corpus
from k2train.data.indexed import open_indexed
from k2train.data.sidecar import read_sidecar
from k2train.data.stdlib import build_stdlib, read_sources
from k2train.data.tokenizer import ByteTokenizer


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small library directory with everything that must be left out."""
    root = tmp_path / "lib"
    files = {f"module{i}.py": f"value = {i}\n" * 50 for i in range(30)}
    files |= {
        "package/inner.py": "inner = 1\n",
        "test/test_a.py": "no",
        "package/tests/b.py": "no",
        "site-packages/c.py": "no",
        "__pycache__/d.py": "no",
        "_sysconfigdata_x.py": "no",
        "e.txt": "no",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    return root


def test_sources_are_the_librarys_modules_and_nothing_else(library: Path) -> None:
    names = [name for name, _ in read_sources(library)]
    assert sorted(names) == sorted([*(f"module{i}.py" for i in range(30)), "package/inner.py"])
    assert names != sorted(names), "in path order the held-out files would be the end of the alphabet"
    assert names == [name for name, _ in read_sources(library)]


def test_a_change_of_the_library_makes_another_corpus(tmp_path: Path, library: Path) -> None:
    first = build_stdlib(tmp_path / "data", ByteTokenizer(), library)
    assert build_stdlib(tmp_path / "data", ByteTokenizer(), library) == first
    before = Path(f"{first}.idx").stat().st_mtime_ns
    build_stdlib(tmp_path / "data", ByteTokenizer(), library)
    assert Path(f"{first}.idx").stat().st_mtime_ns == before, "built again without need"
    (library / "module3.py").write_text("value = 3\n" * 51)
    assert build_stdlib(tmp_path / "data", ByteTokenizer(), library) != first


def test_two_that_build_it_at_once_do_not_disturb_each_other(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts and ends between the first one's last write and its rename, and is open
    while that happens."""
    publish, opened = writer.publish, []

    def interleaved(staged: Path, target: Path, same: bool) -> None:
        monkeypatch.setattr(stdlib, "publish", publish)
        opened.append(open_indexed(str(build_stdlib(tmp_path / "data", ByteTokenizer(), library)), "prefix"))
        publish(staged, target, same=same)

    monkeypatch.setattr(stdlib, "publish", interleaved)
    prefix = build_stdlib(tmp_path / "data", ByteTokenizer(), library)
    alone = build_stdlib(tmp_path / "alone", ByteTokenizer(), library)
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"{prefix}{suffix}").read_bytes() == Path(f"{alone}{suffix}").read_bytes()
    assert len(list((tmp_path / "data").iterdir())) == 3, "something half-written was left"
    both = zip(opened[0], open_indexed(str(alone), "prefix"), strict=True)
    assert all((ours == theirs).all() for ours, theirs in both)


def test_what_one_has_built_stays_readable_while_another_renames(tmp_path: Path, library: Path) -> None:
    """The other is stopped at its last rename, by there being nothing to rename, so at the moment
    most is in motion."""
    prefix = build_stdlib(tmp_path / "data", ByteTokenizer(), library)
    with pytest.raises(FileNotFoundError):
        writer.publish(tmp_path / "other", Path(f"{prefix}"), same=True)
    assert Path(f"{prefix}.idx").is_file()


def test_a_directory_without_sources_or_that_cannot_be_written_is_named(
    tmp_path: Path, library: Path
) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="holds none"):
        build_stdlib(tmp_path / "data", ByteTokenizer(), tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        build_stdlib(tmp_path / "file" / "data", ByteTokenizer(), library)


def test_this_machines_library_gives_millions_of_tokens_and_a_held_out_set(tmp_path: Path) -> None:
    corpus = build_corpus(DataConfig(name="stdlib", cache_dir=str(tmp_path)), 256, 0, 257)
    assert corpus.num_tokens("train") > 5_000_000
    assert corpus.num_samples("valid") * 256 > 200_000
    prefix = next(tmp_path.glob("*.idx")).with_suffix("")
    facts = read_sidecar(prefix, "prefix")
    assert facts is not None
    assert facts.num_documents == corpus.num_documents("train") + corpus.num_documents("valid")
    names = {name for name, _ in read_sources(Path(sysconfig.get_path("stdlib")))}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert len(names) == facts.num_documents
