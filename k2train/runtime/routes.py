"""Where the messages of a rank's virtual stages go, read off a schedule."""

from __future__ import annotations

import dataclasses

from k2train.schedule.program import Schedule


@dataclasses.dataclass(frozen=True)
class Route:
    """Where a virtual stage's outputs go and its inputs come from.

    previous and next are virtual stages (None at the ends); the stages are the pipeline ranks they
    live on.
    """

    stage: int
    previous: int | None
    next: int | None
    previous_stage: int
    next_stage: int

    @property
    def next_is_here(self) -> bool:
        return self.next is not None and self.next_stage == self.stage

    @property
    def previous_is_here(self) -> bool:
        return self.previous is not None and self.previous_stage == self.stage


def build_routes(schedule: Schedule, stage: int) -> dict[int, Route]:
    """The route of every virtual stage that lives on a stage."""
    placement = schedule.placement
    routes = {}
    for virtual_stage in schedule.virtual_stages_of(stage):
        before, after = schedule.previous[virtual_stage], schedule.next[virtual_stage]
        routes[virtual_stage] = Route(
            stage=stage,
            previous=before,
            next=after,
            previous_stage=stage if before is None else placement[before],
            next_stage=stage if after is None else placement[after],
        )
    return routes
