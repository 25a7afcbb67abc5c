"""The one-rank optimizer against torch's own, and its promises: exact resume, untouched on
non-finite, nothing silent."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from k2train.config.errors import ConfigError
from k2train.device.cpu import CpuDevice
from k2train.layout.grid import RankGrid
from k2train.model.pieces import Piece
from k2train.optim.build import build_optimizer
from k2train.parallel.groups import build_groups
from k2train.parallel.threads import run_threads
from k2train.update_rules.chosen import all_rules

LOW = {layer: torch.zeros(3) for layer in range(3)}


def named_gradients(rank, drawn, step: int) -> dict[str, torch.Tensor]:
    """What Rank.feed adds on one rank."""
    return {
        piece.name: drawn(f"{piece.name} {step}", tuple(piece.tensor.shape), piece.tensor.dtype)
        for piece in rank.model.pieces()
        if piece.trained
    }


@pytest.mark.parametrize("name", ["muonclip", "adamw"])
def test_adamw_and_global_clipping_equal_torchs(one_rank, drawn, optim_config, name: str) -> None:
    """Float64 masters on both sides; what remains is the order of a few operations."""
    rank = one_rank(optim=dataclasses.replace(optim_config, name=name))
    start = rank.weights()
    trained = {piece.name for piece in rank.model.pieces() if piece.trained}
    theirs = {tensor: torch.nn.Parameter(start[tensor].clone()) for tensor in trained}
    is_adam = {t for t in trained if name == "adamw" or rank.catalogue[t].role != "matrix"}
    decayed = [theirs[t] for t in sorted(is_adam) if theirs[t].ndim == 2]
    others = [theirs[t] for t in sorted(is_adam) if theirs[t].ndim == 1]
    torch_adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(4):
        lr = 0.01 * (step + 1)
        rank.feed(step, scale=10.0**-step)
        for tensor, gradient in named_gradients(rank, drawn, step).items():
            theirs[tensor].grad = gradient * 10.0**-step
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 5.0)
        for group in torch_adamw.param_groups:
            group["lr"] = lr
        torch_adamw.step()
        result = rank.optimizer.step(lr, LOW, clip_norm=5.0)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-12)
        assert result.clip_scale == pytest.approx(min(1.0, 5.0 / (norm.item() + 1e-6)), rel=1e-12)
    weights = rank.weights()
    for tensor in is_adam:
        torch.testing.assert_close(weights[tensor], theirs[tensor].data, rtol=1e-10, atol=1e-12)


def test_muon_parameters_equal_torchs_muon(one_rank, drawn) -> None:
    """torch's Newton-Schulz is bfloat16, ours here float64: the difference is the former's
    rounding, about 1 %."""
    rank = one_rank()
    start = rank.weights()
    matrices = [spec.name for spec in rank.catalogue.values() if spec.role == "matrix"]
    theirs = {name: torch.nn.Parameter(start[name].float()) for name in matrices}
    muon = torch.optim.Muon(theirs.values(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        rank.feed(step)
        for name, gradient in named_gradients(rank, drawn, step).items():
            if name in theirs:
                theirs[name].grad = gradient.float()
        muon.step()
        rank.optimizer.step(0.01, LOW)
    weights = rank.weights()
    for name in matrices:
        moved = torch.linalg.norm(weights[name] - start[name])
        assert torch.linalg.norm(weights[name] - theirs[name].double()) < 0.03 * moved, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_parameters_are_their_masters_in_the_compute_type(one_rank, dtype: torch.dtype) -> None:
    rank = one_rank(dtype=dtype)
    for step in range(2):
        rank.feed(step)
        rank.optimizer.step(0.01, LOW)
    masters = {
        s.name.split("/", 1)[1]: s.tensor for s in rank.optimizer.state() if s.name.startswith("master/")
    }
    for name, master in masters.items():
        assert master.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(rank.weights()[name], master.to(dtype))


def test_small_updates_add_up_in_the_masters_of_a_bfloat16_model(one_rank) -> None:
    """One step of 1e-5 is lost in a bfloat16 weight of 0.1; two hundred in the master are not."""
    rank = one_rank(dtype=torch.bfloat16)
    before = rank.weights()["lm_head.weight"]
    for _ in range(200):
        rank.feed(0, microbatches=1)
        rank.optimizer.step(1e-5, LOW)
    moved = (rank.weights()["lm_head.weight"].float() - before.float()).abs()
    assert 0.5 * 200e-5 < moved.mean() < 1.5 * 200e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [named.name for named in all_rules()])
def test_a_resumed_run_is_bit_equal(one_rank, optim_config, name, dtype: torch.dtype) -> None:
    optim = dataclasses.replace(optim_config, name=name, newton_schulz_dtype="bfloat16")
    high = {layer: torch.tensor([50.0, 130.0, 400.0]) for layer in range(3)}
    straight = one_rank(optim=optim, dtype=dtype)
    for step in range(2):
        straight.feed(step)
        straight.optimizer.step(0.01, high, clip_norm=1.0)
    stored = {s.name: s.tensor.clone() for s in straight.optimizer.state()}
    resumed = one_rank(optim=optim, dtype=dtype)
    resumed.optimizer.load(lambda name, start, stop: stored[name][start:stop])
    for rank in (straight, resumed):
        for step in range(2, 5):
            rank.feed(step)
            rank.optimizer.step(0.01, high, clip_norm=1.0)
    for name, expected in straight.weights().items():
        assert torch.equal(resumed.weights()[name], expected), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing(one_rank, bad) -> None:
    rank = one_rank()
    rank.feed(0)
    rank.optimizer.step(0.01, LOW)
    before = {s.name: s.tensor.clone() for s in rank.optimizer.state()}
    weights = rank.weights()
    rank.feed(1)
    norm = next(piece for piece in rank.model.pieces() if piece.name == "model.norm.weight").parameter
    rank.optimizer.gradients.add(norm, torch.full_like(norm, bad))
    result = rank.optimizer.step(0.01, {layer: torch.full((3,), 500.0) for layer in range(3)}, clip_norm=1.0)
    assert not result.finite
    assert all(torch.equal(s.tensor, before[s.name]) for s in rank.optimizer.state())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in rank.weights().items())
    assert not any(bucket.flat.any() for bucket in rank.optimizer.gradients.buckets)
    rank.feed(2)
    assert rank.optimizer.step(0.01, LOW).finite


def test_gradients_are_forgotten_after_a_step(one_rank) -> None:
    rank = one_rank()
    for _ in range(2):
        rank.feed(0)
        norm = rank.optimizer.step(0.0, LOW).grad_norm
        assert norm == pytest.approx(rank_norm(rank), rel=1e-12)


def rank_norm(rank) -> float:
    rank.feed(0)
    total = torch.cat([bucket.flat for bucket in rank.optimizer.gradients.buckets]).norm().item()
    rank.optimizer.gradients.zero()
    return total


def test_buckets_sum_fused_gradients_tensor_by_tensor(one_rank, gradient_of) -> None:
    """Three microbatches of bfloat16 gradients for every parameter, fused ones too, end in FP32
    under each tensor's name."""
    rank = one_rank(dtype=torch.bfloat16)
    expected: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter, pieces in rank.parameters().items():
            gradient = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
            rank.optimizer.gradients.add(parameter, gradient)
            for piece in pieces:
                expected[piece.name] = expected.get(piece.name, 0) + piece.view(gradient).float()
    for name, total in expected.items():
        got = gradient_of(rank.optimizer.gradients, name)
        assert got.dtype == torch.float32
        assert torch.equal(got, total), name


def test_what_is_added_to_the_runs_of_a_parameter_is_its_gradient(one_rank, gradient_of) -> None:
    """One owner: a matrix is one run, and a stack of matrices one for each."""
    rank = one_rank()
    gradients = rank.optimizer.gradients
    for parameter, pieces in rank.parameters().items():
        if parameter.dim() == 1:
            gradients.add(parameter, parameter.detach())
        else:
            matrices = parameter.detach().view(-1, *parameter.shape[-2:])
            runs = gradients.runs(parameter)
            assert [run.matrix for run in runs] == list(range(len(matrices)))
            for run in runs:
                run.buffer.add_(matrices[run.matrix, run.first : run.last])
        for piece in pieces:
            assert torch.equal(gradient_of(gradients, piece.name), piece.tensor)


@pytest.mark.parametrize("latent", [14, None])
def test_qk_clip_scales_masters_of_the_named_projections_only(
    one_rank, model_config, latent: int | None
) -> None:
    """A step of rate 0 moves nothing but what QK-Clip scales: head 1 of layer 2 by 1/4, half of it
    on each side."""
    rank = one_rank(model=dataclasses.replace(model_config, q_lora_rank=latent))
    before = rank.weights()
    rank.feed(0)
    logits = {
        0: torch.tensor([1.0, 100.0, -4.0]),
        1: torch.zeros(3),
        2: torch.tensor([99.0, 400.0, -torch.inf]),
    }
    result = rank.optimizer.step(0.0, logits)
    assert (result.clipped_heads, result.max_logit) == (1, 400.0)
    after = rank.weights()
    prefix = "model.layers.2.self_attn."
    query, key = prefix + ("q_b_proj.weight" if latent else "q_proj.weight"), prefix + "kv_b_proj.weight"
    assert {name for name in before if not torch.equal(before[name], after[name])} == {query, key}
    scale = torch.ones(3, 10, 1, dtype=torch.float64)
    scale[1, :6], scale[1, 6:] = 0.5, 0.25
    assert torch.equal(after[query], (before[query].view(3, 10, -1) * scale).view_as(before[query]))
    scale = torch.ones(3, 11, 1, dtype=torch.float64)
    scale[1, :6] = 0.5
    assert torch.equal(after[key], (before[key].view(3, 11, -1) * scale).view_as(before[key]))


def test_logits_missing_for_a_layer_are_an_error_not_a_silent_no_clip(one_rank) -> None:
    rank = one_rank()
    rank.feed(0)
    with pytest.raises(ValueError, match=r"missing for layers \[1\]"):
        rank.optimizer.step(0.01, {0: torch.zeros(3), 2: torch.zeros(3)})


def test_without_tau_nothing_is_clipped_and_logits_are_reported(one_rank, optim_config) -> None:
    rank = one_rank(optim=dataclasses.replace(optim_config, qk_clip_tau=None))
    before = rank.weights()
    rank.feed(0)
    result = rank.optimizer.step(0.0, {0: torch.full((3,), 777.0)})
    assert (result.clipped_heads, result.max_logit) == (0, 777.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in rank.weights().items())


def test_the_ownership_table_names_every_trained_tensor_once(one_rank) -> None:
    rank = one_rank()
    rows = {row.name: row for row in rank.optimizer.ownership()}
    assert set(rows) == {spec.name for spec in rank.catalogue.values() if spec.trained}
    for name, row in rows.items():
        spec = rank.catalogue[name]
        assert row.rule.name == ("muon" if spec.role == "matrix" else "adamw")
        assert (row.shape, row.num_elements) == (spec.shape, spec.num_elements)
        assert row.replication == ("edp" if spec.expert is not None else "dp")


def test_masters_can_be_read_again_after_an_import(one_rank) -> None:
    rank = one_rank()
    for piece in rank.model.pieces():
        piece.tensor.fill_(0.5)
    rank.optimizer.read_parameters()
    rank.feed(0)
    rank.optimizer.step(0.0, LOW)
    assert all((tensor == 0.5).all() for tensor in rank.weights().values())


def build_from(pieces: list[Piece], rank, optim_config) -> None:
    def build(world) -> None:
        groups = build_groups(RankGrid(pp=1, edp=1, ep=1), world)
        build_optimizer(optim_config, rank.model.config, rank.catalogue, {0: pieces}, groups, CpuDevice())

    run_threads(1, build)


def test_qk_clip_without_its_projections_is_refused(one_rank, optim_config) -> None:
    rank = one_rank()
    pieces = [piece for piece in rank.model.pieces() if "kv_b_proj" not in piece.name]
    with pytest.raises(ConfigError, match=r"optim\.qk_clip_tau=100\.0: QK-Clip finds 3 .* in 3 layers"):
        build_from(pieces, rank, optim_config)


def test_muon_without_a_matrix_is_refused(one_rank, optim_config) -> None:
    rank = one_rank()
    pieces = [piece for piece in rank.model.pieces() if rank.catalogue[piece.name].role == "norm"]
    with pytest.raises(ConfigError, match="Muon finds no matrix"):
        build_from(pieces, rank, optim_config)
