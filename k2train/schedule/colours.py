"""What kinds of boxes a timeline has, in which colour, and on which lane.

The colours are those of Okabe and Ito, told apart with every common colour blindness; forward is
blue, backward orange, and what moves data is darker than what computes it.
"""

from __future__ import annotations

from k2train.schedule.actions import Action, Kind
from k2train.schedule.simulation import Event

FORWARD, BACKWARD, WEIGHT = "forward", "input gradient", "weight gradient"

COLOURS = {
    FORWARD: "#56B4E9",
    BACKWARD: "#E69F00",
    WEIGHT: "#009E73",
    "forward all-to-all": "#0072B2",
    "backward all-to-all": "#D55E00",
    "send activations": "#7B9BD1",
    "send gradients": "#CC79A7",
    "offload": "#999999",
    "reload": "#F0E442",
}
"""Colour of each category, in the order of the legend."""

BOX_CATEGORIES = (FORWARD, BACKWARD, WEIGHT, "forward all-to-all", "backward all-to-all")
"""What a stage's row shows; messages and copies have lanes only where every stream is drawn."""

DARK = frozenset({"forward all-to-all", "backward all-to-all", WEIGHT})
"""Categories that take white text."""

IDLE = "#F4F4F4"

LANES = ("compute", "ep", "send", "d2h", "h2d")
LANE_NAMES = {"compute": "compute", "ep": "all-to-all", "send": "PP send", "d2h": "offload", "h2d": "reload"}

_COMPUTE = {Kind.F: FORWARD, Kind.I: BACKWARD, Kind.B: BACKWARD, Kind.W: WEIGHT}
_EP = {Kind.F: "forward all-to-all", Kind.I: "backward all-to-all", Kind.B: "backward all-to-all"}
_OTHER = {
    Kind.SEND_F: "send activations",
    Kind.SEND_B: "send gradients",
    Kind.OFFLOAD: "offload",
    Kind.RELOAD: "reload",
}


def category(event: Event) -> str:
    """The category of a box."""
    if event.stream == "ep":
        return _EP[event.action.kind]
    if event.stream == "compute":
        return compute_category(event.action, event.name)
    return _OTHER[event.action.kind]


def compute_category(action: Action, phase: str) -> str:
    """The category of a compute phase; a full backward has its weight gradient as its last
    phase."""
    return WEIGHT if phase == "weight grad" else _COMPUTE[action.kind]
