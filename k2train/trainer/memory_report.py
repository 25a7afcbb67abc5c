"""What a layer saves for its backward, name by name: as the plan predicts it and as a real forward leaves it.

One microbatch goes through one layer of each kind the model has, with the run's own operations, store and offload engine and
all experts on this rank. What then lies in the store, on the device and on the host, is set beside the estimate for the same
shapes. K2's layers do not fit a laptop, so a model too large is measured at a fraction of its widths, and the prediction for
the run's own shapes stands beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import torch

from k2train.activations.arena import HostArena
from k2train.activations.offload import OffloadEngine
from k2train.activations.store import ActivationStore
from k2train.config.model import ModelConfig
from k2train.config.schema import Config
from k2train.config.sections import TrainConfig
from k2train.estimate.activations import SavedTensor, check_policies, saved_tensors
from k2train.estimate.layer_ops import workload
from k2train.estimate.shrink import sample_layers, shrink
from k2train.model.context import MicrobatchContext
from k2train.model.model import build_model, forward
from k2train.model.pieces import ModelPart
from k2train.ops.dtypes import DTYPES
from k2train.ops.weight_grad import PlainGradients, WeightGradQueue

MEASURED_TOKENS = 256
"""The measured microbatch is one sequence of so many tokens, or of the run's length where that is shorter."""
PARAMETER_LIMIT_BYTES = 2**28
"""The most that the parameters of the measured layers may take; larger models are narrowed."""


@dataclasses.dataclass(frozen=True)
class NameRow:
    """One saved activation of one layer, bytes of a microbatch."""

    predicted: SavedTensor
    """For the measured shapes."""
    device_bytes: int
    """Measured on the device."""
    host_bytes: int
    """Measured in host memory."""
    full_size: SavedTensor
    """Predicted for the run's own microbatch, widths and expert-parallel degree."""

    @property
    def difference(self) -> float:
        """The larger of both places' |measured - predicted| / predicted; infinite where nothing was predicted."""
        pairs = (
            (self.predicted.device_bytes, self.device_bytes),
            (self.predicted.host_bytes, self.host_bytes),
        )
        return max(_relative(predicted, measured) for predicted, measured in pairs)


@dataclasses.dataclass(frozen=True)
class LayerMemory:
    """Every name of one layer, in the order of `ActivationsConfig`."""

    moe: bool
    rows: tuple[NameRow, ...]


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """One layer of each kind the model has, the MoE layer first. divisor: of the measured model's widths."""

    layers: tuple[LayerMemory, ...]
    divisor: int
    measured_tokens: int
    full_tokens: int
    device: torch.device

    @property
    def difference(self) -> float:
        """The largest of all names."""
        return max(row.difference for layer in self.layers for row in layer.rows)


def memory_report(config: Config) -> MemoryReport:
    """Predict and measure. Raises ConfigError for policies that cannot be, and for a model that no width makes small enough."""
    check_policies(config.activations)
    layers, train = sample_layers(config.model), measured_train(config.train)
    narrow, divisor = shrink(config.model, layers, train.dtype, PARAMETER_LIMIT_BYTES)
    device = measuring_device(config)
    measured = measure(dataclasses.replace(config, model=narrow, train=train), layers, device)
    small, full = workload(narrow, train, 1), workload(config.model, config.train, config.layout.ep)
    tables = []
    for layer in reversed(layers):
        moe = config.model.is_moe(layer)
        predictions = (saved_tensors(w, config.activations, moe) for w in (small, full))
        found = measured[layer]
        rows = tuple(
            NameRow(here, *found.pop(here.name, (0, 0)), there)
            for here, there in zip(*predictions, strict=True)
        )
        assert not found, f"layer {layer} stores names the estimate does not know: {sorted(found)}"
        tables.append(LayerMemory(moe, rows))
    return MemoryReport(tuple(tables), divisor, small.tokens, full.tokens, device)


def measured_train(train: TrainConfig) -> TrainConfig:
    """The run's section with one short sequence as its microbatch."""
    tokens = min(train.seq_len, MEASURED_TOKENS)
    return dataclasses.replace(train, seq_len=tokens, microbatch_size=1, global_batch_tokens=tokens)


def measuring_device(config: Config) -> torch.device:
    """A GPU where there is one and train.device allows it. Bytes are the same everywhere, so a config for GPUs can be
    measured without."""
    gpu = torch.cuda.is_available() and config.train.device != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def measure(
    config: Config, layers: tuple[int, ...], device: torch.device
) -> dict[int, dict[str, tuple[int, int]]]:
    """Forward one microbatch through `layers` (neighbours), send out what is to be offloaded, and read the store.

    For every layer and name: bytes on the device, bytes in host memory. Names of which nothing is stored are left out.
    """
    model, train = config.model, config.train
    part = ModelPart(layers, embedding=False, head=False, local_experts=tuple(range(model.n_routed_experts)))
    built = build_model(model, part, DTYPES[train.dtype], device)
    built.initialise(train.seed)
    arena = HostArena(pinned=device.type == "cuda")
    store = ActivationStore(config.activations, OffloadEngine(device, arena))
    context = MicrobatchContext(
        num_sequences=train.microbatch_size,
        gradients=PlainGradients(),
        weight_grads=WeightGradQueue(),
        balance_loss_scale=train.balance_loss_alpha,
        saved=store.microbatch(),
    )
    # The records are autograd's graphs: what they hold is what is stored.
    _, records = forward(built, (residual_stream(model, train, device),), context)
    context.saved.offload()
    found = stored_bytes(store)
    assert sum(host for _, host in found_bytes(found)) == store.engine.in_flight_bytes
    del records
    context.saved.drop()
    return found


def residual_stream(model: ModelConfig, train: TrainConfig, device: torch.device) -> torch.Tensor:
    """What a layer above might have sent (T, D): noise, the same for the same seed."""
    generator = torch.Generator().manual_seed(train.seed)
    x_TD = torch.randn(train.seq_len * train.microbatch_size, model.hidden_size, generator=generator)
    return x_TD.to(device, DTYPES[train.dtype])


def stored_bytes(store: ActivationStore) -> dict[int, dict[str, tuple[int, int]]]:
    """What the store holds now, by layer and name: (on the device, in host memory)."""
    device: Counter[tuple[int, str]] = Counter()
    host: Counter[tuple[int, str]] = Counter()
    found: dict[int, dict[str, tuple[int, int]]] = {}
    for entry in store.entries():
        assert entry.origin.layer is not None, "the ends of the model are not measured"
        where = entry.origin.layer, entry.origin.name
        device[where] += entry.device_bytes
        host[where] += entry.host_bytes
        found.setdefault(where[0], {})[where[1]] = (device[where], host[where])
    return found


def found_bytes(found: dict[int, dict[str, tuple[int, int]]]) -> list[tuple[int, int]]:
    """The bytes alone."""
    return [both for names in found.values() for both in names.values()]


def _relative(predicted: int, measured: int) -> float:
    if predicted == measured:
        return 0.0
    return abs(measured - predicted) / predicted if predicted else math.inf
