"""Section 6: one MoE layer of K2 with 24 experts on one device, by phase, under each activation preset.

Milliseconds of the phases forward, of their backward and of the put-off weight gradients; bytes kept between forward and
backward, and the peak above what is there before, beside the plan's bound and the rehearsal's peak. The device's own
experts get as many rows as in K2's layout, since every token chooses 8 of them.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from k2train.config.schema import Config

from . import adapter
from .adapter import Layer
from .predictions import estimator, plan_peak, predicted_peak
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
    passes = [one_pass(setting, layer, store) for _ in range(2 + min(5, setting.sizes.repeats))][2:]
    predicted = phase_predictions(config) if setting.cluster is not None else {}
    for name in passes[0].laps:
        milliseconds = [1e3 * each.laps[name] for each in passes]
        report.figure(f"{preset}: {name}", statistics.median(milliseconds), "ms", predicted.get(name), len(passes))
    if not setting.on_gpu:
        report.skip(f"{preset}: bytes", "a CPU's allocator is not asked")
        return
    costs = estimator(config).layer(MOE_LAYER)
    kept = sum(tensor.device_bytes for tensor in costs.saved)
    rehearsed = predicted_peak(config)
    peak = max(each.peak_bytes for each in passes) / 1e9
    report.figure(f"{preset}: kept between forward and backward", passes[-1].kept_bytes / 1e9, "GB", kept / 1e9)
    report.figure(f"{preset}: peak, beside the plan's bound", peak, "GB", plan_peak(costs) / 1e9)
    report.figure(f"{preset}: peak, beside the rehearsal's", peak, "GB", rehearsed and rehearsed / 1e9)


class Pass:
    """What one forward and backward took. Seconds by part, bytes above what was there before."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.kept_bytes = self.peak_bytes = 0


def one_pass(setting: Setting, layer: Layer, store: Any) -> Pass:
    """Forward, offload and reload where the store does so, backward, weight gradients."""
    result, names = Pass(), []
    inputs: Any = (setting.random(layer.config.train.seq_len, layer.config.model.hidden_size),)
    saved, queue = None if store is None else store.microbatch(), adapter.new_queue()
    context, records = layer.context(saved, queue), []
    base = start_counting(setting)
    watch = Stopwatch(setting.device)

    def lap(name: str) -> None:
        watch.lap()
        names.append(name)

    for phase in layer.phases:
        inputs, record = adapter.forward_phase(phase, inputs, context)
        records.append(record)
        lap(f"forward {phase.name}")
    context.saved.forward_done()
    grads: Any = tuple(torch.ones_like(t) if t.is_floating_point() else None for t in inputs)
    if saved is not None and layer.config.activations.offloads:
        offload(setting, saved, result, base)
        saved.reload()
        lap("offload and reload, waited for")
    else:
        result.kept_bytes = allocated(setting) - base
    del inputs
    for phase in reversed(layer.phases):
        grads = phase.backward(records.pop(), grads, context)
        lap(f"backward {phase.name}")
    layer.drain(queue)
    lap("weight gradients")
    result.laps = dict(zip(names, watch.seconds(), strict=True))
    result.laps |= {f"{way}, all phases": sum(s for n, s in result.laps.items() if n.startswith(way))
                    for way in ("forward", "backward")}  # fmt: skip
    result.peak_bytes = peak(setting) - base
    return result


def offload(setting: Setting, saved: Any, result: Pass, base: int) -> None:
    """Send out, and look at what is left when all has left."""
    saved.offload()
    synchronize(setting.device)
    result.kept_bytes = allocated(setting) - base


def phase_predictions(config: Config) -> dict[str, float]:
    """Milliseconds by the plan, which counts the dispatch's and the combine's copies with attention."""
    costs = estimator(config).layer(MOE_LAYER)
    found = {f"forward {phase.name}": phase.seconds for phase in costs.forward}
    found |= {f"backward {phase.name}": phase.seconds for phase in costs.backward_input}
    found["forward, all phases"] = sum(phase.seconds for phase in costs.forward)
    found["backward, all phases"] = sum(phase.seconds for phase in costs.backward_input)
    found["weight gradients"] = costs.weight_grad_seconds
    return {name: 1e3 * seconds for name, seconds in found.items()}


def start_counting(setting: Setting) -> int:
    """Bytes allocated now; the peak is counted from here."""
    if not setting.on_gpu:
        return 0
    synchronize(setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    return allocated(setting)


def allocated(setting: Setting) -> int:
    return torch.cuda.memory_allocated(setting.device) if setting.on_gpu else 0


def peak(setting: Setting) -> int:
    return torch.cuda.max_memory_allocated(setting.device) if setting.on_gpu else 0
