"""What lives between forward and backward: exactly the tensors of the `activations` table, nothing
unnamed."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from k2train.architecture.layer import mixer_of
from k2train.config.sections import ActivationsConfig
from k2train.model.context import MicrobatchContext
from k2train.model.loss import CrossEntropy
from k2train.model.model import Model, forward_backward
from k2train.ops.weight_grad import PlainGradients, WeightGradQueue

SEQUENCES, LENGTH = 2, 24


def widths(config) -> dict[str, list[int]]:
    """Saved elements a token of a MoE layer, by name; a norm's extra 1 is its inverse root mean
    square."""
    heads, k = config.num_attention_heads, config.num_experts_per_tok
    hidden, width = config.hidden_size, config.moe_intermediate_size
    shared = width * config.n_shared_experts
    qk, value = mixer_of(config).heads.query, mixer_of(config).heads.value
    table = {
        "layer_input": [hidden, 1],
        "input_norm_output": [hidden],
        "query": [heads * qk],
        "key_value": [heads * qk, heads * value],
        "attention_output": [heads * value],
        "attention_residual": [hidden, 1],
        "post_norm_output": [hidden],
        "expert_input": [k * hidden],
        "swiglu_input": [k * 2 * width],
        "swiglu_output": [k * width, k],
        "shared_swiglu_input": [2 * shared],
        "shared_swiglu_output": [shared],
    }
    if config.mixer == "latent":
        table |= {"kv_latent": [config.kv_lora_rank + config.qk_rope_head_dim, 1]}
        table |= {"kv_latent_norm_output": [config.kv_lora_rank]}
    if config.q_lora_rank is not None:
        table |= {"q_latent": [config.q_lora_rank, 1], "q_latent_norm_output": [config.q_lora_rank]}
    return table


def saved_by_layer(model, layer: int) -> list[torch.Tensor]:
    """The tensors that the layer's phases save, one a storage, parameters excluded."""
    parameters = {p.parameter.untyped_storage().data_ptr() for p in model.pieces()}
    tokens = torch.randint(model.config.vocab_size, (SEQUENCES, LENGTH))
    context = MicrobatchContext(SEQUENCES, PlainGradients(), WeightGradQueue(), loss=CrossEntropy(tokens))
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        storage = tensor.untyped_storage().data_ptr()
        if phase.name.startswith(f"layer{layer}.") and storage not in parameters:
            saved[storage] = tensor
        return tensor

    inputs, records = (tokens,), []
    for phase in model.phases:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            inputs, record = phase.forward(inputs, context)
        records.append(record)
    return list(saved.values())


def test_a_moe_layer_saves_the_named_tensors_and_no_others(family, make_model: Callable[..., Model]) -> None:
    model = make_model(family, torch.float32, 0)
    saved = saved_by_layer(model, family.first_k_dense_replace)
    table = widths(family)
    names = {field.name for field in dataclasses.fields(ActivationsConfig)}
    assert set(table) <= names
    tokens = SEQUENCES * LENGTH
    # Routing keeps scores, chosen experts and the experts' offsets; a route's tables are held
    # outside of autograd.
    experts, k = family.n_routed_experts, family.num_experts_per_tok
    routing = [experts * tokens, k * tokens, experts]
    expected = [width * tokens for parts in table.values() for width in parts] + routing
    got = [t.untyped_storage().nbytes() // t.element_size() for t in saved]
    assert sorted(got) == sorted(expected)


def test_a_dense_layer_saves_the_named_tensors_and_no_others(
    family, make_model: Callable[..., Model]
) -> None:
    model = make_model(family, torch.float32, 0)
    hidden, width, tokens = family.hidden_size, family.intermediate_size, SEQUENCES * LENGTH
    table = widths(family)
    moe_only = {
        "attention_residual",
        "post_norm_output",
        "expert_input",
        "swiglu_input",
        "swiglu_output",
        "shared_swiglu_input",
        "shared_swiglu_output",
    }
    expected = [w for name, parts in table.items() if name not in moe_only for w in parts]
    expected += [hidden, 1, hidden, 2 * width, width]
    got = [t.untyped_storage().nbytes() // t.element_size() for t in saved_by_layer(model, 0)]
    assert sorted(got) == sorted(w * tokens for w in expected)


def test_nothing_of_a_microbatch_survives_its_backward_and_its_weight_gradients(
    families, make_model: Callable[..., Model]
) -> None:
    model = make_model(families["k2"], torch.float32, 0)
    tokens = torch.randint(96, (SEQUENCES, LENGTH))
    queue = WeightGradQueue()
    context = MicrobatchContext(SEQUENCES, PlainGradients(), queue, loss=CrossEntropy(tokens))
    alive = []

    def pack(tensor):
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward_backward(model, tokens, context)
    parameters = {p.parameter.untyped_storage().data_ptr() for p in model.pieces()}

    def left() -> list[torch.UntypedStorage]:
        storages = (ref() for ref in alive)
        return [s for s in storages if s is not None and s.data_ptr() not in parameters]

    assert left()  # the queue still holds the linear layers' inputs
    assert queue.num_bytes() > 0
    queue.drain((0, 0), context.gradients)
    gc.collect()
    assert not left()


@pytest.mark.parametrize("phase_name", ["layer1.combine", "layer1.dispatch"])
def test_communication_phases_keep_no_rows(
    families, make_model: Callable[..., Model], phase_name: str
) -> None:
    """The record of a combine holds its index table; a dispatch needs none."""
    model = make_model(families["k2"], torch.float32, 0)
    tokens = torch.randint(96, (SEQUENCES, LENGTH))
    context = MicrobatchContext(SEQUENCES, PlainGradients(), loss=CrossEntropy(tokens))
    inputs = (tokens,)
    for phase in model.phases:
        inputs, record = phase.forward(inputs, context)
        if phase.name == phase_name:
            assert record is None or record.get().dtype == torch.int64
