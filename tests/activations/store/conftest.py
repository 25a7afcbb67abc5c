"""A small model of K2's rules with lively weights, one microbatch through it, and a store that
notes what it is told."""

from __future__ import annotations

import collections
import dataclasses
import weakref

import pytest
import torch

from k2train.activations.arena import HostArena
from k2train.activations.offload import OffloadEngine
from k2train.activations.store import ActivationStore, MicrobatchStore
from k2train.config.model import ModelConfig, YarnConfig
from k2train.config.sections import ActivationsConfig
from k2train.device.cpu import CpuDevice
from k2train.model.context import MicrobatchContext
from k2train.model.loss import CrossEntropy
from k2train.model.model import Model, backward, forward
from k2train.ops.weight_grad import PlainGradients, WeightGradQueue

K2 = ModelConfig(
    vocab_size=96,
    hidden_size=136,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=96,
    moe_intermediate_size=72,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_shared_experts=1,
    num_attention_heads=4,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=16,
    v_head_dim=10,
    routed_scaling_factor=2.827,
    rope_theta=50000.0,
    rope_scaling=YarnConfig(
        factor=32.0,
        original_max_position_embeddings=4096,
        beta_fast=1.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
)
MOONLIGHT = dataclasses.replace(K2, q_lora_rank=None, n_shared_experts=2, rope_scaling=None)
PLAIN = dataclasses.replace(K2, n_shared_experts=0, first_k_dense_replace=0, num_hidden_layers=2)
GLM = dataclasses.replace(
    MOONLIGHT,
    mixer="grouped_query",
    kv_lora_rank=None,
    qk_nope_head_dim=None,
    qk_rope_head_dim=None,
    v_head_dim=None,
    num_key_value_heads=2,
    head_dim=20,
    partial_rotary_factor=0.5,
)
FAMILIES = {"k2": K2, "moonlight": MOONLIGHT, "no_shared_expert": PLAIN, "glm": GLM}
SEQUENCES, LENGTH = 2, 24
NAMES = tuple(field.name for field in dataclasses.fields(ActivationsConfig))


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> ModelConfig:
    return FAMILIES[request.param]


@pytest.fixture
def k2() -> ModelConfig:
    return K2


class Noting:
    """SavedActivations that passes everything on to a real store and notes names, values and
    computations."""

    def __init__(self, store: MicrobatchStore) -> None:
        self.store = store
        self.values: dict[int, list[torch.Tensor]] = {}
        self.storages: dict[str, list[weakref.ref]] = collections.defaultdict(list)
        self.computations: collections.Counter[tuple[int | None, str]] = collections.Counter()
        self.layer: int | None = None

    def _note(self, name, tensors) -> None:
        for tensor in tensors:
            self.storages[name].append(weakref.ref(tensor.untyped_storage()))
            entry = self.store._entry(tensor)
            if entry is not None:
                self.values[id(entry)] = [entry, tensor.detach().clone()]

    def name(self, name, *tensors, extras=()) -> None:
        self.store.name(name, *tensors, extras=extras)
        self._note(name, (*tensors, *extras))

    def make(self, name, compute, *sources):
        where = self.layer, name

        def counted(*sources):
            self.computations[where] += 1
            return compute(*sources)

        made = self.store.make(name, counted, *sources)
        self._note(name, made if isinstance(made, tuple) else (made,))
        return made

    def saving(self, layer, otherwise):
        self.layer = layer
        return self.store.saving(layer, otherwise)

    def hold(self, tensor):
        return self.store.hold(tensor)

    def forward_done(self) -> None:
        self.store.forward_done()


@dataclasses.dataclass
class Microbatch:
    """One microbatch's forward, done, and what its backward needs."""

    model: Model
    context: MicrobatchContext
    loss: torch.Tensor
    records: list
    store: ActivationStore | None

    @property
    def saved(self):
        return self.context.saved

    def finish(self) -> list[torch.Tensor]:
        """Backward and weight gradients; the gradients of all parameters."""
        backward(self.model, self.records, (None,), self.context)
        if self.context.weight_grads is not None:
            self.context.weight_grads.drain(self.context.key, self.context.gradients)
        sink = self.context.gradients
        return [sink.buffer(piece.parameter).clone() for piece in self.model.pieces() if piece.trained]


@pytest.fixture
def begin():
    """begin(model, policies, split=False, noting=False) -> Microbatch after its forward; policies
    None: no store."""

    def make(
        model: Model, policies: ActivationsConfig | None, split: bool = False, noting: bool = False
    ) -> Microbatch:
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(model.config.vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)
        context = MicrobatchContext(
            SEQUENCES,
            PlainGradients(),
            WeightGradQueue() if split else None,
            loss=CrossEntropy(tokens[:, 1:], 1 / (SEQUENCES * LENGTH)),
            balance_loss_scale=1e-2,
        )
        store = None
        if policies is not None:
            store = ActivationStore(policies, OffloadEngine(CpuDevice(), HostArena(CpuDevice())))
            context.saved = Noting(store.microbatch()) if noting else store.microbatch()
        (loss,), records = forward(model, (tokens[:, :-1],), context)
        return Microbatch(model, context, loss, records, store)

    return make
