"""What is installed is what is in the clone: the wheel carries configs/ and the program finds it
from anywhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_finds_its_configs_from_any_directory(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("k2train-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    configs = {f"k2train/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= names
    code = (
        "from k2train.config.compose import load_config\n"
        "from k2train.config.folders import config_dir\n"
        "assert load_config(['model=k2']).model.num_hidden_layers == 61\n"
        "print(config_dir())\n"
    )
    # The path comes first, so that the extracted package hides the editable installation.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    assert done.stdout.strip() == str(tmp_path / "installed" / "k2train" / "configs")
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "mine.yaml").write_text(
        "defaults: [k2_tiny, _self_]\nhidden_size: 64\n"
    )
    code = (
        "from k2train.config.compose import load_config; print(load_config(['model=mine']).model.hidden_size)"
    )
    for folder, place in ((None, tmp_path), (tmp_path / "configs", Path("/"))):
        named = {} if folder is None else {"K2TRAIN_CONFIG_DIR": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=place,
            env={**environment, **named},
            timeout=120,
        )
        assert done.stdout.strip() == "64"
