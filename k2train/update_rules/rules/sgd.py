"""SGD with momentum and decoupled weight decay (SGDW), for every parameter.

    M <- mu M + G
    W <- W - lr (M + lambda W)        with Nesterov: G + mu M in place of M

torch.optim.SGD adds lambda W to the gradient, so that the decay enters the momentum. Here the decay
is decoupled, as it is in Muon and AdamW. Without weight decay both make the same update.

Source: Loshchilov & Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101), Algorithm
1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from k2train.config.optim import OptimConfig
from k2train.update_rules.rule import NamedRules, Rules

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sgd:
    """The constants mu and lambda."""

    name: ClassVar[str] = "sgd"
    label: ClassVar[str] = "SGD"
    states: ClassVar[tuple[str, ...]] = ("momentum",)
    whole_matrices: ClassVar[bool] = False

    momentum: float
    nesterov: bool
    weight_decay: float

    def matmul_flops(self, shape: Sequence[int]) -> float:
        return 0.0

    def update(
        self,
        W: torch.Tensor,
        states: Sequence[torch.Tensor],
        G: torch.Tensor,
        lr: float,
        decayed: bool,
        num_updates: int,
    ) -> None:
        """One step in place, where the states are. Any equal shapes."""
        (M,) = states
        M.mul_(self.momentum).add_(G)
        direction = G + self.momentum * M if self.nesterov else M
        decay = self.weight_decay if decayed else 0.0
        W.mul_(1 - lr * decay).add_(direction, alpha=-lr)


def rules(optim: OptimConfig) -> Rules:
    """SGD for every parameter."""
    sgd = Sgd(optim.momentum, optim.nesterov, optim.weight_decay)
    return Rules(matrices=sgd, others=sgd)


OPTIMIZER = NamedRules("sgd", rules)
