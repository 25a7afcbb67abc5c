"""Forward and backward tokens per second of our model beside transformers' DeepseekV3, alternating in one run.

Both sides hold the same weights and get the same batch, and must give the same loss before anything is timed.
transformers runs with its fastest settings, found first by trying every experts and attention implementation it has
for this device. A pair is one timing of each side, in turns, so that a noisy machine disturbs both alike; the figure to
trust is the median of the pairs' ratios.

    python benchmarks/model.py --pairs 9 --batch 4 --seq-len 256
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers

from k2train.config.compose import load_config
from k2train.config.model import ModelConfig
from k2train.model.context import MicrobatchContext
from k2train.model.model import Model, build_model, forward_backward
from k2train.model.pieces import whole_model
from k2train.ops.weight_grad import PlainGradients

EXPERTS = ("grouped_mm", "batched_mm", "eager")
ATTENTION = ("sdpa", "eager")
Step = Callable[[], torch.Tensor]


def shapes() -> dict[str, ModelConfig]:
    """The models compared: k2_tiny of configs/, and a wider one with more, smaller experts."""
    tiny = load_config(["model=k2_tiny"]).model
    wide = dataclasses.replace(
        tiny, vocab_size=2048, hidden_size=256, intermediate_size=768, moe_intermediate_size=128, n_routed_experts=32,
        num_experts_per_tok=4, num_attention_heads=8, q_lora_rank=128, kv_lora_rank=96,
    )  # fmt: skip
    return {"k2_tiny": tiny, "hidden 256, 32 experts, top 4": wide}


def transformers_model(model: Model, attention: str, experts: str) -> torch.nn.Module:
    """transformers' model with our model's weights."""
    config = model.config
    values = {key: value for key, value in dataclasses.asdict(config).items() if not key.startswith("rope_")}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope = {**rope, **dataclasses.asdict(config.rope_scaling), "rope_type": "yarn"}
    hf_config = transformers.DeepseekV3Config(
        **values, num_key_value_heads=config.num_attention_heads, rope_parameters=rope, use_cache=False,
        num_mtp_layers=0, attn_implementation=attention, experts_implementation=experts,
    )  # fmt: skip
    other = transformers.DeepseekV3ForCausalLM(hf_config)
    state = other.state_dict()
    for piece in model.pieces():
        _in_state(state, piece.name).copy_(piece.tensor)
    return other


def _in_state(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The tensor `name` inside transformers' state, where the experts of a layer are fused."""
    if name in state:
        return state[name]
    prefix, rest = name.split(".experts.")
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        return state[f"{prefix}.experts.down_proj"][int(expert)]
    halves = state[f"{prefix}.experts.gate_up_proj"][int(expert)].chunk(2)
    return halves[0 if projection == "gate_proj" else 1]


def transformers_step(other: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor) -> Step:
    """One forward and backward; gradients start from none, which is faster for it than zeroing."""

    def step() -> torch.Tensor:
        other.zero_grad(set_to_none=True)
        loss = F.cross_entropy(other(tokens).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.detach()

    return step


def our_step(model: Model, tokens: torch.Tensor, targets: torch.Tensor) -> Step:
    """One forward and backward into FP32 buffers, which are zeroed as part of the step."""
    sink = PlainGradients()

    def step() -> torch.Tensor:
        sink.zero()
        context = MicrobatchContext(
            num_sequences=tokens.shape[0], gradients=sink, targets=targets, loss_scale=1 / tokens.numel()
        )
        return forward_backward(model, tokens, context)

    return step


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def fastest_transformers(model: Model, tokens: torch.Tensor, targets: torch.Tensor, tries: int) -> Step:
    """The step of transformers' fastest setting, by the best of a few timings of each."""
    found: list[tuple[float, str, Step]] = []
    for attention in ATTENTION:
        for experts in EXPERTS:
            step = transformers_step(transformers_model(model, attention, experts), tokens, targets)
            step()
            best = min(seconds(step) for _ in range(tries))
            found.append((best, f"experts={experts} attention={attention}", step))
            print(f"  transformers {found[-1][1]:42s} {tokens.numel() / best:9.0f} tokens/s")
    best, name, step = min(found, key=lambda item: item[0])
    print(f"  taking {name}")
    return step


def compare(name: str, config: ModelConfig, options: argparse.Namespace) -> float:
    """Print both sides' tokens/s and return the median ratio, ours over transformers'."""
    print(f"{name}: {options.batch} sequences of {options.seq_len} tokens, {torch.get_num_threads()} threads")
    model = build_model(config, whole_model(config), dtype=torch.float32)
    model.initialise(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch, options.seq_len + 1)
    batch = torch.randint(config.vocab_size, shape, generator=generator)
    tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    ours = our_step(model, tokens, targets)
    theirs = fastest_transformers(model, tokens, targets, options.tries)
    torch.testing.assert_close(ours(), theirs(), rtol=1e-5, atol=1e-5)
    # Neither side's steps should pay for walking the other's imported objects.
    gc.collect()
    gc.freeze()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(options.pairs)]
    ratio = statistics.median(their / our for our, their in pairs)
    for label, times in zip(("ours", "transformers"), zip(*pairs, strict=True), strict=True):
        print(
            f"  {label:13s}{tokens.numel() / statistics.median(times):9.0f} tokens/s (median of {len(pairs)})"
        )
    print(f"  ratio {ratio:.2f} (median of {len(pairs)} pairs)")
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="timings of each side, in turns")
    parser.add_argument(
        "--tries", type=int, default=3, help="timings of each transformers setting beforehand"
    )
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of both sides")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    with contextlib.suppress(KeyboardInterrupt):
        ratios = [compare(name, config, options) for name, config in shapes().items()]
        print(f"smallest median ratio {min(ratios):.2f}")


if __name__ == "__main__":
    main()
