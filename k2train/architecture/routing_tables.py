"""Bytes of the tables by which a route sends rows, and how many ranks and nodes a token goes to.

Routing is taken as even: every choice of experts is as likely.
"""

from __future__ import annotations

from k2train.architecture.work import Workload

DEEPEP_NODE = 8
"""Ranks of a node, as DeepEP's kernels take it: NUM_MAX_NVL_PEERS
(github.com/deepseek-ai/DeepEP)."""


def hit_probability(w: Workload, num_ranks: int) -> float:
    """Chance that at least one of a token's experts is on given ranks, if every choice of experts
    is as likely."""
    experts, chosen = w.model.n_routed_experts, w.model.num_experts_per_tok
    held = min(experts, num_ranks * (experts // w.ep))
    missed = 1.0
    for drawn in range(chosen):
        missed *= max(0, experts - held - drawn) / (experts - drawn)
    return 1.0 - missed


def table_bytes(w: Workload) -> int:
    """A route's index tables, 4 bytes an entry.

    Of every (token, expert) pair its row and its token, and with other ranks, of every row that
    arrives, its place among the experts' rows and back. Where tokens are passed on: of every copy
    in every hop its row and its place in the order of sums, and of every row where its copies begin
    there; of every pair that arrives its place among the choices and its place in the order of
    sums; as many as are to be expected.
    """
    if w.deepep:
        return _deepep_table_bytes(w)
    if w.relay_ranks is None:
        return 8 * w.rows if w.ep == 1 else 16 * w.rows
    arrived = w.tokens * w.ep * hit_probability(w, 1)
    if w.relay_ranks == w.ep:
        of_hops = 2 * arrived + w.tokens
    else:
        crossed = w.tokens * (w.ep // w.relay_ranks) * hit_probability(w, w.relay_ranks)
        of_hops = 2 * crossed + w.tokens + 2 * arrived + crossed
    return round(4 * (of_hops + arrived)) + 8 * w.rows


def _deepep_table_bytes(w: Workload) -> int:
    """Our three tables of the rows that arrive, and the handle, from DeepEP's sources.

    The handle has of every token which ranks need it (1 byte each). Inside a node it has a number
    for each rank and the source of each row (4 bytes each). Between nodes it has a number for each
    node, one for each of a node's ranks of every token that reached the node, and 8 bytes for each
    row. The small matrices of ranks and channels are left out.
    """
    arrived = w.tokens * w.ep * hit_probability(w, 1)
    ours = 8 * w.rows + 4 * arrived
    if w.ep <= DEEPEP_NODE:
        return round(ours + 5 * w.tokens * w.ep + 4 * arrived)
    nodes = w.ep // DEEPEP_NODE
    reached = w.tokens * nodes * hit_probability(w, DEEPEP_NODE)
    handle = w.tokens * w.ep + 4 * w.tokens * nodes + 4 * DEEPEP_NODE * reached + 8 * arrived
    return round(ours + handle)
