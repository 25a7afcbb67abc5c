"""Forward and backward tokens per second of our model beside transformers' DeepseekV3, alternating
in one run.

Both sides hold the same weights and get the same batch, and must give the same loss before anything
is timed. transformers runs with its fastest settings for the shape, found first by trying every
experts and attention implementation it has for this device. A pair is one timing of each side, in
turns, so that a noisy machine disturbs both alike; the figure to trust is the median of the pairs'
ratios. Rows go by sequences x tokens: 8192 tokens a step, and 2048, of which Python and the calls
of operations are a larger part (`experiment=tiny` runs 16 x 128); sequences of 128 to 1024, since
attention is where the two sides differ most, and K2 trains on sequences of 4096. Processor time is
printed too, since a shared machine disturbs it less than the wall clock; with several threads it
also counts threads that wait for each other.

    python benchmarks/model.py
    python benchmarks/model.py --only k2_tiny/8x256 --pairs 15 --threads 1
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
from k2train.config.model import OPTIONAL_BY_MIXER, REQUIRED_BY_MIXER, ModelConfig
from k2train.model.context import MicrobatchContext
from k2train.model.loss import CrossEntropy
from k2train.model.model import Model, build_model, forward_backward
from k2train.model.pieces import whole_model
from k2train.ops.weight_grad import PlainGradients

EXPERTS = ("grouped_mm", "batched_mm", "eager")
ATTENTION = ("sdpa", "eager")
# It takes ten to twenty times as long as the others wherever it was tried; a layer's copies are
# kept until backward.
MAX_GATHERED_BYTES = 4 * 2**30
Step = Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and the batch it is given."""

    config: ModelConfig
    batch: int
    seq_len: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """One step: seconds of the wall clock and of the processor."""

    wall: float
    processor: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table: median tokens per second of both sides, median ratios of the pairs."""

    name: str
    ours: float
    transformers: float
    settings: str
    wall_ratio: float
    processor_ratio: float


def shapes() -> dict[str, Shape]:
    """What is compared: k2_tiny, and a wider model with more, smaller experts.

    Names end in sequences x tokens.
    """
    tiny = load_config([]).model
    wide = dataclasses.replace(
        tiny,
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        n_routed_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=8,
        q_lora_rank=128,
        kv_lora_rank=96,
    )
    rows = [
        ("k2_tiny", tiny, seq_len, tokens) for tokens in (8192, 2048) for seq_len in (128, 256, 512, 1024)
    ]
    rows += [("hidden256_experts32", wide, 256, tokens) for tokens in (8192, 2048)]
    return {
        f"{name}/{tokens // seq_len}x{seq_len}": Shape(config, tokens // seq_len, seq_len)
        for name, config, seq_len, tokens in rows
    }


def gathered_bytes(config: ModelConfig, tokens: int) -> int:
    """What transformers' batched_mm makes of a layer's experts: a copy of every token's own
    ones, and their gradient."""
    weights = 3 * config.hidden_size * config.moe_intermediate_size
    return 2 * 4 * tokens * config.num_experts_per_tok * weights


def transformers_model(model: Model, attention: str, experts: str) -> torch.nn.Module:
    """transformers' model with our model's weights."""
    config = model.config
    others = {"mixer", *REQUIRED_BY_MIXER["grouped_query"], *OPTIONAL_BY_MIXER["grouped_query"]}
    given = dataclasses.asdict(config).items()
    values = {key: value for key, value in given if key not in others and not key.startswith("rope_")}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope = {**rope, **dataclasses.asdict(config.rope_scaling), "rope_type": "yarn"}
    hf_config = transformers.DeepseekV3Config(
        **values,
        num_key_value_heads=config.num_attention_heads,
        rope_parameters=rope,
        use_cache=False,
        num_mtp_layers=0,
        attn_implementation=attention,
        experts_implementation=experts,
    )
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
            num_sequences=tokens.shape[0], gradients=sink, loss=CrossEntropy(targets, 1 / tokens.numel())
        )
        return forward_backward(model, tokens, context)

    return step


def timing(step: Step) -> Timing:
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return Timing(time.perf_counter() - wall, time.process_time() - processor)


def fastest_transformers(
    model: Model, tokens: torch.Tensor, targets: torch.Tensor, tries: int
) -> tuple[Step, str]:
    """The step of transformers' fastest setting and its name, by the best of a few timings of each,
    in turns.

    A setting whose first step takes over four times the best first step so far is dropped at once.
    """
    steps: dict[str, Step] = {}
    best: dict[str, float] = {}
    experts_settings = list(EXPERTS)
    if (size := gathered_bytes(model.config, tokens.numel())) > MAX_GATHERED_BYTES:
        print(f"  without batched_mm, which copies {size / 2**30:.0f} GiB of weights a layer here")
        experts_settings.remove("batched_mm")
    for attention in ATTENTION:
        for experts in reversed(experts_settings):
            name = f"{experts}/{attention}"
            step = transformers_step(transformers_model(model, attention, experts), tokens, targets)
            best[name] = timing(step).wall
            if best[name] <= 4 * min(best.values()):
                steps[name] = step
    for _ in range(tries):
        for name, step in steps.items():
            best[name] = min(best[name], timing(step).wall)
    for name, seconds in best.items():
        print(f"  transformers experts/attention {name:18s} {tokens.numel() / seconds:9.0f} tokens/s")
    chosen = min(steps, key=best.__getitem__)
    return steps[chosen], chosen


def compare(name: str, shape: Shape, options: argparse.Namespace) -> Result:
    """Time both sides in turns."""
    print(f"{name}: {shape.batch} sequences of {shape.seq_len} tokens, {torch.get_num_threads()} threads")
    model = build_model(shape.config, whole_model(shape.config), dtype=torch.float32)
    model.initialise(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    size = (shape.batch, shape.seq_len + 1)
    batch = torch.randint(shape.config.vocab_size, size, generator=generator)
    tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    ours = our_step(model, tokens, targets)
    theirs, settings = fastest_transformers(model, tokens, targets, options.tries)
    torch.testing.assert_close(ours(), theirs(), rtol=1e-5, atol=1e-5)
    # Neither side's steps should pay for walking the other's imported objects.
    gc.collect()
    gc.freeze()
    pairs = [(timing(ours), timing(theirs)) for _ in range(options.pairs)]
    gc.unfreeze()
    return Result(
        name,
        tokens.numel() / statistics.median(our.wall for our, _ in pairs),
        tokens.numel() / statistics.median(their.wall for _, their in pairs),
        settings,
        statistics.median(their.wall / our.wall for our, their in pairs),
        statistics.median(their.processor / our.processor for our, their in pairs),
    )


def print_table(results: list[Result], pairs: int) -> None:
    print(f"\nmedians of {pairs} pairs")
    header = f"{'model/batch':26s}{'ours tok/s':>12s}{'theirs tok/s':>14s}{'ratio':>8s}{'cpu ratio':>11s}"
    print(f"{header}  transformers' experts/attention")
    for row in results:
        figures = f"{row.ours:12.0f}{row.transformers:14.0f}{row.wall_ratio:8.2f}{row.processor_ratio:11.2f}"
        print(f"{row.name:26s}{figures}  {row.settings}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9, help="timings of each side, in turns")
    parser.add_argument(
        "--tries", type=int, default=3, help="timings of each transformers setting beforehand"
    )
    parser.add_argument("--only", choices=sorted(shapes()), help="one shape of the table")
    parser.add_argument("--batch", type=int, help="sequences, instead of each shape's own number")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of both sides")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    results = []
    with contextlib.suppress(KeyboardInterrupt):
        for name, shape in shapes().items():
            if options.only in (None, name):
                batch = options.batch or shape.batch
                results.append(compare(name, dataclasses.replace(shape, batch=batch), options))
    print_table(results, options.pairs)


if __name__ == "__main__":
    main()
