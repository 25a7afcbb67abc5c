"""Sources are held to the rules of tools/reading.py: widths, letters of shapes, references that
lead somewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import reading


@pytest.mark.parametrize("rule", sorted(reading.RULES))
def test_every_file_keeps_the_rule(rule: str) -> None:
    check = reading.RULES[rule]
    found = {str(path.relative_to(reading.ROOT)): check(path) for path in reading.files_for(rule)}
    assert {name: lines for name, lines in found.items() if lines} == {}


def check(tmp_path: Path, text: str, rule: str) -> list[str]:
    """What a rule finds in a file with a text."""
    path = tmp_path / f"file_of_{len(text)}.py"
    path.write_text(text)
    return reading.RULES[rule](path)


def test_a_wide_docstring_or_comment_is_found_and_a_wide_line_of_code_is_not(tmp_path: Path) -> None:
    wide = "x" * 101
    text = f'"""Head.\n\n{wide}\n"""\n# {wide}\nname = "{wide}"\n'
    assert [finding.split(":")[0] for finding in check(tmp_path, text, "width")] == ["3", "5"]


def test_a_letter_that_the_head_leaves_out_is_found(tmp_path: Path) -> None:
    code = "\ndef scale(x_TD, y_TE):\n    return x_TD\n"
    assert check(tmp_path, f'"""Head. Letters: T tokens, D hidden."""{code}', "legend") == ["E"]
    assert check(tmp_path, f'"""Head."""{code}', "legend") == ["D", "E", "T"]


def test_a_line_kept_from_the_formatter_is_found(tmp_path: Path) -> None:
    assert len(check(tmp_path, "a = 1  # fmt" + ": skip\n", "skip")) == 1


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("docs/" + "nowhere.md says so", "path"),
        ("decision " + "9999 says so", "path"),
        ("`layout.tensors." + "nothing` makes it", "name"),
    ],
)
def test_a_reference_that_leads_nowhere_is_found(tmp_path: Path, words: str, rule: str) -> None:
    assert len(check(tmp_path, f"# {words}\n", rule)) == 1
    assert check(tmp_path, "# docs/design.md, `layout.tensors.model_tensors`\n", rule) == []
