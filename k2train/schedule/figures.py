"""The pictures of docs/schedule.md: `python -m k2train.schedule.figures docs/pictures`.

Their costs illustrate: round numbers in the proportions of a K2 layer, an all-to-all at 30 % of its
experts' time. What real clusters give is for `k2train plan` to say.
"""

from __future__ import annotations

import sys
from pathlib import Path

from k2train.schedule.builders import build_schedule
from k2train.schedule.costs import Costs, Phase, Stream, VirtualStageCosts, uniform_costs
from k2train.schedule.render import render_comparison, render_timeline
from k2train.schedule.simulate import simulate
from k2train.schedule.simulation import Simulation
from k2train.schedule.spec import ScheduleSpec


def layer_costs(num_virtual_stages: int, layers: int) -> Costs:
    """MoE layers in milliseconds: attention 3, experts 5, each all-to-all 1.5, the route 0.3 and
    nothing in the backward; backward 1.2 times forward; a hop 1."""

    def phases(scale: float, route: float, *names: str) -> tuple[Phase, ...]:
        compute = {"attention": 3e-3 * scale, "experts": 5e-3 * scale}
        exchange = {"dispatch": 1.5e-3, "combine": 1.5e-3, "route": route}
        return tuple(
            Phase(name, Stream.COMPUTE, compute[name])
            if name in compute
            else Phase(name, Stream.EP, exchange[name])
            for name in names
        )

    one = VirtualStageCosts(
        phases(1.0, 0.3e-3, "attention", "route", "dispatch", "experts", "combine") * layers,
        phases(1.2, 0.0, "combine", "experts", "dispatch", "route", "attention") * layers,
        weight_grad_seconds=7e-3 * layers,
        send_forward_seconds=1e-3,
        send_backward_seconds=1e-3,
        offload_seconds=4e-3 * layers,
        reload_seconds=4e-3 * layers,
        offload_bytes=200 * 2**20 * layers,
        activation_bytes=40 * 2**20 * layers,
        weight_queue_bytes=300 * 2**20 * layers,
    )
    return Costs((one,) * num_virtual_stages)


def _simulated(spec: ScheduleSpec, costs: Costs) -> Simulation:
    return simulate(build_schedule(spec), costs, record=True)


def _unit(kind: str, num_microbatches: int, vpp: int = 1) -> tuple[str, Simulation]:
    """A kind on four stages; a stage's work for a microbatch is F = I = W = 1 whatever the kind."""
    spec = ScheduleSpec.preset(kind, 4, num_microbatches, vpp, **({"offload": False} if kind == "k2" else {}))
    per_stage = 2 if kind == "dualpipe_v" else vpp
    part = 1.0 / per_stage
    simulation = _simulated(spec, uniform_costs(build_schedule(spec).num_virtual_stages, part, part, part))
    each = "one virtual stage" if per_stage == 1 else f"{per_stage} virtual stages"
    return f"{kind}, {each} on each stage: makespan {simulation.makespan_seconds:g}", simulation


def _shrink(picture: Path) -> None:
    """Store a picture with 256 colours; flat boxes need no more, and the file is a third of the
    size. Colours are chosen for coverage, not by area: rare boxes must keep theirs."""
    from PIL import Image

    with Image.open(picture) as image:
        reduced = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    reduced.save(picture, optimize=True)


def main(directory: str) -> None:
    """Write all pictures into a directory."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    orders = [_unit("gpipe", 8), _unit("1f1b", 8), _unit("interleaved_1f1b", 8, 2), _unit("k2", 8, 2)]
    render_comparison(
        orders, folder / "schedule_orders.png", "F = I = W = 1, no communication, 8 microbatches"
    )
    others = [_unit("zb_h1", 8), _unit("dualpipe", 8), _unit("dualpipe_v", 8), _unit("k2", 8, 2)]
    render_comparison(
        others, folder / "schedule_others.png", "F = I = W = 1, no communication, 8 microbatches"
    )
    small = _simulated(ScheduleSpec.preset("k2", 4, 12, 2), layer_costs(8, 1))
    render_timeline(small, folder / "schedule_k2_small.png", dpi=100)
    large = _simulated(ScheduleSpec.preset("k2", 16, 1024, 2), layer_costs(32, 2))
    render_timeline(large, folder / "schedule_k2.png", dpi=100)
    for picture in folder.glob("schedule_*.png"):
        _shrink(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
