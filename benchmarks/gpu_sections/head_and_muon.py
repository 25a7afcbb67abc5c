"""Section 8: K2's head with its loss and both gradients, and Newton-Schulz at the shapes of K2's
matrices."""

from __future__ import annotations

import torch

from k2train.architecture.layer import mixer_of

from . import adapter
from .memory import note, peak, start_peak
from .predictions import Predictions, estimator, newton_schulz_flops
from .report import Report
from .setting import Setting
from .shapes import k2_config
from .timing import timed

NEWTON_SCHULZ_STEPS = 5
EXPERTS_AT_ONCE = 8


def run(report: Report, setting: Setting) -> None:
    with report.attempt("head"):
        head(report, setting)
    for name, shape in matrices(setting).items():
        with report.attempt(name):
            muon(report, setting, name, shape)


def head(report: Report, setting: Setting) -> None:
    """Final norm and embedding left out: the loss of one microbatch from its normed hidden
    states."""
    config = k2_config(setting)
    model, tokens = config.model, config.train.seq_len
    weight = setting.random(model.vocab_size, model.hidden_size).mul_(model.initializer_range)
    hidden = setting.random(tokens, model.hidden_size, seed=1).requires_grad_()
    targets = torch.randint(model.vocab_size, (tokens,), device=setting.device)
    buffer = torch.zeros(weight.shape, device=setting.device)
    before = start_peak(setting)

    def step() -> None:
        loss = adapter.head_loss(hidden, weight, targets, buffer)
        torch.autograd.grad(loss, hidden)

    timing = timed(step, setting.device, setting.sizes.repeats)
    flops = 6.0 * tokens * model.hidden_size * model.vocab_size
    predicted = None
    if setting.cluster is not None:
        predicted = 1e3 * sum(phase.seconds for phase in estimator(config).head.forward)
    report.figure(
        "head: loss and both gradients",
        timing.seconds * 1e3,
        "ms",
        predicted,
        timing.n,
        f"{flops / timing.seconds / 1e12:.0f} TFLOP/s",
    )
    transient = estimator(config).head.forward_transient_bytes
    report.figure(
        "head: memory besides weight, sums and input",
        (peak(setting) - before) / 1e9,
        "GB",
        transient / 1e9,
        note=note(setting),
    )


def matrices(setting: Setting) -> dict[str, tuple[int, ...]]:
    """The shapes that Muon orthogonalises; experts in a batch, as the optimizer takes them."""
    model = k2_config(setting).model
    hidden = model.hidden_size
    mixer = {
        spec.name.split(".")[-2]: spec.shape for spec in mixer_of(model).tensors(0) if spec.role == "matrix"
    }
    return {
        f"{EXPERTS_AT_ONCE} experts' gate": (EXPERTS_AT_ONCE, model.moe_intermediate_size, hidden),
        f"{EXPERTS_AT_ONCE} experts' down": (EXPERTS_AT_ONCE, hidden, model.moe_intermediate_size),
        **mixer,
        "dense gate": (model.intermediate_size, hidden),
    }


def muon(report: Report, setting: Setting, name: str, shape: tuple[int, ...]) -> None:
    gradient = setting.random(*shape, dtype=torch.float32)
    timing = timed(
        lambda: adapter.orthogonalise(gradient), setting.device, setting.sizes.repeats, most_seconds=1.0
    )
    count = shape[0] if len(shape) == 3 else 1
    flops = count * newton_schulz_flops((shape[-2], shape[-1]), NEWTON_SCHULZ_STEPS)
    report.figure(
        f"Newton-Schulz, {name} {'x'.join(map(str, shape))}",
        flops / timing.seconds / 1e12,
        "TFLOP/s",
        Predictions(setting.cluster).rate(flops),
        timing.n,
        f"{timing.seconds * 1e3:.2f} ms",
    )
