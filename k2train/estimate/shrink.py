"""A model whose layers fit a small machine: every width divided, what routes and what cuts heads left alone.

Bytes a token of saved tensors are linear in the widths, so a prediction that holds for the narrow model is the same formula at
work as for the real one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.config.sections import Dtype
from k2train.estimate.parameters import layer_parameters
from k2train.estimate.work import ELEMENT_BYTES

WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
WIDTH_MULTIPLE = 8
"""Narrow widths stay multiples of it: grouped products want rows of whole 16 bytes, 8 numbers of BF16."""
LARGEST_DIVISOR = 1024


def sample_layers(model: ModelConfig) -> tuple[int, ...]:
    """One layer of each kind the model has: its last dense one, its first MoE one. They are neighbours."""
    first_moe = model.first_k_dense_replace
    dense = (first_moe - 1,) if first_moe else ()
    return dense + ((first_moe,) if model.num_moe_layers else ())


def layer_bytes(model: ModelConfig, layers: Sequence[int], dtype: Dtype) -> int:
    """Parameters of these layers, all experts, in bytes."""
    return ELEMENT_BYTES[dtype] * sum(layer_parameters(model, layer).total for layer in layers)


def divide_widths(model: ModelConfig, divisor: int) -> ModelConfig:
    """Widths of the residual stream, the feed-forwards and the latents, and the number of heads, divided.

    Head widths, experts, and experts a token stay.
    """
    if divisor == 1:
        return model
    given = {name: getattr(model, name) for name in WIDTHS}
    widths = {
        name: max(WIDTH_MULTIPLE, width // divisor // WIDTH_MULTIPLE * WIDTH_MULTIPLE)
        for name, width in given.items()
        if width is not None
    }
    heads = max(1, model.num_attention_heads // divisor)
    return dataclasses.replace(model, num_attention_heads=heads, **widths)


def shrink(
    model: ModelConfig, layers: Sequence[int], dtype: Dtype, limit_bytes: int
) -> tuple[ModelConfig, int]:
    """The model and the smallest power of two by which its widths must be divided for `layers` to fit the limit.

    Raises ConfigError where the experts are too many for any width.
    """
    divisor = 1
    while divisor <= LARGEST_DIVISOR:
        narrow = divide_widths(model, divisor)
        if layer_bytes(narrow, layers, dtype) <= limit_bytes:
            return narrow, divisor
        divisor *= 2
    raise ConfigError("model.n_routed_experts", model.n_routed_experts,
                      f"makes a layer larger than the {limit_bytes / 2**20:.0f} MiB it is measured in, at 1/{LARGEST_DIVISOR} of "
                      "its widths", "use fewer experts, or k2train plan, which computes the same bytes")  # fmt: skip
