"""Where a section runs and at which sizes."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from k2train.config.sections import ClusterConfig

from .configs import read_cluster

# Which cluster file is the plan of a device with this in its name; the first that fits.
_CLUSTERS = (("H200", "h200"), ("H100", "h100"), ("H800", "h800"))
# K2's shapes at toy widths: what is left are the shapes' relations.
TINY_MODEL = {
    "vocab_size": 257,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "num_attention_heads": 2,
}


@dataclass(frozen=True)
class Sizes:
    """Everything that is smaller in a tiny run; the defaults are those of a real one."""

    copy_bytes: int = 2**30
    """Of one side of a copy, on the device and over the bus."""
    product_side: int = 8192
    """Of the square product that shows the ceiling."""
    attention_lengths: tuple[int, ...] = (4096, 8192)
    accuracy_lengths: tuple[int, ...] = (4096, 1000)
    accuracy_heads: int = 4
    seq_len: int = 4096
    num_experts: int = 24
    expert_rows: int = 1300
    vocab_size: int = 32768
    """Of the slice that is trained, whose embedding and head would else take longer to
    initialise than to train; the head is measured with K2's own."""
    train_steps: int = 20
    train_microbatches: int = 4
    offload_microbatches: int = 8
    repeats: int = 20
    overrides: Mapping[str, int] = field(default_factory=dict)
    """Changes to K2's model."""


TINY = Sizes(
    copy_bytes=2**16,
    product_side=64,
    attention_lengths=(16, 24),
    accuracy_lengths=(24, 17),
    accuracy_heads=2,
    seq_len=32,
    num_experts=8,
    expert_rows=16,
    vocab_size=257,
    train_steps=6,
    train_microbatches=2,
    offload_microbatches=3,
    repeats=1,
    overrides=TINY_MODEL,
)


@dataclass(frozen=True)
class Setting:
    """What a section is given.

    dtype: of the compute, BF16 on a GPU. cluster: the plan's device; None for one it has not.
    """

    device: torch.device
    dtype: torch.dtype
    tiny: bool
    cluster_name: str | None
    sizes: Sizes
    ends_at: float
    """When the section is stopped, on the clock of time.monotonic."""

    @property
    def cluster(self) -> ClusterConfig | None:
        return None if self.cluster_name is None else read_cluster(self.cluster_name)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.ends_at - time.monotonic()

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal values: products of zeros run faster than any others."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return values.to(dtype or self.dtype)


def build_setting(options: argparse.Namespace) -> Setting:
    """options: of `child`."""
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    sizes = TINY if options.tiny else Sizes()
    if options.repeats:
        sizes = dataclasses.replace(sizes, repeats=options.repeats)
    return Setting(
        device,
        torch.bfloat16,
        options.tiny,
        cluster_of(name),
        sizes,
        time.monotonic() + options.limit,
    )


def cluster_of(device_name: str | None) -> str | None:
    """The cluster file of a device; None for a device without one. No name is a CPU's."""
    if device_name is None:
        return "cpu"
    return next((cluster for word, cluster in _CLUSTERS if word in device_name), None)
