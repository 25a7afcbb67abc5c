"""Where the Triton kernels of these operations can run, and how they are launched.

Triton is an optional dependency (the `gpu` extra). Every launch is an operation of torch's own
registry, in the namespace `k2train`: profilers name it, and where tensors have no memory (fake
tensors, a rehearsal) torch passes it over, as it does with every operation that only writes into
memory it is given. So are calls of other libraries' kernels, which make their own output.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

from k2train.device.build import compute_capability

P = ParamSpec("P")
R = TypeVar("R")

_OPERATIONS = torch.library.Library("k2train", "DEF")


# Asked several times a layer; looking for a package that is not there searches the disk.
@functools.cache
def gpu_kernels(module: str, device: torch.device, capability: tuple[int, int] = (8, 0)) -> ModuleType | None:
    """The module of this package whose kernels run on `device`, imported at first use; None where
    they cannot run.

    capability: the oldest compute capability they are made for; BF16 begins with 8.0.
    """
    if device.type != "cuda" or compute_capability(device) < capability:
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"k2train.ops.{module}")


def launchable(*written: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function that launches one kernel the operation `torch.ops.k2train.<its name>`.

    written: the parameters whose tensors the kernel writes. The function allocates nothing and
    returns nothing; its parameters have types that torch's registry knows (tensors, optional
    tensors, int, float, bool).
    """

    def register(launch: Callable[P, None]) -> Callable[P, None]:
        name = launch.__name__
        _OPERATIONS.define(name + torch.library.infer_schema(launch, mutates_args=written))
        _OPERATIONS.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"k2train::{name}", _nothing, lib=_OPERATIONS)
        return getattr(torch.ops.k2train, name).default

    return register


def registered(fake: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function that returns new tensors the operation `torch.ops.k2train.<its name>`.

    fake: the same without the numbers: tensors of the right shapes, types and strides for tensors
    without memory. The function changes none of its arguments; their types are as for `launchable`.
    """

    def register(compute: Callable[P, R]) -> Callable[P, R]:
        name = compute.__name__
        _OPERATIONS.define(name + torch.library.infer_schema(compute, mutates_args=()))
        _OPERATIONS.impl(name, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"k2train::{name}", fake, lib=_OPERATIONS)
        return getattr(torch.ops.k2train, name).default

    return register


def _nothing(*arguments: object, **keywords: object) -> None:
    """What a launch does to tensors without memory."""
