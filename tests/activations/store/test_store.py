"""The store: what is kept, dropped, rounded or sent away comes back as it was, once, and nothing is
kept unasked."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable

import pytest
import torch

from k2train.architecture.layer import NOT_REBUILDABLE, layer_kind
from k2train.architecture.work import Workload
from k2train.config.compose import load_config
from k2train.config.sections import ActivationsConfig
from k2train.estimate.activations import saved_tensors
from k2train.model.model import Model
from k2train.ops.fp8 import dequantise, quantise

LOSSLESS = ["none", "recompute", "offload", "recompute_offload"]
SEQUENCES, LENGTH = 2, 24
NAMES = [field.name for field in dataclasses.fields(ActivationsConfig)]


def preset(name: str) -> ActivationsConfig:
    return load_config([f"activations={name}"]).activations


def through_host(microbatch) -> None:
    """OFFLOAD and RELOAD."""
    microbatch.saved.offload()
    microbatch.saved.reload()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", LOSSLESS)
def test_recompute_and_offload_change_no_bit_of_loss_and_gradients(
    family, make_model: Callable[..., Model], begin, name, split: bool
) -> None:
    model = make_model(family)
    want = begin(model, None, split)
    got = begin(model, preset(name), split)
    through_host(got)
    assert torch.equal(got.loss, want.loss)
    for one, other in zip(got.finish(), want.finish(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", ["recompute", "offload"])
@pytest.mark.parametrize("name", NAMES)
def test_each_name_alone_changes_no_bit(
    k2, make_model: Callable[..., Model], begin, name, policy: str
) -> None:
    if policy == "recompute" and name in NOT_REBUILDABLE:
        pytest.skip("refused by check_policies")
    model = make_model(k2)
    want = begin(model, None)
    got = begin(model, dataclasses.replace(ActivationsConfig(), **{name: policy}))
    through_host(got)
    for one, other in zip(got.finish(), want.finish(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*LOSSLESS, "recompute_fp8", "k2"])
def test_every_stored_tensor_comes_back_with_its_value(
    k2, make_model: Callable[..., Model], begin, name, dtype: torch.dtype
) -> None:
    """Bit-equal without FP8. With it: the direct round trip of what was saved, or, rebuilt from
    rounded sources, near it: E4M3's 2^-4 a factor, two factors and sums of many in SwiGLU and the
    down-projection, so a tenth of the norm."""
    policies = preset(name)
    microbatch = begin(make_model(k2, dtype), policies, noting=True)
    noted = [values for values in microbatch.saved.values.values() if values[0].stored]
    microbatch.saved.store.offload()
    microbatch.saved.store.reload()
    assert len(noted) > 30
    lossless = name in LOSSLESS
    for entry, value in noted:
        back = entry.get()
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        if entry.origin.policy in ("fp8", "fp8_offload"):
            assert torch.equal(back, dequantise(quantise(value)))
        elif lossless or entry.origin.policy != "recompute":
            assert torch.equal(back, value), entry.origin.name
        else:
            assert (back - value).norm() <= 0.1 * value.norm(), entry.origin.name


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["recompute", "recompute_fp8", "recompute_offload", "k2"])
def test_everything_dropped_is_rebuilt_exactly_once(
    family, make_model: Callable[..., Model], begin, name: str, split: bool
) -> None:
    policies = preset(name)
    microbatch = begin(make_model(family), policies, split, noting=True)
    noting = microbatch.saved
    noting.store.offload()
    noting.store.reload()
    assert set(noting.computations.values()) == {1}
    microbatch.finish()
    for (layer, made), count in noting.computations.items():
        expected = 2 if getattr(policies, made, "keep") == "recompute" else 1
        assert count == expected, (layer, made)


@pytest.mark.parametrize("name", [*LOSSLESS, "recompute_fp8", "k2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_bytes_are_those_the_estimate_predicts_for_every_name(
    family, make_model: Callable[..., Model], begin, name, dtype: torch.dtype
) -> None:
    policies = preset(name)
    microbatch = begin(make_model(family, dtype), policies)
    words = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}
    workload = Workload(family, LENGTH, SEQUENCES, words[dtype], 1)
    for layer in range(family.num_hidden_layers):
        want = {
            t.name: t.stored_bytes
            for t in saved_tensors(workload, policies, layer_kind(family, layer))
            if t.stored_bytes
        }
        got: dict[str, int] = {}
        for entry in microbatch.store.entries():
            if entry.origin.layer == layer and entry.device_bytes:
                got[entry.origin.name] = got.get(entry.origin.name, 0) + entry.device_bytes
        assert got == want


@pytest.mark.parametrize("name", ["offload", "recompute_offload", "k2"])
def test_after_offload_no_byte_of_the_layers_stays_on_the_device(
    family, make_model: Callable[..., Model], begin, name: str
) -> None:
    """The storages themselves are gone, not only uncounted; what the head keeps is all there is,
    but for the numbers by which a route is undone, at most two of 8 bytes an expert."""
    microbatch = begin(make_model(family), preset(name), noting=True)
    noting, store = microbatch.saved, microbatch.store
    before = store.device_bytes
    noting.store.offload()
    noting.values.clear()
    gc.collect()
    head = sum(entry.device_bytes for entry in store.entries() if entry.origin.layer is None)
    assert store.device_bytes == head < before
    for tensor, storages in noting.storages.items():
        if tensor not in ("head_input", "head_gradient", "attention_output"):
            alive = [storage for reference in storages if (storage := reference()) is not None]
            few = 16 * family.n_routed_experts if tensor == "routing" else 0
            assert all(storage.nbytes() <= few for storage in alive), tensor
    assert sum(entry.host_bytes for entry in store.entries()) == before - head
    noting.store.drop()


def test_a_read_before_the_reload_is_an_error(k2, make_model: Callable[..., Model], begin) -> None:
    microbatch = begin(make_model(k2), preset("k2"))
    microbatch.saved.offload()
    with pytest.raises(AssertionError, match="RELOAD"):
        microbatch.finish()


@pytest.mark.parametrize("name", ["none", "recompute_fp8", "k2"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_nothing_is_left_after_the_backward(
    family, make_model: Callable[..., Model], begin, name: str, offloaded: bool
) -> None:
    microbatch = begin(make_model(family), preset(name), split=True)
    if offloaded:
        through_host(microbatch)
    assert microbatch.store.device_bytes > 0
    microbatch.finish()
    gc.collect()
    assert list(microbatch.store.entries()) == []


def test_a_saved_tensor_without_a_name_is_our_mistake(k2, make_model: Callable[..., Model], begin) -> None:
    store = begin(make_model(k2), ActivationsConfig()).store.microbatch()
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(AssertionError, match="no name"), store.saving(0, None):
        (x * 2).exp()


@pytest.mark.parametrize("policy", ["fp8", "fp8_offload"])
def test_values_that_are_not_finite_are_counted_by_name(
    k2, make_model: Callable[..., Model], begin, policy: str
) -> None:
    model = make_model(k2)
    policies = dataclasses.replace(ActivationsConfig(), swiglu_input=policy)
    assert begin(model, policies).store.non_finite_tiles() == {}
    experts = next(phase for phase in model.phases if phase.name == "layer1.experts")
    with torch.no_grad():
        experts.routed.gate_up[:, 0, 0] = float("inf")
    found = begin(model, policies).store.non_finite_tiles()
    assert set(found) == {"swiglu_input"}
    assert found["swiglu_input"] > 0


def test_a_view_that_reaches_beyond_what_was_named_of_its_storage_is_our_own_mistake(
    make_model: Callable[..., Model], begin, k2
) -> None:
    """Only the named part is rounded or moved, so the rest would come back as something else."""
    store = begin(make_model(k2), preset("k2")).store.microbatch()
    wide = torch.randn(4, 8)
    store.name("layer_input", wide[:2])
    assert torch.equal(store.hold(wide[1]).get(), wide[1])
    with pytest.raises(AssertionError, match="reaches beyond what was named"):
        store.hold(wide[1:3])
