"""AdamW by torch's fused kernel, which updates masters in place, on a GPU or on a CPU.

Source: Loshchilov & Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101). Where all
states live in host memory, DeepSpeed's kernel can do the same arithmetic instead (optim/adam.py).
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
class AdamW:
    """AdamW's constants."""

    name: ClassVar[str] = "adamw"
    label: ClassVar[str] = "AdamW"
    states: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    whole_matrices: ClassVar[bool] = False

    beta1: float
    beta2: float
    eps: float
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
        """One step of the paper's Algorithm 2, in place, where the states are. Any equal shapes."""
        import torch
        from torch.optim.adamw import adamw as torch_adamw

        exp_avg, exp_avg_sq = states
        # Filled on the device: a number copied there would make the host wait.
        step = torch.full((), float(num_updates), device=W.device)
        torch_adamw(
            [W],
            [G],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=self.weight_decay if decayed else 0.0,
            eps=self.eps,
            maximize=False,
        )


def adamw(optim: OptimConfig) -> AdamW:
    """AdamW with the config's constants."""
    return AdamW(optim.adam_beta1, optim.adam_beta2, optim.adam_eps, optim.weight_decay)


def rules(optim: OptimConfig) -> Rules:
    """AdamW for every parameter."""
    return Rules(matrices=adamw(optim), others=adamw(optim))


OPTIMIZER = NamedRules("adamw", rules)
