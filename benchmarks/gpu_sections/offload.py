"""Section 7: copies between device and pinned host memory, alone and beside products, and what of
offloading is hidden.

The hidden share comes from the wall clock, so that nothing of the program is instrumented: with
`k2` a pass takes as long as with `recompute_fp8`, which computes the same and sends nothing, plus
what the copies add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import adapter
from .predictions import Predictions
from .report import Report
from .setting import Setting
from .shapes import k2_config
from .timing import Timing, timed

VIRTUAL_STAGES = 4


def run(report: Report, setting: Setting) -> None:
    with report.attempt("bandwidths"):
        bandwidths(report, setting)
    with report.attempt("hidden share"):
        hidden_share(report, setting)


class Bus:
    """A buffer on each side and a stream for each direction; on a CPU the streams are the one there
    is."""

    def __init__(self, setting: Setting) -> None:
        self.setting, num_bytes = setting, setting.sizes.copy_bytes
        self._pages = [adapter.pinned_bytes(setting.device, num_bytes) for _ in range(2)]
        self.host_out, self.host_back = (pages.bytes for pages in self._pages)
        self.device_out, self.device_back = (
            setting.random(num_bytes // 4, seed=seed, dtype=torch.float32).view(torch.uint8)
            for seed in (0, 1)
        )
        self._streams = [torch.cuda.Stream(setting.device) for _ in range(2)] if setting.on_gpu else []

    def copies(self, out: bool, back: bool, beside: Callable[[], object] | None = None) -> Callable[[], None]:
        """A function that copies in these directions, and computes meanwhile, until all is done."""

        def function() -> None:
            if not self._streams:
                self._copy(out, back)
            else:
                self._copy_beside(out, back)
            if beside is not None:
                beside()
            for stream in self._streams:
                torch.cuda.current_stream().wait_stream(stream)

        return function

    def _copy(self, out: bool, back: bool) -> None:
        if out:
            self.host_out.copy_(self.device_out, non_blocking=True)
        if back:
            self.device_back.copy_(self.host_back, non_blocking=True)

    def _copy_beside(self, out: bool, back: bool) -> None:
        for stream, ways in zip(self._streams, ((out, False), (False, back)), strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._copy(*ways)


def bandwidths(report: Report, setting: Setting) -> None:
    bus, sizes = Bus(setting), setting.sizes
    predicted = Predictions(setting.cluster).bus_bandwidth
    rate = predicted and predicted / 1e9
    for name, ways in {
        "to the host": (True, False),
        "to the device": (False, True),
        "both ways": (True, True),
    }.items():
        timing = timed(bus.copies(*ways), setting.device, sizes.repeats)
        num_bytes = sum(ways) * sizes.copy_bytes
        report.figure(
            f"pinned copy {name}, alone",
            num_bytes / timing.seconds / 1e9,
            "GB/s",
            rate and rate * sum(ways),
            timing.n,
        )
    a, b = (setting.random(sizes.product_side, sizes.product_side, seed=seed) for seed in (0, 1))
    alone = timed(lambda: a @ b, setting.device, sizes.repeats)
    copying = timed(bus.copies(True, True), setting.device, sizes.repeats)
    # As many products as last about as long as the copies.
    count = max(1, round(copying.seconds / alone.seconds))
    products: Timing = timed(lambda: [a @ b for _ in range(count)], setting.device, sizes.repeats)
    together = timed(
        bus.copies(True, True, lambda: [a @ b for _ in range(count)]), setting.device, sizes.repeats
    )
    report.figure(
        "copies both ways beside products, over the longer alone",
        together.seconds / max(copying.seconds, products.seconds),
        "times",
        1.0,
        together.n,
        f"copies {copying.seconds * 1e3:.1f} ms, {count} products {products.seconds * 1e3:.1f} ms, "
        f"together {together.seconds * 1e3:.1f} ms",
    )


def hidden_share(report: Report, setting: Setting) -> None:
    """A pass of K2's schedule over MoE layers in four virtual stages on this device."""
    sizes = setting.sizes
    tokens = sizes.offload_microbatches * sizes.seq_len
    changes: dict[str, Any] = {
        "model": {"num_hidden_layers": VIRTUAL_STAGES, "vocab_size": sizes.vocab_size},
        "layout": {"vpp": VIRTUAL_STAGES},
        "train": {"global_batch_tokens": tokens},
    }
    configs = {preset: k2_config(setting, preset, **changes) for preset in ("recompute_fp8", "k2")}
    gradients = adapter.new_gradients()
    base = adapter.ScheduledPass(configs["recompute_fp8"], setting.device, setting.dtype, gradients)
    sending = adapter.ScheduledPass(configs["k2"], setting.device, setting.dtype, gradients, base.models)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(
        sizes.vocab_size, (sizes.offload_microbatches, sizes.seq_len + 1), generator=generator
    ).to(setting.device)
    times = {}
    for name, one in (("recompute_fp8", base), ("k2", sending)):
        times[name] = timed(
            functools.partial(one.run, batch), setting.device, min(5, sizes.repeats), most_seconds=6.0
        )
        report.figure(f"a pass with activations={name}", 1e3 * times[name].seconds, "ms", n=times[name].n)
    sending.offloaded_bytes()
    sending.run(batch)
    moved = sending.offloaded_bytes()
    report.figure("offloaded in a pass", moved / 1e9, "GB", note="the same comes back")
    bandwidth = Predictions(setting.cluster).bus_bandwidth
    if bandwidth is None or not setting.on_gpu:
        report.skip("hidden share of the copies", "needs a GPU and the plan's bandwidth of its bus")
        return
    copies = 2 * moved / bandwidth
    exposed = max(0.0, times["k2"].seconds - times["recompute_fp8"].seconds)
    report.figure(
        "hidden share of the copies",
        1 - exposed / copies,
        "share",
        1.0,
        note=f"copies {copies * 1e3:.0f} ms at the plan's bandwidth, exposed {exposed * 1e3:.0f} ms",
    )
