"""The loss curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Blue, vermillion and grey of the Okabe-Ito palette, which colour-blind readers can tell apart.
TRAIN_COLOUR, HELD_OUT_COLOUR, RATE_COLOUR = "#0072B2", "#D55E00", "#999999"


def draw_loss_curve(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write a PNG: training loss, held-out loss where it was measured, learning rate below."""
    # Imported here: matplotlib takes most of a second, and most commands draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps = [line["step"] for line in metrics]
    loss_axes.plot(
        steps, [line["loss"] for line in metrics], color=TRAIN_COLOUR, linewidth=0.9, label="training"
    )
    held_out = [(line["step"], line["eval_loss"]) for line in metrics if line.get("eval_loss") is not None]
    if held_out:
        loss_axes.plot(
            *zip(*held_out, strict=True), color=HELD_OUT_COLOUR, marker="o", markersize=4, label="held out"
        )
    loss_axes.set(title=title, ylabel="loss (nats a token)")
    loss_axes.legend(frameon=False)
    loss_axes.grid(alpha=0.3)
    rate_axes.plot(steps, [line["lr"] for line in metrics], color=RATE_COLOUR, linewidth=1.2)
    rate_axes.set(xlabel="step", ylabel="learning rate")
    rate_axes.set_ylim(bottom=0)
    figure.savefig(path)
