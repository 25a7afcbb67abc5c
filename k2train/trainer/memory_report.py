"""Bytes of every saved tensor, predicted beside measured: what `k2train report memory` prints.

Measured means: one microbatch forward through one dense and one MoE layer of the config, with the
store that training uses and the offload executed, and then the tensors counted that are really
held, here and on the host. Beside the store's own sum stands that of the storages which are really
alive because of the microbatch: those that go when it is forgotten. A model whose layers are too
large for that is measured at a fraction of its widths (hidden, latents, feed-forwards, number of
heads; head sizes, experts and choices stay), and the prediction beside it is for the same widths.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

import torch

from k2train.activations.arena import HostArena
from k2train.activations.offload import OffloadEngine
from k2train.activations.store import ActivationStore
from k2train.architecture.layer import KIND_WORDS, LayerKind, layer_kinds, layer_of, mixer_of
from k2train.architecture.microbatch import workload
from k2train.architecture.work import Workload
from k2train.config.model import ModelConfig
from k2train.config.schema import Config
from k2train.config.sections import ActivationsConfig
from k2train.device.living import LivingStorages
from k2train.device.protocol import Device
from k2train.estimate.activations import SavedTensor, saved_tensors
from k2train.layout.build import build_layout
from k2train.model.context import MicrobatchContext, Statistics
from k2train.model.loss import CrossEntropy
from k2train.model.model import build_model, forward
from k2train.model.pieces import whole_model
from k2train.ops.backend import OpsBackend, choose_backend
from k2train.ops.dtypes import DTYPES
from k2train.ops.weight_grad import PlainGradients
from k2train.update_rules.chosen import chosen_rules

MAX_ELEMENTS = 1 << 27
"""Parameters of the layers that are measured, at most."""
MAX_TOKENS = 256
VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class NameBytes:
    """One name of one layer. Bytes a token."""

    name: str
    policy: str
    computed: float
    """As computed, at the config's own widths."""
    planned: float
    """Kept, wherever that is, at the config's own widths."""
    predicted_device: float
    measured_device: float
    predicted_host: float
    measured_host: float

    @property
    def difference(self) -> float:
        """Measured against predicted, relative."""
        pairs = ((self.measured_device, self.predicted_device), (self.measured_host, self.predicted_host))
        return max(abs(mine - plan) / plan if plan else float(mine != 0) for mine, plan in pairs)


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """`divisor` of the widths at which was measured; the names of each kind of layer, "MoE layer"
    and "dense layer".

    stored_bytes: on the device after the offload, the ends of the model included, as the store
    says. alive_bytes: of storages that were freed when the microbatch was forgotten.
    """

    divisor: int
    tokens: int
    layers: Mapping[str, tuple[NameBytes, ...]]
    stored_bytes: int
    alive_bytes: int

    @property
    def other_bytes(self) -> int:
        """Alive and not the store's: the row counts by which exchanges are undone, a few numbers
        for each expert."""
        return self.alive_bytes - self.stored_bytes

    @property
    def largest_difference(self) -> float:
        return max(row.difference for rows in self.layers.values() for row in rows)


def measure_memory(config: Config, device: Device) -> MemoryReport:
    """Run the layers and count. Raises ConfigError for policies that cannot be."""
    # No rule is used here, but a word that is none is refused everywhere.
    chosen_rules(config.optim)
    kinds = layer_kinds(config.model)
    divisor = smallest_divisor(config.model)
    small = two_layers(narrowed(config.model, divisor), kinds)
    here = microbatch(config, small, device)
    backend = choose_backend(config.ops, small, here.dtype, config.optim.tau, device.torch_device)
    measured = measure(small, here, config.activations, device, backend)
    layout = build_layout(config.layout, config.cluster, config.model, config.train.seq_len)
    whole = workload(config.model, config.train, layout.ep, layout.relay_ranks, config.ops)
    layers = {}
    for layer, kind in enumerate(kinds):
        planned = {tensor.name: tensor for tensor in saved_tensors(whole, config.activations, kind)}
        layers[KIND_WORDS[kind]] = tuple(
            row(tensor, planned[tensor.name], measured.by_name.get((layer, tensor.name), (0, 0)), here, whole)
            for tensor in saved_tensors(here, config.activations, kind)
        )
    return MemoryReport(divisor, here.tokens, layers, measured.stored, measured.alive)


def smallest_divisor(model: ModelConfig) -> int:
    """The smallest power of two by which widths must be divided for the layers to fit
    MAX_ELEMENTS."""
    divisor = 1
    while num_elements(narrowed(model, divisor)) > MAX_ELEMENTS:
        divisor *= 2
    return divisor


def num_elements(model: ModelConfig) -> int:
    """Parameters of a layer of each kind."""
    layers = (layer_of(model, kind) for kind in layer_kinds(model))
    return sum(spec.num_elements for layer in layers for spec in layer.tensors(0))


def narrowed(model: ModelConfig, divisor: int) -> ModelConfig:
    """The model with its widths and heads divided, at least 1 each."""
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size")
    widths = {name: max(getattr(model, name) // divisor, 1) for name in names}
    narrow = dataclasses.replace(model, **widths)
    return mixer_of(model).narrowed(narrow, divisor)


def two_layers(model: ModelConfig, kinds: tuple[LayerKind, ...]) -> ModelConfig:
    """One layer of each kind, and a small vocabulary."""
    return dataclasses.replace(
        model,
        num_hidden_layers=len(kinds),
        first_k_dense_replace=kinds.count("dense"),
        vocab_size=VOCABULARY,
    )


def microbatch(config: Config, model: ModelConfig, device: Device) -> Workload:
    """One sequence of the config's, cut to MAX_TOKENS, on a rank that holds all experts, where it
    is measured."""
    here: Literal["cpu", "cuda"] = "cuda" if device.torch_device.type == "cuda" else "cpu"
    seq_len = min(config.train.seq_len, MAX_TOKENS)
    train = dataclasses.replace(config.train, seq_len=seq_len, microbatch_size=1, device=here)
    return workload(model, train, ep=1, ops=config.ops)


@dataclasses.dataclass(frozen=True)
class Measured:
    """by_name: bytes of every (layer, name) on the device and on the host. The others: see
    MemoryReport."""

    by_name: Mapping[tuple[int | None, str], tuple[int, int]]
    stored: int
    alive: int


def measure(
    model: ModelConfig, here: Workload, policies: ActivationsConfig, device: Device, backend: OpsBackend
) -> Measured:
    """A microbatch's forward and its offload; then everything is counted, and the microbatch
    forgotten."""
    store = ActivationStore(policies, OffloadEngine(device, HostArena(device)))
    built = build_model(model, whole_model(model), DTYPES[here.dtype], device.torch_device, backend=backend)
    for parameter in {piece.parameter for piece in built.pieces()}:
        torch.nn.init.normal_(parameter, std=model.initializer_range)
    tokens_BS1 = torch.randint(VOCABULARY, (1, here.tokens + 1), device=device.torch_device)
    # What outlives a microbatch is made outside and held.
    statistics, gradients = Statistics(), PlainGradients()
    with LivingStorages() as living:
        context = MicrobatchContext(
            1,
            gradients,
            statistics=statistics,
            loss=CrossEntropy(tokens_BS1[:, 1:]),
            balance_loss_scale=float(here.balance_loss),
            saved=store.microbatch(),
            device=device,
        )
        # The records hold what the backward would need; they must live until everything is counted.
        outputs, records = forward(built, (tokens_BS1[:, :-1],), context)
        context.saved.offload()
        by_name, stored, before = bytes_by_name(store), store.device_bytes, living.num_bytes()
        context.saved.drop()
        records.clear()
        del context
        alive = before - living.num_bytes()
    del outputs
    return Measured(by_name, stored, alive)


def bytes_by_name(store: ActivationStore) -> dict[tuple[int | None, str], tuple[int, int]]:
    """Of everything stored now."""
    found: dict[tuple[int | None, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for entry in store.entries():
        place = entry.origin.layer, entry.origin.name
        on_device, on_host = found[place]
        found[place] = on_device + entry.device_bytes, on_host + entry.host_bytes
    return found


def row(
    tensor: SavedTensor, planned: SavedTensor, measured: tuple[int, int], here: Workload, whole: Workload
) -> NameBytes:
    """A name's line. tensor, here: as measured; planned, whole: as configured; measured: bytes on
    the device, on the host."""
    return NameBytes(
        tensor.name,
        tensor.policy,
        planned.full_bytes / whole.tokens,
        planned.stored_bytes / whole.tokens,
        tensor.device_bytes / here.tokens,
        measured[0] / here.tokens,
        tensor.host_bytes / here.tokens,
        measured[1] / here.tokens,
    )
