"""What all ranks must agree on in a step, as riders on the optimizer's one sum and one maximum over the world.

A sum: loss, balance loss, tokens that chose each expert. A maximum: the signal by which a rank was asked to stop.
Letters: L MoE layers of the whole model, E experts.
"""

from __future__ import annotations

import torch

from k2train.config.model import ModelConfig
from k2train.model.context import Statistics
from k2train.model.routing import load_violation
from k2train.optim.optimizer import Riders


class StepTotals:
    """One rank's numbers, and after `riders` have travelled everybody's."""

    def __init__(
        self, model: ModelConfig, statistics: Statistics, stop_signal: int, device: torch.device
    ) -> None:
        """stop_signal: the number of a signal this rank has received, 0 for none."""
        self._layers = [layer for layer in range(model.num_hidden_layers) if model.is_moe(layer)]
        self._shape = (len(self._layers), model.n_routed_experts)
        # Counts are exact in FP64 as long as a step has fewer than 2^53 tokens.
        loads_LE = torch.zeros(self._shape, dtype=torch.float64, device=device)
        for index, layer in enumerate(self._layers):
            if layer in statistics.expert_loads:
                loads_LE[index] = statistics.expert_loads[layer]
        losses = losses_of_rank(statistics, device)
        asked = torch.tensor([stop_signal], dtype=torch.float64, device=device)
        self.riders = Riders(sums=torch.cat([losses, loads_LE.flatten()]), maxima=asked)

    def loads(self) -> dict[int, torch.Tensor]:
        """Tokens of the global batch that chose each expert (E,), by MoE layer of the whole model."""
        return dict(zip(self._layers, self._loads, strict=True))

    def read(self) -> tuple[float, float, float, int]:
        """Loss, balance loss, the load violation of the worst layer, the stop signal. Waits for the device."""
        worst = load_violation(self._loads).view(1)
        numbers = torch.cat([self.riders.sums[:2], worst, self.riders.maxima])
        loss, balance_loss, violation, stop_signal = numbers.tolist()
        return loss, balance_loss, violation, int(stop_signal)

    @property
    def _loads(self) -> torch.Tensor:
        return self.riders.sums[2:].view(self._shape)


def losses_of_rank(statistics: Statistics, device: torch.device) -> torch.Tensor:
    """This rank's parts of loss and balance loss (2,), FP64, on the device; zero where it has none."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    parts = (statistics.loss, statistics.balance_loss)
    return torch.stack([zero if part is None else part.double() for part in parts])
