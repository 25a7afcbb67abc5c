"""Pipeline schedules: built, proven, simulated and drawn, without torch.

A schedule is one list of actions for each pipeline stage (docs/schedule.md). This room builds it,
proves that it can run, and answers what it costs; the runtime executes the same list.

    spec = ScheduleSpec.preset("k2", pp=16, num_microbatches=64, vpp=2)     # or ScheduleSpec(pp,
        ..., kind=...)
    schedule = build_schedule(spec)                  Schedule: stages, placement, chains; to_text /
                                                     parse_schedule
    report = validate(schedule)                      ScheduleReport, or ScheduleError with the cycle
                                                     of waits
    simulation = simulate(schedule, costs, record=True)      Simulation: makespan, waits, memory,
                                                             events
    render_text(simulation)                          text for a terminal
    render_timeline(simulation, path)                a picture; also render_window,
                                                     render_comparison, render_cells
    write_trace(simulation, path)                    opens in Perfetto

Costs (`Costs`, `VirtualStageCosts`, `Phase`) are defined here and filled in by `estimate`;
`uniform_costs` are those of the textbook formulas in `formulas.py`. Numbers a user chose wrongly
raise ConfigError; a schedule that cannot run raises ScheduleError.
"""

from k2train.schedule.actions import Action, Kind, Pair, Step, parse_action, parse_line, parse_step
from k2train.schedule.builders import build_schedule, compute_order
from k2train.schedule.costs import Costs, Phase, Stream, VirtualStageCosts, uniform_costs, without
from k2train.schedule.errors import ScheduleError
from k2train.schedule.overlap import pair_order
from k2train.schedule.program import Schedule, parse_schedule
from k2train.schedule.render import render_comparison, render_timeline, render_window
from k2train.schedule.render_text import render_cells, render_text
from k2train.schedule.simulate import simulate
from k2train.schedule.simulation import Event, Simulation, StageTimes, Waits
from k2train.schedule.spec import KINDS, ScheduleSpec
from k2train.schedule.trace import write_trace
from k2train.schedule.validate import ScheduleReport, validate

__all__ = [
    "KINDS",
    "Action",
    "Costs",
    "Event",
    "Kind",
    "Pair",
    "Phase",
    "Schedule",
    "ScheduleError",
    "ScheduleReport",
    "ScheduleSpec",
    "Simulation",
    "StageTimes",
    "Step",
    "Stream",
    "VirtualStageCosts",
    "Waits",
    "build_schedule",
    "compute_order",
    "pair_order",
    "parse_action",
    "parse_line",
    "parse_schedule",
    "parse_step",
    "render_cells",
    "render_comparison",
    "render_text",
    "render_timeline",
    "render_window",
    "simulate",
    "uniform_costs",
    "validate",
    "without",
    "write_trace",
]
