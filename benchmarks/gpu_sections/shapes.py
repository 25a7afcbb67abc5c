"""K2's shapes, as the sections use them."""

from __future__ import annotations

from typing import Any

import torch

from k2train.architecture.layer import mixer_of
from k2train.config.schema import Config

from .configs import compose
from .setting import Setting


def k2_config(
    setting: Setting,
    activations: str = "none",
    model: dict[str, Any] | None = None,
    **changes: dict[str, Any],
) -> Config:
    """K2 with as few layers and experts as one device has of it, on the plan's device; `model` and
    sections on top."""
    sizes = setting.sizes
    shape = {
        "num_hidden_layers": 2,
        "n_routed_experts": sizes.num_experts,
        **sizes.overrides,
        **(model or {}),
    }
    train = {
        "seq_len": sizes.seq_len,
        "microbatch_size": 1,
        "global_batch_tokens": sizes.seq_len,
        "dtype": "bfloat16",
        "device": setting.device.type,
        **changes.pop("train", {}),
    }
    groups = {"model": "k2", "activations": activations, "cluster": setting.cluster_name or "h200"}
    return compose(groups, model=shape, train=train, **changes)


def attention_inputs(
    setting: Setting, heads: int, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k (1, H, S, K), v (1, H, S, V) and the output's gradient (1, S, H, V); the first three ask
    for gradients."""
    widths = mixer_of(k2_config(setting).model).heads
    q, k = (setting.random(1, heads, length, widths.query, seed=seed).requires_grad_() for seed in (0, 1))
    v = setting.random(1, heads, length, widths.value, seed=2).requires_grad_()
    return q, k, v, setting.random(1, length, heads, widths.value, seed=3)


def expert_ends(setting: Setting) -> torch.Tensor:
    """Where each expert's rows end, int32: as many rows a piece as K2's even routing gives, here
    and there some more or less."""
    sizes = setting.sizes
    shift = [max(1, sizes.expert_rows // 8) * (-1) ** expert for expert in range(sizes.num_experts)]
    rows = torch.tensor([sizes.expert_rows + step for step in shift])
    return rows.cumsum(0).to(torch.int32).to(setting.device)
