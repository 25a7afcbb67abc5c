"""`k2train doctor` says what packages are there and what each is really used for."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

import k2train
from k2train.cli.doctor import (
    OPTIONAL,
    REQUIRED,
    allocator_settings,
    gpu_facts,
    locked_memory,
    numa_node_count,
    rdma_devices,
)
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


def test_the_doctor_tells_what_start_up_depends_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for fact in ("NUMA nodes", "RDMA devices", "locked memory", "CUDA allocator"):
        assert fact in text


def test_the_kernel_s_files_say_how_many_nodes_and_which_rdma_devices_there_are(tmp_path: Path) -> None:
    assert (numa_node_count(tmp_path), rdma_devices(tmp_path)) == (1, [])
    for name in (
        "devices/system/node/node0",
        "devices/system/node/node1",
        "class/infiniband/mlx5_1",
        "class/infiniband/mlx5_0",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "devices/system/node/possible").write_text("0-1\n")
    assert (numa_node_count(tmp_path), rdma_devices(tmp_path)) == (2, ["mlx5_0", "mlx5_1"])


def test_a_limit_on_locked_memory_is_told_with_its_remedy() -> None:
    assert locked_memory(resource.RLIM_INFINITY) == "unlimited"
    assert locked_memory(8_388_608) == "8.4 MB; RDMA wants it unlimited (ulimit -l)"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_s_settings_are_told_under_either_name(name: str) -> None:
    assert allocator_settings({name: "expandable_segments:True"}) == f"expandable_segments:True ({name})"
    assert "default" in allocator_settings({})


def test_a_gpu_is_told_with_its_numa_node() -> None:
    assert gpu_facts("H200", 150_000_000_000, 1) == "H200, 150 GB, NUMA node 1"
    assert gpu_facts("H200", 150_000_000_000, None) == "H200, 150 GB, NUMA node unknown"
