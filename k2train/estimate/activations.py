"""What a layer saves between forward and backward: bytes of every named activation, by policy.

Names are the fields of `ActivationsConfig`. A policy splits a tensor's bytes into what stays on the
device, what goes to the host, and what is rebuilt. FP8 is one byte a number and an FP32 scale for
every 128 of a row. Source: K2 report, section 2.4.3.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from k2train.architecture.layer import NOT_REBUILDABLE, LayerKind, layer_of
from k2train.architecture.mixture_of_experts import HOLDS_INDICES
from k2train.architecture.work import Saved, Workload
from k2train.config.errors import ConfigError
from k2train.config.sections import FP8_POLICIES, OFFLOAD_POLICIES, ActivationsConfig, Policy

FP8_TILE = 128
"""Numbers that share a scale."""


@dataclass(frozen=True)
class SavedTensor:
    """One named activation of one layer and microbatch. Bytes on one rank."""

    name: str
    policy: Policy
    numbers: int
    """Numbers in it, extras included."""
    full_bytes: int
    """As computed."""
    stored_bytes: int
    """As kept between forward and backward, wherever that is; where it is rebuilt, the few numbers
    that go with it."""

    @property
    def device_bytes(self) -> int:
        """On the device between forward and backward."""
        return 0 if self.policy in OFFLOAD_POLICIES else self.stored_bytes

    @property
    def host_bytes(self) -> int:
        """In host memory between forward and backward."""
        return self.stored_bytes if self.policy in OFFLOAD_POLICIES else 0

    @property
    def is_fp8(self) -> bool:
        return self.policy in FP8_POLICIES


def check_policies(policies: ActivationsConfig) -> None:
    """Raise ConfigError for a policy that cannot be carried out."""
    for name, why in NOT_REBUILDABLE.items():
        if getattr(policies, name) == "recompute":
            allowed = "keep or offload" if name in HOLDS_INDICES else "keep, fp8, offload or fp8_offload"
            raise ConfigError(
                f"activations.{name}", "recompute", f"cannot be rebuilt: {why}", f"use {allowed}"
            )
    for name in HOLDS_INDICES:
        policy = getattr(policies, name)
        if policy in FP8_POLICIES:
            rule = "holds indices, which FP8 would destroy"
            raise ConfigError(f"activations.{name}", policy, rule, "use keep or offload")


def saved_tensors(w: Workload, policies: ActivationsConfig, kind: LayerKind) -> tuple[SavedTensor, ...]:
    """Every activation of one layer, in the order of `ActivationsConfig`.

    Those that the layer does not have are left out.
    """
    saved = layer_of(w.model, kind).saved(w)
    names = [field.name for field in fields(policies)]
    return tuple(_saved(w, name, getattr(policies, name), saved[name]) for name in names if name in saved)


def _saved(w: Workload, name: str, policy: Policy, saved: Saved) -> SavedTensor:
    numbers = sum(rows * width for rows, width in saved.parts)
    stored = full = numbers * w.element_bytes
    if policy == "recompute":
        stored = 0
    elif policy in FP8_POLICIES:
        stored = sum(rows * (width + 4 * -(-width // FP8_TILE)) for rows, width in saved.parts)
    return SavedTensor(name, policy, numbers, full + saved.extra_bytes, stored + saved.extra_bytes)
