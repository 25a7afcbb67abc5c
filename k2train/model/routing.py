"""Which experts a token goes to, with which weights, and how their load is kept even.

DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): sigmoid scores, a correction bias for the choice
alone, group limits, no auxiliary loss but a small sequence-wise one.

That loss counts the experts that the raw scores would choose (equation 18), without the bias and
without groups, whatever was chosen. If it counted the choices themselves, it would see an even load
as soon as the bias had evened it out, and would no longer pull at the scores.

Letters: T tokens, K experts per token (in `_limit_groups` kept groups), E experts (there those of a
group, after G), G groups, B sequences, N choices of a sequence, D hidden, L MoE layers.
"""

from __future__ import annotations

import torch

from k2train.architecture.mixture_of_experts import ExpertsChannel
from k2train.config.model import ModelConfig
from k2train.model.context import MicrobatchContext
from k2train.model.pieces import Allocator, Piece
from k2train.ops.dtypes import accumulation_dtype
from k2train.ops.linear import linear
from k2train.ops.routing import attach_loss, chosen_weights, sequence_balance_loss
from k2train.ops.weight_grad import WeightGradSlot


def choose_experts(scores_TE: torch.Tensor, bias_E: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """The K experts of every token (T, K): the best biased scores within the best `topk_group`
    groups.

    A group is ranked by the sum of its two best biased scores.
    """
    biased_TE = scores_TE + bias_E
    if model.topk_group < model.n_group:
        biased_TE = _limit_groups(biased_TE, model.n_group, model.topk_group)
    return torch.topk(biased_TE, model.num_experts_per_tok, dim=-1, sorted=False).indices


def _limit_groups(biased_TE: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    biased_TGE = biased_TE.unflatten(1, (groups, -1))
    ranks_TG = biased_TGE.topk(2, dim=-1).values.sum(-1)
    kept_TK = ranks_TG.topk(kept, dim=-1, sorted=False).indices
    dropped_TG = torch.ones_like(ranks_TG, dtype=torch.bool).scatter_(1, kept_TK, False)
    return biased_TGE.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(1)


def count_experts(experts_TK: torch.Tensor, num_sequences: int, num_experts: int) -> torch.Tensor:
    """How many tokens of each sequence chose each expert (B, E), int64, with no host sync.

    experts_TK: the choices, sequence after sequence.
    """
    experts_BN = experts_TK.reshape(num_sequences, -1)
    counts_BE = torch.zeros(num_sequences, num_experts, dtype=torch.int64, device=experts_TK.device)
    return counts_BE.scatter_add_(1, experts_BN, torch.ones_like(experts_BN))


class Router:
    """The gate of one MoE layer. Scores are FP32 (FP64 for float64) whatever the model's type."""

    def __init__(self, model: ModelConfig, channel: ExpertsChannel, layer: int, allocator: Allocator) -> None:
        self.model, self.layer = model, layer
        gate, bias = channel.router_tensors(layer)
        self.weight = allocator.parameter(*gate.shape)
        self.bias = allocator.bias(*bias.shape)
        self._pieces = [Piece(gate.name, self.weight), Piece(bias.name, self.bias)]

    def pieces(self) -> list[Piece]:
        return self._pieces

    def __call__(
        self, normed_TD: torch.Tensor, context: MicrobatchContext, slot: WeightGradSlot | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Experts (T, K), their weights (T, K), and tokens per expert (E,). Reports loads and the
        balance loss."""
        model = self.model
        wide = accumulation_dtype(normed_TD.dtype)
        scores_TE = linear(normed_TD, self.weight, slot, compute_dtype=wide).sigmoid()
        experts_TK = choose_experts(scores_TE.detach(), self.bias, model)
        weights_TK = chosen_weights(scores_TE, experts_TK, model.norm_topk_prob, model.routed_scaling_factor)
        (counts_E,) = count_experts(experts_TK, 1, model.n_routed_experts)
        context.saved.name("routing", extras=(scores_TE, experts_TK))
        context.statistics.add_expert_loads(self.layer, counts_E)
        if context.balance_loss_scale:
            loss = self._balance_loss(scores_TE, context)
            context.statistics.add_balance_loss(loss.detach() * context.balance_loss_scale)
            weights_TK = attach_loss(weights_TK, loss, context.balance_loss_scale)
        return experts_TK, weights_TK, counts_E

    def _balance_loss(self, scores_TE: torch.Tensor, context: MicrobatchContext) -> torch.Tensor:
        """The mean of the sequences' balance losses, of what the raw scores would choose; a
        scalar."""
        top_k = self.model.num_experts_per_tok
        experts_TK = torch.topk(scores_TE.detach(), top_k, dim=-1, sorted=False).indices
        counts_BE = count_experts(experts_TK, context.num_sequences, self.model.n_routed_experts)
        context.saved.name("routing", extras=(counts_BE,))
        return sequence_balance_loss(scores_TE, counts_BE, top_k)


def update_correction_bias(bias_E: torch.Tensor, loads_E: torch.Tensor, rate: float) -> None:
    """bias += rate * sign(mean load - load), in place: an expert that got too little is chosen more
    easily next step.

    loads_E are the counts of a whole step over all ranks.
    """
    loads_E = loads_E.to(torch.float64)
    bias_E.add_(torch.sign(loads_E.mean() - loads_E).to(bias_E), alpha=rate)


def load_violation(loads_LE: torch.Tensor) -> torch.Tensor:
    """Largest load over mean load, minus 1, of the worst layer (MaxVio, arXiv 2408.15664): a
    scalar, with no host sync.

    0 is even; 0 without layers or loads.
    """
    if not len(loads_LE):
        return torch.zeros((), dtype=torch.float64, device=loads_LE.device)
    loads_LE = loads_LE.to(torch.float64)
    mean_L = loads_LE.mean(1).clamp_min(1e-9)
    return (loads_LE.amax(1) / mean_L - 1).amax().clamp_min(0.0)
