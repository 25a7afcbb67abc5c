"""`k2train data` as a user calls it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tokenizers

from k2train.cli.main import main


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text('{"text": "hello \\u001b world"}\n{"text": 1}\n{"text": "second"}\n')
    return tmp_path / "a.jsonl"


def test_build_then_show(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "build", f"input=[{texts}]", f"output={tmp_path}/out", "workers=1"]) == 0
    shown = capsys.readouterr().out
    assert f"1 malformed lines left out, all listed in {tmp_path}/out.bad.log" in shown
    assert f"{texts}:2: 'text' is a number, not text" in shown
    assert "2 documents, 21 tokens, 19 bytes of text" in shown
    assert main(["data", "show", f"{tmp_path}/out"]) == 0
    shown = capsys.readouterr().out
    assert "documents   2" in shown
    assert "tokenizer   byte, vocabulary 257, end of document 256" in shown
    assert "document 0: 'hello \\x1b world'" in shown, "control characters must not reach the terminal"
    assert "document 1: 'second'" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["biuld"], "did you mean build?"),
        (["build", "output=x"], "needs at least one file or directory"),
        (["build", "input=[a.txt]"], "output=(missing): must be given"),
        (["build", "output=x", "input=[]"], "needs at least one file or directory"),
        (["build", "output=x", "input=[nowhere]"], "input[0]=nowhere: not found"),
        (["build", "output=x", "input=[nowhere]", "workers=0"], "workers=0: must be at least 1"),
        (["build", "output=x", "inptu=[a]"], "did you mean input?"),
        (["build", "output=x", "input=[a]", "tokenizer.kind=tiktoken"], "tokenizer needs its file"),
        (["show", "nowhere"], "nowhere.idx and nowhere.bin not found"),
        (["show"], "prefix=(missing): must be given"),
    ],
)
def test_mistakes_are_named_in_a_few_lines(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [[], ["--help"], ["build", "--help"], ["show", "--help"]])
def test_help_explains_the_keys(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *args]) == 0
    shown = capsys.readouterr().out
    assert "k2train data" in shown
    if "build" in args:
        for key in ("input", "output", "text_key", "tokenizer.kind", "workers", "on_bad_line", "overwrite"):
            assert key in shown


def test_a_build_that_is_terminated_leaves_nothing_behind(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    staged: list[Path] = []

    def terminate(display: object, input_bytes: int, num_documents: int, num_tokens: int) -> None:
        staged.extend(out.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("k2train.cli.data._Display.advance", terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["data", "build", f"input=[{texts}]", f"output={out}/x", "workers=1"]) == 130
    assert staged, "the build was not under way"
    assert list(out.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_dataset_is_shown_in_the_words_of_the_tokenizer_that_its_side_car_names(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokenizer.json"
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "hello": 1, "second": 2, "</s>": 3}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(file))
    words = ["tokenizer.kind=huggingface", f"tokenizer.path={file}"]
    assert main(["data", "build", f"input=[{texts}]", f"output={tmp_path}/out", *words]) == 0
    capsys.readouterr()
    assert main(["data", "show", f"{tmp_path}/out"]) == 0
    assert "document 1: 'second'" in capsys.readouterr().out
    file.unlink()
    assert main(["data", "show", f"{tmp_path}/out"]) == 0
    assert "give tokenizer.kind and tokenizer.path" in capsys.readouterr().out
