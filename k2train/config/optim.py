"""`optim`: which update rules a run has, their constants, and the learning rate as phases."""

from __future__ import annotations

import dataclasses
from typing import Literal

from k2train.config.errors import ConfigError
from k2train.config.fields import check_ranges, key

NewtonSchulzDtype = Literal["bfloat16", "float32", "float64"]


@dataclasses.dataclass(frozen=True)
class LrPhase:
    """One stretch of the learning-rate schedule, from where the previous one ended to `to`.

    Its length is given by exactly one of steps, tokens or fraction (of train.steps).
    """

    kind: Literal["linear", "constant", "cosine"] = key("shape of the stretch")
    to: float = key("learning rate at its end; a constant phase holds it throughout", minimum=0)
    steps: int | None = key("length", unit="steps", default=None, minimum=0)
    tokens: float | None = key("length", unit="tokens", default=None, minimum=0)
    fraction: float | None = key("length as a share of train.steps", default=None, minimum=0, maximum=1)

    def __post_init__(self) -> None:
        check_ranges("optim.lr_phases", self)
        given = [name for name in ("steps", "tokens", "fraction") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                "optim.lr_phases",
                f"{self.kind} phase with {' and '.join(given) or 'no length'}",
                "a phase has exactly one length",
                "give one of steps, tokens or fraction",
            )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """`optim`: which update every parameter gets.

    The rules themselves stand above this room, in `update_rules`. So `name` is any word here, and
    `chosen_rules` refuses one that no rule answers to.
    """

    name: str = key(
        "rules of the update, as in the files of configs/optim; muonclip is Muon and QK-Clip for matrices, "
        "AdamW for embedding, head and norms",
        default="muonclip",
    )
    lr_phases: tuple[LrPhase, ...] = key("learning rate over the run, phase after phase from 0", default=())
    weight_decay: float = key(
        "decoupled weight decay of every parameter with two dimensions", default=0.1, minimum=0
    )
    momentum: float = key("momentum, for a rule that has one", default=0.95, minimum=0, maximum=1)
    nesterov: bool = key(
        "look one momentum step ahead (Moonlight does), for a rule with momentum", default=True
    )
    newton_schulz_steps: int = key(
        "iterations of Muon's orthogonalisation", unit="iterations", default=5, minimum=1, maximum=100
    )
    newton_schulz_dtype: NewtonSchulzDtype = key("precision of that iteration", default="bfloat16")
    update_rms: float = key(
        "RMS of a Muon update per unit of learning rate, matched to AdamW's", default=0.2, above=0
    )
    qk_clip_tau: float | None = key(
        "largest attention logit a head may keep after a step; null never clips", default=100.0, above=0
    )
    adam_beta1: float = key("AdamW's decay of the first moment", default=0.9, minimum=0, maximum=1)
    adam_beta2: float = key("AdamW's decay of the second moment", default=0.95, minimum=0, maximum=1)
    adam_eps: float = key("AdamW's epsilon", default=1e-8, above=0)
    states: Literal["device", "host"] = key(
        "where FP32 masters, momentum and moments live; from host memory they are streamed through the "
        "device in the step",
        default="device",
    )
    host_adam: Literal["torch", "deepspeed"] = key(
        "which CPU AdamW updates states in host memory; deepspeed needs the deepspeed extra", default="torch"
    )

    @property
    def tau(self) -> float | None:
        """QK-Clip's limit of logits; None where nothing is clipped. Only MuonClip clips."""
        return self.qk_clip_tau if self.name == "muonclip" else None

    def __post_init__(self) -> None:
        check_ranges("optim", self)
        if not self.lr_phases:
            raise ConfigError(
                "optim.lr_phases",
                "[]",
                "needs at least one phase",
                "for example optim.lr_phases=[{kind: constant, to: 2e-4, fraction: 1}]",
            )
