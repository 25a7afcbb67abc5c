"""The numbers that the host of a rehearsed rank reads, as a device would have computed them.

What decides sizes is drawn: the experts that every rank's tokens choose, with popularities that may
differ, and counted by the dispatcher's own code on real tensors. A few draws are taken in turn, so
that loads change from layer to layer and from microbatch to microbatch. Everything else that is
read (a norm, a loss) decides nothing, and is 1.

Letters: T tokens, K experts per token, E experts, L local experts, P ranks of the group.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from k2train.config.schema import Config
from k2train.layout.layout import Layout
from k2train.parallel.communicator import Communicator
from k2train.parallel.relay_route import count_route

NUM_DRAWS = 16


@dataclasses.dataclass(frozen=True)
class _Sized:
    """All that counting asks of a group."""

    size: int


class Numbers:
    """Answers to the reads of one rank.

    skew: deviation of the logarithm of an expert's popularity; 0 leaves chance alone.
    """

    def __init__(self, config: Config, layout: Layout, ep_rank: int, skew: float) -> None:
        self._layout, self._ep_rank = layout, ep_rank
        num_draws = NUM_DRAWS if config.model.num_moe_layers else 0
        draws = [draw_choices(config, layout.ep, skew, seed) for seed in range(num_draws)]
        self._routes: Iterator[list[float]] = itertools.cycle([self._count(choices) for choices in draws])

    def answer(self, what: str, count: int) -> list[float]:
        """The `count` numbers of a read named `what`."""
        if what != "route":
            return [1.0] * count
        numbers = next(self._routes)
        assert len(numbers) == count, f"a route of {count} numbers, {len(numbers)} were counted"
        return numbers

    def _count(self, choices_PTK: torch.Tensor) -> list[float]:
        layout = self._layout
        if layout.ep == 1:
            return cast(
                list[float], choices_PTK.flatten().bincount(minlength=layout.n_routed_experts).tolist()
            )
        if layout.relay_ranks is None:
            return expert_counts(choices_PTK, layout.num_local_experts, self._ep_rank)
        nodes = layout.ep // layout.relay_ranks
        sizes = [layout.relay_ranks] if nodes == 1 else [nodes, layout.relay_ranks]
        groups = cast(Sequence[Communicator], [_Sized(size) for size in sizes])
        tokens, parts = choices_PTK.shape[1], layout.relay_parts
        # Parts are equal, so tokens are made up for; they choose an expert that does not exist.
        missing = (0, 0, 0, -tokens % parts)
        padded_PTK = torch.nn.functional.pad(choices_PTK, missing, value=layout.n_routed_experts)
        counts = count_route(padded_PTK, tokens, layout.num_local_experts, self._ep_rank, groups, parts)
        return cast(list[float], counts.numbers.tolist())


def draw_choices(config: Config, num_ranks: int, skew: float, seed: int) -> torch.Tensor:
    """The experts of every token of every rank of a group (P, T, K), int64.

    The best K of scores that are Gumbel noise around the logarithms of popularities: K draws
    without replacement.
    """
    model, train = config.model, config.train
    with unset_fake_temporarily():
        generator = torch.Generator().manual_seed(seed)
        tokens = train.microbatch_size * train.seq_len
        popularity_E = skew * torch.randn(model.n_routed_experts, generator=generator)
        noise_PTE = torch.rand(num_ranks, tokens, model.n_routed_experts, generator=generator)
        scores_PTE = popularity_E - torch.log(-torch.log(noise_PTE.clamp(1e-12, 1 - 1e-7)))
        return scores_PTE.topk(model.num_experts_per_tok, dim=-1).indices


def expert_counts(choices_PTK: torch.Tensor, num_local: int, ep_rank: int) -> list[float]:
    """What `AllToAllDispatcher` reads: rows for every rank, then rows from each rank for each local
    expert."""
    num_ranks = choices_PTK.shape[0]
    rows_PE = torch.stack([c.flatten().bincount(minlength=num_ranks * num_local) for c in choices_PTK])
    sent_P = rows_PE[ep_rank].view(num_ranks, num_local).sum(1)
    arriving_PL = rows_PE.view(num_ranks, num_ranks, num_local)[:, ep_rank]
    return cast(list[float], torch.cat([sent_P, arriving_PL.flatten()]).tolist())
