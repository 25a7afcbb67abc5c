"""The order of a pair's phases: one of each in turn, in the simulator as in the runtime."""

from __future__ import annotations

from itertools import product

import pytest

from k2train.schedule.costs import Phase, Stream
from k2train.schedule.overlap import overlap, pair_order


@pytest.mark.parametrize(("forward", "backward"), list(product(range(6), repeat=2)))
def test_both_halves_run_all_their_phases_in_turn(forward: int, backward: int) -> None:
    order = pair_order(forward, backward)
    assert (order.count(0), order.count(1)) == (forward, backward)
    shorter = 2 * min(forward, backward)
    assert order[:shorter] == (0, 1) * (shorter // 2)
    assert len(set(order[shorter:])) <= 1


def phases(*words: str) -> tuple[Phase, ...]:
    """ "attention 3 compute" and so on."""
    split = (word.split() for word in words)
    return tuple(Phase(name, Stream(stream), float(seconds)) for name, seconds, stream in split)


def test_a_layers_pair_is_the_reports_figure_7() -> None:
    """The route's two steps, of which one does nothing, leave the order of everything else as it is
    there."""
    forward = phases(
        "attention 3 compute", "route 1 ep", "dispatch 2 ep", "experts 5 compute", "combine 2 ep"
    )
    backward = phases(
        "combine 2 ep", "experts 6 compute", "dispatch 2 ep", "route 0 ep", "attention 4 compute"
    )
    spans = overlap((forward, backward)).spans
    of_stream = {
        stream: ["FI"[span.chain] + " " + span.phase.name for span in spans if span.phase.stream is stream]
        for stream in Stream
    }
    assert of_stream[Stream.COMPUTE] == ["F attention", "I experts", "F experts", "I attention"]
    assert of_stream[Stream.EP] == [
        "I combine",
        "F route",
        "F dispatch",
        "I dispatch",
        "I route",
        "F combine",
    ]


def test_a_stream_keeps_the_order_of_issue_although_another_phase_would_be_ready_sooner() -> None:
    forward = phases("a 1 compute", "x 10 ep", "b 1 compute")
    backward = phases("c 1 compute", "d 1 compute", "e 1 compute")
    layout = overlap((forward, backward))
    starts = {span.phase.name: span.start for span in layout.spans}
    assert starts == {"a": 0, "c": 1, "x": 1, "d": 2, "b": 11, "e": 12}
    assert layout.exposed_ep == 8  # from 3, when d is done, until 11
