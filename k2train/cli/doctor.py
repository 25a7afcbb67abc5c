"""`k2train doctor`: what this machine has, what is missing, and what each missing thing is for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from k2train.config.errors import ConfigError
from k2train.config.folders import config_dir
from k2train.telemetry.tables import fact_table, output_console
from k2train.trainer.cores import SYSFS, numa_node, pci_address

USAGE = "usage: k2train doctor\n\nPrints versions, devices and optional packages; exit status 1 where training cannot start."


@dataclasses.dataclass(frozen=True)
class Package:
    """An importable distribution and what k2train uses it for; `extra` is the pip extra that brings
    it.
    """

    name: str
    purpose: str
    extra: str = ""


REQUIRED = (
    Package("torch", "tensors, autograd, process groups"),
    Package("hydra-core", "configs and sweeps"),
    Package("megatron-core", "indexed, blended datasets"),
    Package("safetensors", "checkpoints"),
    Package("tokenizers", "Hugging Face tokenizers"),
    Package("tiktoken", "tiktoken tokenizers"),
    Package("pyarrow", "Parquet corpora"),
    Package("rich", "progress and tables"),
    Package("tensorboard", "metrics"),
    Package("matplotlib", "pictures"),
)
OPTIONAL = (
    Package("triton", "attention, SwiGLU, norms and FP8 storage on CUDA; without it, plain torch", "gpu"),
    Package("transformer-engine", "attention and experts' products with ops.backend=te", "gpu"),
    Package("deepspeed", "optim.host_adam=deepspeed: AdamW on states in host memory", "deepspeed"),
    Package("wandb", "Weights & Biases metrics", "wandb"),
    Package("hydra-submitit-launcher", "sweeps on Slurm", "slurm"),
    Package("transformers", "the model oracle of the tests", "dev"),
)


def run(args: list[str]) -> int:
    """Print the report; 0 where training can start, 1 where a required package is missing."""
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if args:
        raise ConfigError("doctor", " ".join(args), "takes no arguments")
    console = output_console()
    console.print(_machine_table())
    console.print(_package_table())
    missing = [package.name for package in REQUIRED if _version(package.name) is None]
    console.print(f"missing: {', '.join(missing)}" if missing else "training can start on this machine")
    return 1 if missing else 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine_table() -> Table:
    table = fact_table(None, [])
    table.add_row("python", platform.python_version())
    table.add_row("cores", str(os.cpu_count()))
    table.add_row("memory", f"{_memory_bytes() / 1e9:.1f} GB")
    table.add_row("free disk", f"{shutil.disk_usage('.').free / 1e9:.1f} GB")
    table.add_row("configs", str(config_dir()))
    table.add_row("NUMA nodes", str(numa_node_count(SYSFS)))
    table.add_row("RDMA devices", ", ".join(rdma_devices(SYSFS)) or "none; between nodes NCCL uses TCP")
    table.add_row("locked memory", locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]))
    table.add_row("CUDA allocator", allocator_settings(os.environ))
    for name, value in _devices():
        table.add_row(name, value)
    return table


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def numa_node_count(sysfs: Path) -> int:
    """How many NUMA nodes the machine has; 1 where it does not say."""
    return len(list((sysfs / "devices/system/node").glob("node[0-9]*"))) or 1


def rdma_devices(sysfs: Path) -> list[str]:
    """The names of InfiniBand and RoCE devices, such as `mlx5_0`."""
    return sorted(path.name for path in (sysfs / "class/infiniband").glob("*"))


def locked_memory(limit: int) -> str:
    """What a process may lock, which is what RDMA registers.

    limit: in bytes, as getrlimit says it.
    """
    if limit == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{limit / 1e6:.1f} MB; RDMA wants it unlimited (ulimit -l)"


def allocator_settings(environment: Mapping[str, str]) -> str:
    """What torch's allocator for GPU memory is told, under either of the two names that torch
    reads.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if environment.get(name):
            return f"{environment[name]} ({name})"
    return "torch's default; the launch scripts set launch/env.sh's"


def _devices() -> list[tuple[str, str]]:
    if _version("torch") is None:
        return [("devices", "torch is missing")]
    # Imported here: the doctor must answer on a machine where torch is what is missing.
    import torch

    if not torch.cuda.is_available():
        return [("devices", "CPU only")]
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        (f"device {index}", gpu_facts(gpu.name, gpu.total_memory, numa_node(pci_address(gpu))))
        for index, gpu in enumerate(gpus)
    ]


def gpu_facts(name: str, num_bytes: int, node: int | None) -> str:
    """A GPU's name, memory and NUMA node."""
    return f"{name}, {num_bytes / 1e9:.0f} GB, NUMA node {'unknown' if node is None else node}"


def _package_table() -> Table:
    table = fact_table(None, [], ("package", "version", "used for"))
    for package in REQUIRED:
        table.add_row(package.name, _version(package.name) or "MISSING", package.purpose)
    for package in OPTIONAL:
        absent = escape(f"- (extra [{package.extra}])")
        table.add_row(package.name, _version(package.name) or absent, package.purpose)
    return table
