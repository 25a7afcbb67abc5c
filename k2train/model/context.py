"""What a phase may touch besides its inputs: one MicrobatchContext for each (virtual stage,
microbatch).

Letters: H attention heads, E experts.
"""

from __future__ import annotations

import dataclasses

import torch

from k2train.device.cpu import CpuDevice
from k2train.device.protocol import Device
from k2train.model.dispatcher import Route
from k2train.model.loss import Loss
from k2train.model.saved import KeepEverything, SavedActivations
from k2train.ops.weight_grad import AtOnce, GradientSink, Key, WeightGradQueue, WeightGradSlot

_CPU = CpuDevice(torch.device("cpu"))


class Statistics:
    """What a step reports, summed over microbatches on the device with no host sync.

    loss and balance_loss are the scaled parts of the objective, so their sums over microbatches are
    the step's values.
    """

    def __init__(self) -> None:
        self.max_logits: dict[int, torch.Tensor] = {}
        self.expert_loads: dict[int, torch.Tensor] = {}
        self.loss: torch.Tensor | None = None
        self.balance_loss: torch.Tensor | None = None

    def add_max_logits(self, layer: int, max_logit_H: torch.Tensor) -> None:
        """Keep the larger of each head's logits (H,) so far in the step."""
        seen = self.max_logits.get(layer)
        self.max_logits[layer] = max_logit_H if seen is None else torch.maximum(seen, max_logit_H)

    def add_expert_loads(self, layer: int, counts_E: torch.Tensor) -> None:
        """Add up the tokens that chose each expert of the layer, (E,) int64."""
        seen = self.expert_loads.get(layer)
        self.expert_loads[layer] = counts_E if seen is None else seen + counts_E

    def add_loss(self, loss: torch.Tensor) -> None:
        self.loss = loss if self.loss is None else self.loss + loss

    def add_balance_loss(self, loss: torch.Tensor) -> None:
        self.balance_loss = loss if self.balance_loss is None else self.balance_loss + loss


@dataclasses.dataclass
class MicrobatchContext:
    """One microbatch on one virtual stage; the same object in its forward and its backward.

    num_sequences: sequences in the microbatch; tokens are flattened, so phases cut them again for
        attention.
    gradients: where gradients end; None in evaluation, when nothing is saved for a backward.
    weight_grads: the queue of put-off weight gradients; None takes each at once, within its phase's
        backward.
    key: (virtual_stage, microbatch), the queue's key.
    loss: the microbatch's part of the objective (model.loss), needed where the head is.
    balance_loss_scale: factor on the mean over the microbatch's sequences of the balance loss,
        summed over layers; alpha / microbatches of the global batch for a mean. 0 switches it off.
    routes: the row exchange of each MoE layer, from its route phase until the backward of its
        dispatch.
    saved: what becomes of the tensors that phases keep for the backward; the default leaves them to
        autograd.
    device: whose streams phases run on.
    """

    num_sequences: int
    gradients: GradientSink | None = None
    weight_grads: WeightGradQueue | None = None
    key: Key = (0, 0)
    statistics: Statistics = dataclasses.field(default_factory=Statistics)
    loss: Loss | None = None
    balance_loss_scale: float = 0.0
    routes: dict[int, Route] = dataclasses.field(default_factory=dict)
    saved: SavedActivations = dataclasses.field(default_factory=KeepEverything)
    device: Device = _CPU

    @property
    def training(self) -> bool:
        return self.gradients is not None

    def slot(self) -> WeightGradSlot:
        """Where this microbatch's weight gradients go in training."""
        if self.weight_grads is not None:
            return self.weight_grads.slot(self.key)
        assert self.gradients is not None, "weight gradients of a context that has none"
        return AtOnce(self.gradients)
