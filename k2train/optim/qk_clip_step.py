"""QK-Clip across ranks: which named tensors it touches, and all layers' logits as one tensor for a
maximum over the world.

Letters: L layers of the model, H heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from k2train.architecture.heads import ClipRows
from k2train.architecture.layer import mixer_of
from k2train.architecture.tensors import TensorSpec
from k2train.config.model import ModelConfig
from k2train.optim.qk_clip import clip_rows, qk_clip_scale


@dataclasses.dataclass(frozen=True)
class ReducedLogits:
    """Of the largest logits of the whole batch, on the device.

    gamma: (layers, H), None where tau is. numbers: (2,) FP64, the largest logit and how many heads
    are to be clipped.
    """

    gamma: torch.Tensor | None
    numbers: torch.Tensor


class QkClipper:
    """Applies QK-Clip to the projections among the tensors of a rank that its mixer names.

    tau None never clips; logits are reduced and reported all the same.
    """

    def __init__(
        self, model: ModelConfig, tensors: Iterable[TensorSpec], tau: float | None, like: torch.Tensor
    ) -> None:
        """tensors: those of this rank. like: a tensor whose type and device the reduced logits
        take."""
        self._tau = tau
        self._shape = (model.num_hidden_layers, model.num_attention_heads)
        self._like = like
        self._targets: dict[str, tuple[int, tuple[ClipRows, ...]]] = {}
        clipped = {f"self_attn.{name}.weight": rows for name, rows in mixer_of(model).clipped.items()}
        self.targets_per_layer = len(clipped)
        for spec in tensors:
            rows = clipped.get(".".join(spec.name.split(".")[-3:]))
            if rows is not None and spec.layer is not None:
                self._targets[spec.name] = (spec.layer, rows)

    @property
    def num_targets(self) -> int:
        """Tensors of this rank that QK-Clip may scale."""
        return len(self._targets)

    def of_rank(self, max_logits: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """This rank's part (layers, H) of a maximum over the world: minus infinity for layers that
        live elsewhere.

        Raises ValueError where this rank holds the attention of a layer it gives no logits for: a
        clip asked for would silently not happen.
        """
        missing = {layer for layer, _ in self._targets.values()} - set(max_logits)
        if self._tau is not None and missing:
            raise ValueError(f"QK-Clip is on, but max logits are missing for layers {sorted(missing)}")
        logits_LH = self._like.new_full(self._shape, -torch.inf)
        for layer, max_logit_H in max_logits.items():
            logits_LH[layer] = max_logit_H
        return logits_LH

    def decide(self, logits_LH: torch.Tensor) -> ReducedLogits:
        """gamma of the whole batch's maxima. Local, and nothing is waited for."""
        largest = logits_LH.max().double()
        if self._tau is None:
            return ReducedLogits(None, torch.stack([largest, torch.zeros_like(largest)]))
        gamma_LH = qk_clip_scale(logits_LH, self._tau)
        clipped = (gamma_LH != 1).sum().double()
        return ReducedLogits(gamma_LH, torch.stack([largest, clipped]))

    def apply(self, masters: Iterable[tuple[str, torch.Tensor]], logits: ReducedLogits) -> None:
        """Scale the given masters in place where they are query or key projections, on whatever
        device. Local."""
        if logits.gamma is None:
            return
        for name, master in masters:
            if name not in self._targets:
                continue
            layer, rows = self._targets[name]
            clip_rows(master, logits.gamma[layer].to(master.device), rows)
