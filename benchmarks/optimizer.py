"""AdamW on the CPU by three implementations, and a MuonClip step with its states on the device and
in host memory.

    OMP_NUM_THREADS=2 python benchmarks/optimizer.py
    OMP_NUM_THREADS=1 python benchmarks/optimizer.py --millions 100 --rounds 5

Everything alternates in one run, so that a noisy machine disturbs all alike; the figures are
medians over the rounds, and the ratio is the median of each round's ratio to torch's fused AdamW
(to states on the device). The AdamW sides get equal values and must agree before anything is timed.
DeepSpeed is left out where it is not installed; it compiles its kernel first. OMP_NUM_THREADS is
the one setting of threads that all of them obey.

The MuonClip step runs on this machine's CPU (with --device cuda on a GPU), where host and device
memory are one: there it shows what the copies through staging cost at most, not what a GPU's bus
would hide.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table
from torch.optim.adamw import adamw

from k2train.config.model import ModelConfig
from k2train.config.optim import LrPhase, OptimConfig
from k2train.device.build import build_device
from k2train.layout.tensors import model_tensors
from k2train.model.model import build_model
from k2train.model.pieces import whole_model
from k2train.optim.adam import DeepSpeedAdamW
from k2train.optim.build import build_optimizer
from k2train.optim.optimizer import Optimizer
from k2train.parallel.communicator import World
from k2train.parallel.groups import Groups
from k2train.parallel.threads import run_threads
from k2train.update_rules.rules.adamw import AdamW

RULE = AdamW(0.9, 0.95, 1e-8, 0.1)
Step = Callable[[], None]
# Master and both moments, flat.
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Kernel = Callable[[States, torch.Tensor, int], None]
# 28 M parameters, three quarters of them in the experts of three layers.
MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=384,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    intermediate_size=1024,
    moe_intermediate_size=192,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_shared_experts=1,
    num_attention_heads=6,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--millions", type=float, default=50.0, help="parameters that AdamW updates")
    parser.add_argument("--rounds", type=int, default=11, help="each with every side once")
    parser.add_argument("--experts", type=int, default=32, help="of a layer of the MuonClip step's model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the MuonClip step")
    arguments = parser.parse_args()
    console = Console(width=110)
    console.print(f"python benchmarks/optimizer.py {' '.join(sys.argv[1:])}", highlight=False)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)", highlight=False)
    num_elements = round(arguments.millions * 1e6)
    sides = adamw_sides(num_elements)
    seconds = alternate(sides, arguments.rounds)
    console.print(table(f"AdamW, {arguments.millions:g} M parameters, FP32", seconds))
    device = torch.device(arguments.device)
    model = dataclasses.replace(MODEL, n_routed_experts=arguments.experts)
    seconds = alternate(muon_sides(model, device), arguments.rounds)
    console.print(table(f"MuonClip step, {num_parameters(model) / 1e6:.1f} M parameters, {device}", seconds))


def adamw_sides(num_elements: int) -> dict[str, Step]:
    """Each implementation on states of its own, equal in value; one update of each is compared."""
    kernels: dict[str, Kernel] = {"torch fused": fused}
    if importlib.util.find_spec("deepspeed") is not None:
        deepspeed = DeepSpeedAdamW(RULE)
        kernels["DeepSpeedCPUAdam"] = lambda states, gradient, n: deepspeed.update(
            states[0], states[1:], gradient, 1e-3, True, n
        )
    kernels["torch foreach"] = foreach
    gradient = torch.randn(num_elements, generator=torch.Generator().manual_seed(1))
    states = {name: new_states(num_elements) for name in kernels}
    for name, kernel in kernels.items():
        kernel(states[name], gradient, 0)
        torch.testing.assert_close(states[name][0], states["torch fused"][0], rtol=1e-5, atol=1e-6)
    return {name: repeated(kernel, states[name], gradient) for name, kernel in kernels.items()}


def new_states(num_elements: int) -> States:
    master = torch.randn(num_elements, generator=torch.Generator().manual_seed(0))
    return master, torch.zeros(num_elements), torch.zeros(num_elements)


def repeated(kernel: Kernel, states: States, gradient: torch.Tensor) -> Step:
    """The kernel with its number of updates counted on."""
    done = [1]

    def step() -> None:
        kernel(states, gradient, done[0])
        done[0] += 1

    return step


def fused(states: States, gradient: torch.Tensor, num_updates: int) -> None:
    RULE.update(states[0], states[1:], gradient, 1e-3, True, num_updates)


def foreach(states: States, gradient: torch.Tensor, num_updates: int) -> None:
    master, exp_avg, exp_avg_sq = states
    adamw(
        [master],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(float(num_updates))],
        foreach=True,
        amsgrad=False,
        beta1=RULE.beta1,
        beta2=RULE.beta2,
        lr=1e-3,
        weight_decay=RULE.weight_decay,
        eps=RULE.eps,
        maximize=False,
    )


def muon_sides(model: ModelConfig, device: torch.device) -> dict[str, Step]:
    """Steps of two optimizers with equal weights and gradients."""
    return {f"states on the {place}": muon_step(model, device, place) for place in ("device", "host")}


def muon_step(model: ModelConfig, device: torch.device, states: str) -> Step:
    optim = OptimConfig(lr_phases=(LrPhase("constant", 1e-3, fraction=1.0),), newton_schulz_dtype="float32")
    optimizer = build(model, dataclasses.replace(optim, states=states), device)  # type: ignore[arg-type]
    logits = {
        layer: torch.full((model.num_attention_heads,), 150.0) for layer in range(model.num_hidden_layers)
    }
    flats = [bucket.flat for bucket in optimizer.gradients.buckets]
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(flat.shape, generator=generator).to(device) for flat in flats]

    def step() -> None:
        for flat, gradient in zip(flats, gradients, strict=True):
            flat.copy_(gradient)
        optimizer.step(1e-3, logits)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def build(config: ModelConfig, optim: OptimConfig, device: torch.device) -> Optimizer:
    """The one-rank optimizer of the model; a group of one is good for use after the world that
    made it."""
    model = build_model(config, whole_model(config), torch.float32, device)
    model.initialise(seed=0)
    catalogue = {spec.name: spec for spec in model_tensors(config)}
    pieces = {0: [piece for piece in model.pieces() if piece.trained]}

    def run_rank(world: World) -> Optimizer:
        alone = world.group("world", [0])
        groups = Groups(world=alone, pp=alone, ep=alone, edp=alone, dp=alone)
        return build_optimizer(optim, config, catalogue, pieces, groups, build_device(device))

    return run_threads(1, run_rank)[0]


def num_parameters(model: ModelConfig) -> int:
    return sum(spec.num_elements for spec in model_tensors(model) if spec.trained)


def alternate(sides: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            if index:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def table(title: str, seconds: Mapping[str, list[float]]) -> Table:
    """Medians, and the median of the rounds' ratios to the first side."""
    result = Table(
        "side",
        "median ms",
        "fastest ms",
        "slowest ms",
        "ratio to the first",
        title=title,
        title_justify="left",
    )
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = statistics.median(value / base for value, base in zip(values, first, strict=True))
        result.add_row(
            name, *(f"{1e3 * part(values):.1f}" for part in (statistics.median, min, max)), f"{ratio:.2f}"
        )
    return result


if __name__ == "__main__":
    main()
