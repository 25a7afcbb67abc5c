"""What all ranks must agree on in a step, as riders on the optimizer's one sum and one maximum over
the world.

A sum: loss, balance loss, tokens that chose each expert. A maximum: the signal by which a rank was
asked to stop. Letters: L MoE layers of the whole model, E experts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from k2train.architecture.layer import moe_layers
from k2train.config.model import ModelConfig
from k2train.model.context import Statistics
from k2train.model.routing import load_violation
from k2train.optim.optimizer import Riders


class Reported(NamedTuple):
    """What the host reads of a step's totals. load_violation: of the worst layer. stop_signal: 0
    for none."""

    loss: float
    balance_loss: float
    load_violation: float
    stop_signal: float


class StepTotals:
    """One rank's numbers, and after `riders` have travelled everybody's."""

    def __init__(
        self, model: ModelConfig, statistics: Statistics, stop_signal: int, device: torch.device
    ) -> None:
        """stop_signal: the number of a signal this rank has received, 0 for none."""
        self._layers = moe_layers(model)
        self._shape = (len(self._layers), model.n_routed_experts)
        # Counts are exact in FP64 as long as a step has fewer than 2^53 tokens.
        loads_LE = torch.zeros(self._shape, dtype=torch.float64, device=device)
        for index, layer in enumerate(self._layers):
            if layer in statistics.expert_loads:
                loads_LE[index] = statistics.expert_loads[layer]
        losses = losses_of_rank(statistics, device)
        # Filled on the device: a number copied there would make the host wait.
        asked = torch.full((1,), float(stop_signal), dtype=torch.float64, device=device)
        self.riders = Riders(
            torch.cat([losses, loads_LE.flatten()]), asked, functools.partial(_report, self._shape)
        )

    def loads(self) -> dict[int, torch.Tensor]:
        """Tokens of the global batch that chose each expert (E,), by MoE layer of the whole
        model."""
        return dict(zip(self._layers, self._loads, strict=True))

    @property
    def _loads(self) -> torch.Tensor:
        return self.riders.sums[2:].view(self._shape)


def _report(shape: tuple[int, int], sums: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """The numbers of `Reported` (4,), on the device. shape: (L, E) of the loads."""
    return torch.cat([sums[:2], load_violation(sums[2:].view(shape)).view(1), maxima])


def losses_of_rank(statistics: Statistics, device: torch.device) -> torch.Tensor:
    """This rank's parts of loss and balance loss (2,), FP64, on the device; zero where it has
    none."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    parts = (statistics.loss, statistics.balance_loss)
    return torch.stack([zero if part is None else part.double() for part in parts])
