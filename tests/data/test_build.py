"""`build_dataset`: every line becomes a document or is named, whatever the number of workers."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2train.config.data import CorpusConfig, DataBuildConfig, DataConfig, TokenizerConfig
from k2train.config.errors import ConfigError
from k2train.data import readers, sources
from k2train.data.build import BuildReport, Progress, build_dataset
from k2train.data.corpus import build_corpus
from k2train.data.indexed import open_indexed
from k2train.data.readers import LineCount, parse_json_line, read_unit
from k2train.data.tokenizer import ByteTokenizer


def build(output: Path, *inputs: Path, workers: int = 1, **options: object) -> BuildReport:
    config = DataBuildConfig(
        input=tuple(map(str, inputs)),
        output=str(output),
        workers=workers,
        **options,  # type: ignore[arg-type]
    )
    return build_dataset(config)


def documents(prefix: str | Path) -> list[str]:
    """The text of every document; each must end in one end-of-document id and hold no other."""
    indexed = open_indexed(str(prefix), "prefix")
    texts = []
    for i in range(len(indexed)):
        ids = np.array(indexed[i])
        assert np.flatnonzero(ids == 256).tolist() == [len(ids) - 1]
        texts.append(ByteTokenizer().decode(ids).decode())
    assert indexed.document_indices.tolist() == list(range(len(indexed) + 1))
    return texts


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
    )
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Every kind of file, nested, with a bad line here and there."""
    root = tmp_path / "in"
    (root / "b").mkdir(parents=True)
    write_jsonl(root / "a.jsonl", [f"jsonl {i} ü" for i in range(5)])
    with gzip.open(root / "b" / "c.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write('{"text": "zipped"}\n{"text": null}\n')
    (root / "b" / "d.txt").write_text("first\nline\n<|endoftext|>\nsecond")
    (root / "e.txt").write_bytes(b"fine\nbad \xff byte\n")
    pq.write_table(
        pa.table({"text": ["p0", None, "p2", "p3"], "id": [1, 2, 3, 4]}), root / "f.parquet", row_group_size=2
    )
    (root / "notes.md").write_text("passed over")
    (root / ".hidden.txt").write_text("passed over")
    return root


def test_every_kind_of_file_is_read_in_the_order_of_its_path(tmp_path: Path, mixed: Path) -> None:
    report = build(tmp_path / "out", mixed)
    assert documents(tmp_path / "out") == [
        *(f"jsonl {i} ü" for i in range(5)),
        "zipped",
        "first\nline\n",
        "second",
        "p0",
        "p2",
        "p3",
    ]
    assert [(Path(bad.path).name, bad.line, bad.reason) for bad in report.bad_lines] == [
        ("c.jsonl.gz", 2, "'text' is null, not text"),
        ("e.txt", 2, "not UTF-8: byte 0xff; the document from line 1 is left out"),
        ("f.parquet", 2, "'text' is null, not text"),
    ]
    listed = Path(str(report.bad_file)).read_text().splitlines()
    assert len(listed) == report.sidecar.num_bad_lines == 3
    assert listed[0] == f"{mixed}/b/c.jsonl.gz:2: 'text' is null, not text"


def test_the_side_car_counts_what_is_there(tmp_path: Path, mixed: Path) -> None:
    facts = build(tmp_path / "out", mixed).sidecar
    texts = documents(tmp_path / "out")
    assert facts.num_documents == len(texts)
    assert facts.num_bytes == sum(len(text.encode()) for text in texts)
    assert facts.num_tokens == facts.num_bytes + facts.num_documents
    assert (facts.vocab_size, facts.eod_id) == (257, 256)


def test_any_number_of_workers_and_any_cut_make_the_same_bytes(
    tmp_path: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad lines and their numbers included, across byte ranges that cut lines in two."""
    lines = [json.dumps({"text": f"{i} " + "é" * (i % 90)}) for i in range(400)]
    lines[37] = "{"
    lines[250] = '{"other": 1}'
    (mixed / "long.jsonl").write_text("\n".join(lines))
    build(tmp_path / "whole", mixed)
    monkeypatch.setattr(sources, "TASK_BYTES", 700)
    for name, workers in (("serial", 1), ("parallel", 3)):
        report = build(tmp_path / name, mixed, workers=workers)
        assert [bad.line for bad in report.bad_lines if bad.path.endswith("long.jsonl")] == [38, 251]
        for suffix in (".bin", ".idx", ".json", ".bad.log"):
            assert (tmp_path / f"{name}{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


@given(st.lists(st.text(max_size=30), max_size=12), st.integers(1, 40), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_byte_ranges_read_every_line_once(
    tmp_path: Path, texts: list[str], step: int, last_end: bool
) -> None:
    data = b"\n".join(json.dumps({"text": text}).encode() for text in texts) + (
        b"\n" if texts and last_end else b""
    )
    file = tmp_path / "x.jsonl"
    file.write_bytes(data)
    found = []
    for start in range(0, max(len(data), 1), step):
        unit = sources.Unit(str(file), "jsonl", False, start, min(start + step, len(data)), step)
        found += list(read_unit(unit, "text", LineCount()))
    assert [item[1] if isinstance(item, tuple) else "" for item in found] == texts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{bad}", "not JSON: Expecting property name"),
        (b'{"text": "cut', "not JSON: Unterminated string"),
        (b"", "blank line"),
        (b"   \n", "blank line"),
        (b"[1]", "a list"),
        (b"null", "null"),
        (b"3", "a number"),
        (b'{"body": "x"}', "no key 'text'"),
        (b'{"text": 3}', "a number"),
        (b'{"text": ["x"]}', "a list"),
        (b'{"text": true}', "true or false"),
        (b'{"text": ""}', "is empty"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "not UTF-8: byte 0xff at byte 11"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", ""),
    ],
)
def test_each_way_for_a_line_to_be_wrong_is_named(line: bytes, reason: str) -> None:
    text, found = parse_json_line(line, "text")
    assert text is None
    assert reason in found
    assert found


def test_a_byte_order_mark_and_windows_line_ends_are_no_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert build(tmp_path / "out", tmp_path / "a.jsonl").bad_file is None
    assert documents(tmp_path / "out") == ["one", "two"]


def test_a_bad_line_stops_the_build_if_asked_to_and_leaves_nothing(tmp_path: Path, mixed: Path) -> None:
    for workers in (1, 2):
        with pytest.raises(ConfigError, match=r"c\.jsonl\.gz:2: 'text' is null"):
            build(tmp_path / "out" / "x", mixed, workers=workers, on_bad_line="stop")
        assert list((tmp_path / "out").iterdir()) == []


def test_a_long_text_file_is_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 50)
    lines = [f"line {i}\n" for i in range(40)]
    (tmp_path / "a.txt").write_text("".join(lines))
    build(tmp_path / "out", tmp_path / "a.txt")
    found = documents(tmp_path / "out")
    assert "".join(found) == "".join(lines)
    assert len(found) > 1
    assert all(text.endswith("\n") and len(text) < 60 for text in found)


class StoppedError(Exception):
    """Stands for a failure in the middle of a build."""


class StopAtFirstTask(Progress):
    def advance(self, input_bytes: int, num_documents: int, num_tokens: int) -> None:
        raise StoppedError


def test_an_interrupted_build_leaves_the_old_dataset_as_it_was(tmp_path: Path, mixed: Path) -> None:
    out = tmp_path / "out" / "x"
    build(out, write_jsonl(tmp_path / "old.jsonl", ["old"]))
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    config = DataBuildConfig(input=(str(mixed),), output=str(out), workers=1, overwrite=True)
    with pytest.raises(StoppedError):
        build_dataset(config, StopAtFirstTask())
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before


def test_an_existing_output_is_replaced_only_if_asked_to(tmp_path: Path, mixed: Path) -> None:
    out = tmp_path / "out"
    build(out, mixed)
    assert Path(f"{out}.bad.log").exists()
    clean = write_jsonl(tmp_path / "clean.jsonl", ["new"])
    with pytest.raises(ConfigError, match="exists") as caught:
        build(out, clean)
    assert "overwrite=true" in caught.value.remedy
    build(out, clean, overwrite=True)
    assert documents(out) == ["new"]
    assert not Path(f"{out}.bad.log").exists(), "the bad lines of the dataset that was replaced"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_damaged_file_is_named_with_the_place(tmp_path: Path, workers: int) -> None:
    whole = gzip.compress(
        "".join(json.dumps({"text": str(random.Random(i).random())}) + "\n" for i in range(2000)).encode()
    )
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    write_jsonl(tmp_path / "b.jsonl", ["x" * 9_000_000])
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz: cannot be read after line \d+"):
        build(tmp_path / "out", tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl", workers=workers)


def test_inputs_that_cannot_work_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "ids.parquet")
    (tmp_path / "none.txt").write_text("")
    good = write_jsonl(tmp_path / "good.jsonl", ["x"])
    cases: list[tuple[tuple[Path, ...], dict[str, Any], str]] = [
        ((tmp_path / "missing.txt",), {}, r"input\[0\]=.*not found"),
        ((good, tmp_path / "x.csv"), {}, r"input\[1\]=.*no kind that can be read"),
        ((tmp_path / "empty",), {}, "holds no .txt"),
        ((tmp_path / "bad.parquet",), {}, "not a readable Parquet file"),
        ((tmp_path / "ids.parquet",), {}, "text_key=text: is no column"),
        ((tmp_path / "ids.parquet",), {"text_key": "id"}, "holds int64"),
        ((tmp_path / "none.txt",), {}, "holds no document; the first of 1 bad lines"),
        ((good, good), {}, "named twice"),
    ]
    for inputs, options, message in cases:
        with pytest.raises(ConfigError, match=message):
            build(tmp_path / "out" / "x", *inputs, **options)
    assert not list((tmp_path / "out").glob("*"))


def test_outputs_that_cannot_work_are_refused(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", ["x"])
    (tmp_path / "file").write_text("")
    for output, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "x.bin", "names a file"),
        (tmp_path / "file" / "x", "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(output, good)


def test_a_built_dataset_trains_only_with_its_tokenizer(tmp_path: Path) -> None:
    """The way from text to samples, with a tokenizer that is not the default."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    texts = [f"word {i} and words again" for i in range(60)]
    library.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=350,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TokenizerConfig("huggingface", str(tmp_path / "tokenizer.json"))
    build(tmp_path / "out", write_jsonl(tmp_path / "a.jsonl", texts), tokenizer=tokenizer, workers=2)
    blend = (CorpusConfig(str(tmp_path / "out")),)
    config = DataConfig(name="t", blend=blend, split="50,50,0", cache_dir=str(tmp_path), tokenizer=tokenizer)
    corpus = build_corpus(config, 16, 0, vocab_size=400)
    text = corpus.held_out_text(1000)
    assert sum(document.encode() in text for document in texts[30:]) >= 28
    assert corpus.num_bytes(corpus.batch("valid", 0, corpus.num_samples("valid"))[:, 1:]) == len(text)
    with pytest.raises(ConfigError, match="was built with the tokenizer huggingface"):
        build_corpus(DataConfig(name="t", blend=blend, cache_dir=str(tmp_path)), 16, 0)
