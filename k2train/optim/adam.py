"""AdamW for flat stretches of masters, by torch or by DeepSpeed.

torch's fused kernel updates masters in place, on a GPU or on a CPU (Loshchilov & Hutter, arXiv 1711.05101). Where all
states live in host memory, DeepSpeed's CPU kernel (ZeRO-Offload, arXiv 2101.06840) can do the same arithmetic instead;
it is a C++ extension that is compiled when it is first used. docs/optimizer.md has both measured side by side.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Protocol

import torch
from torch.optim.adamw import adamw

from k2train.config.errors import ConfigError
from k2train.config.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class AdamRule:
    """AdamW's constants."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class AdamStates:
    """Equal stretches of master and moments, flat; views, updated in place."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    def part(self, entries: slice) -> AdamStates:
        return AdamStates(self.master[entries], self.exp_avg[entries], self.exp_avg_sq[entries])


class AdamW(Protocol):
    """One update of some states. num_updates: made before this one. decayed: whether weight decay applies."""

    def update(
        self, states: AdamStates, gradient: torch.Tensor, lr: float, decayed: bool, num_updates: int
    ) -> None: ...


class TorchAdamW:
    """torch's fused kernel, where the states are."""

    def __init__(self, rule: AdamRule) -> None:
        self._rule = rule

    def update(
        self, states: AdamStates, gradient: torch.Tensor, lr: float, decayed: bool, num_updates: int
    ) -> None:
        rule = self._rule
        # Filled on the device: a number copied there would make the host wait.
        step = torch.full((), float(num_updates), device=states.master.device)
        adamw([states.master], [gradient], [states.exp_avg], [states.exp_avg_sq], [], [step], fused=True, amsgrad=False,
              beta1=rule.beta1, beta2=rule.beta2, lr=lr, weight_decay=rule.weight_decay if decayed else 0.0,
              eps=rule.eps, maximize=False)  # fmt: skip


class DeepSpeedAdamW:
    """DeepSpeed's CPU kernel, for FP32 states in host memory.

    It is an optimizer with states of its own, so before each update it is handed ours in their place.
    """

    def __init__(self, rule: AdamRule) -> None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        self._weight_decay = rule.weight_decay
        self._parameter = torch.nn.Parameter(torch.empty(0))
        self._optimizer = DeepSpeedCPUAdam([self._parameter], betas=(rule.beta1, rule.beta2), eps=rule.eps,
                                           adamw_mode=True)  # fmt: skip

    def update(
        self, states: AdamStates, gradient: torch.Tensor, lr: float, decayed: bool, num_updates: int
    ) -> None:
        self._parameter.data, self._parameter.grad = states.master, None
        self._parameter.grad = gradient
        (group,) = self._optimizer.param_groups
        group["lr"], group["weight_decay"] = lr, self._weight_decay if decayed else 0.0
        moments = {"exp_avg": states.exp_avg, "exp_avg_sq": states.exp_avg_sq}
        self._optimizer.state[self._parameter] = {"step": num_updates, **moments}
        self._optimizer.step()


def adam_rule(config: OptimConfig) -> AdamRule:
    """AdamW's constants from the config."""
    return AdamRule(config.adam_beta1, config.adam_beta2, config.adam_eps, config.weight_decay)


def build_adamw(config: OptimConfig) -> AdamW:
    """The update that `optim.host_adam` names. The config has passed `check_host_adam`."""
    return (DeepSpeedAdamW if config.host_adam == "deepspeed" else TorchAdamW)(adam_rule(config))


def check_host_adam(config: OptimConfig, dtype: torch.dtype) -> None:
    """Refuse a DeepSpeed kernel that is missing, or that has no states of its kind to update. dtype: the compute type."""
    if config.host_adam != "deepspeed":
        return
    if config.states != "host":
        raise ConfigError("optim.host_adam", "deepspeed", f"updates states in host memory, and optim.states={config.states}",
                          "set optim.states=host, or optim.host_adam=torch")  # fmt: skip
    if dtype == torch.float64:
        raise ConfigError("optim.host_adam", "deepspeed", "has no kernel for the float64 states of train.dtype=float64",
                          "set optim.host_adam=torch")  # fmt: skip
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("optim.host_adam", "deepspeed", "the package deepspeed is not installed",
                          "install k2train with its deepspeed extra: pip install 'k2train[deepspeed]', or set "
                          "optim.host_adam=torch")  # fmt: skip
