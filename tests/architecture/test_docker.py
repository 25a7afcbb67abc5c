"""The image's steps, without docker: every file they name is there, and pip can do what they ask in
a fresh environment."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
STEPS = [
    tuple(shlex.split(words)) for words in re.findall(r"^RUN /src/docker/install\.sh (.*)$", DOCKERFILE, re.M)
]
COPIES = [line.split() for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M)]


def copy_sources(target: Path, until: str) -> None:
    """What the Dockerfile has copied to /src before the step `until`, under `target`."""
    before = DOCKERFILE[: DOCKERFILE.index(f"RUN /src/docker/install.sh {until}")]
    for *sources, place in (line.split() for line in re.findall(r"^COPY (.*)$", before, re.M)):
        for source in sources:
            path = target / Path(place).relative_to("/src")
            path = path / source if place.endswith("/") else path
            path.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, path)


def run_step(sources: Path, environment: Path, *words: str) -> None:
    """One step of docker/install.sh with the pip of `environment`; the project itself without its
    dependencies."""
    done = subprocess.run(
        [sources / "docker" / "install.sh", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "PIP_ARGS": "--no-deps"},
    )
    if done.returncode and "connection broken by" in done.stderr + done.stdout:
        pytest.skip("pip reaches no package index")
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_dockerfile_installs_by_the_script_alone() -> None:
    assert [step[0] for step in STEPS] == ["system", "torch", "project", "extras"]
    others = set(re.findall(r"^RUN (.*)$", DOCKERFILE, re.M)) - {"python3 -m venv /opt/k2train"}
    assert all(line.startswith("/src/docker/install.sh ") for line in others)


@pytest.mark.parametrize("source", [source for line in COPIES for source in line[:-1]])
def test_a_copied_file_is_in_the_clone(source: str) -> None:
    assert (ROOT / source).exists()


def test_the_entry_point_is_copied_and_can_be_run() -> None:
    (entry,) = re.findall(r'^ENTRYPOINT \["/src/(.*)"\]$', DOCKERFILE, re.M)
    assert entry in [source for line in COPIES for source in line[:-1]]
    assert os.access(ROOT / entry, os.X_OK)


def test_an_unknown_step_is_refused() -> None:
    done = subprocess.run(
        [ROOT / "docker" / "install.sh", "all"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "usage")


def test_the_project_and_its_extras_install_in_a_fresh_environment(tmp_path: Path) -> None:
    """With an empty environment, as in the image: what a build needs must come from a step before
    it.

    The sources are those that the Dockerfile has copied by then, so that a file missing there is
    missing here.
    """
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    for step in STEPS[2:]:
        sources = tmp_path / step[0]
        copy_sources(sources, step[0])
        run_step(sources, environment, step[0], *(word.replace("${EXTRAS}", "gpu") for word in step[1:]))
    code = "import k2train, pathlib; print((pathlib.Path(k2train.__file__).parent / 'configs' / 'model').is_dir())"
    done = subprocess.run(
        [environment / "bin" / "python", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.stdout.strip() == "True"
    assert (environment / "bin" / "k2train").exists()
