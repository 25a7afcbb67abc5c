"""optim.states=host is optim.states=device, bit for bit: the same arithmetic on the same batches,
from other memory.

Clipping by norm and QK-Clip act in every step. Where a tolerance stands, it is DeepSpeed's.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch

from k2train.config.errors import ConfigError
from k2train.config.optim import OptimConfig
from k2train.device.cpu import CpuDevice
from k2train.layout.grid import RankGrid
from k2train.layout.staging import CHUNK_ELEMENTS, MAX_BATCH_ELEMENTS, NUM_SLOTS
from k2train.optim.adam import DeepSpeedAdamW, check_host_adam
from k2train.optim.residence import OnHost
from k2train.optim.states import by_rule, matrix_batches
from k2train.parallel.testing import run_distributed_test
from k2train.update_rules.chosen import all_rules
from k2train.update_rules.rules.adamw import AdamW

STEPS = 4
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the deepspeed extra is not installed"
)


def logits(step: int) -> dict[int, torch.Tensor]:
    """Two of three heads over tau in every layer."""
    return {layer: torch.tensor([20.0, 150.0 + step, 300.0 + layer]) for layer in range(3)}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A rank after some steps."""

    results: list
    weights: dict[str, torch.Tensor]
    states: dict[tuple[str, int], torch.Tensor]


def train(rank, steps: range = range(STEPS)) -> Trained:
    results = []
    for step in steps:
        rank.feed(step)
        results.append(rank.optimizer.step(0.01, logits(step), clip_norm=5.0))
    states = {(state.name, state.start): state.tensor.clone() for state in rank.optimizer.state()}
    return Trained(results, rank.weights(), states)


def assert_same_bits(host: Trained, device: Trained) -> None:
    assert host.results == device.results
    assert all(result.clip_scale < 1 for result in device.results)
    for mine, expected in ((host.weights, device.weights), (host.states, device.states)):
        assert mine.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(mine[name], tensor), name


def moved(optim: OptimConfig, **changes: object) -> OptimConfig:
    return dataclasses.replace(optim, states="host", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [named.name for named in all_rules()])
def test_one_rank_trains_the_same_bits(one_rank, optim_config, name, dtype: torch.dtype) -> None:
    optim = dataclasses.replace(optim_config, name=name, newton_schulz_dtype="bfloat16")
    device = train(one_rank(optim=optim, dtype=dtype))
    host = train(one_rank(optim=moved(optim), dtype=dtype))
    assert_same_bits(host, device)
    assert device.results[0].clipped_heads == (6 if name == "muonclip" else 0)


@pytest.mark.parametrize("name", [named.name for named in all_rules()])
@pytest.mark.parametrize(
    ("edp", "ep", "backend"), [(2, 2, "threads"), (3, 1, "threads"), (2, 1, "processes")]
)
def test_every_rank_of_a_layout_trains_the_same_bits(
    make_rank, optim_config, name, edp: int, ep: int, backend: str
) -> None:
    grid = RankGrid(1, edp, ep)
    optim = dataclasses.replace(optim_config, name=name)
    device, host = (
        run_distributed_test(lambda w, o=o: train(make_rank(w, grid, o)), grid.world, backend)
        for o in (optim, moved(optim))
    )
    for mine, expected in zip(host, device, strict=True):
        assert_same_bits(mine, expected)


@pytest.mark.parametrize("name", [named.name for named in all_rules()])
@pytest.mark.parametrize(("first", "second"), [("device", "host"), ("host", "device")])
def test_states_of_one_mode_load_into_the_other(
    one_rank, optim_config, name, first: str, second: str
) -> None:
    optim = dataclasses.replace(optim_config, name=name)
    kept = train(one_rank(optim=optim), range(2)).states
    before = one_rank(optim=dataclasses.replace(optim, states=first))
    stored = train(before, range(2)).states
    assert all(torch.equal(stored[key], tensor) for key, tensor in kept.items())
    after = one_rank(optim=dataclasses.replace(optim, states=second))
    after.optimizer.load(lambda name, start, stop: stored[name, 0][start:stop])
    assert_same_bits(train(after, range(2, 5)), train(before, range(2, 5)))


def test_masters_in_host_memory_can_be_read_again_after_an_import(one_rank, optim_config) -> None:
    rank = one_rank(optim=moved(optim_config))
    for piece in rank.model.pieces():
        piece.tensor.fill_(0.5)
    rank.optimizer.read_parameters()
    rank.feed(0)
    rank.optimizer.step(0.0, {layer: torch.zeros(3) for layer in range(3)})
    assert all((tensor == 0.5).all() for tensor in rank.weights().values())


def test_a_non_finite_gradient_leaves_host_states_alone(one_rank, optim_config) -> None:
    rank = one_rank(optim=moved(optim_config))
    before = train(rank, range(1))
    rank.feed(1, scale=float("nan"))
    assert not rank.optimizer.step(0.01, logits(1)).finite
    after = {(state.name, state.start): state.tensor for state in rank.optimizer.state()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.states.items())
    assert all(torch.equal(rank.weights()[name], tensor) for name, tensor in before.weights.items())


@pytest.mark.parametrize("name", [named.name for named in all_rules()])
@pytest.mark.parametrize("layers", [3, 6])
def test_host_states_hold_only_their_slots_on_the_device(
    one_rank, optim_config, model_config, name, layers: int
) -> None:
    """Three slots of one batch, whatever the number of layers; no state shares memory with a slot
    or with a gradient."""
    model = dataclasses.replace(model_config, num_hidden_layers=layers)
    rank = one_rank(optim=moved(optim_config, name=name), model=model)
    rank.feed(0)
    rank.optimizer.step(0.01, {layer: torch.full((3,), 300.0) for layer in range(layers)})
    staging = rank.optimizer.staging
    assert len(staging) == NUM_SLOTS
    assert rank.optimizer.staging_bytes == sum(memory.nbytes for memory in staging)
    on_device = {memory.untyped_storage().data_ptr() for memory in staging}
    on_device |= {b.flat.untyped_storage().data_ptr() for b in rank.optimizer.gradients.buckets}
    states = [state.tensor for state in rank.optimizer.state() if "/" in state.name]
    assert sum(tensor.nbytes for tensor in states) == rank.optimizer.state_bytes
    assert not on_device & {tensor.untyped_storage().data_ptr() for tensor in states}


def test_slots_hold_one_batch_and_no_more(one_rank, optim_config, model_config) -> None:
    """Master and momentum of the largest batch, which is here all experts' up-projections of the
    larger bucket."""
    rank = one_rank(optim=moved(optim_config))
    owned = [part for bucket in rank.optimizer.gradients.buckets for part in by_rule(bucket.owned)]
    batches = [batch for rule, shares in owned if rule.name == "muon" for batch in matrix_batches(shares)]
    largest = max(batch.num_elements for batch in batches)
    stretch = max(bucket.own_gradient.numel() for bucket in rank.optimizer.gradients.buckets)
    assert largest <= MAX_BATCH_ELEMENTS
    assert rank.optimizer.staging_bytes == 3 * 8 * max(2 * largest, min(stretch, CHUNK_ELEMENTS))


def test_states_on_the_device_need_no_slots(one_rank) -> None:
    rank = one_rank()
    assert (rank.optimizer.states_on_host, rank.optimizer.staging_bytes) == (False, 0)


def flat_states(num_elements: int, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Master and both moments, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    master, gradient = (torch.randn(num_elements, generator=generator) for _ in range(2))
    return [master, torch.zeros(num_elements), torch.zeros(num_elements)], gradient


RULE = AdamW(0.9, 0.95, 1e-8, 0.1)


@pytest.mark.parametrize("num_elements", [64, 1000, 4099])
def test_an_update_cut_into_pieces_has_the_bits_of_the_whole(num_elements: int) -> None:
    """Pieces of a multiple of every vector width, so the entries outside whole vectors are the
    same; CHUNK_ELEMENTS is one."""
    assert CHUNK_ELEMENTS % 64 == 0
    whole, gradient = flat_states(num_elements)
    cut, _ = flat_states(num_elements)
    residence = OnHost(CpuDevice(), gradient, 1, 64)
    for step in range(3):
        RULE.update(whole[0], whole[1:], gradient, 0.01, True, step)
        for part, piece in residence.gradients(gradient):
            RULE.update(cut[0][part], [state[part] for state in cut[1:]], piece, 0.01, True, step)
    for mine, expected in zip(cut, whole, strict=True):
        assert torch.equal(mine, expected)


@needs_deepspeed
@pytest.mark.parametrize("decayed", [True, False])
def test_deepspeeds_update_is_torchs_within_rounding(decayed: bool) -> None:
    """Both compute in FP32, in another order and with other fused operations.

    An update is lr * m / (sqrt(v) + eps) with bias corrections 1 - beta^t that both take from FP32
    constants: beta's own rounding, 2^-25, is relative to 1 - beta >= 0.05 an error of 2^-20. Ten
    such errors in a row are 1e-5 of an update, and an update is at most about 2 lr. Adding it to
    the master rounds to 2^-24 of that, twice with decay. So after n steps they may differ by n *
    (1e-5 * 2 lr + 2^-23 |w|).
    """
    steps, lr = 20, 0.01
    (mine, _), (theirs, _) = flat_states(5003), flat_states(5003)
    kernel = DeepSpeedAdamW(RULE)
    for step in range(steps):
        _, gradient = flat_states(5003, seed=step)
        kernel.update(mine[0], mine[1:], gradient, lr, decayed, step)
        RULE.update(theirs[0], theirs[1:], gradient, lr, decayed, step)
    bound = steps * (1e-5 * 2 * lr + 2**-23 * theirs[0].abs().max().item())
    assert (mine[0] - theirs[0]).abs().max().item() <= bound
    assert (mine[0] - flat_states(5003)[0][0]).abs().mean().item() > 100 * bound


@needs_deepspeed
@pytest.mark.parametrize("name", ["muonclip", "adamw"])
def test_a_run_with_deepspeeds_update_follows_torchs(one_rank, optim_config, name: str) -> None:
    """Within the bound of the kernel's test: gradients are given, so a difference does not feed
    back into them."""
    optim = moved(optim_config, name=name)
    torchs = train(one_rank(optim=optim, dtype=torch.float32))
    other = dataclasses.replace(optim, host_adam="deepspeed")
    deepspeeds = train(one_rank(optim=other, dtype=torch.float32))
    largest = max(weight.abs().max().item() for weight in torchs.weights.values())
    for tensor, expected in torchs.weights.items():
        difference = (deepspeeds.weights[tensor] - expected).abs().max().item()
        assert difference <= STEPS * (1e-5 * 2 * 0.01 + 2**-23 * largest), tensor


def test_deepspeed_without_host_states_is_refused(optim_config) -> None:
    with pytest.raises(ConfigError, match=r"optim\.host_adam=deepspeed: .*optim\.states=device"):
        check_host_adam(dataclasses.replace(optim_config, host_adam="deepspeed"), torch.float32)


def test_deepspeed_in_a_float64_run_is_refused(optim_config) -> None:
    with pytest.raises(ConfigError, match="float64"):
        check_host_adam(moved(optim_config, host_adam="deepspeed"), torch.float64)


def test_a_missing_deepspeed_is_refused_with_its_extra(optim_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed\n.*k2train\[deepspeed\]"):
        check_host_adam(moved(optim_config, host_adam="deepspeed"), torch.float32)
