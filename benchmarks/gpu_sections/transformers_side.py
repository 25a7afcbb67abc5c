"""transformers' DeepseekV3 of a config's shape, trained in BF16 with torch's fused AdamW: the usual
way without this program."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from k2train.config.model import OPTIONAL_BY_MIXER, REQUIRED_BY_MIXER
from k2train.config.schema import Config

from .setting import Setting
from .timing import Timing, timed


def transformers_tokens_per_second(setting: Setting, config: Config, experts: str) -> tuple[Timing, int]:
    """Seconds of a step, and its tokens: the same microbatches, with gradients added up in BF16.
    Raises where it does not fit."""
    # Imported here: the package takes seconds, and no other section needs it.
    model = build(setting, config, experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    sizes, train = setting.sizes, config.train
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.train_microbatches, train.seq_len + 1)
    batch = torch.randint(config.model.vocab_size, shape, generator=generator).to(setting.device)

    def step() -> None:
        for row in batch.split(train.microbatch_size):
            logits = model(row[:, :-1]).logits.flatten(0, 1)
            F.cross_entropy(logits, row[:, 1:].flatten()).div(len(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, setting.device, min(5, sizes.repeats), most_seconds=8.0), train.global_batch_tokens


def build(setting: Setting, config: Config, experts: str) -> torch.nn.Module:
    """The model on the device, with random weights made there."""
    import transformers

    model = config.model
    others = {"mixer", *REQUIRED_BY_MIXER["grouped_query"], *OPTIONAL_BY_MIXER["grouped_query"]}
    given = dataclasses.asdict(model).items()
    values = {key: value for key, value in given if key not in others and not key.startswith("rope_")}
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope = {**rope, **dataclasses.asdict(model.rope_scaling), "rope_type": "yarn"}
    hf_config = transformers.DeepseekV3Config(
        **values,
        num_key_value_heads=model.num_attention_heads,
        rope_parameters=rope,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    transformers.utils.logging.set_verbosity_error()
    with torch.device(setting.device):
        return transformers.DeepseekV3ForCausalLM(hf_config).to(setting.dtype)
