"""A new order for the pipeline, proved, simulated and drawn as text before it is wired in.

    python examples/new_schedule.py

The order is GPipe's with the backwards turned round: the newest microbatch goes back first. It
needs no torch. What is written here as a function goes to `k2train/schedule/orders.py`;
docs/extending.md has the rest.
"""

from __future__ import annotations

from k2train.schedule import (
    Action,
    Kind,
    Schedule,
    ScheduleSpec,
    build_schedule,
    render_text,
    simulate,
    uniform_costs,
    validate,
)
from k2train.schedule.p2p import insert_p2p

STAGES, MICROBATCHES = 4, 8


def newest_first(pp: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards from the last microbatch to the first."""
    lines = []
    for stage in range(pp):
        forwards = [Action(Kind.F, stage, m) for m in range(num_microbatches)]
        backwards = [Action(Kind.B, stage, m) for m in reversed(range(num_microbatches))]
        lines.append((*forwards, *backwards))
    everyone = tuple(range(pp))
    return Schedule("newest_first", num_microbatches, everyone, (everyone,), tuple(lines))


def main() -> None:
    """Prove the order, and compare it with GPipe and 1F1B at equal costs."""
    schedule = insert_p2p(newest_first(STAGES, MICROBATCHES))
    report = validate(schedule)  # ScheduleError names the cycle of waits if it cannot run.
    print(f"newest_first is proved; microbatches in flight: {report.peak_in_flight}")
    others = [build_schedule(ScheduleSpec.preset(k, STAGES, MICROBATCHES)) for k in ("gpipe", "1f1b")]
    for each in (schedule, *others):
        costs = uniform_costs(each.num_virtual_stages, 1.0, 1.0, 1.0)
        simulation = simulate(each, costs, record=True)
        print(f"{each.name}: makespan {simulation.makespan_seconds:g}")
        print(render_text(simulation))


if __name__ == "__main__":
    main()
