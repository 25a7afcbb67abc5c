"""Small models and optimizers on every rank of a small world."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import pytest
import torch

from k2train.architecture.tensors import TensorSpec
from k2train.config.model import ModelConfig
from k2train.config.optim import LrPhase, OptimConfig
from k2train.device.cpu import CpuDevice
from k2train.layout.grid import RankGrid
from k2train.layout.tensors import model_tensors
from k2train.model.model import Model, build_model
from k2train.model.pieces import ModelPart
from k2train.optim.buckets import GradBuffers
from k2train.optim.build import build_optimizer
from k2train.optim.optimizer import Optimizer
from k2train.parallel.communicator import World
from k2train.parallel.groups import build_groups
from k2train.parallel.threads import run_threads

# Widths and vocabulary that no number of ranks divides; two dense layers' worth of shapes and two
# of experts.
MODEL = ModelConfig(
    vocab_size=37,
    hidden_size=20,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=28,
    moe_intermediate_size=12,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_shared_experts=1,
    num_attention_heads=3,
    q_lora_rank=14,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    initializer_range=0.1,
)
OPTIM = OptimConfig(lr_phases=(LrPhase("constant", 1e-2, fraction=1.0),), newton_schulz_dtype="float64")


def drawn(key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal values that depend on the key alone."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclasses.dataclass
class Rank:
    """One rank's model and optimizer, and its part in feeding gradients."""

    world: World
    grid: RankGrid
    model: Model
    optimizer: Optimizer
    catalogue: dict[str, TensorSpec]

    def feed(self, step: int, scale: float = 1.0, microbatches: int = 2) -> None:
        """Add this rank's part of the step's gradient: over replicas and microbatches the parts
        make the whole."""
        coordinates = self.grid.coordinates(self.world.rank)
        for parameter, pieces in self.parameters().items():
            for microbatch in range(microbatches):
                gradient = torch.zeros_like(parameter)
                for piece in pieces:
                    spec = self.catalogue[piece.name]
                    expert = spec.expert is not None
                    replicas = self.grid.edp if expert else self.grid.dp
                    replica = coordinates.edp_rank if expert else self.grid.dp_rank(self.world.rank)
                    weights = torch.softmax(drawn(f"{spec.name} weights", (replicas * microbatches,)), 0)
                    whole = drawn(f"{spec.name} {step}", spec.shape) * scale
                    piece.view(gradient).copy_(whole * weights[replica * microbatches + microbatch])
                self.optimizer.gradients.add(parameter, gradient)

    def parameters(self) -> dict[torch.Tensor, list]:  # type: ignore[type-arg]
        found: dict[torch.Tensor, list] = {}  # type: ignore[type-arg]
        for piece in self.model.pieces():
            if piece.trained:
                found.setdefault(piece.parameter, []).append(piece)
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        return {piece.name: piece.tensor.clone() for piece in self.model.pieces()}


def make_rank(
    world: World,
    grid: RankGrid,
    optim: OptimConfig = OPTIM,
    model: ModelConfig = MODEL,
    dtype: torch.dtype = torch.float64,
) -> Rank:
    per_rank = model.n_routed_experts // grid.ep
    first = grid.coordinates(world.rank).ep_rank * per_rank
    layers = tuple(range(model.num_hidden_layers))
    part = ModelPart(layers, True, True, tuple(range(first, first + per_rank)))
    built = build_model(model, part, dtype)
    built.initialise(seed=7)
    catalogue = {spec.name: spec for spec in model_tensors(model)}
    pieces = {0: list(built.pieces())}
    optimizer = build_optimizer(optim, model, catalogue, pieces, build_groups(grid, world), CpuDevice())
    return Rank(world, grid, built, optimizer, catalogue)


@pytest.fixture(name="make_rank")
def make_rank_fixture() -> Callable[..., Rank]:
    return make_rank


@pytest.fixture
def one_rank() -> Callable[..., Rank]:
    """A maker of one-rank optimizers usable outside the world that made them: a group of one never
    waits."""

    def make(**options: object) -> Rank:
        return run_threads(1, lambda world: make_rank(world, RankGrid(1, 1, 1), **options))[0]  # type: ignore[arg-type]

    return make


@pytest.fixture
def gradient_of() -> Callable[[GradBuffers, str], torch.Tensor]:
    """A rank's sum for a named tensor, before the reduce-scatter."""

    def gather(buffers: GradBuffers, name: str) -> torch.Tensor:
        held = [(s, b) for b in buffers.buckets for s in b.plan.shares if s.name == name]
        assert held, f"no gradient buffer for {name}"
        rows = sorted(held, key=lambda share_and_bucket: share_and_bucket[0].start)
        return torch.cat([share.in_bucket(bucket.flat) for share, bucket in rows])

    return gather


@pytest.fixture(name="drawn")
def drawn_fixture() -> Callable[..., torch.Tensor]:
    return drawn


@pytest.fixture
def model_config() -> ModelConfig:
    return MODEL


@pytest.fixture
def optim_config() -> OptimConfig:
    return OPTIM
