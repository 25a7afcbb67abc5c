"""The cycle collector runs after steps, once for each, and is left as it was found."""

from __future__ import annotations

import gc
import weakref

import pytest

from k2train.trainer.garbage import GarbageControl


class Node:
    """Something that can point at itself."""

    me: Node


def cycle() -> weakref.ref[Node]:
    node = Node()
    node.me = node
    return weakref.ref(node)


def test_cycles_are_collected_after_a_step_and_only_once_for_each() -> None:
    with GarbageControl() as garbage:
        for step in (3, 4):
            left = cycle()
            garbage.after_step(step)
            assert left() is None
            another = cycle()
            garbage.after_step(step)
            assert another() is not None
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_off_inside_and_as_before_outside(enabled: bool) -> None:
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with GarbageControl():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
