"""What phases say about the tensors that live from forward to backward. The model names them;
another room stores them.

Each such tensor has a name of `ActivationsConfig` (or one of the head's two) and comes about in one
of three ways:

    name     it came from elsewhere: a layer's input, rows from other ranks
    make     it was computed from others; a store may drop it and compute it again just before its
             use
    extras   small numbers that belong to a name and share its fate, whole: norms' statistics,
             indices, routing weights

Autograd saves what it needs; a store recognises the named tensors among that by their storage. A
microbatch's tensors are known to all phases of its virtual stage, so that one that two phases save
is stored once.

Letters: T tokens, D features.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from k2train.ops.norm import inverse_rms, rms_norm
from k2train.ops.weight_grad import WeightGradSlot

# A tensor or a tuple of tensors.
Made = TypeVar("Made", torch.Tensor, tuple[torch.Tensor, ...])


class Held(Protocol):
    """A tensor kept for the backward outside of autograd."""

    def get(self) -> torch.Tensor: ...


class SavedActivations(Protocol):
    """The store of one microbatch on one virtual stage, as its phases see it."""

    def name(self, name: str, *tensors: torch.Tensor, extras: tuple[torch.Tensor, ...] = ()) -> None:
        """Say what tensors (contiguous, their last dimension the features) and extras are. Any
        number of times a name."""
        ...

    def make(self, name: str, compute: Callable[..., Made], *sources: torch.Tensor) -> Made:
        """compute(*sources), named. `compute` may run again, without gradients, on equal sources,
        so it must be a function of them alone; the sources have names, or are views of tensors that
        have."""
        ...

    def hold(self, tensor: torch.Tensor) -> Held:
        """Keep a named tensor for the backward of a phase without a graph."""
        ...

    def saving(self, layer: int | None, otherwise: str | None) -> contextlib.AbstractContextManager[Any]:
        """Around a phase's forward: what autograd saves inside belongs to this layer. `otherwise`
        names what has no name at the end; None makes that an error."""
        ...

    def forward_done(self) -> None:
        """The forward of the virtual stage has ended: nothing more will be named."""
        ...

    def offload(self) -> None:
        """After the forward: start to copy what the policies send to the host, and let go of it
        here."""
        ...

    def reload(self) -> None:
        """Start to copy it back; the backward's first use waits for it."""
        ...

    def drop(self) -> None:
        """Forget an interrupted microbatch."""
        ...


@dataclasses.dataclass(frozen=True)
class KeptTensor:
    """Held as it is."""

    tensor: torch.Tensor

    def get(self) -> torch.Tensor:
        return self.tensor


class KeepEverything:
    """SavedActivations that leaves everything to autograd."""

    def name(self, name: str, *tensors: torch.Tensor, extras: tuple[torch.Tensor, ...] = ()) -> None:
        pass

    def make(self, name: str, compute: Callable[..., Made], *sources: torch.Tensor) -> Made:
        return compute(*sources)

    def hold(self, tensor: torch.Tensor) -> KeptTensor:
        return KeptTensor(tensor)

    def saving(self, layer: int | None, otherwise: str | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def forward_done(self) -> None:
        pass

    def offload(self) -> None:
        raise AssertionError("a schedule that offloads needs a store of activations")

    def reload(self) -> None:
        raise AssertionError("a schedule that reloads needs a store of activations")

    def drop(self) -> None:
        pass


def named_norm(
    saved: SavedActivations,
    names: tuple[str, str],
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    slot: WeightGradSlot | None,
) -> torch.Tensor:
    """RMSNorm of x (T, D). names: those of x, which has it already, and of the result; the inverse
    RMS goes with x."""
    rstd_T1 = inverse_rms(x_TD, eps)
    saved.name(names[0], extras=(rstd_T1,))
    return saved.make(names[1], lambda x_TD, rstd_T1: rms_norm(x_TD, rstd_T1, weight_D, slot), x_TD, rstd_T1)
