"""Section 6: one MoE layer of K2 with 24 experts on one device, by phase, under each activation
preset.

Milliseconds of the phases forward, of their backward and of the put-off weight gradients; bytes
kept between forward and backward, and the peak above what is there before, beside the plan's bound.
A rehearsal takes whole steps, so its peak stands beside the training of section 9. The experts get
as many rows as in K2's layout, since every token chooses 8.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import torch

from k2train.config.schema import Config

from . import adapter
from .adapter import Layer
from .memory import allocated, note, peak, start_peak
from .predictions import estimator, plan_peak
from .report import Report
from .setting import Setting
from .shapes import k2_config
from .timing import Stopwatch, synchronize

PRESETS = ("none", "recompute", "recompute_fp8", "k2")
MOE_LAYER = 1


def run(report: Report, setting: Setting) -> None:
    layer = adapter.build_layer(k2_config(setting), (MOE_LAYER,), setting.device, setting.dtype)
    for preset in PRESETS:
        with report.attempt(f"activations={preset}"):
            config = k2_config(setting, preset)
            measure(report, setting, adapter.with_config(layer, config), config, preset)


def measure(report: Report, setting: Setting, layer: Layer, config: Config, preset: str) -> None:
    store = layer.store()
    counted = min(5, setting.sizes.repeats)
    passes = [one_pass(setting, layer, store) for _ in range(2 * counted)][counted:]
    predicted = phase_predictions(config) if setting.cluster is not None else {}
    for name in passes[0].laps:
        milliseconds = [1e3 * each.laps[name] for each in passes]
        report.figure(
            f"{preset}: {name}", statistics.median(milliseconds), "ms", predicted.get(name), len(passes)
        )
    costs = estimator(config).layer(MOE_LAYER)
    kept = sum(tensor.device_bytes for tensor in costs.saved)
    most = max(each.peak_bytes for each in passes) / 1e9
    report.figure(
        f"{preset}: kept between forward and backward",
        passes[-1].kept_bytes / 1e9,
        "GB",
        kept / 1e9,
        note=note(setting),
    )
    report.figure(
        f"{preset}: peak, beside the plan's bound", most, "GB", plan_peak(costs) / 1e9, note=note(setting)
    )


@dataclasses.dataclass
class Pass:
    """What one forward and backward took. Seconds by part, bytes above what was there before."""

    laps: dict[str, float]
    kept_bytes: int
    peak_bytes: int


class Laps:
    """A stopwatch whose laps have names."""

    def __init__(self, setting: Setting) -> None:
        self._watch = Stopwatch(setting.device)
        self._names: list[str] = []

    def lap(self, name: str) -> None:
        self._watch.lap()
        self._names.append(name)

    def seconds(self) -> dict[str, float]:
        """By name, and the sums of both directions; waits for the device."""
        laps = dict(zip(self._names, self._watch.seconds(), strict=True))
        for way in ("forward", "backward"):
            laps[f"{way}, all phases"] = sum(
                seconds for name, seconds in laps.items() if name.startswith(way)
            )
        return laps


def one_pass(setting: Setting, layer: Layer, store: Any) -> Pass:
    """Forward, offload and reload where the store does so, backward, weight gradients."""
    inputs: Any = (setting.random(layer.config.train.seq_len, layer.config.model.hidden_size),)
    saved, queue = None if store is None else store.microbatch(), adapter.new_queue()
    context, base, laps, records = layer.context(saved, queue), start_peak(setting), Laps(setting), []
    for phase in layer.phases:
        inputs, record = adapter.forward_phase(phase, inputs, context)
        records.append(record)
        laps.lap(f"forward {short(phase)}")
    context.saved.forward_done()
    outputs = sum(tensor.nbytes for tensor in inputs)
    kept = hold(setting, saved if layer.config.activations.offloads else None, laps) - base - outputs
    grads: Any = tuple(torch.ones_like(t) if t.is_floating_point() else None for t in inputs)
    del inputs
    for phase in reversed(layer.phases):
        grads = phase.backward(records.pop(), grads, context)
        laps.lap(f"backward {short(phase)}")
    layer.drain(queue)
    laps.lap("weight gradients")
    return Pass(laps.seconds(), kept if setting.on_gpu else 0, peak(setting) - base)


def hold(setting: Setting, offloading: Any, laps: Laps) -> int:
    """Bytes allocated between forward and backward; where the store offloads, when all has left,
    before it comes back."""
    if offloading is None:
        return allocated(setting)
    offloading.offload()
    synchronize(setting.device)
    held = allocated(setting)
    offloading.reload()
    laps.lap("offload and reload, waited for")
    return held


def short(phase: Any) -> str:
    """`attention` of `layer1.attention`."""
    return str(phase.name).rpartition(".")[2]


def phase_predictions(config: Config) -> dict[str, float]:
    """Milliseconds by the plan, which counts the dispatch's and the combine's copies with
    attention."""
    costs = estimator(config).layer(MOE_LAYER)
    found = {f"forward {phase.name}": phase.seconds for phase in costs.forward}
    found |= {f"backward {phase.name}": phase.seconds for phase in costs.backward_input}
    found["forward, all phases"] = sum(phase.seconds for phase in costs.forward)
    found["backward, all phases"] = sum(phase.seconds for phase in costs.backward_input)
    found["weight gradients"] = costs.weight_grad_seconds
    return {name: 1e3 * seconds for name, seconds in found.items()}
