"""`k2train doctor` says what packages are there and what each is really used for."""

from __future__ import annotations

from pathlib import Path

import pytest

import k2train
from k2train.cli.doctor import OPTIONAL, REQUIRED
from k2train.cli.main import main


def imported(module: str) -> bool:
    """Whether any file of the package imports it."""
    sources = Path(k2train.__file__).parent.rglob("*.py")
    words = (f"import {module}", f"from {module}")
    return any(line.strip().startswith(words) for path in sources for line in path.read_text().splitlines())


def test_the_doctor_names_every_package_and_its_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for package in (*REQUIRED, *OPTIONAL):
        assert package.name in text
    assert "training can start" in text


@pytest.mark.parametrize(
    ("name", "module"),
    [("triton", "triton"), ("deepspeed", "deepspeed"), ("transformer-engine", "transformer_engine")],
)
def test_a_package_is_for_nothing_yet_exactly_if_no_code_imports_it(name: str, module: str) -> None:
    (package,) = [package for package in OPTIONAL if package.name == name]
    assert package.purpose.startswith("nothing yet") == (not imported(module))
