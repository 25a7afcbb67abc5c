"""What an update rule says of itself, for everybody who has to know.

A rule is read on both sides of the line between planning and computing:

    ownership   needs whole matrices, or can be cut into rows; FLOPs of a matrix, to balance owners
    states      names of what an owner keeps beside the master, in memory and in checkpoints
    estimate    the same facts as bytes and seconds
    optimizer   the update itself

Planning works without torch, so a rule's file imports torch inside the functions that compute with
it. Why the two are kept together: docs/decisions/0025-update-rules.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from k2train.config.optim import OptimConfig

if TYPE_CHECKING:
    import torch

MASTER = "master"
"""The state that every rule has: the parameter in the type of the sums."""


class UpdateRule(Protocol):
    """One rule with its constants."""

    name: ClassVar[str]
    """The rule in one word of code, for instance in the ownership table."""
    label: ClassVar[str]
    """The rule in words for a reader."""
    states: ClassVar[tuple[str, ...]]
    """Names of the states beside the master. Each has the master's shape and starts at zero."""
    whole_matrices: ClassVar[bool]
    """Whether an update needs a whole matrix.

    Otherwise each entry depends on its own history alone,
    and a tensor may be cut into rows anywhere."""

    def matmul_flops(self, shape: Sequence[int]) -> float:
        """FLOPs of the matrix products in one update of a tensor; 0 for an elementwise rule.

        Bytes need no function: gradient, master and states are each read, and all but the gradient
        are written.
        """

    def update(
        self,
        W: torch.Tensor,
        states: Sequence[torch.Tensor],
        G: torch.Tensor,
        lr: float,
        decayed: bool,
        num_updates: int,
    ) -> None:
        """Change masters W and `states` in place by the gradient G. Local.

        Shapes are equal: a batch of matrices (k, n, m) where the rule needs whole matrices, else a
        flat stretch of entries. states: in the order of their names. decayed: whether weight decay
        applies. num_updates: how many were made before this one.
        """


@dataclass(frozen=True)
class Rules:
    """The rules of one run: one for the layers' matrices, and the same or another for all else."""

    matrices: UpdateRule
    others: UpdateRule

    def __post_init__(self) -> None:
        assert not self.others.whole_matrices, f"{self.others.label} cannot update a norm"

    def of(self, role: str) -> UpdateRule:
        """The rule of a tensor with this role (`TensorSpec.role`)."""
        return self.matrices if role == "matrix" else self.others


@dataclass(frozen=True)
class NamedRules:
    """A word of `optim.name` and the rules it stands for. Every file of `rules/` has one."""

    name: str
    build: Callable[[OptimConfig], Rules]


def numbers_kept(rule: UpdateRule) -> int:
    """Numbers that an owner keeps for a parameter: the master and the states."""
    return 1 + len(rule.states)


def numbers_moved(rule: UpdateRule) -> int:
    """Numbers that an update reads or writes for a parameter: kept ones twice, and the gradient."""
    return 2 * numbers_kept(rule) + 1
