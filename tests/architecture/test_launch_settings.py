"""launch/env.sh: the one place of the ranks' environment, sourced wherever ranks start, each line
with its reason."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "launch" / "env.sh"
STARTERS = ["launch/torchrun.sh", "launch/slurm.sbatch", "docker/entrypoint.sh"]
SCRIPTS = [*sorted(ROOT.glob("launch/*")), *sorted(ROOT.glob("docker/*.sh"))]
EXPORT = re.compile(r'^export (\w+)="\$\{\1:-(.*)\}"$')


def settings() -> dict[str, str]:
    """Every variable of launch/env.sh, with the comment above it."""
    paragraphs = SETTINGS.read_text().split("\n\n")[1:]
    reasons: dict[str, str] = {}
    for paragraph in paragraphs:
        *comments, line = paragraph.strip().splitlines()
        match = EXPORT.match(line)
        assert match, f"not a setting that the user's environment overrides: {line}"
        reasons[match[1]] = " ".join(
            comment.removeprefix("# ") for comment in comments if comment.startswith("# ")
        )
    return reasons


def environment_after(script: str, **before: str) -> dict[str, str]:
    """The variables of a shell that has sourced launch/env.sh, started with `before` and nothing
    else."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'source "{script}"; env -0'],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": os.environ["PATH"], **before},
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


def test_every_setting_has_a_reason() -> None:
    reasons = settings()
    assert len(reasons) >= 4
    assert all(len(reason.split()) >= 8 for reason in reasons.values()), reasons


@pytest.mark.parametrize("path", STARTERS)
def test_whatever_starts_ranks_sources_the_settings_and_repeats_none(path: str) -> None:
    text = (ROOT / path).read_text()
    assert re.search(r'^source "\$\(dirname .*env\.sh"$', text, re.M)
    assert not [name for name in settings() if f"{name}=" in text]


@pytest.mark.parametrize("name", settings())
def test_the_user_s_environment_overrides_a_setting(name: str) -> None:
    default = environment_after(str(SETTINGS))[name]
    assert environment_after(str(SETTINGS), **{name: "mine"})[name] == "mine"
    # torch refuses an empty value where it wants a number.
    assert environment_after(str(SETTINGS), **{name: ""})[name] == default != ""


def test_the_allocator_s_older_name_overrides_too() -> None:
    """torch reads both names; a default under the new one must not meet a user's value under the
    old one."""
    after = environment_after(str(SETTINGS), PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512")
    assert after["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512"


def test_torch_reads_the_allocator_s_settings_under_this_name() -> None:
    code = "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": environment_after(str(SETTINGS))["PYTORCH_ALLOC_CONF"]}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == environment["PYTORCH_ALLOC_CONF"]


def put_program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def after_slurm_script(tmp_path: Path, srun: str, limit: str = "UNLIMITED", **given: str) -> str:
    """What `srun` prints when a copy of launch/slurm.sbatch runs, with stand-ins for Slurm's
    commands."""
    copy = tmp_path / "spool" / "slurm_script"
    copy.parent.mkdir()
    shutil.copy(ROOT / "launch" / "slurm.sbatch", copy)
    put_program(
        tmp_path,
        "scontrol",
        f'[ "$1" = show ] && [ "$2" = hostnames ] && echo n1 || '
        f'printf "JobId=7\\n   RunTime=00:00:01 TimeLimit={limit} TimeMin=N/A\\n   Command={ROOT}/launch/slurm.sbatch a=1 b=2\\n   Power=\\n"',
    )
    put_program(tmp_path, "python", "true")
    put_program(tmp_path, "srun", srun)
    done = subprocess.run(
        ["bash", copy, "a=1", "b=2"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_NNODES": "1",
            "SLURM_JOB_NODELIST": "n1",
            **given,
        },
    )
    return done.stdout


def test_the_slurm_script_finds_the_settings_though_slurm_runs_a_copy(tmp_path: Path) -> None:
    printed = after_slurm_script(tmp_path, "env", RANKS="2")
    expected = environment_after(str(SETTINGS))
    assert all(f"{name}={expected[name]}\n" in printed for name in settings())


def test_the_slurm_script_says_how_the_job_was_submitted(tmp_path: Path) -> None:
    """Options from Slurm's variables, settings from the user's; a setting that the script made is
    none of them."""
    given = {
        "SLURM_GPUS_PER_NODE": "0",
        "SLURM_JOB_PARTITION": "main",
        "SLURM_JOB_ACCOUNT": "us",
        "SLURM_JOB_QOS": "high",
        "RANKS": "2",
        "CUDA_MODULE_LOADING": "LAZY",
    }
    printed = after_slurm_script(tmp_path, 'echo "$K2TRAIN_STARTED_BY"', "1-02:00:00", **given)
    script = ROOT / "launch" / "slurm.sbatch"
    options = "--nodes=1 --gpus-per-node=0 --partition=main --account=us --qos=high --time=1-02:00:00"
    assert printed.strip() == f"RANKS=2 CUDA_MODULE_LOADING=LAZY sbatch {options} {script}"


def test_the_slurm_script_gives_its_step_the_whole_node(tmp_path: Path) -> None:
    """--exclusive takes the cores; memory, the step's binding and its environment must be asked for
    beside it."""
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    options = set(re.findall(r"^#SBATCH (\S+)", text, re.M))
    assert {"--exclusive", "--mem=0", "--requeue", "--signal=TERM@300", "--open-mode=append"} <= options
    step = after_slurm_script(tmp_path, 'echo "$@"', RANKS="2").split(" torchrun ")[0].split()
    assert step == ["--kill-on-bad-exit=1", "--export=ALL", "--cpu-bind=none", "--mem=0"]


@pytest.mark.parametrize(
    ("given", "started"),
    [
        ({}, "launch/torchrun.sh"),
        ({"RANKS": "2"}, "RANKS=2 launch/torchrun.sh"),
        (
            {"NUM_NODES": "2", "HEAD_NODE": "a b", "HEAD_PORT": "5"},
            "HEAD_NODE=a\\ b HEAD_PORT=5 NUM_NODES=2 NODE_RANK=$i launch/torchrun.sh",
        ),
    ],
)
def test_the_torchrun_script_says_how_it_was_started(
    tmp_path: Path, given: dict[str, str], started: str
) -> None:
    for name, text in (("python", "true"), ("torchrun", 'echo "$K2TRAIN_STARTED_BY"')):
        put_program(tmp_path, name, text)
    done = subprocess.run(
        ["launch/torchrun.sh", "a=1"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **given},
    )
    assert done.stdout.strip() == started


def test_the_container_s_command_has_the_settings(tmp_path: Path) -> None:
    put_program(tmp_path, "k2train", 'echo "$@"; env')
    done = subprocess.run(
        [ROOT / "docker" / "entrypoint.sh", "train", "a=1"],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    expected = environment_after(str(SETTINGS))
    assert done.stdout.startswith("train a=1\n")
    assert all(f"{name}={expected[name]}\n" in done.stdout for name in settings())


@pytest.mark.parametrize("name", settings())
def test_the_documentation_has_every_setting(name: str) -> None:
    assert f"`{name}" in (ROOT / "docs" / "launch.md").read_text()


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck comes with the extra dev")
    done = subprocess.run(
        [checker, "--external-sources", *SCRIPTS], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
