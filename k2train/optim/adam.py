"""AdamW by DeepSpeed's CPU kernel (ZeRO-Offload, arXiv 2101.06840), for states in host memory.

It does the arithmetic of AdamW's rule. It is a C++ extension that is compiled when it is first
used. docs/optimizer.md has both kernels measured side by side.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import ClassVar

import torch

from k2train.config.errors import ConfigError
from k2train.config.optim import OptimConfig
from k2train.update_rules.chosen import chosen_rules
from k2train.update_rules.rule import Rules
from k2train.update_rules.rules.adamw import AdamW


class DeepSpeedAdamW:
    """AdamW's rule with another update.

    DeepSpeed's optimizer has states of its own, so before each update it is handed ours in their
    place.
    """

    name: ClassVar[str] = AdamW.name
    label: ClassVar[str] = AdamW.label
    states: ClassVar[tuple[str, ...]] = AdamW.states
    whole_matrices: ClassVar[bool] = AdamW.whole_matrices

    def __init__(self, rule: AdamW) -> None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        self._rule = rule
        self._parameter = torch.nn.Parameter(torch.empty(0))
        betas = (rule.beta1, rule.beta2)
        self._optimizer = DeepSpeedCPUAdam([self._parameter], betas=betas, eps=rule.eps, adamw_mode=True)

    def matmul_flops(self, shape: Sequence[int]) -> float:
        return self._rule.matmul_flops(shape)

    def update(
        self,
        W: torch.Tensor,
        states: Sequence[torch.Tensor],
        G: torch.Tensor,
        lr: float,
        decayed: bool,
        num_updates: int,
    ) -> None:
        """One update in place (`UpdateRule.update`); FP32, in host memory."""
        self._parameter.data, self._parameter.grad = W, None
        self._parameter.grad = G
        (group,) = self._optimizer.param_groups
        group["lr"], group["weight_decay"] = lr, self._rule.weight_decay if decayed else 0.0
        moments = dict(zip(self.states, states, strict=True))
        self._optimizer.state[self._parameter] = {"step": num_updates, **moments}
        self._optimizer.step()


def build_rules(config: OptimConfig) -> Rules:
    """The rules of `optim.name`, AdamW's by the kernel of `optim.host_adam`.

    The config has passed `check_host_adam`. Raises ConfigError for an optim.name that is none.
    """
    rules = chosen_rules(config)
    if config.host_adam != "deepspeed" or not isinstance(rules.others, AdamW):
        return rules
    adamw = DeepSpeedAdamW(rules.others)
    return Rules(adamw if rules.matrices == rules.others else rules.matrices, adamw)


def check_host_adam(config: OptimConfig, dtype: torch.dtype) -> None:
    """Refuse a DeepSpeed kernel that is missing, or that has no states of its kind to update.

    dtype: the compute type. Raises ConfigError, for an optim.name that is none, too.
    """
    rules = chosen_rules(config)
    if config.host_adam != "deepspeed":
        return
    if not isinstance(rules.others, AdamW):
        raise ConfigError(
            "optim.host_adam",
            "deepspeed",
            f"updates AdamW's parameters, and optim.name={config.name} has none",
            "set optim.host_adam=torch",
        )
    if config.states != "host":
        raise ConfigError(
            "optim.host_adam",
            "deepspeed",
            f"updates states in host memory, and optim.states={config.states}",
            "set optim.states=host, or optim.host_adam=torch",
        )
    if dtype == torch.float64:
        raise ConfigError(
            "optim.host_adam",
            "deepspeed",
            "has no kernel for the float64 states of train.dtype=float64",
            "set optim.host_adam=torch",
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "optim.host_adam",
            "deepspeed",
            "the package deepspeed is not installed",
            "install k2train with its deepspeed extra: pip install 'k2train[deepspeed]', or set "
            "optim.host_adam=torch",
        )
